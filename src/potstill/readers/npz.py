"""NumPy archives in the layouts of rMD17 and sGDML, or any other with a key map."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from potstill.errors import DataError
from potstill.readers.base import Frame, KeyMap, Units, needed, stacked_frames

_USUAL = {
    "energy": ("energies", "E"),
    "forces": ("forces", "F"),
    "stress": ("stress",),
    "atomic_energies": ("atomic_energies",),
    "charges": ("charges",),
    "dipole": ("dipole", "D"),
}

#: sGDML's names for units that have another name here.
_STATED = {"Ang": "Angstrom", "bohr": "Bohr"}


def read_npz(path: Path, keys: KeyMap, index: slice) -> tuple[Iterator[Frame], Units]:
    """Frames of an archive; kcal/mol and Å unless the archive states its units.

    Raises
    ------
    DataError
        If it is not an archive, or lacks positions or species.
    """
    held = load_archive(path)
    where = str(path)
    positions = needed(held, "positions", keys, ("coords", "R"), where)
    species = needed(held, "species", keys, ("nuclear_charges", "z", "species"), where)
    frames = stacked_frames(
        held,
        keys,
        _USUAL,
        positions,
        species,
        range(len(np.atleast_1d(positions)))[index],
        where=where,
        frame_id=path.name,
        cell=keys.cell or ("cell" if "cell" in held else "lattice"),
    )
    return frames, units_of(held, keys)


def load_archive(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an archive by name; `DataError` if it is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise DataError(f"{path} has the key '{twice[0].removesuffix('.npy')}' twice")
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (zipfile.BadZipFile, OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} is not a readable NumPy archive: {error}") from error


def units_of(held: Mapping[str, Any], keys: KeyMap) -> Units:
    """Units of the published layouts; an archive with other names must have them stated.

    MD17, rMD17 and sGDML use kcal/mol and Å; sGDML's archives say so in `e_unit` and `r_unit`.
    """
    names = ((keys.energy, _USUAL["energy"]), (keys.forces, _USUAL["forces"]))
    foreign = any(key is not None and key not in usual for key, usual in names)
    energy = str(held["e_unit"]) if "e_unit" in held else None if foreign else "kcal/mol"
    length = str(held.get("r_unit", "Angstrom"))
    length = _STATED.get(length, length)
    force = f"{energy}/{length}" if energy else None
    return Units(energy, length, force, "eV/A^3", "tension")
