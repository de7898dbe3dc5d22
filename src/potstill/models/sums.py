"""Potentials made of potentials: sums and means; and the per-species energy offsets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from potstill.errors import ModelError
from potstill.models.base import (
    Edges,
    FirstOrder,
    LocalOutput,
    Pairs,
    Potential,
    TapSpec,
)
from potstill.models.engines import NativeMean, NativeParts
from potstill.species import SpeciesTable
from potstill.structures import Structures


class SpeciesOffsets(Potential):
    """A constant energy per atom of each species, in float64; not trained.

    In float32, offsets of hundreds or thousands of eV would lose meV.

    Parameters
    ----------
    species_table : SpeciesTable
        The species.
    offsets : sequence of float
        (n_species,) eV per atom.
    """

    kind = "offsets"
    traceable = True
    exact_buffers = ("offsets",)
    offsets: Tensor

    def __init__(self, species_table: SpeciesTable, offsets: Sequence[float] | Tensor) -> None:
        super().__init__(species_table, cutoff=0.5)  # any: pairs are not looked at
        values = torch.as_tensor(offsets, dtype=torch.float64).clone()
        if values.shape != (len(species_table),):
            raise ModelError(f"{len(species_table)} species need as many offsets: {values.shape}")
        self.register_buffer("offsets", values)

    @property
    def reach(self) -> float:
        """The cutoff."""
        return self.cutoff

    def forward(
        self, species: Tensor, edges: Edges, r_ij: Tensor, n_local: int, taps: Sequence[str] = ()
    ) -> LocalOutput:
        """(n_local,) offsets of the atoms' species."""
        return LocalOutput(self.offsets[species[:n_local]])

    def native_parts(self) -> NativeParts:
        """The offsets."""
        return NativeParts(offsets=self.offsets)

    def hyperparameters(self) -> dict[str, Any]:
        """The offsets themselves."""
        return {"offsets": self.offsets.tolist()}


class SumPotential(Potential):
    """The sum of named potentials; atomic energies are added in float64.

    A student is `SumPotential(offsets=..., prior=..., network=...)`. Taps of the component called
    `network` keep their names, those of others get the component's name as prefix.

    Parameters
    ----------
    components : mapping of str to Potential
        At least one; all with the same species table.
    """

    kind = "sum"

    def __init__(self, components: Mapping[str, Potential]) -> None:
        if not components:
            raise ModelError("a sum of potentials needs at least one")
        tables = {c.species_table for c in components.values()}
        if len(tables) > 1:
            raise ModelError("the potentials of a sum must share one species table")
        super().__init__(tables.pop(), max(c.cutoff for c in components.values()))
        self.parts = nn.ModuleDict(components)
        direct = {name for name, c in components.items() if c.direct_forces}
        derived = {n for n, c in components.items() if n not in direct and c.kind != "offsets"}
        if direct and derived:
            raise ModelError(
                f"'{min(direct)}' predicts forces directly and cannot be added to "
                f"'{min(derived)}', whose forces are derived from its energy"
            )
        self.direct_forces = bool(direct)
        self.traceable = all(c.traceable for c in components.values())

    @property
    def components(self) -> dict[str, Potential]:
        """The summands by name."""
        return {name: cast(Potential, part) for name, part in self.parts.items()}

    def without(self, name: str) -> SumPotential:
        """The sum of the other components."""
        return SumPotential({k: c for k, c in self.components.items() if k != name})

    def __getitem__(self, name: str) -> Potential:
        return cast(Potential, self.parts[name])

    @property
    def dtype(self) -> torch.dtype:
        """Sums are formed in float64."""
        return torch.float64

    @property
    def reach(self) -> float:
        """The farthest of the components."""
        return max(component.reach for component in self.components.values())

    @property
    def taps(self) -> dict[str, TapSpec]:
        """Taps of all components."""
        return {
            _tap_name(name, tap): spec
            for name, component in self.components.items()
            for tap, spec in component.taps.items()
        }

    @property
    def default_tap(self) -> str | None:
        """That of the network."""
        network = self.components.get("network")
        return None if network is None else network.default_tap

    def forward(
        self, species: Tensor, edges: Edges, r_ij: Tensor, n_local: int, taps: Sequence[str] = ()
    ) -> LocalOutput:
        """(n_local,) sum of the components' atomic energies, float64."""
        total = torch.zeros(n_local, dtype=torch.float64, device=species.device)
        features: dict[str, Tensor] = {}
        forces: Tensor | None = None
        for name, component in self.components.items():
            own = [tap for tap in component.taps if _tap_name(name, tap) in taps]
            output = component(species, edges, r_ij, n_local, own)
            total = total + output.atomic_energies.to(torch.float64)
            features |= {_tap_name(name, tap): f for tap, f in output.features.items()}
            if output.forces is not None:
                own_forces = output.forces.to(torch.float64)
                forces = own_forces if forces is None else forces + own_forces
        return LocalOutput(total, features, forces)

    def native_parts(self) -> NativeParts | None:
        """Those of all components together."""
        total: NativeParts | None = NativeParts()
        for component in self.components.values():
            part = component.native_parts()
            total = None if total is None or part is None else total.merged(part)
        return total

    def evaluate(self, structures: Structures, neighbors: Pairs) -> FirstOrder:
        """Sums over the components, each in its own way."""
        parts = [c.evaluate(structures, neighbors) for c in self.components.values()]
        return FirstOrder(
            torch.stack([part.terms.sum(dim=1, keepdim=True) for part in parts]).sum(dim=0),
            torch.stack([part.forces for part in parts]).sum(dim=0),
            torch.stack([part.virial for part in parts]).sum(dim=0),
        )

    def hyperparameters(self) -> dict[str, Any]:
        """Kinds and hyper-parameters of the components."""
        return {
            "components": {
                name: {"kind": c.spec, "hyperparameters": c.hyperparameters()}
                for name, c in self.components.items()
            }
        }

    def regularized_weights(self) -> list[Tensor]:
        """Those of the components."""
        return [w for part in self.components.values() for w in part.regularized_weights()]


