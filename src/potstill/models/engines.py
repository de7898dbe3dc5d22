"""How a potential is computed: in torch operations, or by native kernels.

What a model is stands in `potstill.models.base`, and knows its engines; an engine knows of a model
no more than is written here. Whoever brings kernels for another model returns `NativeKernels` from
`Potential.native_kernels`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from potstill.core import (
    BondParameters,
    CompactNeighbors,
    MdResult,
    PairPrior,
    PassResult,
    compact_forces,
    compact_neighbors,
    compact_pair_vectors,
    repeat_neighbors,
)
from potstill.errors import ModelError
from potstill.models.graph import Edges, LocalOutput, forces_from_pairs, virial_from_pairs
from potstill.neighbors import pair_vectors
from potstill.structures import NeighborList, Structures

#: `auto` takes native kernels where they serve a model, its device and precision, else PyTorch's.
Core = Literal["auto", "native", "torch"]

#: Neighbor lists for PyTorch, and packed for native kernels.
Pairs = NeighborList | CompactNeighbors

#: A batch in some place, and (N, T) float64 weights of its terms there.
WeightedCopy = tuple[Structures, Tensor]

_T = TypeVar("_T", Structures, NeighborList)


@dataclass(frozen=True)
class FirstOrder:
    """What one pass of a potential gives, all in float64 and without a graph.

    Parameters
    ----------
    terms : Tensor
        (N, T) eV, the terms of the atomic energies.
    forces : Tensor
        (N, 3) eV/Å.
    virial : Tensor
        (S, 3, 3) eV, sum of r_ij outer dE/dr_ij: the stress times the volume of periodic systems.
    """

    terms: Tensor
    forces: Tensor
    virial: Tensor


# -- torch -------------------------------------------------------------------------------------


class Network(Protocol):
    """What the torch engine asks of a model."""

    kind: str
    direct_forces: bool

    def __call__(self, *args: Any) -> LocalOutput: ...  # noqa: D102

    def partial_energies(  # noqa: D102
        self, species: Tensor, edges: Edges, r_ij: Tensor, n_local: int
    ) -> Tensor: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...  # noqa: D102


class TorchEngine:
    """A model in torch operations, differentiated automatically.

    Derivatives are right inside `torch.no_grad()`, `torch.inference_mode()` and `torch.autocast()`
    as well.

    Parameters
    ----------
    network : Network
        The model.
    """

    def __init__(self, network: Network) -> None:
        self.network = network

    def evaluate(self, structures: Structures, neighbors: Pairs) -> FirstOrder:
        """Terms, forces and virial; parameters are no part of the graph meanwhile."""
        pairs = spelled_out(neighbors)
        if self.network.direct_forces:
            local, forces, virial = self.output(structures, pairs, (), False, False)
            return FirstOrder(local.float64_terms, forces, virial)
        n = structures.n_atoms
        terms, r_ij, gradient = self.by_pairs(structures, pairs, n, n)
        edges = Edges(pairs.center, pairs.neighbor)
        forces = forces_from_pairs(gradient, edges, n)
        return FirstOrder(terms, forces, virial_from_pairs(gradient, r_ij, edges, structures))

    def by_pairs(
        self, structures: Structures, pairs: NeighborList, n_local: int, n_own: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Terms of the energies of the first `n_own` atoms, and derivatives of their sum.

        Parameters
        ----------
        structures : Structures
            A batch, or all atoms of a domain.
        pairs : NeighborList
            Pairs up to the cutoff at least.
        n_local : int
            How many atoms are centers of pairs; the others are ghosts to the model.
        n_own : int
            How many energies count, of these.

        Returns
        -------
        terms : Tensor
            (n_own, T) eV, float64.
        r_ij, gradient : Tensor
            (E, 3) Å, and eV/Å, float64.
        """
        with _autograd(True, structures), _frozen(self.network):
            structures, pairs = _usable(structures), _usable(pairs)
            edges = Edges.of(structures, pairs)
            r_ij = pair_vectors(structures, pairs).detach().requires_grad_(True)
            terms = self.network.partial_energies(structures.species, edges, r_ij, n_local)[:n_own]
            gradient = _pair_gradient(terms.sum(), r_ij, create_graph=False)
        return terms.detach(), r_ij.detach(), gradient

    def weighted_energy(self, copies: Sequence[WeightedCopy], neighbors: Pairs) -> Tensor:
        """Sum over the copies, with one graph for all."""
        pairs = spelled_out(neighbors)
        edges = Edges.of(copies[0][0], pairs)
        totals = []
        for structures, weights in copies:
            r_ij = pair_vectors(structures, pairs).detach()
            arguments = (structures.species, edges, r_ij, structures.n_atoms)
            totals.append((weights * self.network.partial_energies(*arguments)).sum())
        return torch.stack(totals).sum()

    def output(
        self,
        structures: Structures,
        neighbors: NeighborList,
        taps: Sequence[str],
        derivative: bool,
        create_graph: bool,
    ) -> tuple[LocalOutput, Tensor, Tensor]:
        """What the model returns, float64 forces (N, 3) and virial (S, 3, 3).

        Both are NaN without `derivative`, but for models with direct forces, which have no virial.
        """
        direct = self.network.direct_forces
        with _autograd(create_graph or (derivative and not direct), structures):
            structures, neighbors = _usable(structures), _usable(neighbors)
            edges = Edges.of(structures, neighbors)
            r_ij = pair_vectors(structures, neighbors)
            if derivative and not direct and not r_ij.requires_grad:
                r_ij.requires_grad_(True)
            local = self.network(structures.species, edges, r_ij, structures.n_atoms, taps)
            nothing = r_ij.new_full((structures.n_systems, 3, 3), torch.nan)
            if direct:
                if local.forces is None:
                    raise ModelError(f"{self.network.kind} declares direct forces but returns none")
                return local, local.forces.to(torch.float64), nothing
            if not derivative:
                return local, r_ij.new_full((structures.n_atoms, 3), torch.nan), nothing
            energy = local.atomic_energies.to(torch.float64).sum()
            gradient = _pair_gradient(energy, r_ij, create_graph)
            forces = forces_from_pairs(gradient, edges, structures.n_atoms)
            virial = virial_from_pairs(gradient, r_ij, edges, structures)
        return local, forces, virial

    def hessian_vector_product(
        self, structures: Structures, vector: Tensor, neighbors: NeighborList
    ) -> Tensor:
        """(N, 3) float64, eV/Å, as of `Potential.hessian_vector_product`."""
        with _autograd(True, structures):
            structures, neighbors = _usable(structures), _usable(neighbors)
            edges = Edges.of(structures, neighbors)
            r_ij = pair_vectors(structures, neighbors).requires_grad_(True)
            local = self.network(structures.species, edges, r_ij, structures.n_atoms)
            energy = local.atomic_energies.to(torch.float64).sum()
            gradient = _pair_gradient(energy, r_ij, create_graph=True)
            displaced = (vector[edges.neighbor] - vector[edges.center]).to(gradient.dtype)
            product = _pair_gradient((gradient * displaced).sum(), r_ij, create_graph=False)
        return -forces_from_pairs(product, edges, structures.n_atoms)


