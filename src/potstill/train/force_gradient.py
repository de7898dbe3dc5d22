"""How the gradient of a loss of forces and stress is taken: one switch, three ways.

Smith, Lubbers, Thompson, Barros, arXiv:2006.05475. Let g_i = dL/dF_i, G = dL/dσ and c = dL/de, the
cotangents of forces, stress and the terms e of the atomic energies. With F = -dE/dr and
σ = (dE/d strain) / V the gradient of the loss is a directional derivative of the energy's gradient,

    ∇L = Σ c ∇e(r) - d/dη ∇E(r + η u) at η = 0        (Eqs. 5 and 6)

where u displaces the atoms by g and strains positions and cell together by -G / V. In pair vectors,
u_ij = g_j - g_i - r_ij G / V (V the volume; G is symmetric). The neighbor list stays as it is.

`backpropagation` differentiates twice. `central_difference` takes the slope between r+ and r-, with
η = epsilon a0 / g0 per system (Eqs. 7 to 10): three first-order passes over the parameters, at r,
r+ and r-. Folded, two are enough: ∇e(r) is replaced by the mean over r+ and r-, an O(η²) change, so
that atom i weighs c_i / 2 - 1 / (2η) at r+ and c_i / 2 + 1 / (2η) at r-. `forward_over_reverse`
(Pearlmutter) takes the slope exactly, by dual numbers. Both take E and dE/dr without a graph first.

A loss of internal features is a function of the positions r alone: the first-order methods add one
more pass at r for it, through the features.

A loss of second derivatives of the energy (rows of the Hessian) is no function of what first-order
passes give: its gradient needs `backpropagation`, or dual numbers once more.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import lightning_fabric
import torch
from torch import Tensor, nn

from potstill.distill.terms import Batch
from potstill.errors import ConfigError, ModelError
from potstill.models import Potential
from potstill.models.base import Edges, Pairs
from potstill.models.graph import stress_from_virial
from potstill.neighbors import pair_vectors
from potstill.properties import LEARNABLE, PROPERTIES
from potstill.structures import NeighborList, Structures
from potstill.train.objective import LossValue, Objective
from potstill.train.settings import ForceGradientSettings

#: The length a0 of Eq. 9, Å: atoms move by at most epsilon times this.
LENGTH = 1.0

#: Epsilon in float64; in float32 the network says it. See docs/force-gradients.md for measurements.
DEFAULT_EPSILON = 3e-6

#: Largest error of the proxy (see `proxy_error`) that training accepts without a warning.
SAFE_PROXY_ERROR = {torch.float64: 1e-5, torch.float32: 1e-2}

#: Steps between two looks at the proxy.
CHECK_EVERY = 100

#: Predicted values that a loss may be a function of, if first-order passes are to be enough.
FIRST_ORDER = (*LEARNABLE, "terms")


@dataclass(frozen=True)
class LossGradient:
    """The passes whose gradients add up to that of the loss, one graph alive at a time.

    `parts` are the loss and its parts, scalars on their device; each of `passes` returns a scalar
    to be differentiated.
    """

    parts: dict[str, Tensor]
    passes: Sequence[Callable[[], Tensor]]

    def backward(self, fabric: lightning_fabric.Fabric, module: nn.Module) -> None:
        """Accumulate the gradient in the parameters; processes exchange it in the last pass."""
        last = len(self.passes) - 1
        for k, run in enumerate(self.passes):
            with fabric.no_backward_sync(module, enabled=k < last):  # type: ignore[arg-type]
                fabric.backward(run())


class NetworkPasses(nn.Module):
    """Everything of a network that is differentiated, as a module's forward.

    Data-parallel wrappers see only calls of `forward`, so these go through it by name.
    """

    def __init__(self, network: Potential) -> None:
        super().__init__()
        self.network = network

    def forward(self, name: str, *args: Any) -> Any:
        """Call `predict`, `weighted_energy`, `weighted_features` or `directional` with `args`."""
        return getattr(self, f"_{name}")(*args)

    def _predict(
        self, structures: Structures, neighbors: NeighborList, wanted: tuple[str, ...]
    ) -> dict[str, Tensor]:
        return predict_values(self.network, structures, neighbors, wanted, create_graph=True)

    def _weighted_energy(
        self, copies: Sequence[tuple[Structures, Tensor]], neighbors: Pairs
    ) -> Tensor:
        n_terms = self.network.n_terms
        spread = [(at, weights.expand(-1, n_terms).contiguous()) for at, weights in copies]
        return self.network.weighted_energy(spread, neighbors)

    def _weighted_features(
        self, structures: Structures, neighbors: NeighborList, weights: dict[str, Tensor]
    ) -> Tensor:
        """Weighted sum of features at r, which needs first derivatives only."""
        taps = tuple(weights)
        found = self.network.predict(structures, neighbors, (), taps=taps, create_graph=True)
        products = [(weights[tap] * found.features[tap]).sum() for tap in taps]
        return torch.stack(products).sum()

    def _directional(self, point: Point, direction: Tensor, weights: Tensor) -> Tensor:
        """Scalar whose gradient is Σ weights ∇e(r) + d/dη ∇E(r + η direction).

        One sweep of dual numbers through the first-order gradient gives both: the weights of the
        terms are 1 + η weights.
        """
        twin = _TorchEnergy(self.network)
        trained = {k: p for k, p in twin.named_parameters() if p.requires_grad}

        def energy(parameters: dict[str, Tensor], r_ij: Tensor, weights: Tensor) -> Tensor:
            return torch.func.functional_call(twin, parameters, (point, r_ij, weights))

        def gradient(r_ij: Tensor, weights: Tensor) -> dict[str, Tensor]:
            return torch.func.grad(energy)(
                {k: p.detach() for k, p in trained.items()}, r_ij, weights
            )

        primals = (point.r_ij, torch.ones_like(weights))
        slope = torch.func.jvp(gradient, primals, (direction, weights))[1]
        products = [(p * slope[name]).sum() for name, p in trained.items()]
        return torch.stack(products).sum()


def predict_values(
    network: Potential,
    structures: Structures,
    neighbors: NeighborList,
    wanted: Sequence[str],
    *,
    create_graph: bool = False,
) -> dict[str, Tensor]:
    """What a loss is a function of, by name, in float64: properties, `terms`, features by tap."""
    taps = tuple(name for name in wanted if name in network.taps)
    names = [name for name in wanted if name not in taps and name != "terms"]
    found = network.predict(structures, neighbors, names, taps=taps, create_graph=create_graph)
    return found.values


class _TorchEnergy(nn.Module):
    """The weighted energy in torch operations, which alone know dual numbers."""

    def __init__(self, network: Potential) -> None:
        super().__init__()
        self.network = network

    def forward(self, point: Point, r_ij: Tensor, weights: Tensor) -> Tensor:
        species, n_atoms = point.structures.species, point.structures.n_atoms
        terms = self.network.partial_energies(species, point.edges, r_ij, n_atoms)
        return (weights * terms).sum()


@dataclass(frozen=True)
class Point:
    """A batch as a network sees it: in its species table, the neighbor list frozen."""

    structures: Structures
    neighbors: Pairs

    @classmethod
    def of(cls, network: Potential, structures: Structures, neighbors: Pairs) -> Point:
        """The point where a batch stands."""
        return cls(structures.with_species_table(network.species_table), neighbors)

    @cached_property
    def edges(self) -> Edges:
        """The pairs, for automatic differentiation."""
        assert isinstance(self.neighbors, NeighborList)
        return Edges.of(self.structures, self.neighbors)

    @cached_property
    def r_ij(self) -> Tensor:
        """(E, 3) float64, Å, without graph."""
        assert isinstance(self.neighbors, NeighborList)
        return pair_vectors(self.structures, self.neighbors).detach()


@dataclass(frozen=True)
class Cotangents:
    """Derivatives of a loss with respect to what was predicted at r, all in float64.

    Those of what the loss does not know are None.
    """

    partial: Tensor | None  #: (N, T) c, with respect to the terms of the atomic energies
    forces: Tensor  #: (N, 3) g
    strain: Tensor | None  #: (S, 3, 3) G / V, symmetric; zero where a cell is not periodic
    slope: Tensor  #: (S,) s = Σ g·F + G:σ of each system, which is -dE/dη
    #: With respect to the features at r, by tap.
    features: dict[str, Tensor] = field(default_factory=dict)

    def scale(self, point: Point) -> Tensor:
        """(S,) g0 of Eq. 10: max |g_i|, and what the strain moves at half the list's reach.

        Then no pair vector within that reach changes by more than 2 epsilon a0.
        """
        largest = point.structures.longest_by_system(self.forces)
        if self.strain is None:
            return largest
        return largest + 0.5 * point.neighbors.cutoff * torch.linalg.matrix_norm(self.strain)

    def direction(self, point: Point) -> Tensor:
        """(E, 3) u_ij = g_j - g_i - r_ij G / V."""
        moved = self.forces[point.edges.neighbor] - self.forces[point.edges.center]
        if self.strain is None:
            return moved
        strain = self.strain[point.structures.system_index[point.edges.center]]
        return moved - torch.einsum("ed,edk->ek", point.r_ij, strain)


@dataclass(frozen=True)
class Displacement:
    """The step from r to r+ of Eq. 8, in float64."""

    positions: Tensor  #: (N, 3) η (g - r G / V), Å
    cell: Tensor | None  #: (S, 3, 3) -η cell G / V, Å; None if cells do not move
    rate: Tensor  #: (S,) 1 / (2η); zero for systems with g0 = 0, which do not move

    @classmethod
    def along(
        cls, cotangents: Cotangents, point: Point, epsilon: float, g0: Tensor | None = None
    ) -> Displacement:
        """η = epsilon a0 / g0 (Eq. 9), system by system; g0 is Eq. 10's unless it is given."""
        g0 = cotangents.scale(point) if g0 is None else g0
        step = epsilon * LENGTH
        eta = torch.where(g0 > 0, step / torch.where(g0 > 0, g0, 1.0), 0.0)
        structures = point.structures
        system = structures.system_index
        direction, strain, cell = cotangents.forces, cotangents.strain, None
        if strain is not None:
            moved = torch.einsum("nd,ndk->nk", structures.positions, strain[system])
            direction = direction - moved
            cell = -eta[:, None, None] * (structures.cell @ strain)
        return cls(direction * eta[system].unsqueeze(1), cell, g0 / (2.0 * step))

    def apply(self, structures: Structures, sign: float) -> Structures:
        """The structures at r+ (sign 1), r (0) or r- (-1)."""
        if sign == 0.0:
            return structures
        cell = structures.cell if self.cell is None else structures.cell + sign * self.cell
        positions = structures.positions + sign * self.positions
        return structures.with_fields(positions=positions, cell=cell)


