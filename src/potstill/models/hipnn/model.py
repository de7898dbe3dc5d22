"""HIP-NN with tensor sensitivities.

Lubbers, Smith, Barros, J. Chem. Phys. 148, 241715 (2018); Chigaev et al., J. Chem. Phys. 158,
184108 (2023). Hyper-parameters keep the names of the hippynn package, with which energies and
forces agree for equal weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, Literal, Self, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from potstill.core import (
    HipnnParameters,
    HipnnShape,
    hipnn_md,
    hipnn_pass,
    weighted_energy,
)
from potstill.errors import suggest
from potstill.models.base import (
    Edges,
    LocalOutput,
    Potential,
    Regularizer,
    StartingData,
    TapSpec,
    refuse_ghosts,
)
from potstill.models.engines import NativeKernels
from potstill.models.hipnn.interactions import (
    CUTOFF_FUNCTIONS,
    HIGHEST_RANK,
    Geometry,
    Indices,
    Interaction,
    NormInteraction,
    SmoothInteraction,
    linear,
)
from potstill.models.hyper import Hyperparameters, Real
from potstill.neighbors import build_neighbor_list, pair_vectors
from potstill.species import SpeciesTable
from potstill.structures import Structures

_Result = TypeVar("_Result")

#: Channels that form triples by default.
N_TRIPLES = 8


class Residual(nn.Module):
    """x + W2 softplus(layer(x)) + b2, with a linear map of x where widths differ."""

    def __init__(self, layer: Interaction | nn.Linear, n_in: int, n_out: int) -> None:
        super().__init__()
        self.layer = layer
        self.res_layer = nn.Linear(n_out, n_out)
        self.adjust = nn.Linear(n_in, n_out, bias=False) if n_in != n_out else None

    def forward(self, features: Tensor, *geometry: Geometry) -> Tensor:
        """(n, n_out) from (n, n_in), or from (N, n_in) of which the first n are local."""
        change = self.res_layer(nn.functional.softplus(self.layer(features, *geometry)))
        same = features[: change.shape[0]]
        return change + (same if self.adjust is None else self.adjust(same))

    def kernel_tensors(self) -> list[Tensor]:
        """The parameters as native kernels take them, in their order."""
        inner = self.layer
        own = inner.kernel_tensors() if isinstance(inner, Interaction) else inner.parameters()
        adjust = [] if self.adjust is None else self.adjust.parameters()
        return [*own, *self.res_layer.parameters(), *adjust]

    def regularized_weights(self) -> list[Tensor]:
        """All matrices of the layer."""
        inner = self.layer
        weights = inner.regularized_weights() if isinstance(inner, Interaction) else [inner.weight]
        adjust = [] if self.adjust is None else [self.adjust.weight]
        return [self.res_layer.weight, *weights, *adjust]


def _through(
    block: Sequence[Residual], features: Tensor, geometry: Geometry
) -> tuple[Tensor, Tensor]:
    """Features behind a block's interaction layer, and behind all of its layers."""
    first = features = block[0](features, geometry)
    for layer in block[1:]:
        features = layer(features)
    return first, features