def spelled_out(neighbors: Pairs) -> NeighborList:
    """The list as torch operations need it.

    Raises
    ------
    ModelError
        If it is packed for native kernels.
    """
    if isinstance(neighbors, NeighborList):
        return neighbors
    raise ModelError("compact neighbor lists are for models with native kernels")


@contextmanager
def _autograd(enabled: bool, structures: Structures) -> Iterator[None]:
    """Automatic differentiation as asked for here, whatever mode the caller is in."""
    try:
        with (
            torch.inference_mode(False),
            torch.set_grad_enabled(enabled),
            torch.autocast(structures.positions.device.type, enabled=False),
        ):
            yield
    except RuntimeError as error:
        if "nference tensor" not in str(error):
            raise
        raise ModelError(
            "the potential's weights were created inside torch.inference_mode() and cannot be "
            "differentiated: create, load or cast the potential outside of it"
        ) from error


def _usable(value: _T) -> _T:
    """The same without tensors made in inference mode, which autograd does not save."""
    tensors: dict[str, Any] = {f.name: getattr(value, f.name) for f in fields(value)}
    copies = {
        name: tensor.clone()
        for name, tensor in tensors.items()
        if isinstance(tensor, Tensor) and tensor.is_inference()
    }
    return replace(value, **copies) if copies else value  # type: ignore[arg-type]


