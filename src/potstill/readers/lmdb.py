"""LMDB files, which OC20's graphs and ASE's databases both come in."""

from __future__ import annotations

from pathlib import Path

from potstill.errors import DataError, require


class Shard:
    """An LMDB file, open for reading; keys are ASCII text.

    Parameters
    ----------
    path : Path
        A single file, as OC20 and ASE's LMDB backend write it.

    Raises
    ------
    OptionalDependencyError
        If lmdb is not installed.
    DataError
        If it is not an LMDB file.
    """

    def __init__(self, path: Path) -> None:
        lmdb = require("lmdb", extra="lmdb", purpose="to read LMDB files")
        self.path = path
        try:
            self._database = lmdb.open(str(path), subdir=False, readonly=True, lock=False)
            self.n_entries: int = self._database.stat()["entries"]
        except lmdb.Error as error:
            raise DataError(f"{path} is not a readable LMDB file: {error}") from error
        self._error = lmdb.Error

    def get(self, key: str) -> bytes | None:
        """The value of a key, None if there is none."""
        try:
            with self._database.begin() as transaction:
                return transaction.get(key.encode("ascii"))
        except self._error as error:
            raise DataError(f"{self.path}, key '{key}' cannot be read: {error}") from error


def open_shards(path: Path, pattern: str) -> list[Shard]:
    """Open an LMDB file, or those of a folder in the order of their names.

    Raises
    ------
    DataError
        If a folder holds no file of that pattern, or a file is no LMDB file.
    """
    files = sorted(path.glob(pattern)) if path.is_dir() else [path]
    if not files:
        raise DataError(f"the folder {path} holds no {pattern} files")
    return [Shard(file) for file in files]
