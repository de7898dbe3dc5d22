"""Extended XYZ and everything else that ASE reads, ASE databases included."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import ase
import ase.io
import ase.io.jsonio
import numpy as np
from ase.db.row import AtomsRow
from ase.io.extxyz import read_xyz
from ase.io.formats import UnknownFileTypeError, filetype

from potstill.ase_bridge import NAMES, fixed_atoms, species_of, velocities_of
from potstill.errors import DataError
from potstill.properties import ASE_NAMES
from potstill.readers.base import ASE_UNITS, Frame, KeyMap, Units, pick_labels, species_numbers
from potstill.readers.lmdb import Shard, open_shards
from potstill.species import Species

_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}

_QUOTED_VALUE = re.compile(r"""=\s*("[^"]*"|'[^']*'|\{[^}]*\}|\[[^\]]*\])""")
#: A stress or virial of six numbers.
_SIX = re.compile(
    r"""(?<!\S)(stress|virial)=(["'\[{]\s*(?:[^\s,"'\]}]+[\s,]+){5}[^\s,"'\]}]+\s*["'\]}])"""
)
_SPECIES = re.compile(r"(\bProperties=\"?(?:[^\s\"]+:)?)species:(?=S:1\b)")
_KEY = re.compile(r"([^\s=]+)\s*=")


def read_extxyz(path: Path, keys: KeyMap, index: slice) -> tuple[Iterator[Frame], Units]:
    """Frames of an extended XYZ file, compressed or not, in ASE's units."""
    blocks = list(_blocks(_lines(path), path))
    chosen = range(len(blocks))[index]
    return _parse(path, keys, ((k, blocks[k]) for k in chosen)), ASE_UNITS


def count_extxyz(path: Path) -> int:
    """How many frames an extended XYZ file has; only one at a time is in memory."""
    return sum(1 for _ in _blocks(_lines(path), path))


def stream_extxyz(path: Path, keys: KeyMap, chosen: range) -> Iterator[Frame]:
    """`read_extxyz` of frames in the order of the file, only one at a time in memory."""
    blocks = islice(enumerate(_blocks(_lines(path), path)), chosen.start, chosen.stop, chosen.step)
    return _parse(path, keys, blocks)


def read_any(path: Path, keys: KeyMap, index: slice) -> tuple[Iterator[Frame], Units]:
    """Frames of any file in a format that ASE knows, in ASE's units."""
    keys = _lammps_keys(path, keys)
    try:
        images = ase.io.read(path, index=slice(None))
    except Exception as error:  # ASE's readers raise whatever their parsers meet
        raise DataError(f"{path} cannot be read by ASE: {_one_line(error)}") from error
    images = [images] if isinstance(images, ase.Atoms) else images
    return (_frame(path, k, images[k], keys) for k in range(len(images))[index]), ASE_UNITS


def read_database(path: Path, keys: KeyMap, index: slice) -> tuple[Iterator[Frame], Units]:
    """Rows of an ASE database in the order of their ids; frame numbers count from zero."""
    from ase.db import connect

    try:
        rows = sorted(connect(path, append=True).select(), key=lambda row: row.id)
    except Exception as error:  # the backends raise their own errors
        raise DataError(f"{path} is not an ASE database: {_one_line(error)}") from error

    def frames() -> Iterator[Frame]:
        for k in range(len(rows))[index]:
            atoms = rows[k].toatoms()
            atoms.info |= {**rows[k].data, **rows[k].key_value_pairs}
            yield _frame(path, k, atoms, keys)

    return frames(), ASE_UNITS


def read_ase_lmdb(path: Path, keys: KeyMap, index: slice) -> tuple[Iterator[Frame], Units]:
    """Rows of ASE databases in LMDB files (`*.aselmdb`), as fairchem publishes its newer sets.

    A row is JSON, packed by zlib, under its id ("1", "2", ...); "nextid" and "deleted_ids" say
    which ids there are. A folder is read in the order of its files' names.

    Raises
    ------
    OptionalDependencyError
        If lmdb is not installed.
    DataError
        If it is not such a file.
    """
    rows = [(shard, id_) for shard in open_shards(path, "*.aselmdb") for id_ in _lmdb_ids(shard)]

    def frames() -> Iterator[Frame]:
        for shard, id_ in rows[index]:
            where = f"{shard.path}, row {id_}"
            row = _from_json(shard.get(str(id_)), where)
            try:
                atoms = AtomsRow({"id": id_, **row}).toatoms()
            except Exception as error:  # a row may lack or mangle whatever ASE expects
                raise DataError(f"{where} is not a row of ASE: {_one_line(error)}") from error
            atoms.info |= (row.get("data") or {}) | (row.get("key_value_pairs") or {})
            yield _frame(shard.path, id_, atoms, keys, where)

    return frames(), ASE_UNITS