class ForceGradient:
    """The switch: turns a loss on a batch into passes that are differentiated once.

    Parameters
    ----------
    watch : bool
        Look at the proxy every `CHECK_EVERY` steps, and warn once where it is too large in three
        steps on end: the slope of a single batch may vanish by chance.
    features : bool
        Whether the loss will be a function of internal features, too. Native kernels keep theirs to
        themselves, so that a pass in torch is added where they give the forces.

    Raises
    ------
    ConfigError
        If the method does not work for this network.
    """

    def __init__(
        self,
        settings: ForceGradientSettings,
        network: Potential,
        *,
        watch: bool = True,
        features: bool = False,
    ) -> None:
        self.method = settings.method
        if self.method == "auto":
            first_order = network.uses_native and not network.direct_forces
            self.method = "central_difference" if first_order else "backpropagation"
        self.folded = settings.folded
        self.network = network
        self.epsilon = 0.0
        if self.method != "backpropagation" and network.direct_forces:
            raise ConfigError(
                f"{network.kind} predicts forces directly: train it with force_gradient.method = "
                "backpropagation"
            )
        if self.method == "central_difference":
            self.epsilon = epsilon_for(settings.epsilon, network)
        self._watching = watch
        self._features = features
        self._steps = 0
        self._suspicions = 0

    @property
    def takes_compact_lists(self) -> bool:
        """Whether all passes are native, so that neighbor lists need not be spelled out."""
        native = self.method == "central_difference" and self.network.uses_native
        return native and not self._features

    @property
    def margin(self) -> float:
        """Å beyond the cutoff that the neighbor list must reach, so that it holds for r+ and r-."""
        return 2.0 * self.epsilon * LENGTH

    def __call__(
        self, module: nn.Module, batch: Batch, wanted: tuple[str, ...], objective: Objective
    ) -> LossGradient:
        """Evaluate the loss on a batch and prepare the passes of its gradient.

        `module` is `NetworkPasses` of the network, possibly wrapped; `objective` a function of the
        predicted values `wanted`.
        """
        # Without derivatives in the loss no second derivative is needed.
        first_order = not any(n in PROPERTIES and PROPERTIES[n].derivative for n in wanted)
        if self.method == "backpropagation" or (first_order and not self.takes_compact_lists):
            value = objective(module("predict", batch.structures, batch.neighbors, wanted))
            return LossGradient(value.parts, [lambda: value.data + value.penalty])
        self._check(batch, wanted)
        point = Point.of(self.network, batch.structures, batch.neighbors)
        value, cotangents = loss_cotangents(self.network, point, wanted, objective)
        if first_order:
            assert cotangents.partial is not None
            copies = [(point.structures, cotangents.partial)]
            *earlier, last = [lambda: module("weighted_energy", copies, point.neighbors)]
        elif self.method == "central_difference":
            move = Displacement.along(cotangents, point, self.epsilon)
            self._watch(point, cotangents, move)
            *earlier, last = difference_passes(module, point, cotangents, move, folded=self.folded)
        else:
            c, direction = cotangents.partial, -cotangents.direction(point)
            if c is None:
                c = point.r_ij.new_zeros(point.structures.n_atoms, self.network.n_terms)
            *earlier, last = [partial(module, "directional", point, direction, c)]
        if cotangents.features:
            tapped = (point.structures, point.neighbors, cotangents.features)
            # What follows the features in the loss has parameters of its own.
            passes = [lambda: value.data, lambda: module("weighted_features", *tapped)]
            earlier = [*passes, *earlier]
        return LossGradient(value.parts, [*earlier, lambda: last() + value.penalty])

    def _check(self, batch: Batch, wanted: tuple[str, ...]) -> None:
        for name in set(wanted) - set(FIRST_ORDER) - set(self.network.taps):
            # A Hessian is a second derivative already: its loss' gradient takes a third.
            raise ConfigError(
                f"a loss of '{name}' needs force_gradient.method = backpropagation: "
                f"{self.method} supports {', '.join(FIRST_ORDER)}"
            )
        reach = self.network.cutoff + self.margin
        if batch.neighbors.cutoff < reach - 1e-9:
            raise ModelError(
                f"the neighbor list reaches {batch.neighbors.cutoff:g} Å, but displaced atoms need "
                f"{reach:g} Å"
            )

    def _watch(self, point: Point, cotangents: Cotangents, move: Displacement) -> None:
        """Look at the proxy now and then, and warn once if epsilon no longer suits the network."""
        due = self._steps % CHECK_EVERY == 0 or self._suspicions > 0
        self._steps += 1
        if not (self._watching and due):
            return
        error = proxy_error(self.network, point, cotangents, move)
        suspicious = error > SAFE_PROXY_ERROR[self.network.dtype]
        self._suspicions = self._suspicions + 1 if suspicious else 0
        if self._suspicions == 3:
            self._watching = False
            warnings.warn(
                f"central differences with epsilon = {self.epsilon:g} have a relative error of "
                f"{error:.1e}: find a better epsilon with `potstill epsilon`",
                stacklevel=2,
            )


