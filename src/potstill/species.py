"""Species: the kinds of atoms and beads that structures are made of, and ordered tables of them.

Arrays of whole numbers name them before there is a table: an element by its atomic number, beads by
-1, -2, ... for the first, second, ... of a sequence of `Species` that travels with the array.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from ase.data import atomic_masses, atomic_numbers, chemical_symbols
from torch import Tensor

from potstill.errors import DataError


@dataclass(frozen=True)
class Species:
    """One kind of atom or bead: its name, mass in amu and atomic number (None for a bead)."""

    name: str
    mass: float
    atomic_number: int | None = None


@dataclass(frozen=True)
class SpeciesTable:
    """The ordered species that indices in `Structures.species` point into."""

    entries: tuple[Species, ...]

    def __post_init__(self) -> None:
        if len({entry.name for entry in self.entries}) != len(self.entries):
            raise DataError(f"species table names a species twice: {self.names}")
        for name in self.names:
            if name.split() != [name]:
                raise DataError(f"the name of a species must be one word, not '{name}'")

    @classmethod
    def from_symbols(cls, symbols: Iterable[str]) -> SpeciesTable:
        """Make a table of chemical elements, sorted by atomic number."""
        names = set(symbols)
        for symbol in names - atomic_numbers.keys():
            raise DataError(f"'{symbol}' is not a chemical symbol")
        return cls.from_atomic_numbers(atomic_numbers[symbol] for symbol in names)

    @classmethod
    def from_atomic_numbers(
        cls, numbers: Iterable[int], beads: Sequence[Species] = ()
    ) -> SpeciesTable:
        """Make a table of chemical elements, sorted by atomic number, and of beads after them."""
        present = sorted({int(z) for z in numbers if z > 0})
        elements = (Species(chemical_symbols[z], float(atomic_masses[z]), z) for z in present)
        return cls((*elements, *beads))

    def indices(self, numbers: np.ndarray, beads: Sequence[Species] = ()) -> np.ndarray:
        """(n,) positions of species in this table; -1 for those that it does not hold.

        Parameters
        ----------
        numbers : ndarray
            (n,) atomic numbers; -1, -2, ... for the first, second, ... of the beads.
        beads : sequence of Species
            Found by their names.
        """
        # Negative numbers count from the end of an array, as NumPy does.
        lookup = np.full(len(chemical_symbols) + len(beads), -1, dtype=np.int64)
        own = {entry.name: k for k, entry in enumerate(self.entries) if entry.atomic_number is None}
        for k, entry in enumerate(self.entries):
            if entry.atomic_number is not None:
                lookup[entry.atomic_number] = k
        for k, bead in enumerate(beads, 1):
            lookup[-k] = own.get(bead.name, -1)
        return lookup[numbers]

    @property
    def names(self) -> tuple[str, ...]:
        """Names in order."""
        return tuple(entry.name for entry in self.entries)

    @property
    def masses(self) -> Tensor:
        """(n_species,) masses in amu, float64."""
        return torch.tensor([entry.mass for entry in self.entries], dtype=torch.float64)

    @property
    def atomic_numbers(self) -> Tensor:
        """(n_species,) atomic numbers; -1 for a bead."""
        return torch.tensor(
            [-1 if e.atomic_number is None else e.atomic_number for e in self.entries],
            dtype=torch.int64,
        )

    def __len__(self) -> int:
        return len(self.entries)

    def index(self, name: str) -> int:
        """Position of the species called `name`."""
        return self.names.index(name)

    def to_json(self) -> list[dict]:
        """Plain lists and numbers, for metadata."""
        return [asdict(entry) for entry in self.entries]

    @classmethod
    def from_json(cls, data: Sequence[Mapping]) -> SpeciesTable:
        """Inverse of `to_json`."""
        return cls(tuple(Species(**entry) for entry in data))


def merge_species_tables(tables: Sequence[SpeciesTable]) -> SpeciesTable:
    """Union of tables: elements sorted by atomic number, then beads in order of appearance."""
    entries = list(dict.fromkeys(entry for table in tables for entry in table.entries))
    return SpeciesTable(tuple(sorted(entries, key=lambda e: e.atomic_number or math.inf)))
