"""Jobs for the scheduler, in a module that processes import fast."""

from __future__ import annotations

import os
from pathlib import Path

from potstill.errors import DataError


class Work:
    """Writes a file for a job: the number of threads and which jobs were done before."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, job: str, threads: int) -> None:
        if job == "wrong":
            raise DataError("this cannot be done")
        if job == "crash":
            os._exit(7)
        before = sorted(path.stem for path in self.folder.glob("*.done"))
        (self.folder / f"{job}.done").write_text(f"{threads} {' '.join(before)}")

    def done(self, job: str) -> bool:
        return (self.folder / f"{job}.done").is_file()
