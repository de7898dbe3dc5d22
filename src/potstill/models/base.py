"""The base class of all models: atomic energies from species and pair vectors.

A model is a function (species, edges, r_ij, n_local) -> atomic energies. Geometry (positions, cell,
strain, images) is formed outside it, in float64, and cast by the model to its own dtype. The base
class turns dE/dr_ij into forces, virial and stress once, for every model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn

from potstill.core import CompactNeighbors, HipnnParameters, MdResult, ZblParameters, hipnn_md
from potstill.errors import ModelError, suggest
from potstill.neighbors import build_neighbor_list, pair_vectors
from potstill.properties import LEARNABLE
from potstill.species import SpeciesTable
from potstill.structures import NeighborList, Properties, Structures

#: `auto` takes native kernels where they serve a model, its device and precision, else PyTorch's.
Core = Literal["auto", "native", "torch"]

#: Neighbor lists for PyTorch, and packed for native kernels.
Pairs = NeighborList | CompactNeighbors

#: From the (N, T) float64 terms of the atomic energies, eV, to (N,) penalties of the atoms.
Regularizer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Edges:
    """The pairs of a model's input, sorted by center.

    Parameters
    ----------
    center, neighbor : Tensor
        (E,) int64. Centers are local atoms (< n_local); neighbors may be ghosts.
    tags : Tensor, optional
        (N,) int64 tags of the atoms; -1 in systems without tags.
    """

    center: Tensor
    neighbor: Tensor
    tags: Tensor | None = None

    @classmethod
    def of(cls, structures: Structures, neighbors: NeighborList) -> Edges:
        """The pairs of a neighbor list, with the atoms' tags.

        A system whose tags are all zero is one without: so are untagged systems that were joined
        with tagged ones.
        """
        tags = structures.tags
        if tags is not None:
            tagged = torch.zeros(structures.n_systems, dtype=torch.bool, device=tags.device)
            tagged[structures.system_index[tags != 0]] = True
            tags = torch.where(tagged[structures.system_index], tags, -1)
        return cls(neighbors.center, neighbors.neighbor, tags)

    @property
    def n_pairs(self) -> int:
        """Number of pairs E."""
        return self.center.shape[0]

    @cached_property
    def _rank(self) -> Tensor:
        """(E,) position of a pair among the pairs of its center."""
        if self.n_pairs == 0:
            return self.center
        counts = torch.bincount(self.center)
        starts = counts.cumsum(0) - counts
        return torch.arange(self.n_pairs, device=self.center.device) - starts[self.center]

    def padded(self, n_local: int) -> tuple[Tensor, Tensor]:
        """Lay the pairs out as a rectangle: neighbor sums then become matrix products.

        Returns
        -------
        pair : Tensor
            (n_local, K) int64, index of the pair in slot k of an atom; 0 in unused slots.
        used : Tensor
            (n_local, K) bool.
        """
        width = int(self._rank.max()) + 1 if self.n_pairs else 0
        pair = self.center.new_zeros(n_local, width)
        used = torch.zeros(n_local, width, dtype=torch.bool, device=self.center.device)
        pair[self.center, self._rank] = torch.arange(self.n_pairs, device=self.center.device)
        used[self.center, self._rank] = True
        return pair, used

    def sum_to_centers(self, values: Tensor, n_local: int) -> Tensor:
        """(n_local, ...) sums over the pairs of each center, from (E, ...) values."""
        return values.new_zeros(n_local, *values.shape[1:]).index_add(0, self.center, values)

    def among_nearest(self, distance: Tensor, n_local: int, max_neighbors: int) -> Tensor:
        """Which pairs are among the nearest of either of their atoms.

        Both directions of a pair are kept or dropped together, and neighbors as far away as the
        last one that counts are kept with it: the choice knows no order of atoms.

        Parameters
        ----------
        distance : Tensor
            (E,) Å.
        n_local : int
            Number of atoms; there must be no ghosts.
        max_neighbors : int
            How many neighbors count for an atom.

        Returns
        -------
        Tensor
            (E,) bool.
        """
        pair, used = self.padded(n_local)
        if pair.shape[1] <= max_neighbors:
            return torch.ones_like(self.center, dtype=torch.bool)
        far = torch.where(used, distance.detach()[pair], torch.inf)
        # Distances that symmetry makes equal differ by rounding.
        reach = far.kthvalue(max_neighbors, dim=1).values * (1.0 + 1e-5)
        return distance <= torch.maximum(reach[self.center], reach[self.neighbor])


@dataclass(frozen=True)
class TapSpec:
    """A named internal feature: where it lives and how wide it is.

    Edge features have a row per given pair, or, of a model with a graph of its own, per edge of it:
    then the model's tap `edges`, (M, 1) int64, says which of the given pairs these are.

    Parameters
    ----------
    kind : {"node_scalar", "node_vector", "edge_scalar"}
        Of shape (N, F), (N, 3, F) or (E, F), with the pairs in the order of the neighbor list.
    width : int
        F.
    """

    kind: Literal["node_scalar", "node_vector", "edge_scalar"]
    width: int


class FeatureRecorder:
    """Keeps the taps that were asked for and lets go of all other features.

    Parameters
    ----------
    names : sequence of str
        Taps to keep.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.features: dict[str, Tensor] = {}
        self._names = frozenset(names)

    def keep(self, name: str, feature: Tensor) -> None:
        """Keep a feature if it was asked for."""
        if name in self._names:
            self.features[name] = feature


