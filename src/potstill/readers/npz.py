"""NumPy archives in the layouts of rMD17 and sGDML, or any other with a key map."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from potstill.errors import DataError
from potstill.readers.base import Frame, KeyMap, Units, cells_of, pick_label

_USUAL = {
    "energy": ("energies", "E"),
    "forces": ("forces", "F"),
    "stress": ("stress",),
    "atomic_energies": ("atomic_energies",),
    "charges": ("charges",),
    "dipole": ("dipole", "D"),
    "virial": (),
}
_POSITIONS = ("coords", "R")
_SPECIES = ("nuclear_charges", "z")

#: sGDML's names for units that have another name here.
_STATED = {"Ang": "Angstrom", "bohr": "Bohr"}


def read_npz(path: Path, keys: KeyMap, index: slice) -> tuple[Iterator[Frame], Units]:
    """Frames of an archive; kcal/mol and Å unless the archive states its units.

    Raises
    ------
    DataError
        If it is not an archive, or lacks positions or atomic numbers.
    """
    held = _load(path)
    where = str(path)
    positions = _needed(held, "positions", keys, _POSITIONS, where)
    species = _needed(held, "species", keys, _SPECIES, where)
    if positions.ndim != 3 or positions.shape[2] != 3:
        raise DataError(f"{path}: 'positions' has shape {positions.shape}, not (frames, atoms, 3)")
    n_frames, n_atoms = positions.shape[:2]
    if species.shape not in ((n_atoms,), (n_frames, n_atoms)):
        raise DataError(
            f"{path}: 'species' has shape {species.shape}, not ({n_atoms},) or "
            f"({n_frames}, {n_atoms})"
        )
    labels = {
        name: _per_frame(value, name, n_frames, where)
        for name, usual in _USUAL.items()
        if (value := pick_label(held, name, keys, usual, where)) is not None
    }
    cell, pbc = _cells(held, keys, n_frames, where)
    numbers = np.broadcast_to(species, (n_frames, n_atoms))

    def frames() -> Iterator[Frame]:
        for k in range(n_frames)[index]:
            yield Frame(
                where=f"{path}, frame {k}",
                frame_id=f"{path.name}:{k}",
                numbers=numbers[k],
                positions=positions[k],
                cell=cell[k],
                pbc=pbc[k],
                labels={name: value[k] for name, value in labels.items()},
                keys=tuple(held),
            )

    return frames(), _units(held, keys)


def _load(path: Path) -> dict[str, np.ndarray]:
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


def _needed(
    held: Mapping[str, Any], name: str, keys: KeyMap, usual: tuple[str, ...], where: str
) -> np.ndarray:
    value = pick_label(held, name, keys, usual, where)
    if value is None:
        wanted = getattr(keys, name) or "' or '".join(usual)
        raise DataError(f"{where} has no '{wanted}'; it holds {', '.join(held) or 'nothing'}")
    return value


def _per_frame(value: np.ndarray, name: str, n_frames: int, where: str) -> np.ndarray:
    if value.ndim == 0 or len(value) != n_frames:
        raise DataError(f"{where}: '{name}' has shape {value.shape} for {n_frames} frames")
    return value


def _cells(
    held: Mapping[str, Any], keys: KeyMap, n_frames: int, where: str
) -> tuple[np.ndarray, np.ndarray]:
    """(S, 3, 3) cells and (S, 3) periodicity; a cell without `pbc` is periodic."""
    name = keys.cell or ("cell" if "cell" in held else "lattice")
    if name not in held:
        if keys.cell:
            raise DataError(f"{where} has no '{keys.cell}'; it holds {', '.join(held)}")
        return cells_of(None, None, n_frames, where)
    cell = held[name]
    if name == "lattice":
        cell = np.swapaxes(cell, -1, -2)  # sGDML stores lattice vectors as columns
    return cells_of(cell, held.get(keys.pbc or "pbc"), n_frames, f"{where}: '{name}'")


def _units(held: Mapping[str, Any], keys: KeyMap) -> Units:
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
