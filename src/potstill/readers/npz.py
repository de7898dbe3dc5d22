"""NumPy archives in the layouts of rMD17 and sGDML, or any other with a key map."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

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
    return {name: array[()] for name, array in open_archive(path).items()}


@dataclass(frozen=True)
class StoredArray:
    """An array of an archive, in the file until it is asked for: `[()]`, or row by row."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    by_rows: bool

    def __getitem__(self, key: Any) -> Any:
        """Read all of it, and take a part."""
        with _readable(self.path), np.load(self.path, allow_pickle=False) as arrays:
            return arrays[self.name][key]

    def rows(self, chosen: range) -> Iterator[np.ndarray]:
        """Read rows in the order of the file, only one at a time in memory."""
        if not self.by_rows:
            whole = self[()]
            yield from (whole[k] for k in chosen)
            return
        row = self.shape[1:]
        size = math.prod(row) * self.dtype.itemsize
        with (
            _readable(self.path),
            zipfile.ZipFile(self.path) as archive,
            archive.open(f"{self.name}.npy") as file,
        ):
            _header(file)
            start = file.tell()
            for k in chosen:
                file.seek(start + k * size)
                yield np.frombuffer(file.read(size), self.dtype).reshape(row)


def open_archive(path: Path) -> dict[str, StoredArray]:
    """Arrays of an archive by name, none of them read yet; `DataError` if it is none."""
    found = {}
    with _readable(path), zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith(".npy")]
        for member in names:
            name = member.removesuffix(".npy")
            if names.count(member) > 1:
                raise DataError(f"{path} has the key '{name}' twice")
            with archive.open(member) as file:
                shape, in_columns, dtype = _header(file)
            by_rows = bool(shape) and not in_columns and not dtype.hasobject
            found[name] = StoredArray(path, name, shape, dtype, by_rows)
    return found


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether it is stored by columns, and type."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    return np.lib.format.read_array_header_2_0(file)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, OSError, ValueError, EOFError) as error:
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
