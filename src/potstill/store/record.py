"""What a store has on disk: columns of rows that only grow, and the record of what counts.

A write first puts rows behind the committed ones and then replaces the record, `commit.json`, in
one atomic step. A process killed at any point leaves the old record or the new one: rows beyond the
record are ignored, and overwritten by the next write. Chunk files, too, are replaced atomically,
so that rewriting a partly filled chunk cannot harm the rows that are already committed.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from potstill.errors import StoreError
from potstill.files import write_atomically
from potstill.properties import property_spec

FORMAT = "potstill labelled store"
FORMAT_VERSION = 2

#: Fields of structures that have one row per atom; all others have one per system.
ATOM_COLUMNS = ("positions", "species", "velocities", "fixed", "tags")
#: Fields of structures that are texts.
TEXTS = ("group", "frame_id")

_COMMIT = "commit.json"
_CHUNK_BYTES = 1 << 18  # of one chunk file before compression

Record = dict[str, Any]


# -- columns --------------------------------------------------------------------------------------


class Columns:
    """The arrays of a store. A record says how many of their rows count."""

    def __init__(self, path: Path, *, writable: bool) -> None:
        self.path = path
        self._group = zarr.open_group(store=str(path), mode="r+" if writable else "r")
        self._arrays: dict[str, zarr.Array] = {}
        #: Columns that an older format lacks, while the store is open for reading only.
        self.derived: dict[str, np.ndarray] = {}

    def forget(self) -> None:
        """Read the disk again after another process or a failed write has changed it."""
        self._arrays.clear()

    def read(self, record: Record, name: str, start: int, stop: int) -> np.ndarray:
        """Rows start..stop-1; the column's neutral value where it has no rows yet."""
        if name not in record["columns"]:
            raise StoreError(f"{self.path} has no column '{name}'")
        end = min(stop, record["columns"][name])
        if name in self.derived:
            return self.derived[name][start:end]
        array = self._array(name)
        if end >= stop:
            return np.asarray(array[start:stop])
        rows = np.full((stop - start, *array.shape[1:]), array.fill_value, dtype=array.dtype)
        if end > start:
            rows[: end - start] = array[start:end]
        return rows

    def write(
        self,
        record: Record,
        name: str,
        start: int,
        values: np.ndarray,
        fill: Any = 0,
        *,
        skipped: Any = None,
    ) -> None:
        """Put rows at `start`, behind those that count, and count them in the record.

        A column that is not there is made. `fill` is its neutral value, for rows that nobody wrote;
        rows between the last that counts and `start` are `skipped`, if given, instead.
        """
        stop, known = start + len(values), record["columns"].get(name)
        row_bytes = values.dtype.itemsize * int(np.prod(values.shape[1:]))
        chunk = max(1, _CHUNK_BYTES // max(row_bytes, 1))
        # Whole chunks, so that few writes must grow it.
        capacity = -(-max(stop, 1) // chunk) * chunk
        if known is None:
            self._arrays[name] = self._group.create_array(
                name,
                shape=(capacity, *values.shape[1:]),
                dtype=values.dtype,
                chunks=(chunk, *values.shape[1:]),
                fill_value=fill,
                overwrite=True,  # what a killed process left does not count
            )
        array = self._array(name)
        if array.shape[0] < stop:
            array.resize((capacity, *values.shape[1:]))
        if known is not None and start > known:  # a killed process may have left something there
            array[known:start] = fill if skipped is None else skipped
        if len(values):
            array[start:stop] = values
        record["columns"][name] = stop

    def append_bytes(self, record: Record, name: str, raw: bytes) -> None:
        """Add bytes to a column of them."""
        start = record["columns"].get(name, 0)
        self.write(record, name, start, np.frombuffer(raw, dtype="u1"))

    def offsets(self, record: Record, name: str, start: int, stop: int) -> np.ndarray:
        """(stop - start + 1,) where the parts of systems begin and end.

        `name` is a column of ends: part k is `ends[k - 1]:ends[k]`. Systems that it does not reach
        have empty parts.
        """
        rows = record["columns"].get(name, 0)
        first, last = min(start, rows), min(stop, rows)
        ends = np.zeros(1, dtype="i8")
        if last:
            read = self.read(record, name, max(first - 1, 0), last)
            ends = read if first else np.concatenate([ends, read])
        return np.pad(ends, (0, stop - start + 1 - len(ends)), mode="edge")

    def write_texts(self, record: Record, name: str, start: int, texts: Iterable[str]) -> None:
        """Write one text per system to `name`: their bytes, and where each ends."""
        encoded = [text.encode() for text in texts]
        before = record["columns"].get(f"{name}_bytes", 0)
        ends = before + np.cumsum([len(text) for text in encoded], dtype="i8")
        self.write(record, f"{name}_end", start, ends, skipped=before)
        self.append_bytes(record, f"{name}_bytes", b"".join(encoded))

    def read_texts(self, record: Record, name: str, start: int, stop: int) -> tuple[str, ...]:
        """One text per system, empty where none was written."""
        offsets = self.offsets(record, f"{name}_end", start, stop)
        first = int(offsets[0])
        raw = self.read(record, f"{name}_bytes", first, int(offsets[-1])).tobytes()
        ends = (offsets - first).tolist()
        return tuple(raw[a:b].decode() for a, b in itertools.pairwise(ends))

    def write_failures(
        self, record: Record, base: str, own: Record, failures: Iterable[Mapping[str, Any]]
    ) -> None:
        """Add frames without labels to a set: one line of JSON each."""
        lines = [json.dumps(failure) + "\n" for failure in failures]
        if lines:
            self.append_bytes(record, f"{base}/failures", "".join(lines).encode())
        own["n_failed"] += len(lines)

    def read_failures(self, record: Record, base: str) -> list[dict[str, Any]]:
        """Inverse of `write_failures`."""
        name = f"{base}/failures"
        if not record["columns"].get(name):
            return []
        raw = self.read(record, name, 0, record["columns"][name]).tobytes()
        return [json.loads(line) for line in raw.decode().splitlines()]

    def n_rows(self, name: str) -> int:
        """Rows on disk, whether they count or not."""
        return int(self._array(name).shape[0])

    def _array(self, name: str) -> zarr.Array:
        if name not in self._arrays:
            array = self._group[name]
            assert isinstance(array, zarr.Array)
            self._arrays[name] = array
        return self._arrays[name]


def atom_offsets(columns: Columns, record: Record, start: int, stop: int) -> np.ndarray:
    """(stop - start + 1,) where the atoms of systems begin and end."""
    return columns.offsets(record, "structures/atom_end", start, stop)


# -- the record -----------------------------------------------------------------------------------


def new_record(info: Mapping[str, Any], species: list[dict], *, fixed: bool) -> Record:
    """Return the record of an empty store."""
    return {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "info": plain_json(info, "info"),
        "species": species,
        "species_are_fixed": fixed,
        "n_systems": 0,
        "n_atoms": 0,
        "digest": "",
        "columns": {},
        "sources": {},
        "features": {},
    }


def read_record(path: Path) -> Record:
    """Read the record of a store, whatever version of the format.

    Raises
    ------
    StoreError
        If there is no store, or a newer version of potstill wrote it.
    """
    if not path.exists():
        raise StoreError(f"there is no store at {path}")
    try:
        record = json.loads((path / _COMMIT).read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise ValueError(record["format"])
        version = int(record["version"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path} is not a store of potstill") from error
    if version > FORMAT_VERSION:
        raise StoreError(
            f"{path} has format version {version}, this potstill reads up to {FORMAT_VERSION}: "
            f"upgrade potstill"
        )
    return record


def write_record(path: Path, record: Record) -> None:
    """Commit: replace the record atomically."""
    write_atomically(path / _COMMIT, json.dumps(record, indent=1))


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Keep other writers out; the system lifts the lock when a process dies."""
    try:
        import fcntl
    except ImportError:  # not on Windows: there, writing from one process is up to the user
        yield
        return
    with open(path / ".lock", "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def remove_litter(path: Path) -> None:
    """Remove what killed writers left; only for a writer who holds the lock."""
    for pattern in ("*.partial", f".{_COMMIT}.*"):
        for litter in path.rglob(pattern):
            litter.unlink()


# -- older formats --------------------------------------------------------------------------------


def upgrade(columns: Columns, record: Record, *, writable: bool) -> Record:
    """Bring the record and columns of an older format to the present one.

    A store that is open for reading stays as it is on disk: new columns are kept in memory. One
    that is open for writing is upgraded in one atomic step, and older versions of potstill refuse
    it from then on.
    """
    while record["version"] < FORMAT_VERSION:
        record, new, gone = UPGRADES[record["version"]](columns, record)
        record["columns"] |= {name: len(rows) for name, rows in new.items()}
        if not writable:
            columns.derived |= new
            continue
        for name, rows in new.items():
            del record["columns"][name]
            columns.write(record, name, 0, rows)
        write_record(columns.path, record)
        for name in gone:
            shutil.rmtree(columns.path / name, ignore_errors=True)
    return record


def _from_version_1(columns: Columns, old: Record) -> tuple[Record, dict[str, np.ndarray], list]:
    """Counts become ends, failures leave the record, and columns say how many rows count."""
    n_systems = old["n_systems"]
    everything = dict.fromkeys(old["columns"], n_systems)
    record: Record = {**old, "version": 2, "columns": {}, "sources": {}, "features": {}}
    del record["text_bytes"]
    new: dict[str, np.ndarray] = {"structures/atom_end": np.zeros(0, "i8")}
    gone = []

    def ends(name: str, n: int, end: str) -> None:
        counts = columns.read({"columns": everything}, name, 0, n)
        new[end] = np.cumsum(counts, dtype="i8")
        gone.append(name)

    if n_systems:
        ends("structures/n_atoms", n_systems, "structures/atom_end")
    for name in TEXTS:
        if f"structures/{name}_length" in everything:
            ends(f"structures/{name}_length", n_systems, f"structures/{name}_end")
    atoms = np.concatenate([[0], new["structures/atom_end"]])

    def moved(own: Record, base: str, done: str) -> Record:
        """Entry of a set of labels or of a tap, its failures in a column."""
        kept = {k: v for k, v in own.items() if k not in (done, "failures", "n_rows")}
        if own["failures"]:
            lines = "".join(json.dumps(failure) + "\n" for failure in own["failures"])
            new[f"{base}/failures"] = np.frombuffer(lines.encode(), "u1")
        return {**kept, "n_done": own[done], "n_failed": len(own["failures"])}

    rows: dict[str, int] = {}
    for source, own in old["sources"].items():
        record["sources"][source] = moved(own, f"labels/{source}", "n_labelled")
        for name in own["properties"]:
            done = own["n_labelled"]
            full = int(atoms[done]) if property_spec(name).level == "atom" else done
            for kind, n in (("values", full), ("weights", full), ("present", done)):
                rows[f"labels/{source}/{kind}/{name}"] = n
    for source, own in old.get("features", {}).items():
        taps = {t: moved(tap, f"features/{source}/{t}", "n_done") for t, tap in own["taps"].items()}
        record["features"][source] = {**own, "taps": taps}
        for tap, entry in own["taps"].items():
            base = f"features/{source}/{tap}"
            for name in ("values", "center", "neighbor", "shifts"):
                rows[f"{base}/{name}"] = entry["n_rows"]
            rows[f"{base}/present"] = entry["n_done"]
            if f"{base}/n_pairs" in everything:
                ends(f"{base}/n_pairs", entry["n_done"], f"{base}/pair_end")
    rows |= {f"structures/{name}": old["n_atoms"] for name in ATOM_COLUMNS}
    rows |= {f"structures/{name}_bytes": n for name, n in old["text_bytes"].items()}
    for name in old["columns"]:
        if name not in gone:
            record["columns"][name] = min(rows.get(name) or n_systems, columns.n_rows(name))
    return record, new, gone


#: Upgrade functions by the version they start from: (record, new columns, columns that go).
UPGRADES: dict[int, Callable[[Columns, Record], tuple[Record, dict[str, np.ndarray], list]]] = {
    1: _from_version_1
}


# -- facts and hashes -----------------------------------------------------------------------------


def plain_json(info: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Facts as JSON gives them back.

    Raises
    ------
    StoreError
        If they cannot be written as JSON.
    """
    try:
        return json.loads(json.dumps(dict(info), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise StoreError(f"the facts about '{what}' cannot be written as JSON: {error}") from error


def chain(start: str, digests: Iterable[bytes]) -> str:
    """Hash of all frames so far, so that the record stays short and chunking does not matter."""
    state = start
    for digest in digests:
        state = hashlib.blake2b(state.encode() + digest, digest_size=16).hexdigest()
    return state