class MeanPotential(Potential):
    """The mean of potentials: a committee as one potential, with the cost of all of them.

    Parameters
    ----------
    components : mapping of str to Potential
        At least one; all with the same species table, and all or none with direct forces.
    """

    kind = "mean"

    def __init__(self, components: Mapping[str, Potential]) -> None:
        total = SumPotential(components)
        super().__init__(total.species_table, total.cutoff)
        self.total = total
        self.direct_forces, self.traceable = total.direct_forces, total.traceable

    @property
    def members(self) -> tuple[Potential, ...]:
        """The potentials, in order."""
        return tuple(self.total.components.values())

    @property
    def dtype(self) -> torch.dtype:
        """Means are formed in float64."""
        return torch.float64

    @property
    def reach(self) -> float:
        """The farthest of the members."""
        return self.total.reach

    def forward(
        self, species: Tensor, edges: Edges, r_ij: Tensor, n_local: int, taps: Sequence[str] = ()
    ) -> LocalOutput:
        """(n_local,) mean of the members' atomic energies, float64."""
        found, share = self.total(species, edges, r_ij, n_local), 1.0 / len(self.members)
        forces = None if found.forces is None else share * found.forces
        return LocalOutput(share * found.atomic_energies, forces=forces)

    def native_parts(self) -> NativeParts | None:
        """A call for each member, if all have native kernels."""
        parts = [member.native_parts() for member in self.members]
        whole = [part for part in parts if part is not None and part.network is not None]
        if len(whole) < len(parts):
            return None
        return NativeMean(**vars(whole[0]), others=tuple(whole[1:]))

    def evaluate(self, structures: Structures, neighbors: Pairs) -> FirstOrder:
        """Means over the members, each in its own way."""
        found, share = self.total.evaluate(structures, neighbors), 1.0 / len(self.members)
        return FirstOrder(share * found.terms, share * found.forces, share * found.virial)

    def hyperparameters(self) -> dict[str, Any]:
        """As of a sum."""
        return self.total.hyperparameters()

    def regularized_weights(self) -> list[Tensor]:
        """Those of the members."""
        return self.total.regularized_weights()


def _tap_name(component: str, tap: str) -> str:
    return tap if component == "network" else f"{component}.{tap}"


def summands(potential: Potential) -> Iterator[Potential]:
    """The parts of a sum, and of sums in it."""
    if not isinstance(potential, SumPotential):
        yield potential
        return
    for component in potential.components.values():
        yield from summands(component)