def _lmdb_ids(shard: Shard) -> list[int]:
    """Ids of the rows of an ASE database in LMDB."""
    next_id = _from_json(shard.get("nextid"), f"{shard.path}, key 'nextid'")
    deleted = shard.get("deleted_ids")
    gone = set() if deleted is None else _from_json(deleted, f"{shard.path}, key 'deleted_ids'")
    return [id_ for id_ in range(1, int(next_id)) if id_ not in set(gone)]


def _from_json(packed: bytes | None, where: str) -> Any:
    if packed is None:
        raise DataError(f"{where} is missing: this is not an ASE database, or it is damaged")
    try:
        return ase.io.jsonio.decode(zlib.decompress(packed).decode("utf-8"))
    except Exception as error:  # zlib, UTF-8, JSON or ASE's own objects in it
        raise DataError(f"{where} cannot be unpacked: {_one_line(error)}") from error


def read_text(path: Path) -> str:
    """Read a text file, unpacked in memory: ASE seeks in it, which is quadratic in a .gz."""
    with _open_text(path) as file:
        return str(file.read())


def _lines(path: Path) -> Iterator[str]:
    """Lines of a text file, unpacked as they are read."""
    with _open_text(path) as file:
        yield from (line.removesuffix("\n") for line in file)


@contextmanager
def _open_text(path: Path) -> Iterator[Any]:
    opener = _OPENERS.get(path.suffix.lower(), open)
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            yield file
    except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {_one_line(error)}") from error


# -- extended XYZ ---------------------------------------------------------------------------------


def _blocks(lines: Iterator[str], path: Path) -> Iterator[list[str]]:
    """Lines of each frame, complete and with unique keys."""
    frame, n_read = 0, 0
    for line in lines:
        n_read += 1
        if not line.strip():
            if any(rest.strip() for rest in lines):
                raise DataError(
                    f"{path}, frame {frame}: line {n_read} is blank where the number of atoms "
                    f"should be"
                )
            return
        try:
            count = int(line)
        except ValueError:
            raise DataError(
                f"{path}, frame {frame}: line {n_read} is '{line.strip()[:40]}', not the number of "
                f"atoms"
            ) from None
        block = [line, *islice(lines, max(count, 0) + 1)]
        if count < 0 or len(block) < count + 2:
            raise DataError(
                f"{path}, frame {frame} is cut off: it announces {count} atoms and has "
                f"{max(len(block) - 2, 0)}"
            )
        _check_keys(block[1], f"{path}, frame {frame}")
        yield block
        frame, n_read = frame + 1, n_read + len(block) - 1


def _check_keys(comment: str, where: str) -> None:
    counts = Counter(_KEY.findall(_QUOTED_VALUE.sub("=_ ", comment)))
    columns = re.search(r"\bProperties=\"?([^\s\"]+)", comment)
    if columns:
        counts.update(columns.group(1).split(":")[::3])
    for key, count in counts.items():
        if count > 1:
            raise DataError(f"{where} has the key '{key}' twice")


def _parse(path: Path, keys: KeyMap, blocks: Iterable[tuple[int, list[str]]]) -> Iterator[Frame]:
    for k, block in blocks:
        if int(block[0]) == 0:
            raise DataError(f"{path}, frame {k} holds no atoms")
        # ASE insists on nine numbers under these two names, and on these alone.
        block[1] = _SIX.sub(r"six_\1=\2", block[1])
        own = keys
        if keys.beads is not None and keys.species is None and NAMES not in block[1]:
            # In its own column ASE refuses names that are no elements.
            block[1], renamed = _SPECIES.subn(rf"\1{NAMES}:", block[1])
            own = replace(keys, species=NAMES) if renamed else keys
        try:
            (atoms,) = read_xyz(io.StringIO("\n".join(block) + "\n"), slice(None))
        except Exception as error:  # ASE raises whatever its parser meets
            raise DataError(f"{path}, frame {k} cannot be parsed: {_one_line(error)}") from error
        for name in ("stress", "virial"):
            if f"six_{name}" in atoms.info:
                atoms.info[name] = atoms.info.pop(f"six_{name}")
        yield _frame(path, k, atoms, own)