@contextmanager
def _frozen(network: Network) -> Iterator[None]:
    """Take the parameters out of the graph for a while: nothing is kept for their gradients."""
    trainable = [p for p in network.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def _pair_gradient(scalar: Tensor, r_ij: Tensor, create_graph: bool) -> Tensor:
    """(E, 3) d(scalar)/dr_ij; zero where nothing depends on r_ij."""
    if not scalar.requires_grad:
        return torch.zeros_like(r_ij)
    (gradient,) = torch.autograd.grad(scalar, r_ij, create_graph=create_graph, allow_unused=True)
    return torch.zeros_like(r_ij) if gradient is None else gradient


# -- native kernels ----------------------------------------------------------------------------


@dataclass(frozen=True)
class NativeKernels:
    """Kernels of one network with its present parameters, on the CPU.

    Parameters
    ----------
    dtype : torch.dtype
        What they compute in: float32 or float64.
    first_order : callable
        (species, neighbors, r_ij) to a `PassResult`: terms, and dE/dr_ij in their dtype.
    weighted_energy : callable
        (species, neighbors, r_ij, weights) to the sum of (N, T) weights times terms, a scalar that
        is differentiable once by the parameters.
    dynamics : callable
        (species, neighbors, positions, cell, *, prior, virial) to the `MdResult` of one system,
        with the repulsion `prior` added unless it is None. With `n_threads`, and `bonds` to add,
        where they are given.
    """

    dtype: torch.dtype
    first_order: Callable[..., PassResult]
    weighted_energy: Callable[..., Tensor]
    dynamics: Callable[..., MdResult]


class NativeEngine:
    """First derivatives by kernels: no graph, and pairs in compact lists.

    Parameters
    ----------
    kernels : NativeKernels
        Of the network.
    """

    def __init__(self, kernels: NativeKernels) -> None:
        self.kernels = kernels

    def evaluate(self, structures: Structures, neighbors: Pairs) -> FirstOrder:
        """Terms, forces and virial."""
        pairs = _packed(neighbors, structures)
        r_ij = compact_pair_vectors(structures, pairs, self.kernels.dtype)
        found = self.kernels.first_order(structures.species, pairs, r_ij)
        assert found.gradient is not None
        return FirstOrder(found.terms, *compact_forces(structures, pairs, r_ij, found.gradient))

    def weighted_energy(self, copies: Sequence[WeightedCopy], neighbors: Pairs) -> Tensor:
        """One call for all copies."""
        first = copies[0][0]
        pairs = _packed(neighbors, first)
        r_ij = torch.empty(len(copies), pairs.n_pairs, 3, dtype=self.kernels.dtype)
        for (structures, _), out in zip(copies, r_ij, strict=True):
            compact_pair_vectors(structures, pairs, self.kernels.dtype, out=out)
        return self.kernels.weighted_energy(
            first.species.repeat(len(copies)),
            repeat_neighbors(pairs, len(copies)),
            r_ij.view(-1, 3),
            torch.cat([weights for _, weights in copies]),
        )


def _packed(neighbors: Pairs, structures: Structures) -> CompactNeighbors:
    if isinstance(neighbors, CompactNeighbors):
        return neighbors
    return compact_neighbors(neighbors, structures.n_atoms)


@dataclass(frozen=True)
class NativeParts:
    """The parts of a potential that one native call evaluates together in dynamics.

    Such a call needs no pair vectors, no graph and no tensor of the size of the neighbor list.

    Parameters
    ----------
    network : NativeKernels, optional
        Without it there is nothing to call.
    prior : ZblParameters or RepulsionParameters, optional
        Short-range repulsion.
    bonds : BondParameters, optional
        Bonds and angles of beads.
    offsets : Tensor, optional
        (n_species,) float64 constant energies, eV.
    """

    network: NativeKernels | None = None
    prior: PairPrior | None = None
    bonds: BondParameters | None = None
    offsets: Tensor | None = None

    def merged(self, other: NativeParts) -> NativeParts | None:
        """Both together; None if they hold two parts of a kind."""
        mine, its = vars(self), vars(other)
        if any(mine[name] is not None and its[name] is not None for name in mine):
            return None
        merged: dict[str, Any] = {k: its[k] if v is None else v for k, v in mine.items()}
        return NativeParts(**merged)

    def evaluate(
        self,
        structures: Structures,
        neighbors: CompactNeighbors,
        *,
        virial: bool,
        n_threads: int | None = None,
    ) -> MdResult:
        """Atomic energies, forces and virial of one system, in float64.

        Parameters
        ----------
        structures : Structures
            One system, in the potential's species table.
        neighbors : CompactNeighbors
            Pairs up to the cutoff at least; those beyond are skipped.
        virial : bool
            Whether it is asked for.
        n_threads : int, optional
            Of this call; by default torch's.
        """
        if self.network is None:
            raise ModelError("there is no network for native kernels to evaluate")
        more: dict[str, Any] = {} if self.bonds is None else {"bonds": self.bonds}
        if n_threads is not None:
            more["n_threads"] = n_threads
        result = self.network.dynamics(
            structures.species,
            neighbors,
            structures.positions,
            structures.cell[0],
            prior=self.prior,
            virial=virial,
            **more,
        )
        if self.offsets is None:
            return result
        return replace(result, energies=result.energies + self.offsets[structures.species])


@dataclass(frozen=True)
class NativeMean(NativeParts):
    """The mean of several potentials, each by a call of its own on the same neighbor list.

    Parameters
    ----------
    others : tuple of NativeParts
        All members but the one that this is itself.
    """

    others: tuple[NativeParts, ...] = ()

    def merged(self, other: NativeParts) -> None:
        """Nothing can be added to it in the same call."""

    def evaluate(
        self,
        structures: Structures,
        neighbors: CompactNeighbors,
        *,
        virial: bool,
        n_threads: int | None = None,
    ) -> MdResult:
        """Means of what the members' calls give."""
        how: dict[str, Any] = {"virial": virial, "n_threads": n_threads}
        found = [super().evaluate(structures, neighbors, **how)]
        found += [other.evaluate(structures, neighbors, **how) for other in self.others]

        def mean(name: str) -> Any:
            values = [getattr(one, name) for one in found]
            return None if values[0] is None else torch.stack(values).mean(dim=0)

        return MdResult(**{field.name: mean(field.name) for field in fields(MdResult)})
