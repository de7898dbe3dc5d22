"""To and from `ase.Atoms`, in plain arrays: what `Structures.from_ase` and `to_ase` stand on.

Beads, species without an atomic number, are ASE's dummy element X there; their names travel in the
array `NAMES` (which extended XYZ keeps as a column), their masses in ASE's own.
"""

from __future__ import annotations

from collections.abc import Sequence
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


def fields_of(frames: Sequence[ase.Atoms], table: SpeciesTable | None = None) -> dict[str, Any]:
    """Return the arguments of `Structures` for some frames; labels are left to the readers.

    Raises
    ------
    DataError
        If a frame holds a species that is not in `table`.
    """
    if table is None:
        table = merge_species_tables([_table_of(atoms) for atoms in frames])
    elements = {e.atomic_number: k for k, e in enumerate(table.entries)}
    species: list[int] = []
    for k, atoms in enumerate(frames):
        names, symbols = _bead_names(atoms), atoms.get_chemical_symbols()
        for number, bead, symbol in zip(atoms.numbers.tolist(), names, symbols, strict=True):
            known = bead in table.names if number == 0 else number in elements
            if not known:
                raise DataError(
                    f"{atoms.info.get('frame_id', f'frame {k}')} holds {bead or symbol}, "
                    f"which is not among the species {', '.join(table.names)}"
                )
            species.append(table.index(bead) if number == 0 else elements[number])
    fields: dict[str, Any] = {
        "positions": _joined([atoms.positions for atoms in frames], (0, 3)).double(),
        "species": torch.tensor(species, dtype=torch.int64),
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


def _table_of(atoms: ase.Atoms) -> SpeciesTable:
    elements = SpeciesTable.from_atomic_numbers(z for z in atoms.numbers if z)
    names, masses = _bead_names(atoms), atoms.get_masses().tolist()
    beads = dict.fromkeys(Species(n, m) for n, m in zip(names, masses, strict=True) if n)
    return SpeciesTable((*elements.entries, *beads))


def _bead_names(atoms: ase.Atoms) -> list[str]:
    """Names of beads, `X` where an atom without an element has none; empty for elements."""
    names = atoms.arrays.get(NAMES, [""] * len(atoms))
    numbers = atoms.numbers.tolist()
    return ["" if z else str(name) or "X" for z, name in zip(numbers, names, strict=True)]


def _joined(parts: Sequence[np.ndarray], empty: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts) if parts else np.zeros(empty))
