"""The batched types that everything in potstill speaks: structures, neighbor lists, properties.

One system is a batch of one; there is no second shape. All three types are frozen and hold torch
tensors. N is the number of atoms, S of systems, E of pairs over the whole batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from typing import Any

import ase
import numpy as np
import torch
from torch import Tensor

from potstill.ase_bridge import fields_of, make_atoms
from potstill.errors import ConfigError, DataError
from potstill.properties import property_spec
from potstill.ragged import Rows, as_indices, expand_ranges, offsets_from_counts
from potstill.species import SpeciesTable, merge_species_tables


@dataclass(frozen=True)
class Structures:
    """A batch of S atomic systems with N atoms in all.

    Parameters
    ----------
    positions : Tensor
        (N, 3) float64, Å.
    species : Tensor
        (N,) int64, indices into `species_table`.
    system_index : Tensor
        (N,) int64, 0..S-1, non-decreasing; a system may be empty of atoms.
    cell : Tensor
        (S, 3, 3) float64, Å, rows are lattice vectors; zero rows where there is none.
    pbc : Tensor
        (S, 3) bool.
    species_table : SpeciesTable
        Names, masses and atomic numbers of the species.
    velocities : Tensor, optional
        (N, 3) float64, Å/fs.
    charge, spin_multiplicity : Tensor, optional
        (S,) total charge in e; spin multiplicity 2S+1.
    fixed : Tensor, optional
        (N,) bool, atoms held in place.
    tags : Tensor, optional
        (N,) int64.
    group, frame_id : tuple of str, optional
        Per system: the name of its group (a config type) and where it came from
        (`file.xyz:12`); both are carried into error messages and splits.

    Raises
    ------
    DataError
        If shapes, dtypes or values contradict one another.
    """

    positions: Tensor
    species: Tensor
    system_index: Tensor
    cell: Tensor
    pbc: Tensor
    species_table: SpeciesTable
    velocities: Tensor | None = None
    charge: Tensor | None = None
    spin_multiplicity: Tensor | None = None
    fixed: Tensor | None = None
    tags: Tensor | None = None
    group: tuple[str, ...] | None = None
    frame_id: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        n, s = self.positions.shape[0], self.cell.shape[0]
        _check_shape("positions", self.positions, (n, 3), torch.float64)
        _check_shape("species", self.species, (n,), torch.int64)
        _check_shape("system_index", self.system_index, (n,), torch.int64)
        _check_shape("cell", self.cell, (s, 3, 3), torch.float64)
        _check_shape("pbc", self.pbc, (s, 3), torch.bool)
        for name in ATOM_FIELDS:
            value = getattr(self, name)
            if value is not None and value.shape[0] != n:
                raise DataError(f"{name} has {value.shape[0]} rows for {n} atoms")
        for name in SYSTEM_FIELDS:
            value = getattr(self, name)
            if value is not None and len(value) != s:
                raise DataError(f"{name} has {len(value)} entries for {s} systems")
        if n:
            index = self.system_index
            if int(index[0]) < 0 or int(index[-1]) >= s or bool((index[1:] < index[:-1]).any()):
                raise DataError("system_index must be non-decreasing and lie in 0..S-1")
            low, high = int(self.species.min()), int(self.species.max())
            if low < 0 or high >= len(self.species_table):
                raise DataError(f"species index {high if low >= 0 else low} is not in the table")

    # -- sizes -------------------------------------------------------------------------------

    @property
    def n_atoms(self) -> int:
        """Atoms in all systems together."""
        return self.positions.shape[0]

    @property
    def n_systems(self) -> int:
        """Number of systems."""
        return self.cell.shape[0]

    def __len__(self) -> int:
        return self.n_systems

    @property
    def n_atoms_per_system(self) -> Tensor:
        """(S,) int64."""
        return torch.bincount(self.system_index, minlength=self.n_systems)

    @property
    def atom_offsets(self) -> Tensor:
        """(S+1,) int64: atoms of system s are `atom_offsets[s]:atom_offsets[s + 1]`."""
        return offsets_from_counts(self.n_atoms_per_system)

    def batches(self, max_atoms: int, order: Tensor | None = None) -> list[Tensor]:
        """Cut the systems into consecutive batches of at most `max_atoms` atoms.

        Parameters
        ----------
        max_atoms : int
            A larger system is a batch of its own.
        order : Tensor, optional
            (n,) int64 systems to be cut, in their order; all systems if absent.
        """
        if order is None:
            order = torch.arange(self.n_systems)
        batches: list[list[int]] = []
        held = 0
        n_atoms = self.n_atoms_per_system[order].tolist()
        for system, n in zip(order.tolist(), n_atoms, strict=True):
            if not batches or held + n > max_atoms:
                batches.append([])
                held = 0
            batches[-1].append(system)
            held += n
        return [torch.tensor(batch) for batch in batches]

    @property
    def free(self) -> Tensor:
        """(N,) bool: atoms that are not held in place."""
        everything = torch.ones_like(self.species, dtype=torch.bool)
        return everything if self.fixed is None else ~self.fixed

    @property
    def volume(self) -> Tensor:
        """(S,) Å³; zero where the cell is not three-dimensional."""
        return torch.linalg.det(self.cell).abs()

    @property
    def masses(self) -> Tensor:
        """(N,) amu."""
        return self.species_table.masses.to(self.species.device)[self.species]

    @property
    def atomic_numbers(self) -> Tensor:
        """(N,) int64; -1 for beads."""
        return self.species_table.atomic_numbers.to(self.species.device)[self.species]

    def composition(self) -> Tensor:
        """(S, n_species) float64: how many atoms of each species a system has."""
        n_species = len(self.species_table)
        flat = self.system_index * n_species + self.species
        counts = torch.bincount(flat, minlength=self.n_systems * n_species)
        return counts.reshape(self.n_systems, n_species).to(torch.float64)

    def name_of(self, system: int) -> str:
        """Where a system came from, for messages."""
        return self.frame_id[system] if self.frame_id is not None else f"frame {system}"

    # -- selecting and joining ---------------------------------------------------------------

    def n_rows(self, name: str) -> int:
        """Rows of a property's values: one per system, or one per atom."""
        return self.n_systems if property_spec(name).level == "system" else self.n_atoms

    def sum_by_system(self, values: Tensor) -> Tensor:
        """(S, ...) sums of (N, ...) values over the atoms of each system."""
        total = values.new_zeros(self.n_systems, *values.shape[1:])
        return total.index_add(0, self.system_index, values)

    def longest_by_system(self, vectors: Tensor) -> Tensor:
        """(S,) length of the longest of (N, 3) vectors of the atoms of each system."""
        lengths = torch.linalg.vector_norm(vectors, dim=1)
        longest = lengths.new_zeros(self.n_systems)
        return longest.scatter_reduce(0, self.system_index, lengths, "amax")

    def per_row(self, name: str, value: Tensor) -> Tensor:
        """What (S, ...) values mean for each row of a property's: (S, ...) or (N, ...)."""
        return value if property_spec(name).level == "system" else value[self.system_index]

    def rows(self, systems: Sequence[int] | Tensor) -> Rows:
        """Which rows of this batch, and of all that belongs to it, the given systems have.

        Labels, features and neighbor lists are selected by them: `labels.select(batch.rows([0]))`.
        Systems are indices, of which negative ones count from the end, or an (S,) mask.
        """
        return Rows.at(self.atom_offsets, as_indices(systems, self.n_systems))

    def select(self, systems: Rows | Sequence[int] | Tensor) -> Structures:
        """Return the given systems (rows, indices or an (S,) mask), in that order, as a batch."""
        rows = systems if isinstance(systems, Rows) else self.rows(systems)
        systems, atoms = rows.systems, rows.atoms
        changes: dict = {
            "system_index": torch.repeat_interleave(torch.arange(len(systems)), rows.counts),
        }
        for name in ("positions", "species", *ATOM_FIELDS):
            value = getattr(self, name)
            if value is not None and name != "system_index":
                changes[name] = value[atoms]
        for name in ("cell", "pbc", *SYSTEM_FIELDS):
            value = getattr(self, name)
            if isinstance(value, tuple):
                changes[name] = tuple(value[int(i)] for i in systems)
            elif value is not None:
                changes[name] = value[systems]
        return self.with_fields(**changes)

    def __getitem__(self, system: int) -> Structures:
        return self.select([system])

    @classmethod
    def concatenate(cls, parts: Sequence[Structures]) -> Structures:
        """Join batches; species tables are merged.

        An optional field that only some parts have is filled with its `NEUTRAL` value in the
        others, `group` and `frame_id` with empty strings.
        """
        if not parts:
            raise DataError("cannot join an empty list of structures")
        table = merge_species_tables([part.species_table for part in parts])
        parts = [part.with_species_table(table) for part in parts]
        shifts = np.cumsum([0] + [part.n_systems for part in parts])
        values: dict = {
            "system_index": torch.cat(
                [p.system_index + int(k) for p, k in zip(parts, shifts, strict=False)]
            ),
            "species_table": table,
        }
        for name in (f.name for f in fields(cls) if f.name not in values):
            held = [getattr(part, name) for part in parts]
            if all(value is None for value in held):
                continue
            column: list[Any] = [
                neutral_field(name, part) if value is None else value
                for part, value in zip(parts, held, strict=True)
            ]
            is_text = name in ("group", "frame_id")
            values[name] = tuple(chain.from_iterable(column)) if is_text else torch.cat(column)
        return cls(**values)

    def repeat(self, repeats: tuple[int, int, int]) -> Structures:
        """Repeat one system along its lattice vectors; the copies follow one another whole.

        Raises
        ------
        ConfigError
            If it is repeated along a direction that is not periodic, or is not one system.
        """
        if self.n_systems != 1:
            raise ConfigError(f"one structure can be repeated, not {self.n_systems}")
        for axis, count in enumerate(repeats):
            if count < 1 or (count > 1 and not bool(self.pbc[0, axis])):
                raise ConfigError(
                    f"{self.name_of(0)} cannot be repeated {count} times along lattice vector "
                    f"{axis + 1}: it must be periodic there and the number positive"
                )
        axes = [torch.arange(n, dtype=torch.float64) for n in repeats]
        offsets = torch.cartesian_prod(*axes) @ self.cell[0]  # (copies, 3)
        copies = len(offsets)
        changes: dict = {
            "positions": (self.positions[None] + offsets[:, None]).reshape(-1, 3),
            "cell": self.cell * self.cell.new_tensor(repeats)[:, None],
        }
        for name in ("species", *ATOM_FIELDS):
            value = getattr(self, name)
            if value is not None:
                changes[name] = value.repeat(copies, *(1,) * (value.dim() - 1))
        if self.charge is not None:
            changes["charge"] = self.charge * copies
        return replace(self, **changes)

    def deformed(self, gradient: Tensor) -> Structures:
        """Apply a (3, 3) deformation gradient: positions r and cells become r @ gradient."""
        return replace(self, positions=self.positions @ gradient, cell=self.cell @ gradient)

    def with_species_table(self, table: SpeciesTable) -> Structures:
        """Re-index species into another table.

        Raises
        ------
        DataError
            If a species that occurs is not in `table`.
        """
        if table == self.species_table:
            return self
        mapping = torch.full((len(self.species_table),), -1, dtype=torch.int64)
        for old, name in enumerate(self.species_table.names):
            if name in table.names:
                mapping[old] = table.index(name)
        species = mapping.to(self.species.device)[self.species]
        if bool((species < 0).any()):
            atom = int((species < 0).nonzero()[0])
            name = self.species_table.names[int(self.species[atom])]
            where = self.name_of(int(self.system_index[atom]))
            raise DataError(
                f"{where} holds {name}, which is not among the species {', '.join(table.names)}"
            )
        return self.with_fields(species=species, species_table=table)

    def to(self, device: torch.device | str) -> Structures:
        """Move all tensors to a device."""
        return self.with_fields(**_moved(vars(self), device))

    def with_fields(self, **changes: Any) -> Structures:
        """A copy with other fields that are known to fit: unlike `replace` it validates nothing.

        Validation reads values, for which a GPU would have to be waited for.
        """
        copy = object.__new__(type(self))
        vars(copy).update(vars(self), **changes)
        return copy

    # -- ASE ---------------------------------------------------------------------------------

    @classmethod
    def from_ase(
        cls, frames: ase.Atoms | Sequence[ase.Atoms], *, table: SpeciesTable | None = None
    ) -> Structures:
        """Take positions, cell, pbc, constraints and tags from ASE; labels are left to the readers.

        `group` is `info["config_type"]` and `frame_id` is `info["frame_id"]` where present;
        `charge` and `spin_multiplicity` are `info["charge"]` and `info["spin"]`. Atoms of ASE's
        dummy element X become beads, named by the array `species_name`.
        """
        return cls(**fields_of([frames] if isinstance(frames, ase.Atoms) else frames, table))

    def to_ase(self) -> list[ase.Atoms]:
        """One `ase.Atoms` per system; beads become ASE's dummy element X and keep their names."""
        offsets, species = self.atom_offsets.tolist(), self.species.tolist()
        arrays = {
            name: value.cpu().numpy()
            for name in ("positions", "velocities", "tags", "fixed", "cell", "pbc")
            if (value := getattr(self, name)) is not None
        }
        frames = []
        for s in range(self.n_systems):
            atoms = slice(offsets[s], offsets[s + 1])
            own = {
                name: value[s if name in ("cell", "pbc") else atoms]
                for name, value in arrays.items()
            }
            for name in SYSTEM_FIELDS:
                if (value := getattr(self, name)) is not None:
                    own[name] = value[s] if isinstance(value, tuple) else float(value[s])
            entries = [self.species_table.entries[k] for k in species[atoms]]
            frames.append(make_atoms(entries, **own))
        return frames

    def fingerprints(self) -> list[str]:
        """One short hash per system of species, positions, cell and pbc (to 1e-8 Å)."""
        offsets = self.atom_offsets.tolist()
        numbers = self.species.cpu().numpy()
        names = np.array(self.species_table.names)
        positions = np.round(self.positions.cpu().numpy(), 8) + 0.0
        cell = np.round(self.cell.cpu().numpy(), 8) + 0.0
        result = []
        for s in range(self.n_systems):
            part = slice(offsets[s], offsets[s + 1])
            digest = hashlib.blake2b(digest_size=8)
            digest.update(",".join(names[numbers[part]]).encode())
            digest.update(positions[part].tobytes())
            digest.update(cell[s].tobytes())
            digest.update(self.pbc[s].cpu().numpy().tobytes())
            result.append(digest.hexdigest())
        return result