@dataclass(frozen=True)
class LocalOutput:
    """What a model returns.

    Parameters
    ----------
    atomic_energies : Tensor
        (n_local,) eV.
    features : dict of str to Tensor
        The taps that were asked for.
    forces : Tensor, optional
        (n_local, 3) eV/Å, of models with direct forces and of these alone.
    terms : Tensor, optional
        (n_local, T) eV, terms that sum to the atomic energies, of models that have several.
    """

    atomic_energies: Tensor
    features: dict[str, Tensor] = field(default_factory=dict)
    forces: Tensor | None = None
    terms: Tensor | None = None

    @property
    def float64_terms(self) -> Tensor:
        """(n_local, T) float64; the atomic energies where there is one term."""
        terms = self.atomic_energies.unsqueeze(1) if self.terms is None else self.terms
        return terms.to(torch.float64)


@dataclass(frozen=True)
class StartingData:
    """What a fresh network can be fitted to before the first training step.

    Parameters
    ----------
    offsets : Tensor
        (n_species,) float64, eV per atom: least-squares energies of the species in what the
        network is to learn; zero where there are no energies.
    batches : sequence of Structures
        A few batches from all over the training set, in the network's species table.
    """

    offsets: Tensor
    batches: Sequence[Structures]


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


@dataclass(frozen=True)
class NativeParts:
    """The parts of a potential that one call of the native kernels evaluates together.

    Such a call needs no pair vectors, no graph and no tensor of the size of the neighbor list.

    Parameters
    ----------
    network : HipnnParameters, optional
        A HIP-NN.
    prior : ZblParameters, optional
        Short-range repulsion.
    offsets : Tensor, optional
        (n_species,) float64 constant energies, eV.
    """

    network: HipnnParameters | None = None
    prior: ZblParameters | None = None
    offsets: Tensor | None = None

    def merged(self, other: NativeParts) -> NativeParts | None:
        """Both together; None if they hold two parts of a kind."""
        mine, its = vars(self), vars(other)
        if any(mine[name] is not None and its[name] is not None for name in mine):
            return None
        return NativeParts(**{k: v if v is not None else its[k] for k, v in mine.items()})

    def evaluate(
        self, structures: Structures, neighbors: CompactNeighbors, *, virial: bool
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
        """
        result = hipnn_md(
            self.network,
            structures.species,
            neighbors,
            structures.positions,
            structures.cell[0],
            zbl=self.prior,
            virial=virial,
        )
        if self.offsets is None:
            return result
        return replace(result, energies=result.energies + self.offsets[structures.species])


@dataclass(frozen=True)
class Prediction:
    """Properties of a batch, and the model's internal features that were asked for.

    `terms`, (N, T) float64 eV, are the terms that sum to the atomic energies.
    """

    properties: Properties
    features: dict[str, Tensor]
    terms: Tensor

    def __getitem__(self, name: str) -> Tensor:
        return self.properties[name]


class Potential(nn.Module, ABC):
    """Abstract base of all potentials.

    Subclasses implement `forward` and `hyperparameters`. Forces are derived from the energy, except
    where a model sets `direct_forces` and returns them itself; such a model has no stress. A model
    must be zero beyond its own `cutoff` whatever pairs it is given, since a list may reach further
    (a skin, another model).

    Parameters
    ----------
    species_table : SpeciesTable
        The species that the model knows, in the order of its parameters.
    cutoff : float
        Å.
    """

    #: Name of the kind of model in checkpoints and configs.
    kind: str = ""

    #: Models that do not derive forces from an energy say so here.
    direct_forces: bool = False

    #: Models that implement `prepare` and `prepared_terms`, so that training can compile them.
    compilable: bool = False

    #: Which kernels give energies and first derivatives; `use_core` sets it.
    core: Core = "auto"

    def __init__(self, species_table: SpeciesTable, cutoff: float) -> None:
        super().__init__()
        if not cutoff > 0:
            raise ModelError(f"cutoff must be positive, not {cutoff}")
        self.species_table = species_table
        self.cutoff = float(cutoff)

    @abstractmethod
    def forward(
        self,
        species: Tensor,
        edges: Edges,
        r_ij: Tensor,
        n_local: int,
        taps: Sequence[str] = (),
    ) -> LocalOutput:
        """Atomic energies of the local atoms.

        Parameters
        ----------
        species : Tensor
            (N,) int64 indices into `species_table`; local atoms first, then ghosts.
        edges : Edges
            Pairs sorted by center.
        r_ij : Tensor
            (E, 3) Å, any floating dtype; cast to the model's dtype inside.
        n_local : int
            Number of local atoms.
        taps : sequence of str
            Names of internal features to return as well.

        Returns
        -------
        LocalOutput
            (n_local,) eV in the model's dtype, and features by name.
        """

    @abstractmethod
    def hyperparameters(self) -> dict[str, Any]:
        """JSON-able keyword arguments that rebuild the model together with the species table."""

    @property
    def taps(self) -> dict[str, TapSpec]:
        """Internal features that `forward` can return, by name.

        The k-th layer of a kind called `layer` gives `layer_k`, and `layer_k.vector` beside it
        where it has vectors; `last` is what the last linear layer before the energy reads.
        """
        return {}

    @property
    def default_tap(self) -> str | None:
        """The tap that distillation takes unless told otherwise: the last before the energy."""
        return "last" if "last" in self.taps else None

    @property
    def dtype(self) -> torch.dtype:
        """Floating dtype the model computes in."""
        for tensor in chain(self.parameters(), self.buffers()):
            if tensor.is_floating_point():
                return tensor.dtype
        return torch.float64

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        for tensor in chain(self.parameters(), self.buffers()):
            return tensor.device
        return torch.device("cpu")

    @property
    def n_parameters(self) -> int:
        """Number of trainable numbers."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def regularized_weights(self) -> list[Tensor]:
        """Weights (no biases) whose squares the L2 term of the loss sums."""
        return [p for p in self.parameters() if p.ndim > 1]

    # -- hooks of training ---------------------------------------------------------------------

    def initialize_from(self, data: StartingData) -> None:
        """Fit fresh weights to the training data, once, before the first step.

        By default nothing is done. Called on the device and in the dtype of construction, before
        weights of another network are copied in.
        """

    def regularizers(self) -> dict[str, Regularizer]:
        """Penalties on the terms of the atomic energies that belong to this kind of model.

        Returns
        -------
        dict of str to callable
            By the name of their weight in the settings `regularization`. Each takes the `terms` of
            a prediction, (N, T) with T = `n_terms`, to a penalty of each atom, (N,). The loss gains
            the weight times the mean over configurations of the sum over their atoms.
        """
        return {}

    # -- first-order passes: all that training by directional derivatives and dynamics need ------

    @property
    def n_terms(self) -> int:
        """Number of terms T of an atomic energy that a loss can take apart."""
        return 1

    def partial_energies(self, species: Tensor, edges: Edges, r_ij: Tensor, n_local: int) -> Tensor:
        """(n_local, T) eV, float64: the terms that sum to the atomic energies.

        Arguments are those of `forward`. Always in torch operations, differentiable to any order.
        """
        return self(species, edges, r_ij, n_local).float64_terms

    # -- the same in two parts, of which torch.compile takes the second ------------------------

    def prepare(self, species: Tensor, edges: Edges, r_ij: Tensor, n_local: int) -> Any:
        """Look up which pairs and atoms of a batch go where: all whose size depends on values.

        Arguments are those of `forward`.

        Returns
        -------
        tuple
            Index tensors and masks, possibly nested. All their sizes may change with the batch.
        """
        raise NotImplementedError(f"{self.kind} is not compilable")

    def prepared_terms(self, prepared: Any, r_ij: Tensor) -> Tensor:
        """(n_local, T) as of `partial_energies`, by operations whose sizes follow from the inputs'.

        Parameters
        ----------
        prepared : tuple
            What `prepare` returned for the batch.
        r_ij : Tensor
            (E, 3) Å, any floating dtype.
        """
        raise NotImplementedError(f"{self.kind} is not compilable")

    def evaluate(self, structures: Structures, neighbors: Pairs) -> FirstOrder:
        """Energies and first derivatives of a batch, without a graph.

        Parameters
        ----------
        structures : Structures
            The batch, in the model's species table.
        neighbors : NeighborList or CompactNeighbors
            Up to the cutoff at least. Compact lists are for models that native kernels serve.
        """
        neighbors = _spelled_out(neighbors)
        if self.direct_forces:
            with torch.no_grad():
                local, forces = self._direct(structures, neighbors, ())
            virial = forces.new_full((structures.n_systems, 3, 3), torch.nan)
            return FirstOrder(local.float64_terms, forces, virial)
        edges = Edges.of(structures, neighbors)
        r_ij = pair_vectors(structures, neighbors).detach().requires_grad_(True)
        with torch.enable_grad(), _frozen(self):
            terms = self.partial_energies(structures.species, edges, r_ij, structures.n_atoms)
            gradient = _pair_gradient(terms.sum(), r_ij, create_graph=False)
        r_ij = r_ij.detach()
        forces = forces_from_pairs(gradient, edges, structures.n_atoms)
        virial = virial_from_pairs(gradient, r_ij, edges, structures)
        return FirstOrder(terms.detach(), forces, virial)

    def weighted_energy(
        self, copies: Sequence[tuple[Structures, Tensor]], neighbors: Pairs
    ) -> Tensor:
        """Weighted sum of the terms of all atomic energies, over copies of a batch.

        Parameters
        ----------
        copies : sequence of (Structures, Tensor)
            The batch in different places, in the model's species table, and the (N, T) float64
            weights there.
        neighbors : NeighborList or CompactNeighbors
            Of all of them, up to the cutoff at least.

        Returns
        -------
        Tensor
            Scalar, float64; differentiable once with respect to the parameters.
        """
        neighbors = _spelled_out(neighbors)
        edges = Edges.of(copies[0][0], neighbors)
        totals = []
        for structures, weights in copies:
            r_ij = pair_vectors(structures, neighbors).detach()
            arguments = (structures.species, edges, r_ij, structures.n_atoms)
            totals.append((weights * self.partial_energies(*arguments)).sum())
        return torch.stack(totals).sum()

    def why_not_native(self) -> str | None:
        """Why native kernels do not serve this model as it is now; None if they do."""
        return f"there are none for {self.kind}"

    def native_parts(self) -> NativeParts | None:
        """What one native call evaluates for molecular dynamics; None if there is no such call."""
        return None

    @property
    def uses_native(self) -> bool:
        """Whether native kernels give energies and first derivatives.

        Raises
        ------
        ModelError
            If they were asked for and do not serve the model.
        """
        if self.core == "torch":
            return False
        reason = self.why_not_native()
        if reason is not None and self.core == "native":
            raise ModelError(f"native kernels cannot be used: {reason}")
        return reason is None

    def use_core(self, core: Core) -> None:
        """Choose the kernels for this potential and all its parts; not stored with the model."""
        for module in self.modules():
            if isinstance(module, Potential):
                module.core = core

    # -- derived once for every model ----------------------------------------------------------

    def predict(
        self,
        structures: Structures,
        neighbors: Pairs | None = None,
        properties: Iterable[str] = ("energy", "forces"),
        *,
        taps: Sequence[str] = (),
        create_graph: bool = False,
    ) -> Prediction:
        """Predict properties of a batch.

        Parameters
        ----------
        structures : Structures
            The batch; its species table is mapped onto the model's.
        neighbors : NeighborList or CompactNeighbors, optional
            A list with at least the model's cutoff; built if absent.
        properties : iterable of str
            Any of energy, forces, stress, atomic_energies.
        taps : sequence of str
            Internal features to return as well.
        create_graph : bool
            Keep the graph, for training; otherwise results are detached.

        Returns
        -------
        Prediction
            energy (S,), forces (N, 3), stress (S, 3, 3), atomic_energies (N,) in float64. Stress
            is present only for systems that are periodic along all three axes.

        Raises
        ------
        ModelError
            If a property or tap is unknown or the neighbor list is too short.
        DataError
            If a structure holds a species that the model does not know.
        """
        wanted = set(properties)
        for name in wanted - set(LEARNABLE):
            raise ModelError(f"a potential cannot predict '{name}'{suggest(name, LEARNABLE)}")
        if self.direct_forces and "stress" in wanted:
            raise ModelError(f"{self.kind} predicts forces directly and has no stress")
        for name in set(taps) - set(self.taps):
            raise ModelError(f"{self.kind} has no feature tap '{name}'{suggest(name, self.taps)}")
        structures = structures.with_species_table(self.species_table)
        neighbors = self._check_neighbors(structures, neighbors)
        derivative = bool(wanted & {"forces", "stress"})
        compact = isinstance(neighbors, CompactNeighbors)
        if (derivative or compact) and not create_graph and not taps:
            found = self.evaluate(structures, neighbors)
            terms, features = found.terms, dict[str, Tensor]()
            atomic, forces, virial = terms.sum(dim=1), found.forces, found.virial
        else:
            if self.direct_forces:
                with torch.set_grad_enabled(create_graph):
                    local, forces = self._direct(structures, _spelled_out(neighbors), taps)
                virial = forces
            else:
                local, forces, virial = self._differentiate(
                    structures, _spelled_out(neighbors), taps, derivative, create_graph
                )
            atomic, terms = local.atomic_energies.to(torch.float64), local.float64_terms
            features = local.features
        values, present = {}, {}
        if "energy" in wanted:
            energy = atomic.new_zeros(structures.n_systems)
            values["energy"] = energy.index_add(0, structures.system_index, atomic)
        if "forces" in wanted:
            values["forces"] = forces
        if "stress" in wanted:
            values["stress"] = stress_from_virial(virial, structures)
            present["stress"] = structures.pbc.all(dim=1)
        if "atomic_energies" in wanted:
            values["atomic_energies"] = atomic
        if not create_graph:
            values = {name: value.detach() for name, value in values.items()}
            features = {name: value.detach() for name, value in features.items()}
            terms = terms.detach()
        return Prediction(Properties(values, present), features, terms)

    def _direct(
        self, structures: Structures, neighbors: NeighborList, taps: Sequence[str]
    ) -> tuple[LocalOutput, Tensor]:
        """Output and float64 forces of a model that predicts its forces itself."""
        edges = Edges.of(structures, neighbors)
        r_ij = pair_vectors(structures, neighbors)
        local = self(structures.species, edges, r_ij, structures.n_atoms, taps)
        assert local.forces is not None, f"{self.kind} declares direct forces and returns none"
        return local, local.forces.to(torch.float64)

    def _differentiate(
        self,
        structures: Structures,
        neighbors: NeighborList,
        taps: Sequence[str],
        derivative: bool,
        create_graph: bool,
    ) -> tuple[LocalOutput, Tensor, Tensor]:
        """Output, forces and virial by automatic differentiation."""
        edges = Edges.of(structures, neighbors)
        with torch.set_grad_enabled(create_graph or derivative):
            r_ij = pair_vectors(structures, neighbors)
            if derivative and not r_ij.requires_grad:
                r_ij.requires_grad_(True)
            local = self(structures.species, edges, r_ij, structures.n_atoms, taps)
            if not derivative:
                return local, r_ij, r_ij
            energy = local.atomic_energies.to(torch.float64).sum()
            gradient = _pair_gradient(energy, r_ij, create_graph)
        forces = forces_from_pairs(gradient, edges, structures.n_atoms)
        virial = virial_from_pairs(gradient, r_ij, edges, structures)
        return local, forces, virial

    def hessian_vector_product(
        self, structures: Structures, vector: Tensor, neighbors: NeighborList | None = None
    ) -> Tensor:
        """Product of the Hessian of the total energy with a displacement.

        Parameters
        ----------
        structures : Structures
            The batch; the Hessian is block-diagonal over systems.
        vector : Tensor
            (N, 3) displacement, Å.
        neighbors : NeighborList, optional
            Built if absent.

        Returns
        -------
        Tensor
            (N, 3) eV/Å, float64.

        Raises
        ------
        ModelError
            If the model predicts its forces directly.
        """
        if self.direct_forces:
            raise ModelError(f"{self.kind} predicts forces directly and has no Hessian")
        structures = structures.with_species_table(self.species_table)
        neighbors = _spelled_out(self._check_neighbors(structures, neighbors))
        edges = Edges.of(structures, neighbors)
        r_ij = pair_vectors(structures, neighbors).requires_grad_(True)
        local = self(structures.species, edges, r_ij, structures.n_atoms)
        energy = local.atomic_energies.to(torch.float64).sum()
        gradient = _pair_gradient(energy, r_ij, create_graph=True)
        displaced = (vector[edges.neighbor] - vector[edges.center]).to(gradient.dtype)
        product = _pair_gradient((gradient * displaced).sum(), r_ij, create_graph=False)
        return -forces_from_pairs(product, edges, structures.n_atoms)

    def _check_neighbors(self, structures: Structures, neighbors: Pairs | None) -> Pairs:
        if neighbors is None:
            return build_neighbor_list(structures, self.cutoff)
        if neighbors.cutoff < self.cutoff - 1e-9:
            raise ModelError(
                f"the neighbor list reaches {neighbors.cutoff:g} Å, "
                f"but the model's cutoff is {self.cutoff:g} Å"
            )
        return neighbors


def xavier_linear(n_in: int, n_out: int, *, bias: bool = True) -> nn.Linear:
    """Linear layer with Xavier-uniform weights and a bias of zero."""
    layer = nn.Linear(n_in, n_out, bias=bias)
    nn.init.xavier_uniform_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def refuse_ghosts(kind: str, species: Tensor, n_local: int) -> None:
    """Refuse ghost atoms: those of several layers need features that only their owners have.

    Raises
    ------
    ModelError
        If there are more atoms than local ones.
    """
    if n_local < species.shape[0]:
        raise ModelError(f"{kind} with several interaction layers needs its atoms without ghosts")


def forces_from_pairs(gradient: Tensor, edges: Edges, n_atoms: int) -> Tensor:
    """(N, 3) forces from (E, 3) dE/dr_ij: F_i = sum_j dE/dr_ij - sum_j dE/dr_ji."""
    forces = gradient.new_zeros(n_atoms, 3)
    return forces.index_add(0, edges.center, gradient).index_add(0, edges.neighbor, -gradient)


def virial_from_pairs(
    gradient: Tensor, r_ij: Tensor, edges: Edges, structures: Structures
) -> Tensor:
    """(S, 3, 3) sum of r_ij outer dE/dr_ij over the pairs of each system."""
    outer = r_ij.unsqueeze(2) * gradient.unsqueeze(1)  # (E, 3, 3)
    virial = gradient.new_zeros(structures.n_systems, 3, 3)
    return virial.index_add(0, structures.system_index[edges.center], outer)


def stress_from_virial(virial: Tensor, structures: Structures) -> Tensor:
    """(S, 3, 3) stress, the symmetric part of the virial over V; NaN where not fully periodic."""
    virial = 0.5 * (virial + virial.transpose(1, 2))
    periodic = structures.pbc.all(dim=1)[:, None, None]
    # Divided by 1 and replaced afterwards: a division by NaN would leave NaN in gradients, too.
    volume = torch.where(periodic, structures.volume[:, None, None], 1.0)
    return torch.where(periodic, virial / volume, torch.nan)


def _spelled_out(neighbors: Pairs) -> NeighborList:
    if isinstance(neighbors, NeighborList):
        return neighbors
    raise ModelError("compact neighbor lists are for models that native kernels serve")


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Take the parameters out of the graph for a while: nothing is kept for their gradients."""
    trainable = [p for p in module.parameters() if p.requires_grad]
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
