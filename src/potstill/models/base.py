"""The base class of all models: atomic energies from species and pair vectors.

A model is a function (species, edges, r_ij, n_local) -> atomic energies. Geometry (positions, cell,
strain, images) is formed outside it, in float64, and cast by the model to its own dtype. The base
class turns dE/dr_ij into forces, virial and stress once, for every model.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from potstill.core import CompactNeighbors, available, note_missing_kernels, why_unavailable
from potstill.errors import ModelError, suggest
from potstill.models.engines import Core as Core
from potstill.models.engines import FirstOrder as FirstOrder
from potstill.models.engines import (
    NativeEngine,
    NativeKernels,
    NativeParts,
    TorchEngine,
    spelled_out,
)
from potstill.models.engines import Pairs as Pairs
from potstill.models.graph import Edges as Edges
from potstill.models.graph import LocalOutput as LocalOutput
from potstill.models.graph import refuse_coinciding_atoms, stress_from_virial
from potstill.models.hyper import Hyperparameters
from potstill.neighbors import build_neighbor_list
from potstill.properties import LEARNABLE
from potstill.species import SpeciesTable
from potstill.structures import NeighborList, Properties, Structures

#: From the (N, T) float64 terms of the atomic energies, eV, to (N,) penalties of the atoms.
Regularizer = Callable[[Tensor], Tensor]


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
    """Keeps the requested taps and drops all other features.

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
class Prediction:
    """Properties of a batch, and the model's internal features that were asked for.

    `terms`, (N, T) float64 eV, are the terms that sum to the atomic energies.
    """

    properties: Properties
    features: dict[str, Tensor]
    terms: Tensor

    def __getitem__(self, name: str) -> Tensor:
        return self.properties[name]

    @property
    def values(self) -> dict[str, Tensor]:
        """Everything by name, in float64: properties, `terms`, and features by tap."""
        features = {tap: value.to(torch.float64) for tap, value in self.features.items()}
        return {**self.properties.values, "terms": self.terms, **features}


