"""Fused kernels for whole HIP-NN models: typed functions over the extension module.

Three entries:

`hipnn_pass`
    Partial energies at given pair vectors, with the gradient of any weighted sum of them by the
    pair vectors and by every parameter: what first-order training needs.
`hipnn_md`
    Atomic energies, forces and virial at given positions: what molecular dynamics needs.
`weighted_partial_energies`
    The same as `hipnn_pass` as a torch operator, for autograd and `torch.compile`.
`weighted_energy`
    Its scalar alone, differentiable by the parameters, at less cost per call: training's pass.

The twin is `potstill.models.hipnn`, whose `native_parameters()` gives the first argument.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from potstill.core.base import instruction_set, native
from potstill.errors import ModelError
from potstill.structures import NeighborList
from potstill.units import COULOMB

_CUTOFF_FUNCTIONS = ("cosine_squared", "polynomial")
_SUFFIX = {torch.float32: "f32", torch.float64: "f64"}


@dataclass(frozen=True)
class HipnnShape:
    """Hyper-parameters of a HIP-NN, as in `potstill.models.hipnn.HIPNN`.

    Parameters
    ----------
    n_species, n_features, n_sensitivities, l_max, n_interaction_layers, n_atom_layers : int
        Sizes; l_max is 0, 1 or 2.
    cutoff : float
        Å.
    cusp_reg : float
        Added under the square root of the tensors' norms.
    cutoff_function : {"cosine_squared", "polynomial"}
        Envelope of the sensitivities.
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

    @cached_property
    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of all parameters, in the order of `HIPNN.named_parameters()`."""
        n, width = self.n_sensitivities, self.n_features
        shapes: dict[str, tuple[int, ...]] = {}
        for b in range(self.n_interaction_layers):
            n_in = self.n_species if b == 0 else width
            first = f"blocks.{b}.0"
            shapes[f"{first}.layer.int_weights"] = (n, width, n_in)
            shapes[f"{first}.layer.sensitivity.mu"] = (n,)
            shapes[f"{first}.layer.sensitivity.sigma"] = (n,)
            shapes[f"{first}.layer.selfint.weight"] = (width, n_in)
            shapes[f"{first}.layer.selfint.bias"] = (width,)
            for rank in range(self.l_max):
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
        if self.dtype not in _SUFFIX:
            raise ModelError(f"native kernels compute in float32 or float64, not {self.dtype}")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the kernels compute in."""
        return self.tensors[0].dtype

    def flat(self) -> Tensor:
        """(n_parameters,) copy of all parameters side by side, detached."""
        return torch.cat([tensor.detach().reshape(-1) for tensor in self.tensors])


@dataclass(frozen=True)
class ZblParameters:
    """The ZBL repulsion of `potstill.models.prior.ZBL`.

    Parameters
    ----------
    charge : Tensor
        (n_species,) float64 nuclear charges.
    inner, cutoff : float
        Å.
    """

    charge: Tensor
    inner: float
    cutoff: float


@dataclass(frozen=True)
class CompactNeighbors:
    """A neighbor list as the kernels keep it: 6 bytes per pair.

    Parameters
    ----------
    row_ptr : Tensor
        (n_local + 1,) int64: the pairs of atom i are row_ptr[i] to row_ptr[i + 1] - 1.
    neighbor : Tensor
        (E,) int32.
    image : Tensor, optional
        (E,) uint16 rows of `images`; None where all shifts are zero, or r_ij are given anyway.
    images : Tensor
        (n_images, 3) int32 whole lattice vectors.
    cutoff : float
        How far the list reaches, Å; infinite where that is not known.
    """

    row_ptr: Tensor
    neighbor: Tensor
    image: Tensor | None
    images: Tensor
    cutoff: float = math.inf

    @property
    def n_local(self) -> int:
        """Number of atoms that have neighbors listed; ghosts come after them."""
        return self.row_ptr.shape[0] - 1

    @property
    def n_pairs(self) -> int:
        """Number of pairs E."""
        return self.neighbor.shape[0]


