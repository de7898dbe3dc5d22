"""Run a script that is killed again and again until it is allowed to finish.

A killed process ends as by `kill -9`, at one of its own file operations: between two of them
nothing reaches the disk, so that all moments between are the same for what comes after. The
functions here call `kill_helper.py FOLDER OPERATION SCRIPT ARGUMENT...`.
"""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

#: Kinds of file operations that Python reports before it does them.
_EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate")


def kill_until_done(arguments: Sequence[str], folder: Path, operations: Iterable[int]) -> list[int]:
    """Start a Python script, kill it as often as there are operations, then let it finish.

    Parameters
    ----------
    arguments : sequence of str
        The script and its arguments.
    folder : Path
        Only operations that write in it count.
    operations : iterable of int
        One number per run, counted from its start: it is killed before that operation.

    Returns
    -------
    list of int
        Exit statuses of the runs that were to be killed: -9 where the kill met it.
    """
    statuses = [run_and_kill(arguments, folder, operation) for operation in operations]
    assert run_and_kill(arguments, folder, 0) == 0
    return statuses


def run_and_kill(arguments: Sequence[str], folder: Path, operation: int) -> int:
    """Exit status of a Python script that is killed before an operation; of 0, not at all."""
    command = [sys.executable, __file__, str(folder), str(operation), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, timeout=600).returncode


def _die_before(folder: str, operation: int) -> None:
    seen = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in _EVENTS or not str(args[0]).startswith(folder):
            return
        if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR):
            return
        seen += 1
        if seen == operation:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


if __name__ == "__main__":
    _die_before(sys.argv[1], int(sys.argv[2]))
    sys.argv = sys.argv[3:]
    runpy.run_path(sys.argv[0], run_name="__main__")