class HIPNNHyperparameters(Hyperparameters):
    """Hyper-parameters of HIP-NN; the defaults are a small student for any elements.

    Parameters
    ----------
    n_features : int
        Width of every layer.
    n_sensitivities : int
        Radial functions per interaction layer.
    dist_soft_min : float
        First initial center of the Gaussians of `norms`, Å: about the shortest distance in data.
    dist_soft_max : float
        Last initial center, Å, at most the cutoff.
    dist_hard_max : float
        Cutoff, Å.
    n_atom_layers : int
        Feed-forward layers after each interaction layer.
    n_interaction_layers : int
        Number of blocks.
    l_max : int
        Highest rank of the tensors: 0 to 4 (`norms`: to 2).
    cusp_reg : float
        Added under the square root of `norms`: elastic constants and phonons need more than the
        1e-6 of hippynn.
    cutoff_function : {"polynomial", "cosine_squared"}
        The former has two continuous derivatives; the latter is the original.
    invariants : {"smooth", "norms"}
        `smooth`: Chebyshev polynomials, weights for every rank, invariants that are analytic where
        tensors vanish by symmetry (`SmoothInteraction`). `norms`: the original, as in hippynn.
    n_channels : int
        Tensors of each rank in `smooth`; `norms` has `n_features` of them.
    n_triples : int
        Of these in `smooth`, whose invariant products of three are taken: four-body terms. All,
        where there are fewer than 8.
    n_high_sensitivities : int
        Radial functions of the tensors of rank `first_high_rank` and higher in `smooth`, the first
        of `n_sensitivities`. By default half of them, rounded up: most of the work per pair is in
        these ranks.
    first_high_rank : int
        With 3, the default, vectors and matrices have all radial functions; with 1, which is
        cheaper, density alone has.

    Notes
    -----
    Where all of the first six are given and `invariants` is not, as in files from before there were
    `smooth` ones, it is `norms`, with `l_max` 1 and `cusp_reg` 1e-6 by default. Where they are all
    given beside `smooth`, `n_triples` is 0 and `n_high_sensitivities` is `n_sensitivities` where it
    is not, as in files from before there was a choice.
    """

    n_features: int = Field(default=24, ge=1)
    n_sensitivities: int = Field(default=10, ge=1)
    dist_soft_min: Real = 0.8
    dist_soft_max: Real = 4.5
    dist_hard_max: float = 5.5
    n_atom_layers: int = Field(default=2, ge=0)
    n_interaction_layers: int = Field(default=1, ge=1)
    l_max: int = Field(default=3, ge=0, le=HIGHEST_RANK)
    cusp_reg: Real = Field(default=1e-2, ge=0)
    cutoff_function: str = "polynomial"
    invariants: Literal["smooth", "norms"] = "smooth"
    n_channels: int = Field(default=24, ge=1)
    n_triples: int = Field(default=N_TRIPLES, ge=0)
    n_high_sensitivities: int = Field(default=5, ge=1)
    first_high_rank: int = Field(default=3, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _of_norms(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        once_required = values.keys() >= set(list(cls.model_fields)[:6])

        def given(name: str) -> Any:
            return values.get(name, cls.model_fields[name].default)

        own: dict[str, Any] = {"n_triples": 0, "n_high_sensitivities": given("n_sensitivities")}
        if values.get("invariants", "norms" if once_required else "smooth") == "norms":
            own |= {"l_max": 1, "cusp_reg": 1e-6} if once_required else {"l_max": 2}
            own |= {"cutoff_function": "cosine_squared", "invariants": "norms"}
            own["n_channels"] = given("n_features")
        elif not once_required:
            most, n = given("n_channels"), given("n_sensitivities")
            own["n_triples"] = most if isinstance(most, int) and most < N_TRIPLES else N_TRIPLES
            own["n_high_sensitivities"] = (n + 1) // 2 if isinstance(n, int) else n
        return own | values

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.invariants == "norms" and self.l_max > 2:
            raise ValueError(f"l_max must be 0, 1 or 2 with norms, not {self.l_max}")
        if self.invariants == "norms" and self.n_channels != self.n_features:
            raise ValueError("n_channels is of smooth invariants; norms have n_features of them")
        if self.n_triples > (0 if self.invariants == "norms" else self.n_channels):
            raise ValueError(
                f"n_triples must be at most n_channels ({self.n_channels}) of smooth invariants, "
                f"and 0 with norms, not {self.n_triples}"
            )
        least = self.n_sensitivities if self.invariants == "norms" else 1
        if not least <= self.n_high_sensitivities <= self.n_sensitivities:
            raise ValueError(
                f"n_high_sensitivities must be at most n_sensitivities ({self.n_sensitivities}), "
                f"and equal with norms, not {self.n_high_sensitivities}"
            )
        low, high, cutoff = self.dist_soft_min, self.dist_soft_max, self.dist_hard_max
        if not cutoff > 0.0 or (self.invariants == "norms" and not 0.0 < low < high <= cutoff):
            raise ValueError(
                "HIP-NN needs 0 < dist_soft_min < dist_soft_max <= dist_hard_max, "
                f"not {low}, {high}, {cutoff}"
            )
        if self.cutoff_function not in CUTOFF_FUNCTIONS:
            near = suggest(self.cutoff_function, CUTOFF_FUNCTIONS)
            raise ValueError(f"unknown cutoff function '{self.cutoff_function}'{near}")
        return self

    @property
    def n_tensor_sensitivities(self) -> tuple[int, ...]:
        """Radial functions of the tensors of rank 1 to `l_max`."""
        n, high, first = self.n_sensitivities, self.n_high_sensitivities, self.first_high_rank
        return tuple(n if rank < first else high for rank in range(1, self.l_max + 1))

    def to_json(self) -> dict[str, Any]:
        """All values; those of `norms`, and what there was no choice of, as they were then.

        Fingerprints of such potentials stay what they were.
        """
        values = super().to_json()
        if self.n_triples == 0:
            del values["n_triples"]
        if self.n_high_sensitivities == self.n_sensitivities:
            del values["n_high_sensitivities"]
        if self.first_high_rank == 3:
            del values["first_high_rank"]
        if self.invariants == "norms":
            del values["invariants"], values["n_channels"]
        return values


class HIPNN(Potential):
    """Hierarchically interacting particle neural network with tensor sensitivities.

    Parameters
    ----------
    species_table : SpeciesTable
        Species, one-hot encoded.
    *values, **named
        Fields of `HIPNNHyperparameters`, in their order or by name.

    Notes
    -----
    The energy of an atom is the sum of E0 (a trainable energy per species) and one linear term per
    block. The tap `hierarchical_energies` returns the terms one by one, for `hierarchicality`.
    """

    kind = "hipnn"
    traceable = True
    compilable = True
    has_native_kernels = True
    hyper_class = HIPNNHyperparameters
    hyper: HIPNNHyperparameters

    def __init__(self, species_table: SpeciesTable, *values: Any, **named: Any) -> None:
        p = HIPNNHyperparameters.of(*values, **named)
        super().__init__(species_table, p.dist_hard_max, p)
        if p.invariants == "smooth":  # norms bend where they are small
            self.float32_step = 3e-3
        n_features = p.n_features
        n_species = len(species_table)
        widths = [n_species] + [n_features] * p.n_interaction_layers
        self.blocks = nn.ModuleList()
        for b, n_in in enumerate(widths[:-1]):
            unit_input = b == 0 and n_species == 1
            form = NormInteraction if p.invariants == "norms" else SmoothInteraction
            interaction = form(n_in, n_features, p, unit_input=unit_input)
            layers = [Residual(interaction, n_in, n_features)]
            for _ in range(p.n_atom_layers):
                layers.append(Residual(linear(n_features, n_features), n_features, n_features))
            self.blocks.append(nn.ModuleList(layers))
        self.energy_layers = nn.ModuleList(
            nn.Linear(width, 1, bias=k > 0) for k, width in enumerate(widths)
        )

    @property
    def reach(self) -> float:
        """A cutoff per interaction layer."""
        return self.hyper.n_interaction_layers * self.cutoff

    @property
    def taps(self) -> dict[str, TapSpec]:
        """`interaction_b` and `block_b` per block b, and `hierarchical_energies`."""
        taps = {
            "hierarchical_energies": TapSpec("node_scalar", self.hyper.n_interaction_layers + 1)
        }
        for b in range(self.hyper.n_interaction_layers):
            taps[f"interaction_{b}"] = TapSpec("node_scalar", self.hyper.n_features)
            taps[f"block_{b}"] = TapSpec("node_scalar", self.hyper.n_features)
        return taps

    @property
    def default_tap(self) -> str:
        """What the last energy layer reads."""
        return f"block_{self.hyper.n_interaction_layers - 1}"

    def forward(
        self, species: Tensor, edges: Edges, r_ij: Tensor, n_local: int, taps: Sequence[str] = ()
    ) -> LocalOutput:
        """(n_local,) atomic energies in float64, summed over the hierarchy.

        Ghosts are refused where there are several interaction layers, between which their features
        would have to come from their owners.
        """
        return self._evaluate(self.prepare(species, edges, r_ij, n_local), r_ij, taps)

    def prepare(self, species: Tensor, edges: Edges, r_ij: Tensor, n_local: int) -> Indices:
        """The slots of every atom's neighbors."""
        if self.hyper.n_interaction_layers > 1:
            refuse_ghosts("HIP-NN", species, n_local)
        pair, used = edges.padded(n_local)
        return Indices(species, pair, edges.neighbor[pair] if edges.n_pairs else pair, used)

    def prepared_terms(self, prepared: Indices, r_ij: Tensor) -> Tensor:
        """As of the base class: the energies of the hierarchy."""
        return self._evaluate(prepared, r_ij).float64_terms

    def _evaluate(self, indices: Indices, r_ij: Tensor, taps: Sequence[str] = ()) -> LocalOutput:
        features, geometry = self._start(indices, r_ij)
        tapped: dict[str, Tensor] = {}
        # (n_local, 1) each
        terms = [self.energy_layers[0](features[: indices.pair.shape[0]])]
        for b, block in enumerate(self._layers()):
            tapped[f"interaction_{b}"], features = _through(block, features, geometry)
            tapped[f"block_{b}"] = features
            terms.append(self.energy_layers[b + 1](features))
        hierarchy = torch.cat(terms, dim=1)
        tapped["hierarchical_energies"] = hierarchy
        # E0 can be hundreds of eV: the hierarchy is summed in float64 whatever the network's dtype.
        atomic = hierarchy.to(torch.float64).sum(dim=1)
        return LocalOutput(atomic, {name: tapped[name] for name in taps}, terms=hierarchy)

    def _start(self, indices: Indices, r_ij: Tensor) -> tuple[Tensor, Geometry]:
        """Species as features, and the geometry of all layers."""
        one_hot = nn.functional.one_hot(indices.species, len(self.species_table)).to(self.dtype)
        return one_hot, Geometry(indices, r_ij.to(self.dtype), self.hyper.l_max)

    @property
    def n_terms(self) -> int:
        """E0 and one term per block."""
        return self.hyper.n_interaction_layers + 1

    def native_kernels(self) -> NativeKernels:
        """Those of `potstill.core`; they take the parameters as they are when called."""
        return NativeKernels(
            self.dtype,
            partial(self._natively, hipnn_pass),
            lambda *inputs: weighted_energy(self.native_parameters(), *inputs),
            partial(self._natively, hipnn_md),
        )

    def _natively(self, kernel: Callable[..., _Result], *inputs: Any, **options: Any) -> _Result:
        """What needs no gradient by the parameters: these are derived anew only after a change.

        Their values are compared, since not all that changes a tensor counts as a new version.
        """
        with torch.no_grad():
            now = torch.cat([t.reshape(-1) for t in self._all_tensors()])
            before, derived = _DERIVED.get(self, (now[:0], None))
            same = before.dtype == now.dtype and before.device == now.device
            if derived is None or not (same and torch.equal(before, now)):
                derived = self.native_parameters().joined()
                _DERIVED[self] = now, derived
        return kernel(derived, *inputs, **options)

    def _all_tensors(self) -> Iterator[Tensor]:
        """Parameters and buffers, without the walk over all modules that this takes else."""
        places = _PLACES.get(self)
        if places is None:
            held = [(module._parameters, module._buffers) for module in self.modules()]
            places = _PLACES[self] = tuple(place for pair in held for place in pair if place)
        for place in places:
            yield from (tensor for tensor in place.values() if tensor is not None)

    def native_parameters(self) -> HipnnParameters:
        """Shape and parameters for the kernels of `potstill.core`, in the order of `parameters()`.

        Raises
        ------
        ModelError
            If the parameters are not on the CPU, in float32 or float64.
        """
        p = self.hyper
        shape = _interned(
            HipnnShape(
                n_species=len(self.species_table),
                n_features=p.n_features,
                n_sensitivities=p.n_sensitivities,
                l_max=p.l_max,
                n_interaction_layers=p.n_interaction_layers,
                n_atom_layers=p.n_atom_layers,
                cutoff=self.cutoff,
                cusp_reg=p.cusp_reg,
                cutoff_function=p.cutoff_function,
                invariants=p.invariants,
                n_channels=p.n_channels,
                n_triples=p.n_triples,
                n_tensor_sensitivities=p.n_tensor_sensitivities,
            )
        )
        tensors = [t for block in self._layers() for layer in block for t in layer.kernel_tensors()]
        tensors += self.energy_layers.parameters()
        return HipnnParameters(shape, tuple(tensors))

    def regularized_weights(self) -> list[Tensor]:
        """Interaction and atom layers, without biases and without the energy layers.

        The same choice as hippynn's `LPReg` on the network.
        """
        return [
            w for block in self._layers() for layer in block for w in layer.regularized_weights()
        ]

    def _layers(self) -> list[list[Residual]]:
        """The layers of each block: the interaction layer, then the atom layers."""
        return [list(cast(Iterable[Residual], block)) for block in self.blocks]

    def initialize_from(self, data: StartingData) -> None:
        """Whiten the sums over neighbors; the fitted energies as E0, and small corrections."""
        if self.hyper.invariants == "smooth" and data.batches:
            self._whiten(data.batches)
        self.initialize_energy_layers(data.offsets)

    @torch.no_grad()
    def _whiten(self, batches: Sequence[Structures]) -> None:
        """Block after block, since each sees the features of the one before."""
        known = []
        for batch in batches:
            pairs = build_neighbor_list(batch, self.cutoff)
            edges, r_ij = Edges.of(batch, pairs), pair_vectors(batch, pairs)
            indices = self.prepare(batch.species, edges, r_ij, batch.n_atoms)
            known.append(self._start(indices, r_ij))
        for block in self._layers():
            layer = cast(SmoothInteraction, block[0].layer)
            layer.whiten(torch.cat([layer.environment(*state) for state in known]))
            known = [(_through(block, *state)[1], state[1]) for state in known]

    def regularizers(self) -> dict[str, Regularizer]:
        """`hierarchicality`: later terms should be smaller than earlier ones."""
        return {"hierarchicality": hierarchicality}

    @torch.no_grad()
    def initialize_energy_layers(self, e0: Tensor, decay_factor: float = 1e-2) -> None:
        """Set E0 and scale the later energy layers down, so that training starts near the fit.

        Parameters
        ----------
        e0 : Tensor
            (n_species,) eV per atom, from a linear fit to the training energies.
        decay_factor : float
            Energy layer n is multiplied by decay_factor^(2^(n-1)), as hippynn does.
        """
        first, *later = cast(Iterable[nn.Linear], self.energy_layers)
        first.weight.copy_(e0.to(self.dtype).reshape(1, -1))
        for layer in later:
            layer.weight.mul_(decay_factor)
            layer.bias.mul_(decay_factor)
            decay_factor *= decay_factor


def hierarchicality(terms: Tensor) -> Tensor:
    """(n_atoms,) sum over n of E_n² / (E_n² + E_(n-1)²) from (n_atoms, n_terms) energies.

    Lubbers et al. 2018, Eq. 10. It is zero, with zero gradient, where both terms vanish. It
    depends on the zero of energy, since E_0 does.
    """
    square = terms.square()
    later, earlier = square[:, 1:], square[:, :-1]
    total = later + earlier
    return (later / torch.where(total > 0, total, 1.0)).sum(dim=1)


@lru_cache(maxsize=64)
def _interned(shape: HipnnShape) -> HipnnShape:
    """The first of all equal shapes: what is derived from it is derived once."""
    return shape


#: What the kernels were last given of a model, and the values that it was derived from. Not an
#: attribute: copies and pickles need none of it.
_DERIVED: WeakKeyDictionary[HIPNN, tuple[Tensor, HipnnParameters]] = WeakKeyDictionary()

#: Where the modules of a model hold their tensors. Modules do not come and go: the sizes are fixed.
_PLACES: WeakKeyDictionary[HIPNN, tuple[Mapping[str, Tensor | None], ...]] = WeakKeyDictionary()
