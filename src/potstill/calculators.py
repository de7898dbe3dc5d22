"""The ASE calculator of a potential: reused neighbor lists, warnings outside the training range."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import ase
import numpy as np
import torch
from ase.calculators.calculator import Calculator, all_changes, compare_atoms
from ase.data import chemical_symbols
from ase.stress import full_3x3_to_voigt_6_stress
from torch import Tensor

from potstill.ase_bridge import same_species, species_of
from potstill.checkpoint import load_potential
from potstill.core import CompactNeighbors, build_compact_neighbors
from potstill.errors import DataError, ModelError
from potstill.features import pairs_within
from potstill.models import Potential
from potstill.models.engines import Core, NativeParts, Pairs
from potstill.models.graph import ONE_PLACE, refuse_coinciding_atoms
from potstill.neighbors import build_neighbor_list, pair_vectors
from potstill.structures import NeighborList, Structures
from potstill.units import AMU_PER_A3_IN_G_PER_CM3

# Atoms closer than this fraction of the shortest distance in the training data are extrapolation.
_CLOSE = 0.9

# Tolerance of the density range: a structure of the training set must not warn for rounding.
_DENSITY_TOLERANCE = 1e-3


class ExtrapolationWarning(UserWarning):
    """A structure lies outside what the potential was trained on."""


class PotstillCalculator(Calculator):
    """ASE calculator of a potstill potential.

    Gives `energy`, `free_energy` (the same), `energies`, `forces` and, for cells that are periodic
    along all axes, `stress` in ASE's Voigt order (xx, yy, zz, yz, xz, xy), eV/Å³. A potential with
    direct forces gives no stress, and `conservative` is False.

    The neighbor list reaches `skin` farther than the potential and is reused until atoms or cell
    have moved so far that a pair might be missing; results do not depend on it.

    Parameters
    ----------
    potential : Potential or path
        A model, or a checkpoint.
    skin : float
        Å.
    core : {"auto", "native", "torch"}, optional
        Kernels, set for the potential if given: native ones where they serve it, always, or never.
    info : mapping, optional
        What is known of the potential, as `load_potential` returns it. If it tells what the
        potential was trained on, other elements are refused, and short distances and foreign
        densities give an `ExtrapolationWarning`, each kind once.
    """

    name = "potstill"
    implemented_properties = ["energy", "free_energy", "energies", "forces", "stress"]  # noqa: RUF012

    def __init__(
        self,
        potential: Potential | str | Path,
        skin: float = 1.0,
        info: Mapping[str, Any] | None = None,
        core: Core | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(potential, Potential):
            potential, loaded = load_potential(potential)
            info = loaded if info is None else info
        if skin < 0:
            raise ModelError(f"the skin must not be negative: {skin} Å")
        if core is not None:
            potential.use_core(core)
        self.potential = potential
        self.skin = float(skin)
        self.info = dict(info or {})
        self.n_neighbor_lists = 0  # built so far
        self.conservative = not potential.direct_forces
        if potential.direct_forces:
            self.implemented_properties = ["energy", "free_energy", "energies", "forces"]
        self._trained_on: Mapping[str, Any] = self.info.get("trained_on") or {}
        self._limits = _distance_limits(
            potential.species_table.names, self._trained_on.get("shortest_distances") or {}
        )
        self._warned: set[str] = set()
        self._structures: Structures | None = None  # the latest geometry
        self._taken: ase.Atoms | None = None  # its species
        self._reference: Structures | None = None  # where the list was built
        self._list: Pairs | None = None  # packed for native kernels, or spelled out
        self._close: NeighborList | None = None  # pairs that may come too close meanwhile
        self._checked: Structures | None = None  # where their distances were last computed
        self._margin = 0.0  # by how much none of them was too close there, Å

    def calculate(
        self,
        atoms: ase.Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = all_changes,
    ) -> None:
        """Compute all properties at once: they share nearly all of the work."""
        super().calculate(atoms, properties, system_changes)
        # As in ASE's own calculators: after `reset()` all counts as changed, and nothing of the
        # past may shape the result, not even the order of a sum.
        if "numbers" in system_changes:
            self._list = None
        structures = self._take(self.atoms)
        native = self.potential.native_parts()
        if native is not None and native.network is None:
            native = None  # offsets or a prior alone are no native call
        neighbors = self._neighbors(structures, packed=native is not None)
        self._check_range(structures)
        self._check_distances(structures)
        if native is not None and isinstance(neighbors, CompactNeighbors):
            energies, forces, stress = self._evaluate_natively(native, structures, neighbors)
        else:
            assert isinstance(neighbors, NeighborList)
            energies, forces, stress = self._evaluate(structures, neighbors)
        energy = float(energies.sum())
        self.results = {
            "energy": energy,
            "free_energy": energy,
            "energies": energies.numpy(),
            "forces": forces.numpy(),
        }
        if stress is not None:
            self.results["stress"] = full_3x3_to_voigt_6_stress(stress.numpy())

    def check_state(self, atoms: ase.Atoms, tol: float | None = None) -> list[str]:
        """What has changed since the last calculation, exactly by default.

        ASE's tolerance of 1e-15 finds the same, and takes a twentieth of an MD step. Beads, which
        are all of one atomic number, are compared by their names.
        """
        changes = cast(list[str], compare_atoms(self.atoms, atoms, tol=tol))
        if "numbers" not in changes and not same_species(self.atoms, atoms):
            changes.append("numbers")
        return changes

    def _evaluate(
        self, structures: Structures, neighbors: NeighborList
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Atomic energies, forces and stress (of periodic systems) by PyTorch."""
        neighbors, _ = pairs_within(structures, neighbors, self.potential.cutoff)
        has_stress = self.conservative and bool(structures.pbc.all())
        wanted = ["atomic_energies", "forces", *(["stress"] if has_stress else [])]
        device = self.potential.device
        found = self.potential.predict(structures.to(device), neighbors.to(device), wanted)
        stress = found["stress"][0].cpu() if has_stress else None
        return found["atomic_energies"].cpu(), found["forces"].cpu(), stress

    def _evaluate_natively(
        self, native: NativeParts, structures: Structures, neighbors: CompactNeighbors
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The same by native kernels, which skip the pairs of the skin themselves."""
        periodic = bool(structures.pbc.all())
        result = native.evaluate(structures, neighbors, virial=periodic)
        assert result.forces is not None
        if result.virial is None:
            return result.energies, result.forces, None
        stress = 0.5 * (result.virial + result.virial.T) / structures.volume[0]
        return result.energies, result.forces, stress

    def _take(self, atoms: ase.Atoms) -> Structures:
        """Structures of the atoms; species and periodicity are kept from the last call if equal."""
        last = self._structures
        if (
            last is None
            or self._taken is None
            or not same_species(self._taken, atoms)
            or not np.array_equal(last.pbc[0].numpy(), atoms.pbc)
        ):
            last = Structures(
                positions=torch.from_numpy(atoms.positions),
                species=torch.from_numpy(self._species(atoms)),
                system_index=torch.zeros(len(atoms), dtype=torch.int64),
                cell=torch.from_numpy(atoms.cell.array)[None],
                pbc=torch.from_numpy(atoms.pbc)[None],
                species_table=self.potential.species_table,
            )
            self._list, self._taken = None, atoms.copy()
        self._structures = replace(
            last,
            positions=torch.from_numpy(atoms.positions),
            cell=torch.from_numpy(atoms.cell.array)[None],
            tags=torch.from_numpy(atoms.get_tags().astype(np.int64)) if atoms.has("tags") else None,
        )
        return self._structures

    def _neighbors(self, structures: Structures, *, packed: bool) -> Pairs:
        """Return the list with its skin, rebuilt if it might miss a pair."""
        if (
            self._list is None
            or isinstance(self._list, CompactNeighbors) != packed
            or self._reference is None
            or not list_holds(self._reference, structures, self.potential.cutoff, self.skin)
        ):
            self._list = None  # gone before the new one is made: lists are what takes memory
            self._close = self._pairs_to_watch(structures)
            build = build_compact_neighbors if packed else build_neighbor_list
            self._list = build(structures, self.potential.cutoff + self.skin)
            self._reference, self._checked = _copy(structures), None
            self.n_neighbor_lists += 1
        return self._list

    def _species(self, atoms: ase.Atoms) -> np.ndarray:
        """(n,) species in the potential's table."""
        table = self.potential.species_table
        known = set(self._trained_on.get("elements") or table.names)
        numbers, beads = species_of(atoms, table.entries)
        species = table.indices(numbers, beads)
        foreign = set()
        for z, index in set(zip(numbers.tolist(), species.tolist(), strict=True)):
            name = chemical_symbols[z] if z > 0 else beads[-1 - z].name
            if name not in known:
                foreign.add(name)
            elif index < 0:
                foreign.add(f"{name} as {'an element' if z > 0 else 'a bead'}")
        if foreign:
            raise DataError(
                f"the structure holds {', '.join(sorted(foreign))}, but the potential knows only "
                f"{', '.join(sorted(known))}"
            )
        return species

    def _pairs_to_watch(self, structures: Structures) -> NeighborList:
        """Pairs that may come to one place, or closer than in training, while the list is used."""
        reach = self._shortest_of_interest() + self.skin
        # Lists of a shorter reach are slow to build.
        return pairs_within(structures, build_neighbor_list(structures, max(reach, 1.5)), reach)[0]

    def _shortest_of_interest(self) -> float:
        if self._limits is None or "distance" in self._warned:
            return ONE_PLACE
        return max(ONE_PLACE, float(self._limits.max()))

    def _check_range(self, structures: Structures) -> None:
        limits = self._trained_on.get("density_g_cm3")
        if limits is not None and "density" not in self._warned and bool(structures.pbc.all()):
            density = AMU_PER_A3_IN_G_PER_CM3 * float(structures.masses.sum() / structures.volume)
            low, high = limits
            if not low * (1 - _DENSITY_TOLERANCE) <= density <= high * (1 + _DENSITY_TOLERANCE):
                self._warn(
                    "density",
                    f"the density of {density:.3f} g/cm³ is outside the range of the training "
                    f"data, {low:.3f} to {high:.3f} g/cm³",
                )

    def _check_distances(self, structures: Structures) -> None:
        """Refuse atoms at one place; warn of those closer than any in the training data.

        Distances are computed again where atoms have moved far enough to have come too close.
        """
        neighbors, limits = self._close, self._limits
        if neighbors is None or neighbors.n_pairs == 0:
            return
        farthest = self._shortest_of_interest()
        if self._checked is not None and list_holds(
            self._checked, structures, farthest, self._margin
        ):
            return
        self._checked = _copy(structures)
        distance = torch.linalg.vector_norm(pair_vectors(structures, neighbors), dim=1)
        if float(distance.min()) < ONE_PLACE:
            refuse_coinciding_atoms(structures, neighbors)
        self._margin = min(self.skin, float(distance.min()) - ONE_PLACE)
        if limits is None or "distance" in self._warned:
            return
        first_species = structures.species[neighbors.center]
        second_species = structures.species[neighbors.neighbor]
        excess = distance - limits[first_species, second_species]
        self._margin = min(self._margin, float(excess.min()))
        too_close = (excess < 0.0).nonzero()[:, 0]
        if len(too_close):
            names = structures.species_table.names
            closest = int(too_close[0])
            i, j = int(neighbors.center[closest]), int(neighbors.neighbor[closest])
            a, b = int(first_species[closest]), int(second_species[closest])
            self._warn(
                "distance",
                f"atoms {i} and {j} ({names[a]}-{names[b]}) are {float(distance[closest]):.3f} Å "
                f"apart, closer than {_CLOSE:g} times the shortest such distance in the training "
                f"data ({float(limits[a, b]) / _CLOSE:.3f} Å)",
            )

    def _warn(self, kind: str, message: str) -> None:
        self._warned.add(kind)
        warnings.warn(f"extrapolation: {message}", ExtrapolationWarning, stacklevel=2)


# -- batches -------------------------------------------------------------------------------------


#: Systems without a cell that have fewer atoms than so many, on average, share a native call.
_SMALL = 64


@dataclass(frozen=True)
class _Kept:
    """A system, or a whole batch, where its neighbor list was made."""

    structures: Structures
    pairs: Pairs


class BatchCalculator:
    """Energies and forces of a batch of systems whose atoms move.

    Models that native kernels serve are evaluated by them, system by system: a call is quick, and
    needs no tensor of the size of all lists. Systems, not atoms, are what torch's threads share
    then. Molecules without a cell, for which most of a call would be Python's, share one call.
    Other models are evaluated in one batch by PyTorch. Neighbor lists reach `skin` farther
    than the potential and last until atoms have moved.

    Parameters
    ----------
    potential : Potential
        A model, on its device.
    skin : float
        Å.
    """

    def __init__(self, potential: Potential, skin: float = 1.0) -> None:
        if skin < 0:
            raise ModelError(f"the skin must not be negative: {skin} Å")
        self.potential = potential
        self.skin = float(skin)
        self._kept: list[_Kept | None] = []
        self._pool: ThreadPoolExecutor | None = None

    def forget(self) -> None:
        """Make neighbor lists anew at the next call: their order decides the last digits."""
        self._kept = []

    def compute(self, structures: Structures, *, stress: bool = False) -> dict[str, Tensor]:
        """`energy` (S,), `forces` (N, 3) and, if asked, `stress` (S, 3, 3) in float64, eV and Å.

        The structures are in the potential's species table, and on the CPU for native kernels. The
        stress is NaN without full periodicity.
        """
        native = self.potential.native_parts()
        if native is None or native.network is None:
            return self._by_torch(structures, stress)
        if structures.n_atoms < _SMALL * structures.n_systems and not bool(structures.pbc.any()):
            return self._in_one_call(native, structures, stress)
        offsets = structures.atom_offsets.tolist()
        self._kept = [*self._kept, *[None] * structures.n_systems][: structures.n_systems]
        found = {
            "energy": torch.empty(structures.n_systems, dtype=torch.float64),
            "forces": torch.empty_like(structures.positions),
        }
        if stress:
            found["stress"] = torch.full_like(structures.cell, torch.nan)
        n_threads = torch.get_num_threads()
        shared = n_threads > 1 and structures.n_systems > 1

        def one_system(s: int) -> None:
            atoms = slice(offsets[s], offsets[s + 1])
            system, pairs = self._with_list(s, structures, atoms)
            periodic = stress and bool(system.pbc.all())
            one = 1 if shared else None
            result = native.evaluate(system, pairs, virial=periodic, n_threads=one)
            found["energy"][s] = result.energies.sum()
            assert result.forces is not None
            found["forces"][atoms] = result.forces
            if periodic:
                assert result.virial is not None
                found["stress"][s] = 0.5 * (result.virial + result.virial.T) / system.volume[0]

        if shared:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(n_threads)
            list(self._pool.map(one_system, range(structures.n_systems)))
        else:
            for s in range(structures.n_systems):
                one_system(s)
        return found

    def _in_one_call(
        self, native: NativeParts, structures: Structures, stress: bool
    ) -> dict[str, Tensor]:
        """Molecules without cells as one system, whose list has no pair of two of them."""
        kept = self._kept[0] if self._kept else None
        if kept is None or not self._lasts(kept, structures):
            pairs = build_compact_neighbors(structures, self.potential.cutoff + self.skin)
            kept = _Kept(_copy(structures), pairs)
            self._kept = [kept]
        assert isinstance(kept.pairs, CompactNeighbors)
        result = native.evaluate(structures, kept.pairs, virial=False)
        assert result.forces is not None
        energy = structures.sum_by_system(result.energies.to(torch.float64))
        found = {"energy": energy, "forces": result.forces}
        return found | ({"stress": torch.full_like(structures.cell, torch.nan)} if stress else {})

    def _with_list(
        self, s: int, structures: Structures, atoms: slice
    ) -> tuple[Structures, CompactNeighbors]:
        """A system of the batch and its list, made anew if a pair might be missing.

        Another system may come to a place: then atoms are others, or have moved far.
        """
        kept = self._kept[s]
        if (
            kept is not None
            and isinstance(kept.pairs, CompactNeighbors)
            and torch.equal(kept.structures.species, structures.species[atoms])
            and torch.equal(kept.structures.pbc[0], structures.pbc[s])
        ):
            positions, cell = structures.positions[atoms], structures.cell[s : s + 1]
            system = kept.structures.with_fields(positions=positions, cell=cell)
            if list_holds(kept.structures, system, self.potential.cutoff, self.skin):
                return system, kept.pairs
        system = _copy(structures[s])
        pairs = build_compact_neighbors(system, self.potential.cutoff + self.skin)
        self._kept[s] = _Kept(system, pairs)
        return system, pairs

    def _by_torch(self, structures: Structures, stress: bool) -> dict[str, Tensor]:
        """All systems in one batch, with one list for all."""
        kept = self._kept[0] if self._kept else None
        if kept is None or not self._lasts(kept, structures):
            pairs = build_neighbor_list(structures, self.potential.cutoff + self.skin)
            kept = _Kept(_copy(structures), pairs)
            self._kept = [kept]
        assert isinstance(kept.pairs, NeighborList)
        near, _ = pairs_within(structures, kept.pairs, self.potential.cutoff)
        device = self.potential.device
        wanted = ["energy", "forces", *(["stress"] if stress else [])]
        found = self.potential.predict(structures.to(device), near.to(device), wanted)
        return {name: value.detach() for name, value in found.properties.values.items()}

    def _lasts(self, kept: _Kept, structures: Structures) -> bool:
        """Whether the list of a batch is still good, for cells that do not change."""
        same = all(
            torch.equal(getattr(kept.structures, name), getattr(structures, name))
            for name in ("species", "cell", "pbc", "system_index")
        )
        if not same or structures.n_atoms == 0:
            return same
        steps = torch.linalg.vector_norm(structures.positions - kept.structures.positions, dim=1)
        return 2.0 * float(steps.max()) <= self.skin


def _copy(structures: Structures) -> Structures:
    """The geometry as it is now: ASE moves atoms in place."""
    return replace(structures, positions=structures.positions.clone(), cell=structures.cell.clone())


def _distance_limits(names: Sequence[str], shortest: Mapping[str, float]) -> Tensor | None:
    """(n_species, n_species) Å below which a distance is extrapolation; zero where unknown."""
    limits = torch.zeros(len(names), len(names), dtype=torch.float64)
    for a, first in enumerate(names):
        for b, second in enumerate(names):
            value = shortest.get(f"{first}-{second}", shortest.get(f"{second}-{first}", 0.0))
            limits[a, b] = _CLOSE * float(value)
    return limits if bool(limits.any()) else None


def list_holds(old: Structures, new: Structures, cutoff: float, skin: float) -> bool:
    """Whether a list of reach cutoff + skin, built at `old`, has all pairs within cutoff at `new`.

    Map the new positions back into the old cell. A pair within the cutoff is there at most stretch
    * cutoff apart, and at most 2 * displacement more in the old positions, where stretch is the
    largest singular value of the mapping and displacement the largest left-over motion.
    """
    stretch, mapped = 1.0, new.positions
    if not torch.equal(old.cell, new.cell):
        cell = new.cell[0]
        if float(torch.linalg.det(cell)) == 0.0 or float(torch.linalg.det(old.cell[0])) == 0.0:
            return False
        mapping = torch.linalg.solve(cell, old.cell[0])
        stretch = float(torch.linalg.matrix_norm(mapping, ord=2))
        mapped = new.positions @ mapping
    if new.n_atoms == 0:
        return True
    moved = torch.linalg.vector_norm(mapped - old.positions, dim=1)
    return stretch * cutoff + 2.0 * float(moved.max()) <= cutoff + skin
