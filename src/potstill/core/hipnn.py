"""Fused kernels for whole HIP-NN models: typed functions over the extension module.

Three entries:

`hipnn_pass`
    Partial energies at given pair vectors, with the gradient of any weighted sum of them by the
    pair vectors and by every parameter: what first-order training needs.
`hipnn_md`
    Atomic energies, forces and virial at given positions: what molecular dynamics needs.
`weighted_energy`
    The weighted sum, differentiable once by the parameters: training's pass.

The twin is `potstill.models.hipnn`, whose `native_parameters()` gives the first argument.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from potstill.core.base import DTYPES, array, call, native
from potstill.core.neighbors import CompactNeighbors, topology
from potstill.core.prior import BondParameters, PairPrior, RepulsionParameters, ZblParameters
from potstill.errors import ModelError
from potstill.units import COULOMB

_CUTOFF_FUNCTIONS = ("cosine_squared", "polynomial")
_INVARIANTS = ("norms", "smooth")

#: Invariant products of three tensors of ranks from 1 to l_max whose sum is even, by l_max.
N_PRODUCTS = (0, 0, 2, 4, 9)


@dataclass(frozen=True)
class HipnnShape:
    """Hyper-parameters of a HIP-NN, as in `potstill.models.hipnn.HIPNN`.

    Parameters
    ----------
    n_species, n_features, n_sensitivities, l_max, n_interaction_layers, n_atom_layers : int
        Sizes; l_max is at most 2 for norms, 4 for smooth invariants.
    cutoff : float
        Å.
    cusp_reg : float
        Added under the square root of the tensors' norms.
    cutoff_function : {"cosine_squared", "polynomial"}
        Envelope of the sensitivities.
    invariants : {"norms", "smooth"}
        What the tensors enter by.
    n_channels : int
        Tensors of each rank, for smooth invariants.
    n_triples : int
        Of these, whose products of three are invariants as well.
    n_tensor_sensitivities : tuple of int
        How many of the n_sensitivities, from the first on, tensors of rank 1 to l_max have, for
        smooth invariants; no rank has more than the one before. All of them where it is empty.
    """

    n_species: int
    n_features: int
    n_sensitivities: int
    l_max: int
    n_interaction_layers: int
    n_atom_layers: int
    cutoff: float
    cusp_reg: float
    cutoff_function: str = "cosine_squared"
    invariants: str = "norms"
    n_channels: int = 0
    n_triples: int = 0
    n_tensor_sensitivities: tuple[int, ...] = ()

    @cached_property
    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of all parameters, in the order of `HIPNN.native_parameters()`."""
        n, width = self.n_sensitivities, self.n_features
        shapes: dict[str, tuple[int, ...]] = {}
        for b in range(self.n_interaction_layers):
            n_in = self.n_species if b == 0 else width
            first = f"blocks.{b}.0"
            shapes[f"{first}.layer.int_weights"] = (n, width, n_in)
            if self.invariants == "smooth":
                for rank, n_rank in enumerate(self._by_rank):
                    name = f"{first}.layer.tensor_weights.{rank}"
                    shapes[name] = (n_rank, self.n_channels, n_in)
                n_invariants = (
                    self.l_max * self.n_channels + N_PRODUCTS[self.l_max] * self.n_triples
                )
                shapes[f"{first}.layer.mixing"] = (width, n_invariants)
            else:
                shapes[f"{first}.layer.sensitivity.mu"] = (n,)
                shapes[f"{first}.layer.sensitivity.sigma"] = (n,)
            shapes[f"{first}.layer.selfint.weight"] = (width, n_in)
            shapes[f"{first}.layer.selfint.bias"] = (width,)
            for rank in range(self.l_max if self.invariants == "norms" else 0):
                shapes[f"{first}.layer.scales.{rank}"] = (width,)
            shapes[f"{first}.res_layer.weight"] = (width, width)
            shapes[f"{first}.res_layer.bias"] = (width,)
            if n_in != width:
                shapes[f"{first}.adjust.weight"] = (width, n_in)
            for a in range(1, self.n_atom_layers + 1):
                for layer in ("layer", "res_layer"):
                    shapes[f"blocks.{b}.{a}.{layer}.weight"] = (width, width)
                    shapes[f"blocks.{b}.{a}.{layer}.bias"] = (width,)
        shapes["energy_layers.0.weight"] = (1, self.n_species)
        for b in range(1, self.n_interaction_layers + 1):
            shapes[f"energy_layers.{b}.weight"] = (1, width)
            shapes[f"energy_layers.{b}.bias"] = (1,)
        return shapes

    @property
    def _by_rank(self) -> tuple[int, ...]:
        return self.n_tensor_sensitivities or (self.n_sensitivities,) * self.l_max

    @property
    def n_parameters(self) -> int:
        """Numbers in all parameters."""
        return sum(math.prod(shape) for shape in self.parameter_shapes.values())

    @property
    def n_terms(self) -> int:
        """Partial energies of an atom: E0, and one per interaction layer."""
        return self.n_interaction_layers + 1

    def split(self, flat: Tensor) -> list[Tensor]:
        """Views of a flat (n_parameters,) tensor in the shapes of the parameters."""
        shapes = self.parameter_shapes.values()
        parts = flat.split([math.prod(shape) for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    @cached_property
    def _native(self) -> Any:
        return native().Hipnn(
            self.n_species,
            self.n_features,
            self.n_sensitivities,
            self.l_max,
            self.n_interaction_layers,
            self.n_atom_layers,
            _CUTOFF_FUNCTIONS.index(self.cutoff_function),
            self.cutoff,
            self.cusp_reg,
            _INVARIANTS.index(self.invariants),
            self.n_channels,
            self.n_triples,
            [*self._by_rank, 0, 0, 0, 0][:4],
        )


@dataclass(frozen=True)
class HipnnParameters:
    """A model for the kernels: its shape and its parameters.

    Parameters
    ----------
    shape : HipnnShape
        Hyper-parameters.
    tensors : tuple of Tensor
        The parameters, in the order of `shape.parameter_shapes`, of one dtype (float32 or
        float64), on the CPU. They are not copied: what an optimizer changes in place counts.

    Raises
    ------
    ModelError
        If number, shapes, dtype or device do not fit.
    """

    shape: HipnnShape
    tensors: tuple[Tensor, ...]
    _flat: Tensor | None = None

    def __post_init__(self) -> None:
        expected = self.shape.parameter_shapes
        if len(self.tensors) != len(expected):
            raise ModelError(
                f"this HIP-NN has {len(expected)} parameters, but {len(self.tensors)} were given"
            )
        for (name, shape), tensor in zip(expected.items(), self.tensors, strict=True):
            if tuple(tensor.shape) != shape:
                raise ModelError(f"parameter '{name}' has shape {tuple(tensor.shape)}, not {shape}")
            if tensor.dtype != self.dtype or tensor.device.type != "cpu":
                raise ModelError(
                    f"parameter '{name}' is {tensor.dtype} on {tensor.device}: native kernels "
                    "need all parameters in float32 or all in float64, on the CPU"
                )
        if self.dtype not in DTYPES:
            raise ModelError(f"native kernels compute in float32 or float64, not {self.dtype}")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the kernels compute in."""
        return self.tensors[0].dtype

    def flat(self) -> Tensor:
        """(n_parameters,) all parameters side by side, detached; a copy unless `joined`."""
        if self._flat is not None:
            return self._flat
        return torch.cat([tensor.detach().reshape(-1) for tensor in self.tensors])

    def joined(self) -> HipnnParameters:
        """The present values, detached and side by side in memory."""
        flat = self.flat()
        return HipnnParameters(self.shape, tuple(self.shape.split(flat)), flat)


@dataclass(frozen=True)
class PassResult:
    """What `hipnn_pass` returns.

    Parameters
    ----------
    terms : Tensor
        (n_local, n_terms) float64 partial energies, eV: E0 first, then one per interaction layer.
    gradient : Tensor or None
        (E, 3) in the model's dtype: derivative of sum(weights * terms) by r_ij, eV/Å.
    parameter_gradient : Tensor or None
        (n_parameters,) float64: derivative of the same sum by the parameters side by side;
        `HipnnShape.split` gives it the parameters' shapes.
    """

    terms: Tensor
    gradient: Tensor | None
    parameter_gradient: Tensor | None


def hipnn_pass(
    parameters: HipnnParameters,
    species: Tensor,
    neighbors: CompactNeighbors,
    r_ij: Tensor,
    weights: Tensor | None = None,
    *,
    gradient: bool = True,
    parameter_gradient: bool = False,
    n_threads: int | None = None,
) -> PassResult:
    """Partial energies, and first derivatives of a weighted sum of them.

    Parameters
    ----------
    parameters : HipnnParameters
        The model.
    species : Tensor
        (N,) int32 or int64; local atoms, then ghosts (with one interaction layer only).
    neighbors : CompactNeighbors
        Pairs; any that lie beyond the cutoff contribute zero.
    r_ij : Tensor
        (E, 3) float32 or float64, cast to the model's dtype inside.
    weights : Tensor, optional
        (n_local, n_terms) weights of the partial energies; ones if absent. Sums over atoms are
        accumulated in float64: displaced passes whose weights nearly cancel belong into one call.
    gradient, parameter_gradient : bool
        Which derivatives to compute.
    n_threads : int, optional
        By default `torch.get_num_threads()`. Results are bitwise the same for the same number.

    Raises
    ------
    ModelError
        If an array does not fit.
    """
    shape, n_local = parameters.shape, neighbors.n_local
    if r_ij.shape != (neighbors.n_pairs, 3) or r_ij.dtype not in DTYPES:
        raise ModelError(
            f"r_ij must be ({neighbors.n_pairs}, 3) in float32 or float64, not "
            f"{tuple(r_ij.shape)} in {r_ij.dtype}"
        )
    if weights is not None and weights.shape != (n_local, shape.n_terms):
        raise ModelError(
            f"weights must be ({n_local}, {shape.n_terms}), not {tuple(weights.shape)}"
        )
    terms = torch.empty(n_local, shape.n_terms, dtype=torch.float64)
    by_pair = torch.empty(neighbors.n_pairs, 3, dtype=parameters.dtype) if gradient else None
    by_parameter = (
        torch.empty(shape.n_parameters, dtype=torch.float64) if parameter_gradient else None
    )
    call(
        native().run_pass,
        *_model(parameters),
        *topology(species, neighbors),
        array(r_ij, r_ij.dtype),
        None if weights is None else array(weights, torch.float64),
        terms.numpy(),
        None if by_pair is None else by_pair.numpy(),
        None if by_parameter is None else by_parameter.numpy(),
        n_threads or torch.get_num_threads(),
    )
    return PassResult(terms, by_pair, by_parameter)


@dataclass(frozen=True)
class MdResult:
    """What `hipnn_md` returns, all float64.

    Parameters
    ----------
    energies : Tensor
        (n_local,) atomic energies, eV.
    forces : Tensor or None
        (N, 3) eV/Å; ghosts carry what belongs to their owners.
    virial : Tensor or None
        (3, 3) eV: sum over pairs of r_ij outer dE/dr_ij, which is volume times stress.
    center_virials, neighbor_virials : Tensor or None
        (n_local, 3, 3) and (N, 3, 3) eV: the same sum by the pairs' centers, and by neighbors.
    """

    energies: Tensor
    forces: Tensor | None
    virial: Tensor | None
    center_virials: Tensor | None = None
    neighbor_virials: Tensor | None = None


def hipnn_md(
    parameters: HipnnParameters | None,
    species: Tensor,
    neighbors: CompactNeighbors,
    positions: Tensor,
    cell: Tensor,
    *,
    prior: PairPrior | None = None,
    bonds: BondParameters | None = None,
    forces: bool = True,
    virial: bool = False,
    n_threads: int | None = None,
) -> MdResult:
    """Energies, forces and virial of one system at given positions.

    Parameters
    ----------
    parameters : HipnnParameters, optional
        The model; without it, prior and bonds alone.
    species : Tensor
        (N,) int32 or int64; local atoms, then ghosts (with one interaction layer only).
    neighbors : CompactNeighbors
        Pairs at least up to the cutoff; farther ones (a skin) are skipped.
    positions : Tensor
        (N, 3) float64, Å. Differences are taken in float64 and cast to the model's dtype.
    cell : Tensor
        (3, 3) float64, Å, rows are lattice vectors.
    prior : ZblParameters or RepulsionParameters, optional
        Added where two atoms come close.
    bonds : BondParameters, optional
        Bonds and angles of beads, added as well.
    forces, virial : bool
        What to compute; the virial only together with the forces.
    n_threads : int, optional
        By default `torch.get_num_threads()`.

    Raises
    ------
    ModelError
        If an array does not fit.
    """
    geometry, result = md_geometry(
        species, neighbors, positions, cell, prior, forces, virial, bonds=bonds
    )
    if parameters is None:
        call(native().prior, geometry)
    else:
        call(native().md, geometry, *_model(parameters), n_threads or torch.get_num_threads())
    return result


class HipnnLayers:
    """One evaluation layer by layer, for engines that divide space into domains.

    Local atoms are the centers of pairs, their neighbors may be ghosts. Between the layers the
    engine copies features to the ghosts, on the way back it adds the ghosts' derivatives to their
    owners', and in the end the ghosts' forces::

        layers = HipnnLayers(parameters, species, neighbors, positions, cell)
        for k in range(n_layers):
            layers.forward(k)
            if k < n_layers - 1:
                features = layers.features(k)
                features[n_local:] = ...
        for k in reversed(range(n_layers)):
            layers.reverse(k)
            if k > 0:
                cotangents = layers.cotangents(k - 1)
                cotangents[:n_local] += ...
        result = layers.finish()

    Without forces to compute there is no way back. `hipnn_md` takes the same steps in one call.

    Parameters
    ----------
    parameters, species, neighbors, positions, cell, prior, forces, virial, n_threads
        As for `hipnn_md`, with ghosts for any number of interaction layers.

    Raises
    ------
    ModelError
        If an array does not fit, or a step is not the next one.
    """

    def __init__(
        self,
        parameters: HipnnParameters,
        species: Tensor,
        neighbors: CompactNeighbors,
        positions: Tensor,
        cell: Tensor,
        *,
        prior: PairPrior | None = None,
        forces: bool = True,
        virial: bool = False,
        n_threads: int | None = None,
    ) -> None:
        geometry, self._result = md_geometry(
            species, neighbors, positions, cell, prior, forces, virial
        )
        self._state = native().State()
        call(self._state.begin, geometry, *_model(parameters), n_threads or torch.get_num_threads())

    def forward(self, layer: int) -> None:
        """Compute the features and the energy term of an interaction layer, counted from 0."""
        call(self._state.forward, layer)

    def reverse(self, layer: int) -> None:
        """Compute the derivatives by a layer's pairs and input features."""
        call(self._state.reverse, layer)

    def features(self, layer: int) -> Tensor:
        """(N, n_features) output of a layer, in place; those of ghosts are the caller's to fill."""
        return torch.from_numpy(call(self._state.features, layer))

    def cotangents(self, layer: int) -> Tensor:
        """(N, n_features) derivatives by a layer's output, in place, of local atoms and ghosts."""
        return torch.from_numpy(call(self._state.cotangents, layer))

    def finish(self) -> MdResult:
        """Energies of the local atoms, forces of local atoms and ghosts, and their virial."""
        call(self._state.finish)
        return self._result


def _model(parameters: HipnnParameters) -> tuple[Any, Any]:
    return parameters.shape._native, parameters.flat().numpy()


def md_geometry(
    species: Tensor,
    neighbors: CompactNeighbors,
    positions: Tensor,
    cell: Tensor,
    prior: PairPrior | None,
    forces: bool,
    virial: bool,
    atom_virials: bool = False,
    bonds: BondParameters | None = None,
) -> tuple[Any, MdResult]:
    """One system for the kernels, and where they write."""
    n_atoms = species.shape[0]
    if positions.shape != (n_atoms, 3):
        raise ModelError(f"positions must be ({n_atoms}, 3), not {tuple(positions.shape)}")
    result = MdResult(
        torch.empty(neighbors.n_local, dtype=torch.float64),
        torch.empty(n_atoms, 3, dtype=torch.float64) if forces else None,
        torch.empty(3, 3, dtype=torch.float64) if virial else None,
        torch.empty(neighbors.n_local, 3, 3, dtype=torch.float64) if atom_virials else None,
        torch.empty(n_atoms, 3, 3, dtype=torch.float64) if atom_virials else None,
    )
    zbl = prior if isinstance(prior, ZblParameters) else None
    beads = prior if isinstance(prior, RepulsionParameters) else None
    offsets = neighbors.images.to(torch.float64) @ cell.detach().to(torch.float64)
    geometry = native().Geometry(
        *topology(species, neighbors),
        array(positions, torch.float64),
        None if neighbors.image is None else neighbors.image.numpy(),
        offsets.numpy(),
        None if zbl is None else array(zbl.charge, torch.float64),
        COULOMB,
        0.0 if zbl is None else zbl.inner,
        0.0 if zbl is None else zbl.cutoff,
        None if beads is None else array(beads.strength.reshape(-1), torch.float64),
        None if beads is None else array(beads.radius.reshape(-1), torch.float64),
        None if bonds is None else array(bonds.pairs.reshape(-1), torch.float64),
        None if bonds is None else array(bonds.angles.reshape(-1), torch.float64),
        0 if bonds is None else len(bonds.angles),
        len(beads.radius) if beads is not None else 0 if bonds is None else bonds.pairs.shape[1],
        result.energies.numpy(),
        None if result.forces is None else result.forces.numpy(),
        None if result.virial is None else result.virial.numpy(),
        False,
        None if result.center_virials is None else result.center_virials.numpy(),
        None if result.neighbor_virials is None else result.neighbor_virials.numpy(),
    )
    return geometry, result


class _WeightedEnergy(torch.autograd.Function):
    """Sum of weights x partial energies; gradients by the parameters come with the value."""

    @staticmethod
    def forward(
        ctx: Any,
        parameters: HipnnParameters,
        species: Tensor,
        neighbors: CompactNeighbors,
        r_ij: Tensor,
        weights: Tensor,
        *tensors: Tensor,
    ) -> Tensor:
        wanted = any(ctx.needs_input_grad)
        arguments = (parameters, species, neighbors, r_ij, weights)
        result = hipnn_pass(*arguments, gradient=False, parameter_gradient=wanted)
        ctx.parameters, ctx.gradient = parameters, result.parameter_gradient
        return (weights * result.terms).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_total: Tensor) -> tuple[Any, ...]:
        gradient = (by_total * ctx.gradient).to(ctx.parameters.dtype)
        return (None, None, None, None, None, *ctx.parameters.shape.split(gradient))


def weighted_energy(
    parameters: HipnnParameters,
    species: Tensor,
    neighbors: CompactNeighbors,
    r_ij: Tensor,
    weights: Tensor,
) -> Tensor:
    """Sum over atoms and terms of weights x partial energies, for training.

    Parameters
    ----------
    parameters, species, neighbors, r_ij
        As for `hipnn_pass`.
    weights : Tensor
        (n_local, n_terms) float64.

    Returns
    -------
    Tensor
        Scalar, float64, differentiable once.

    Raises
    ------
    ModelError
        If an array does not fit.
    """
    arguments = (parameters, species, neighbors, r_ij, weights)
    total: Tensor = _WeightedEnergy.apply(*arguments, *parameters.tensors)
    return total