def compact_neighbors(neighbors: NeighborList, n_local: int) -> CompactNeighbors:
    """Pack a neighbor list for the kernels.

    Parameters
    ----------
    neighbors : NeighborList
        Sorted by center, on the CPU.
    n_local : int
        Number of local atoms: all centers are below it.

    Raises
    ------
    ModelError
        If it is not sorted, or the cell shifts span more than 65536 images.
    """
    n_pairs = neighbors.n_pairs
    row_ptr = torch.empty(n_local + 1, dtype=torch.int64)
    neighbor = torch.empty(n_pairs, dtype=torch.int32)
    image = torch.empty(n_pairs, dtype=torch.uint16)
    images = torch.empty(65536, 3, dtype=torch.int32)
    lists = (neighbors.center, neighbors.neighbor, neighbors.shifts)
    arrays = [_array(tensor, torch.int64) for tensor in lists]
    out = [tensor.numpy() for tensor in (row_ptr, neighbor, image, images)]
    n_images = _call(native().pack_pairs, *arrays, *out)
    crossing = n_images > 1
    return CompactNeighbors(
        row_ptr,
        neighbor,
        image if crossing else None,
        images[:n_images].clone(),
        neighbors.cutoff,
    )


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
    if r_ij.shape != (neighbors.n_pairs, 3) or r_ij.dtype not in _SUFFIX:
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
    function = getattr(native(), f"pass_{_SUFFIX[parameters.dtype]}_{_SUFFIX[r_ij.dtype]}")
    _call(
        function,
        shape._native,
        parameters.flat().numpy(),
        *_topology(species, neighbors),
        _array(r_ij, r_ij.dtype),
        None if weights is None else _array(weights, torch.float64),
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
    """

    energies: Tensor
    forces: Tensor | None
    virial: Tensor | None


def hipnn_md(
    parameters: HipnnParameters | None,
    species: Tensor,
    neighbors: CompactNeighbors,
    positions: Tensor,
    cell: Tensor,
    *,
    zbl: ZblParameters | None = None,
    forces: bool = True,
    virial: bool = False,
    n_threads: int | None = None,
) -> MdResult:
    """Energies, forces and virial of one system at given positions.

    Parameters
    ----------
    parameters : HipnnParameters, optional
        The model; without it, the ZBL term alone.
    species : Tensor
        (N,) int32 or int64; local atoms, then ghosts (with one interaction layer only).
    neighbors : CompactNeighbors
        Pairs at least up to the cutoff; farther ones (a skin) are skipped.
    positions : Tensor
        (N, 3) float64, Å. Differences are taken in float64 and cast to the model's dtype.
    cell : Tensor
        (3, 3) float64, Å, rows are lattice vectors.
    zbl : ZblParameters, optional
        Added where two atoms come close.
    forces, virial : bool
        What to compute; the virial only together with the forces.
    n_threads : int, optional
        By default `torch.get_num_threads()`.

    Raises
    ------
    ModelError
        If an array does not fit.
    """
    n_atoms = species.shape[0]
    if positions.shape != (n_atoms, 3):
        raise ModelError(f"positions must be ({n_atoms}, 3), not {tuple(positions.shape)}")
    energies = torch.empty(neighbors.n_local, dtype=torch.float64)
    force = torch.empty(n_atoms, 3, dtype=torch.float64) if forces else None
    total_virial = torch.empty(3, 3, dtype=torch.float64) if virial else None
    offsets = neighbors.images.to(torch.float64) @ cell.detach().to(torch.float64)
    dtype = torch.float64 if parameters is None else parameters.dtype
    _call(
        getattr(native(), f"md_{_SUFFIX[dtype]}"),
        None if parameters is None else parameters.shape._native,
        None if parameters is None else parameters.flat().numpy(),
        *_topology(species, neighbors),
        _array(positions, torch.float64),
        None if neighbors.image is None else neighbors.image.numpy(),
        offsets.numpy(),
        None if zbl is None else _array(zbl.charge, torch.float64),
        COULOMB,
        0.0 if zbl is None else zbl.inner,
        0.0 if zbl is None else zbl.cutoff,
        energies.numpy(),
        None if force is None else force.numpy(),
        None if total_virial is None else total_virial.numpy(),
        n_threads or torch.get_num_threads(),
    )
    return MdResult(energies, force, total_virial)


def _array(tensor: Tensor, dtype: torch.dtype) -> Any:
    """Contiguous numpy view (or copy, where dtype or strides differ) of a CPU tensor."""
    return tensor.detach().to(dtype).contiguous().numpy()


def _topology(species: Tensor, neighbors: CompactNeighbors) -> list[Any]:
    return [
        _array(species, torch.int32),
        _array(neighbors.row_ptr, torch.int64),
        _array(neighbors.neighbor, torch.int32),
    ]


def _call(function: Any, *arguments: Any) -> Any:
    instruction_set()  # a wrong POTSTILL_SIMD is a setting to mend, not a fault of the model
    try:
        return function(*arguments)
    except RuntimeError as error:
        raise ModelError(f"native kernels: {error}") from None


# -- the torch operator --------------------------------------------------------------------------


@torch.library.custom_op("potstill::hipnn_weighted_energies", mutates_args=())
def _weighted_energies(
    species: Tensor,
    row_ptr: Tensor,
    neighbor: Tensor,
    r_ij: Tensor,
    weights: Tensor,
    parameters: Sequence[Tensor],
    sizes: Sequence[int],
    lengths: Sequence[float],
    gradient: bool,
    parameter_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    result = hipnn_pass(
        HipnnParameters(_unpack(sizes, lengths), tuple(parameters)),
        species,
        CompactNeighbors(row_ptr, neighbor, None, row_ptr.new_zeros(1, 3)),
        r_ij,
        weights,
        gradient=gradient,
        parameter_gradient=parameter_gradient,
    )
    total = (weights.to(torch.float64) * result.terms).sum()
    by_pair, by_parameter = result.gradient, result.parameter_gradient
    return (
        total,
        result.terms,
        r_ij.new_empty(0, 3, dtype=parameters[0].dtype) if by_pair is None else by_pair,
        total.new_empty(0) if by_parameter is None else by_parameter,
    )


@_weighted_energies.register_fake
def _(
    species: Tensor,
    row_ptr: Tensor,
    neighbor: Tensor,
    r_ij: Tensor,
    weights: Tensor,
    parameters: Sequence[Tensor],
    sizes: Sequence[int],
    lengths: Sequence[float],
    gradient: bool,
    parameter_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n_parameters = sum(p.numel() for p in parameters) if parameter_gradient else 0
    n_pairs = r_ij.shape[0] if gradient else 0
    return (
        r_ij.new_empty((), dtype=torch.float64),
        r_ij.new_empty(weights.shape, dtype=torch.float64),
        r_ij.new_empty((n_pairs, 3), dtype=parameters[0].dtype),
        r_ij.new_empty(n_parameters, dtype=torch.float64),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, _, r_ij, weights, parameters, *_ = inputs
    _, terms, by_pair, by_parameter = output
    ctx.set_materialize_grads(False)
    ctx.dtypes = (r_ij.dtype, weights.dtype)
    ctx.shapes = [(p.shape, p.dtype) for p in parameters]
    # Saved as outputs of this operator: a second derivative leads back to it, and is refused.
    ctx.save_for_backward(terms, by_pair, by_parameter)


def _backward(
    ctx: Any,
    by_total: Tensor | None,
    by_terms: Tensor | None,
    by_by_pair: Tensor | None,
    by_by_parameter: Tensor | None,
) -> tuple[Any, ...]:
    if by_terms is not None or by_by_pair is not None or by_by_parameter is not None:
        raise ModelError(
            "native kernels have first derivatives of the weighted sum only: for second "
            "derivatives (iterated backpropagation, Hessians), or losses of the terms, use the "
            "torch core"
        )
    nothing = (None,) * 10
    if by_total is None:
        return nothing
    terms, by_pair, by_parameter = ctx.saved_tensors
    r_type, weight_type = ctx.dtypes
    for_pairs = (by_total * by_pair).to(r_type) if ctx.needs_input_grad[3] else None
    for_weights = (by_total * terms).to(weight_type) if ctx.needs_input_grad[4] else None
    for_parameters: list[Tensor | None] = [None] * len(ctx.shapes)
    if by_parameter.shape[0] > 0:
        parts = (by_total * by_parameter).split([shape.numel() for shape, _ in ctx.shapes])
        for_parameters = [
            part.view(shape).to(dtype)
            for part, (shape, dtype) in zip(parts, ctx.shapes, strict=True)
        ]
    return (None, None, None, for_pairs, for_weights, for_parameters, None, None, None, None)


_weighted_energies.register_autograd(_backward, setup_context=_save)


def weighted_partial_energies(
    parameters: HipnnParameters,
    species: Tensor,
    neighbors: CompactNeighbors,
    r_ij: Tensor,
    weights: Tensor,
) -> tuple[Tensor, Tensor]:
    """Sum over atoms and terms of weights x partial energies, for autograd.

    First derivatives by `r_ij`, `weights` and every parameter are computed in the same call, in
    native code, if they require gradients. It runs with `torch.get_num_threads()` threads.

    Parameters
    ----------
    parameters, species, neighbors, r_ij
        As for `hipnn_pass`.
    weights : Tensor
        (n_local, n_terms), any floating dtype.

    Returns
    -------
    total : Tensor
        Scalar, float64, differentiable once.
    terms : Tensor
        (n_local, n_terms) float64 partial energies, eV; not differentiable.

    Raises
    ------
    ModelError
        If an array does not fit; in the backward pass, if a second derivative or one of the terms
        is asked for.
    """
    shape = parameters.shape
    total, terms, _, _ = _weighted_energies(
        species,
        neighbors.row_ptr,
        neighbors.neighbor,
        r_ij,
        weights,
        list(parameters.tensors),
        *_pack(shape),
        torch.is_grad_enabled() and r_ij.requires_grad,
        torch.is_grad_enabled() and any(p.requires_grad for p in parameters.tensors),
    )
    return total, terms


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

    In small batches the dispatch of a torch operator costs more than the kernels do; this is the
    total of `weighted_partial_energies` without it, and with gradients by the parameters alone.

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


def _pack(shape: HipnnShape) -> tuple[list[int], list[float]]:
    """Numbers that a torch operator can take in place of a shape."""
    sizes = [
        shape.n_species,
        shape.n_features,
        shape.n_sensitivities,
        shape.l_max,
        shape.n_interaction_layers,
        shape.n_atom_layers,
        _CUTOFF_FUNCTIONS.index(shape.cutoff_function),
    ]
    return sizes, [shape.cutoff, shape.cusp_reg]


def _unpack(sizes: Sequence[int], lengths: Sequence[float]) -> HipnnShape:
    n_species, n_features, n_sensitivities, l_max, n_interaction_layers, n_atom_layers, f = sizes
    return HipnnShape(
        n_species,
        n_features,
        n_sensitivities,
        l_max,
        n_interaction_layers,
        n_atom_layers,
        lengths[0],
        lengths[1],
        _CUTOFF_FUNCTIONS[f],
    )