ATOM_FIELDS = ("system_index", "velocities", "fixed", "tags")
SYSTEM_FIELDS = ("charge", "spin_multiplicity", "group", "frame_id")

#: What an optional field is taken to be where nobody said; velocities are unknown, hence NaN.
NEUTRAL: dict[str, float | int | bool] = {
    "velocities": float("nan"),
    "fixed": False,
    "tags": 0,
    "charge": 0.0,
    "spin_multiplicity": 1.0,
}


def neutral_field(name: str, structures: Structures) -> Tensor | tuple[str, ...]:
    """Value of an optional field where none is given."""
    if name in ("group", "frame_id"):
        return ("",) * structures.n_systems
    rows = structures.n_atoms if name in ATOM_FIELDS else structures.n_systems
    value = torch.tensor(NEUTRAL[name])
    value = value.double() if value.is_floating_point() else value
    shape = (rows, 3) if name == "velocities" else (rows,)
    return value.expand(shape).to(structures.cell.device)


@dataclass(frozen=True)
class NeighborList:
    """A full neighbor list of a batch, sorted by center.

    The law: `r_ij = positions[neighbor] - positions[center] + shifts @ cell`.

    Parameters
    ----------
    center, neighbor : Tensor
        (E,) int64, indices into the atoms of the batch.
    shifts : Tensor
        (E, 3) int64, whole lattice vectors.
    n_pairs_per_system : Tensor
        (S,) int64.
    cutoff : float
        Å.
    """

    center: Tensor
    neighbor: Tensor
    shifts: Tensor
    n_pairs_per_system: Tensor
    cutoff: float

    @property
    def n_pairs(self) -> int:
        """Number of pairs E (both directions counted)."""
        return self.center.shape[0]

    def select(self, rows: Rows) -> NeighborList:
        """Pairs of some systems, re-indexed as `Structures.select` does."""
        pairs = expand_ranges(offsets_from_counts(self.n_pairs_per_system), rows.systems)
        counts = self.n_pairs_per_system[rows.systems]
        before = offsets_from_counts(rows.counts)[:-1]
        move = torch.repeat_interleave(before - rows.starts, counts)
        return replace(
            self,
            center=self.center[pairs] + move,
            neighbor=self.neighbor[pairs] + move,
            shifts=self.shifts[pairs],
            n_pairs_per_system=counts,
        )

    def to(self, device: torch.device | str) -> NeighborList:
        """Move all tensors to a device."""
        return replace(self, **_moved(vars(self), device))