class Potential(nn.Module, ABC):
    """Abstract base of all potentials.

    Subclasses implement `forward` and declare their hyper-parameters. Forces are derived from the
    energy, except where a model sets `direct_forces` and returns them itself; such a model has no
    stress. A model must be zero beyond its own `cutoff` whatever pairs it is given, since a list
    may reach further (a skin, another model).

    Parameters
    ----------
    species_table : SpeciesTable
        The species that the model knows, in the order of its parameters.
    cutoff : float
        Å.
    hyper : Hyperparameters, optional
        What the model was told. Models without such a class implement `hyperparameters`.
    """

    #: What the constructor takes beside the species table, in this order or by name.
    hyper_class: ClassVar[type[Hyperparameters] | None] = None

    #: Name of the kind of model in checkpoints and configs.
    kind: str = ""

    #: Models that do not derive forces from an energy say so here.
    direct_forces: bool = False

    #: Displacement of atoms, Å, for central differences of gradients in float32, where rounding and
    #: curvature balance.
    float32_step: float = 1e-3

    #: Models that implement `prepare` and `prepared_terms`, so that training can compile them.
    compilable: bool = False

    #: Whether all sizes follow from the inputs' under `torch.jit.trace` too: then the model can be
    #: written as TorchScript.
    traceable: bool = False

    #: Names of buffers that stay in float64 whatever the model is cast to.
    exact_buffers: tuple[str, ...] = ()

    #: Models that implement `native_kernels`.
    has_native_kernels: bool = False

    #: Which kernels give energies and first derivatives; `use_core` sets it.
    core: Core = "auto"

    def __init__(
        self, species_table: SpeciesTable, cutoff: float, hyper: Hyperparameters | None = None
    ) -> None:
        super().__init__()
        if not cutoff > 0:
            raise ModelError(f"cutoff must be positive, not {cutoff}")
        self.species_table = species_table
        self.cutoff = float(cutoff)
        self.hyper = hyper

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

    @property
    def reach(self) -> float:
        """How far away an atom can be and still have a part in another one's energy, Å.

        The cutoff, of models whose atoms see their neighbors alone; n times as much through n
        layers of messages. Infinite where a model does not say it: then engines cannot divide a
        system into domains.
        """
        return math.inf

    def hyperparameters(self) -> dict[str, Any]:
        """JSON-able keyword arguments that rebuild the model together with the species table."""
        if self.hyper is None:
            raise NotImplementedError(
                f"{type(self).__name__} does not declare its hyper-parameters"
            )
        return self.hyper.to_json()

    @property
    def spec(self) -> str:
        """The kind, or `module:Class` of an external model, to build it again."""
        kind = type(self)
        own = kind.__module__.startswith("potstill.")
        return self.kind if own else f"{kind.__module__}:{kind.__qualname__}"

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

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        exact = {name: getattr(self, name) for name in self.exact_buffers}
        super()._apply(fn, recurse)
        for name, before in exact.items():
            setattr(self, name, before.to(getattr(self, name).device))
        return self

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
        return self.engine.evaluate(structures, neighbors)

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
        return self.engine.weighted_energy(copies, neighbors)

    # -- native kernels ------------------------------------------------------------------------

    def native_kernels(self) -> NativeKernels:
        """Compiled kernels with the present parameters, of models that have `has_native_kernels`.

        Asked for only where `why_not_native` sees no obstacle.
        """
        raise NotImplementedError(f"{self.kind} has no native kernels")

    def why_not_native(self) -> str | None:
        """Why native kernels do not serve this model as it is now; None if they do."""
        if not self.has_native_kernels:
            return f"there are none for {self.kind}"
        if not available():
            return why_unavailable()
        if self.device.type != "cpu":
            return f"the model is on {self.device}, but they run on the CPU"
        if self.dtype not in (torch.float32, torch.float64):
            return f"the model is in {self.dtype}, but they need float32 or float64"
        return None

    def native_parts(self) -> NativeParts | None:
        """What this potential adds to a native call of dynamics; None if it cannot be part of one.

        Parts without a network (offsets, a prior) are no call of their own.
        """
        return NativeParts(network=self.native_kernels()) if self.uses_native else None

    @property
    def engine(self) -> NativeEngine | TorchEngine:
        """What computes energies and first derivatives of the model as it is now."""
        return NativeEngine(self.native_kernels()) if self.uses_native else TorchEngine(self)

    @property
    def uses_native(self) -> bool:
        """Whether native kernels give energies and first derivatives.

        Raises
        ------
        ModelError
            If they were asked for and do not serve the model, or are missing where the environment
            variable POTSTILL_REQUIRE_NATIVE is 1.
        """
        if self.core == "torch":
            return False
        reason = self.why_not_native()
        if reason is not None and self.core == "native":
            raise ModelError(f"native kernels cannot be used: {reason}")
        if self.has_native_kernels:
            note_missing_kernels()
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
        self.check_precision()
        structures = structures.with_species_table(self.species_table)
        given = neighbors is not None
        neighbors = self._check_neighbors(structures, neighbors)
        derivative = bool(wanted & {"forces", "stress"})
        compact = isinstance(neighbors, CompactNeighbors)
        if (derivative or compact) and not create_graph and not taps:
            found = self.evaluate(structures, neighbors)
            terms, features = found.terms, dict[str, Tensor]()
            atomic, forces, virial = terms.sum(dim=1), found.forces, found.virial
        else:
            local, forces, virial = TorchEngine(self).output(
                structures, spelled_out(neighbors), taps, derivative, create_graph
            )
            atomic, terms = local.atomic_energies.to(torch.float64), local.float64_terms
            features = local.features
        # Lists that are given are of structures that were looked through before.
        if not given and isinstance(neighbors, NeighborList):
            refuse_coinciding_atoms(structures, neighbors)
        elif not create_graph and not bool(atomic.isfinite().all()):
            refuse_coinciding_atoms(structures)
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
        self.check_precision()
        structures = structures.with_species_table(self.species_table)
        pairs = spelled_out(self._check_neighbors(structures, neighbors))
        return TorchEngine(self).hessian_vector_product(structures, vector, pairs)

    def check_precision(self) -> None:
        """Refuse a potential that was cast to fewer digits than float32 has.

        Raises
        ------
        ModelError
            With the dtype.
        """
        for tensor in chain(self.parameters(), self.buffers()):
            if tensor.is_floating_point() and tensor.dtype not in (torch.float32, torch.float64):
                raise ModelError(
                    f"the potential is in {str(tensor.dtype).removeprefix('torch.')}, whose low "
                    f"precision gives wrong energies: cast it to float32 or float64"
                )

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
        raise ModelError(f"{kind} with several interaction layers cannot work with ghost atoms")