def difference_passes(
    module: nn.Module, point: Point, cotangents: Cotangents, move: Displacement, *, folded: bool
) -> list[Callable[[], Tensor]]:
    """Weighted energies at r+ and r-, and at r unless they are folded in (Eq. 7)."""
    rate = move.rate[point.structures.system_index].unsqueeze(1)  # (N, 1), for all terms alike
    c = cotangents.partial
    if c is None:
        weights = {1.0: -rate, -1.0: rate}
    elif folded:
        weights = {1.0: 0.5 * c - rate, -1.0: 0.5 * c + rate}
    else:
        weights = {0.0: c, 1.0: -rate, -1.0: rate}
    copies = [(move.apply(point.structures, sign), weight) for sign, weight in weights.items()]
    # Kernels that keep no graph take all copies at once.
    spelled_out = isinstance(point.neighbors, NeighborList)
    passes = [[copy] for copy in copies] if spelled_out else [copies]
    return [partial(module, "weighted_energy", part, point.neighbors) for part in passes]


def epsilon_for(epsilon: float | None, network: Potential) -> float:
    """Epsilon as it is set, or that of the precision; ConfigError if that leaves no digits."""
    defaults = {torch.float64: DEFAULT_EPSILON, torch.float32: network.float32_step}
    if network.dtype not in defaults:
        name = str(network.dtype).removeprefix("torch.")
        raise ConfigError(
            f"central differences need float32 or float64, and the network is in {name}: use "
            "force_gradient.method = backpropagation or forward_over_reverse"
        )
    return defaults[network.dtype] if epsilon is None else epsilon


