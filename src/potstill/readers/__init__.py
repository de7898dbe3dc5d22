"""Readers: files of many formats to one batched type, in Å, eV, eV/Å and eV/Å³.

`FORMATS` is the explicit table; a new format is one file and one line here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from potstill.errors import ConfigError, DataError, suggest
from potstill.readers.ani_h5 import read_ani_h5
from potstill.readers.ase import count_extxyz as count_extxyz
from potstill.readers.ase import (
    read_any,
    read_ase_lmdb,
    read_database,
    read_extxyz,
    stream_extxyz,
)
from potstill.readers.base import ASE_UNITS, gather
from potstill.readers.base import Checks as Checks
from potstill.readers.base import DataWarning as DataWarning
from potstill.readers.base import Frame as Frame
from potstill.readers.base import KeyMap as KeyMap
from potstill.readers.base import Units as Units
from potstill.readers.fitsnap import StressCheck as StressCheck
from potstill.readers.fitsnap import check_stress_unit as check_stress_unit
from potstill.readers.fitsnap import read_fitsnap
from potstill.readers.lmdb import Shard
from potstill.readers.npz import read_npz
from potstill.readers.oc20 import read_oc20
from potstill.readers.splits import split_by_blocks as split_by_blocks
from potstill.readers.splits import split_by_group as split_by_group
from potstill.readers.splits import split_by_seed as split_by_seed
from potstill.readers.splits import split_from_file as split_from_file
from potstill.readers.splits import write_split as write_split
from potstill.species import SpeciesTable
from potstill.structures import Properties, Structures

Reader = Callable[[Path, KeyMap, slice], tuple[Iterator[Frame], Units]]

FORMATS: dict[str, Reader] = {
    "extxyz": read_extxyz,
    "ase": read_any,
    "ase-db": read_database,
    "ase-lmdb": read_ase_lmdb,
    "oc20": read_oc20,
    "npz": read_npz,
    "ani-h5": read_ani_h5,
    "fitsnap": read_fitsnap,
}

_BY_SUFFIX = {
    ".xyz": "extxyz",
    ".extxyz": "extxyz",
    ".db": "ase-db",
    ".npz": "npz",
    ".h5": "ani-h5",
    ".hdf5": "ani-h5",
    ".aselmdb": "ase-lmdb",
}
#: Folders of shards by the suffix of their files.
_FOLDERS = {".aselmdb": "ase-lmdb", ".lmdb": "oc20"}
_PACKED = (".gz", ".bz2", ".xz")


def read(
    path: str | Path,
    *,
    format: str | None = None,
    keys: KeyMap | None = None,
    units: Units | None = None,
    require: Sequence[str] = (),
    allow_partial: bool = False,
    index: str | int | slice = ":",
    species: Sequence[str] | None = None,
    min_distance: float = 0.3,
) -> tuple[Structures, Properties]:
    """Read structures and their reference labels.

    Parameters
    ----------
    path : str or Path
        A file, or a folder of FitSNAP JSON files or of LMDB shards.
    format : str, optional
        One of `FORMATS`; told from the name and the content if absent.
    keys : KeyMap, optional
        Names in the file where they are not the format's usual ones.
    units : Units, optional
        Units of the file where they are not the format's own.
    require : sequence of str
        Properties that must be there, for instance ("energy", "forces").
    allow_partial : bool
        Whether some frames may lack labels that others have.
    index : str, int or slice
        Which frames: ":100", "::10", -1. Counted from zero.
    species : sequence of str, optional
        The elements that may occur, and beads of the key map.
    min_distance : float
        Å; a frame with atoms closer than this is refused.

    Returns
    -------
    Structures
        With `frame_id`, and `group` where the file has groups.
    Properties
        Labels in eV, eV/Å and eV/Å³ (ASE's sign), float64; NaN and not present where absent.

    Raises
    ------
    DataError
        If the file or a frame is faulty; the message names file, frame and key.
    MissingLabelError
        If a label that is asked for is absent.
    ConfigError
        If a format, property or unit is unknown.
    """
    path = Path(path)
    keys, units = keys or KeyMap(), units or Units()
    table = None
    if species is not None:
        beads = tuple(bead for bead in keys.bead_species if bead.name in species)
        elements = SpeciesTable.from_symbols(set(species) - {bead.name for bead in beads})
        table = SpeciesTable((*elements.entries, *beads))
    checks = Checks(tuple(require), allow_partial, table, min_distance)
    name = _format_of(path, format)
    frames, own_units = FORMATS[name](path, keys, as_slice(index))
    used = units.over(own_units)
    structures, labels = gather(frames, str(path), used, keys, checks)
    if name == "fitsnap" and "stress" in labels:
        _check_stress(structures, labels, used, path, overridden=units.stress is not None)
    return structures, labels


def read_frames(
    path: str | Path,
    *,
    keys: KeyMap | None = None,
    units: Units | None = None,
    require: Sequence[str] = (),
    chosen: range,
    min_distance: float = 0.3,
) -> Iterator[tuple[Structures, Properties]]:
    """Read frames of an extended XYZ file as `read` does, only one at a time in memory.

    `chosen` are numbers of frames, in the order of the file.
    """
    path, keys = Path(path), keys or KeyMap()
    used = (units or Units()).over(ASE_UNITS)
    checks = Checks(tuple(require), False, None, min_distance)
    for frame in stream_extxyz(path, keys, chosen):
        yield gather([frame], str(path), used, keys, checks)


def _format_of(path: Path, name: str | None) -> str:
    if name is not None and name not in FORMATS:
        raise ConfigError(f"unknown format '{name}'{suggest(name, FORMATS)}")
    if not path.exists():
        raise DataError(f"{path} does not exist")
    if path.is_file() and path.stat().st_size == 0:
        raise DataError(f"{path} is empty")
    if name is not None:
        return name
    if path.is_dir():
        found = {file.suffix for file in path.iterdir()}
        return next((f for s, f in _FOLDERS.items() if s in found), "fitsnap")
    suffixes = [s.lower() for s in path.suffixes if s.lower() not in _PACKED]
    suffix = suffixes[-1] if suffixes else ""
    if suffix == ".json":
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            return "fitsnap" if '"Dataset"' in file.read(4096) else "ase-db"
    if suffix == ".lmdb":  # fairchem has given this name to both
        return "oc20" if Shard(path).get("nextid") is None else "ase-lmdb"
    return _BY_SUFFIX.get(suffix, "ase")


def as_slice(index: str | int | slice) -> slice:
    """Frames that an index names: ":100", "::10", 3 or a slice.

    Raises
    ------
    ConfigError
        If it is none of these, or goes backwards.
    """
    if isinstance(index, str):
        parts = index.split(":")
        try:
            numbers = [int(part) if part.strip() else None for part in parts]
        except ValueError:
            raise ConfigError(f"index '{index}' is not of the form start:stop:step") from None
        if len(numbers) > 3 or numbers == [None]:
            raise ConfigError(f"index '{index}' is not of the form start:stop:step")
        index = slice(*numbers) if len(numbers) > 1 else int(index)
    if isinstance(index, int):
        index = slice(index, index + 1 if index != -1 else None)
    if index.step is not None and index.step < 1:
        raise ConfigError("frames are read in the order of the file: the step must be positive")
    return index


def _check_stress(
    structures: Structures, labels: Properties, units: Units, path: Path, *, overridden: bool
) -> None:
    """Refuse a unit of stress that -dE/dV contradicts; only warn if the user chose it."""
    stated, positive = str(units.stress), str(units.positive_stress)
    for check in check_stress_unit(structures, labels, stated, positive):
        if 0.8 < check.ratio < 1.25:
            continue
        where = f"{path}, group '{check.group}': stress in {stated} is {check.ratio:.3g} times"
        message = f"{where} -dE/dV of the volume scan ({check.n_pairs} pairs)"
        if check.unit is None:
            warnings.warn(f"{message}, which fits no known unit", DataWarning, stacklevel=3)
            continue
        advice = f"Units(stress='{check.unit}', positive_stress='{check.positive_stress}') fits"
        if overridden:
            warnings.warn(f"{message}; {advice}", DataWarning, stacklevel=3)
        else:
            raise DataError(f"{message}; {advice}")
