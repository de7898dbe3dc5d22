"""To and from `ase.Atoms`, in plain arrays: what `Structures.from_ase` and `to_ase` stand on.

Beads, species without an atomic number, are ASE's dummy element X there; their names travel in the
array `NAMES` (which extended XYZ keeps as a column), their masses in ASE's own. ASE's trajectories
and databases keep masses but no such array: where it is known which beads there may be, those
without a name are told by their mass.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import ase
import numpy as np
import torch
from ase.constraints import FixAtoms, FixCartesian
from ase.units import fs as _ASE_FS
from torch import Tensor

from potstill.errors import DataError
from potstill.species import Species, SpeciesTable, merge_species_tables

#: Name of the array of strings that holds the names of all species where some are beads.
NAMES = "species_name"

#: Keys of `Atoms.info` by the fields of structures that they hold.
INFO_KEYS = {
    "group": "config_type",
    "frame_id": "frame_id",
    "charge": "charge",
    "spin_multiplicity": "spin",
}


def fixed_atoms(atoms: ase.Atoms) -> np.ndarray:
    """(n,) bool: held in place along all axes, by a constraint or a column called `fixed`."""
    fixed = np.zeros(len(atoms), dtype=bool)
    if "fixed" in atoms.arrays and atoms.arrays["fixed"].shape == (len(atoms),):
        fixed |= atoms.arrays["fixed"].astype(bool)
    for constraint in atoms.constraints:
        if isinstance(constraint, FixAtoms) or (
            isinstance(constraint, FixCartesian) and np.all(constraint.mask)
        ):
            fixed[constraint.index] = True
    return fixed


def velocities_of(atoms: ase.Atoms) -> np.ndarray:
    """(n, 3) Å/fs."""
    return atoms.get_velocities() * _ASE_FS


def species_of(
    atoms: ase.Atoms, known: Sequence[Species] = ()
) -> tuple[np.ndarray, tuple[Species, ...]]:
    """Which species the atoms are.

    Parameters
    ----------
    atoms : ase.Atoms
        Beads are named by the array `NAMES`, or an entry of `info` where a file keeps no arrays;
        those without a name are told by their mass where `known` allows, and called X otherwise.
    known : sequence of Species
        What beads may be; gives the masses where the atoms have none of their own.

    Returns
    -------
    numbers : ndarray
        (n,) int64, atomic numbers; -1, -2, ... for the first, second, ... of the beads.
    beads : tuple of Species
        In order of appearance.

    Raises
    ------
    DataError
        If a bead has no mass, or two, or no name and the mass of several known ones.
    """
    numbers = atoms.numbers.astype(np.int64)
    places = np.flatnonzero(numbers == 0)
    if len(places) == 0:
        return numbers, ()
    own = atoms.get_masses()[places].tolist() if atoms.has("masses") else [None] * len(places)
    masses = {bead.name: bead.mass for bead in known if bead.atomic_number is None}
    kinds: dict[tuple[str, float | None], int] = {}
    found = [
        kinds.setdefault((name or _told_by_mass(mass, masses), mass), -1 - len(kinds))
        for name, mass in zip(_names(atoms)[places].tolist(), own, strict=True)
    ]
    numbers[places] = found
    beads = []
    for name, mass in kinds:
        if mass is None and name not in masses:
            raise DataError(f"the bead {name} has no mass: set the masses of the atoms")
        beads.append(Species(name, float(masses[name] if mass is None else mass)))
    for first, second in itertools.combinations(beads, 2):
        if first.name == second.name:
            raise DataError(
                f"the bead {first.name} has two masses, {first.mass:g} and {second.mass:g} amu"
            )
    return numbers, tuple(beads)


def species_names(atoms: ase.Atoms) -> list[str]:
    """Chemical symbols of atoms, and names of beads."""
    symbols = atoms.get_chemical_symbols()
    if atoms.numbers.all():
        return symbols
    names = _names(atoms).tolist()
    return [s if s != "X" else name or s for s, name in zip(symbols, names, strict=True)]


def same_species(first: ase.Atoms, second: ase.Atoms) -> bool:
    """Whether atoms are of the same species one by one: elements, names and masses of beads."""
    if not np.array_equal(first.numbers, second.numbers):
        return False
    bead = first.numbers == 0
    return not bead.any() or (
        np.array_equal(_names(first)[bead], _names(second)[bead])
        and np.array_equal(first.get_masses()[bead], second.get_masses()[bead])
    )


def fields_of(frames: Sequence[ase.Atoms], table: SpeciesTable | None = None) -> dict[str, Any]:
    """Return the arguments of `Structures` for some frames; labels are left to the readers.

    Raises
    ------
    DataError
        If a frame holds a species that is not in `table`, or as of `species_of`.
    """
    known = () if table is None else table.entries
    found = [species_of(atoms, known) for atoms in frames]
    if table is None:
        tables = (SpeciesTable.from_atomic_numbers(numbers, beads) for numbers, beads in found)
        table = merge_species_tables(list(tables))
    species = [table.indices(numbers, beads) for numbers, beads in found]
    for k, (atoms, indices) in enumerate(zip(frames, species, strict=True)):
        if (indices < 0).any():
            name = species_names(atoms)[int(indices.argmin())]
            raise DataError(
                f"{atoms.info.get('frame_id', f'frame {k}')} holds {name}, "
                f"which is not among the species {', '.join(table.names)}"
            )
    fields: dict[str, Any] = {
        "positions": _joined([atoms.positions for atoms in frames], (0, 3)).double(),
        "species": _joined(species, (0,)).long(),
        "system_index": torch.repeat_interleave(
            torch.arange(len(frames)), torch.tensor([len(a) for a in frames], dtype=torch.int64)
        ),
        "cell": _joined([atoms.cell.array[None] for atoms in frames], (0, 3, 3)).double(),
        "pbc": _joined([atoms.pbc[None] for atoms in frames], (0, 3)).bool(),
        "species_table": table,
    }
    fixed = _joined([fixed_atoms(atoms) for atoms in frames], (0,))
    tags = _joined([atoms.get_tags() for atoms in frames], (0,))
    if fixed.any():
        fields["fixed"] = fixed
    if tags.any():
        fields["tags"] = tags.long()
    if any(atoms.has("momenta") for atoms in frames):
        fields["velocities"] = _joined([velocities_of(atoms) for atoms in frames], (0, 3))
    for name, key in INFO_KEYS.items():
        held = [key in atoms.info for atoms in frames]
        if name in ("group", "frame_id"):
            if any(held):
                fields[name] = tuple(str(atoms.info.get(key, "")) for atoms in frames)
        elif held and all(held):
            numbers = [float(atoms.info[key]) for atoms in frames]
            fields[name] = torch.tensor(numbers, dtype=torch.float64)
    return fields


def make_atoms(
    species: Sequence[Species],
    positions: np.ndarray,
    cell: np.ndarray,
    pbc: np.ndarray,
    *,
    velocities: np.ndarray | None = None,
    tags: np.ndarray | None = None,
    fixed: np.ndarray | None = None,
    **info: Any,
) -> ase.Atoms:
    """Make one `ase.Atoms`; `info` holds the fields of `INFO_KEYS`, unknown velocities are NaN."""
    atoms = ase.Atoms(
        numbers=[entry.atomic_number or 0 for entry in species],
        positions=positions,
        cell=cell,
        pbc=pbc,
        masses=[entry.mass for entry in species],
    )
    if any(entry.atomic_number is None for entry in species):
        atoms.set_array(NAMES, np.array([entry.name for entry in species]))
    if velocities is not None and np.isfinite(velocities).all():
        atoms.set_velocities(velocities / _ASE_FS)
    if tags is not None:
        atoms.set_tags(tags)
    if fixed is not None and fixed.any():
        atoms.set_constraint(FixAtoms(mask=fixed))
    atoms.info.update({INFO_KEYS[name]: value for name, value in info.items() if value != ""})
    return atoms


def _names(atoms: ase.Atoms) -> np.ndarray:
    """(n,) what the array `NAMES` says, or else an entry of `info`; empty where nobody does."""
    names = np.asarray(atoms.arrays.get(NAMES, atoms.info.get(NAMES, [""] * len(atoms))))
    if names.shape != (len(atoms),):
        raise DataError(f"'{NAMES}' has shape {names.shape} for {len(atoms)} atoms")
    return names


def _told_by_mass(mass: float | None, masses: Mapping[str, float]) -> str:
    """The known bead of a mass, X if there is none."""
    if mass is None:
        return "X"
    like = [name for name, own in masses.items() if math.isclose(own, mass, rel_tol=1e-6)]
    if len(like) > 1:
        raise DataError(
            f"a bead of {mass:g} amu has no name and may be {' or '.join(like)}: name the beads in "
            f"the array '{NAMES}'"
        )
    return like[0] if like else "X"


def _joined(parts: Sequence[np.ndarray], empty: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts) if parts else np.zeros(empty))