@dataclass(frozen=True)
class Properties:
    """Values of properties for a batch: predictions and labels have this same type.

    Parameters
    ----------
    values : dict of str to Tensor
        Full arrays, (S, ...) or (N, ...) by the property's level; NaN where absent.
    present : dict of str to Tensor
        (S,) bool per property: which systems have it. A name left out is present everywhere.
    weights : dict of str to Tensor
        (S,) or (N,) float64 per property; a name left out weighs one everywhere.
    """

    values: dict[str, Tensor]
    present: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in self.values.items():
            spec = property_spec(name)
            if tuple(value.shape[1:]) != spec.shape:
                raise DataError(
                    f"{name} has shape {tuple(value.shape)}, not (n, *{spec.shape}) with one row "
                    f"per {spec.level}"
                )

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.values:
            raise DataError(f"'{name}' is missing; there are {', '.join(self.values) or 'none'}")
        return self.values[name]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the properties."""
        return tuple(self.values)

    def presence(self, name: str, n_systems: int) -> Tensor:
        """(S,) bool: which systems have the property."""
        if name not in self.values:
            return torch.zeros(n_systems, dtype=torch.bool)
        if name in self.present:
            return self.present[name]
        return torch.ones(n_systems, dtype=torch.bool, device=self.values[name].device)

    def only(self, names: Sequence[str]) -> Properties:
        """Those of the named properties that are there."""
        kinds = vars(self).values()
        return Properties(*({k: v for k, v in kind.items() if k in names} for kind in kinds))

    def row_weights(self, name: str, structures: Structures) -> Tensor:
        """Weights with one row per value of the property: (S,) or (N,) by its level, float64."""
        rows, weight = structures.n_rows(name), self.weights.get(name)
        if weight is None:
            return torch.ones(rows, dtype=torch.float64, device=structures.cell.device)
        return weight if weight.shape[0] == rows else structures.per_row(name, weight)

    def weighted(self, weights: Tensor, structures: Structures) -> Properties:
        """The same values, every weight multiplied by that of its system, (S,) float64."""
        own = {
            name: self.row_weights(name, structures) * structures.per_row(name, weights)
            for name in self.values
        }
        return Properties(self.values, self.present, own)

    def select(self, rows: Rows) -> Properties:
        """Values of some systems of the batch that this belongs to."""
        weights = {}
        for name, weight in self.weights.items():
            per_atom = property_spec(name).level == "atom" and weight.shape[0] == rows.n_atoms
            weights[name] = weight[rows.atoms if per_atom else rows.systems]
        return Properties(
            {name: value[rows.of(name)] for name, value in self.values.items()},
            {name: mask[rows.systems] for name, mask in self.present.items()},
            weights,
        )

    def to(self, device: torch.device | str) -> Properties:
        """Move all tensors to a device."""
        return Properties(*(_moved(kind, device) for kind in vars(self).values()))

    @classmethod
    def concatenate(cls, parts: Sequence[Properties], sizes: Sequence[Structures]) -> Properties:
        """Join the properties of batches; what a part lacks becomes absent (NaN) there."""
        names = list(dict.fromkeys(name for part in parts for name in part.values))
        pairs = list(zip(parts, sizes, strict=True))
        values, present, weights = {}, {}, {}
        for name in names:
            columns = [
                part.values[name] if name in part.values else absent(name, size)
                for part, size in pairs
            ]
            values[name] = torch.cat(columns)
            present[name] = torch.cat([p.presence(name, size.n_systems) for p, size in pairs])
            if any(name in part.weights for part in parts):
                weights[name] = torch.cat([p.row_weights(name, size) for p, size in pairs])
        return cls(values, present, weights)


def absent(name: str, structures: Structures) -> Tensor:
    """Values of a property that no system has: NaN, float64."""
    shape = (structures.n_rows(name), *property_spec(name).shape)
    return torch.full(shape, torch.nan, dtype=torch.float64)


def _moved(values: Mapping[str, Any], device: torch.device | str) -> dict[str, Any]:
    """The tensors among some values, on a device."""
    return {name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)}


def _check_shape(name: str, value: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(value.shape) != shape or value.dtype != dtype:
        raise DataError(
            f"{name} must have shape {shape} and dtype {dtype}, "
            f"not {tuple(value.shape)} and {value.dtype}"
        )