def _lammps_keys(path: Path, keys: KeyMap) -> KeyMap:
    """Where the species of a LAMMPS dump are: ASE takes its types for atomic numbers."""
    try:
        kind = filetype(str(path))
    except (UnknownFileTypeError, OSError):  # reading it will say so
        return keys
    if not kind.startswith("lammps-dump"):
        return keys
    if keys.types is not None:
        return replace(keys, species=keys.species or "type")
    if kind == "lammps-dump-text":
        head = re.search(r"ITEM: ATOMS (.*)", read_text(path))
        if head is None or {"element", "mass"} & set(head.group(1).split()):
            return keys
    raise DataError(
        f"{path} gives atom types by number, not as elements: say which they are, type 1 first, as "
        "in KeyMap(types='Al Cu') (in a config: keys: {types: Al Cu})"
    )


# -- frames ---------------------------------------------------------------------------------------


def _frame(path: Path, k: int, atoms: ase.Atoms, keys: KeyMap, where: str = "") -> Frame:
    where = where or f"{path}, frame {k}"
    held = _held(atoms)
    # The names that ASE's own calculators use; a key map overrides them.
    usual = {name: (key,) for name, key in ASE_NAMES.items()}
    fixed = fixed_atoms(atoms)
    numbers, beads = _species(atoms, keys, where)
    return Frame(
        where=where,
        frame_id=f"{path.name}:{k}",
        numbers=numbers,
        positions=atoms.positions,
        cell=atoms.cell.array,
        pbc=atoms.pbc,
        labels=pick_labels(held, keys, usual, where),
        keys=tuple(held),
        group=str(held.get(keys.group or "config_type", "")),
        fixed=fixed if fixed.any() else None,
        tags=atoms.get_tags() if atoms.has("tags") else None,
        velocities=velocities_of(atoms) if atoms.has("momenta") else None,
        charge=_number(held.get("charge")),
        spin_multiplicity=_number(held.get("spin")),
        beads=beads,
    )


def _species(atoms: ase.Atoms, keys: KeyMap, where: str) -> tuple[np.ndarray, tuple[Species, ...]]:
    """Atomic numbers and beads: ASE's own, or from the column that the key map names."""
    columns = {
        name: array
        for name, array in atoms.arrays.items()
        if name not in ("numbers", "positions") and array.ndim == 1 and array.dtype.kind in "iuUO"
    }
    if keys.species is not None:
        if keys.species not in columns:
            raise DataError(
                f"{where} has no column '{keys.species}' of symbols or numbers; it has "
                f"{', '.join(columns) or 'none such'}"
            )
        values = columns[keys.species]
        if keys.types is None or values.dtype.kind in "UO":
            masses = atoms.get_masses() if atoms.has("masses") else None
            return species_numbers(values, keys, f"{where}, column '{keys.species}'", masses)
        elements = keys.types.replace(",", " ").split()
        if values.min() < 1 or values.max() > len(elements):
            raise DataError(
                f"{where}, column '{keys.species}': types {values.min()} to {values.max()} for the "
                f"{len(elements)} elements of '{keys.types}'"
            )
        named = [elements[k - 1] for k in values.tolist()]
        return species_numbers(named, keys, f"{where}, types '{keys.types}'")
    unnamed = not atoms.numbers.all() and NAMES not in {*atoms.arrays, *atoms.info}
    if unnamed and columns and keys.beads is None:
        likely = next((n for n in columns if n in ("element", "type")), next(iter(columns)))
        types = "" if columns[likely].dtype.kind in "UO" else ", types='Al Cu'"
        raise DataError(
            f"{where} has no column 'species' or 'Z' of chemical elements; it has "
            f"{', '.join(columns)}: name the right one, as in KeyMap(species='{likely}'{types})"
        )
    try:
        return species_of(atoms, keys.bead_species)
    except DataError as error:
        hint = ", or state it, as in KeyMap(beads='W 72.06')" if "no mass" in str(error) else ""
        raise DataError(f"{where}: {error}{hint}") from None


def _held(atoms: ase.Atoms) -> Mapping[str, Any]:
    """Everything a frame carries, by name.

    ASE moves keys such as `energy` from `info` into a calculator while reading. They are taken
    from its raw results: `get_forces` would zero the forces on constrained atoms.
    """
    arrays = {k: v for k, v in atoms.arrays.items() if k not in ("numbers", "positions")}
    results = dict(atoms.calc.results) if atoms.calc is not None else {}
    return {**atoms.info, **arrays, **results}


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float, np.number)) else None


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