def energies(terms: Tensor, structures: Structures) -> dict[str, Tensor]:
    """(S,) energies and (N,) atomic energies with the (N, T) terms that they are sums of."""
    atomic = terms.sum(dim=1)
    energy = atomic.new_zeros(structures.n_systems)
    energy = energy.index_add(0, structures.system_index, atomic)
    return {"energy": energy, "atomic_energies": atomic, "terms": terms}


def loss_cotangents(
    network: Potential, point: Point, wanted: Sequence[str], objective: Objective
) -> tuple[LossValue, Cotangents]:
    """The loss at r, and its derivatives with respect to the predicted values.

    One inference of energies and dE/dr_ij; no graph of the parameters is built.
    """
    structures = point.structures
    found = network.evaluate(structures, point.neighbors)
    terms, forces = found.terms.requires_grad_(True), found.forces.requires_grad_(True)
    values = energies(terms, structures) | {"forces": forces}
    leaves = [terms, forces]
    taps = [name for name in wanted if name in network.taps and name not in FIRST_ORDER]
    if taps:
        tapped = network.predict(structures, point.neighbors, (), taps=taps).features
        values |= {t: tapped[t].to(torch.float64).requires_grad_(True) for t in taps}
        leaves += [values[tap] for tap in taps]
    if "stress" in wanted:
        values["stress"] = stress_from_virial(found.virial, structures).requires_grad_(True)
        leaves.append(values["stress"])
    value = objective(values)
    c, g, *rest = torch.autograd.grad(
        value.data, leaves, allow_unused=True, retain_graph=bool(taps)
    )
    of_taps, rest = rest[: len(taps)], rest[len(taps) :]
    features = {tap: f for tap, f in zip(taps, of_taps, strict=True) if f is not None}
    g = torch.zeros_like(forces) if g is None else g
    slope = g.new_zeros(structures.n_systems)
    slope = slope.index_add(0, structures.system_index, (g * forces.detach()).sum(dim=1))
    strain = None
    if rest and rest[0] is not None:
        periodic = structures.pbc.all(dim=1)[:, None, None]
        work = torch.where(periodic, rest[0] * values["stress"].detach(), 0.0)  # NaN elsewhere
        slope = slope + work.sum(dim=(1, 2))
        symmetric = 0.5 * (rest[0] + rest[0].transpose(1, 2))
        strain = torch.where(periodic, symmetric / structures.volume[:, None, None], 0.0)
    return value, Cotangents(c, g, strain, slope, features)


def proxy_error(
    network: Potential, point: Point, cotangents: Cotangents, move: Displacement
) -> float:
    """How well differences of the energy give s = Σ g·F + G:σ: |s~ - s| / |s| over the systems.

    s~ = -(E(r+) - E(r-)) / (2η), Eq. 12. Differences are taken term by term and atom by atom, so
    that constant energies of the species drop out before anything is summed.
    """
    exact = cotangents.slope
    error = torch.linalg.vector_norm(difference_slope(network, point, move) - exact)
    size = torch.linalg.vector_norm(exact)
    return float(error / size) if size > 0 else 0.0


def difference_slope(network: Potential, point: Point, move: Displacement) -> Tensor:
    """(S,) s~ = -(E(r+) - E(r-)) / (2η) of each system, float64."""

    def terms(sign: float) -> Tensor:
        return network.evaluate(move.apply(point.structures, sign), point.neighbors).terms

    change = (terms(1.0) - terms(-1.0)).sum(dim=1)
    total = change.new_zeros(point.structures.n_systems)
    return -move.rate * total.index_add(0, point.structures.system_index, change)
