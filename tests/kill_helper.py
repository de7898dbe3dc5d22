"""Run a script that is killed again and again with SIGKILL until it is allowed to finish.

A script under test prints the line `ready` (flushed) once its imports are done and the work that
must survive begins: see `announce`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence

import numpy as np


def announce() -> None:
    """Tell the parent that the work begins."""
    print("ready", flush=True)


def kill_until_done(
    arguments: Sequence[str], *, kills: int, longest: float, seed: int = 0
) -> list[bool]:
    """Start a Python script `kills` times, kill it at a random moment, then let it finish.

    Parameters
    ----------
    arguments : sequence of str
        The script and its arguments.
    kills : int
        How often it is killed.
    longest : float
        s; the moments are drawn evenly between the line `ready` and this long after it.
    seed : int
        Seed of the moments.

    Returns
    -------
    list of bool
        Whether each kill met a running process (else it had finished before).
    """
    moments = np.random.default_rng(seed).uniform(0.0, longest, kills)
    met = []
    for moment in moments:
        process = _start(arguments)
        time.sleep(moment)
        met.append(process.poll() is None)
        process.kill()
        process.communicate()
    process = _start(arguments)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return met


def _start(arguments: Sequence[str]) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line == "ready\n", process.communicate()[1]
    return process
