"""Settings of the process that are read only when it starts: memory allocator, waiting threads."""

from __future__ import annotations

import os
import platform
import sys

#: glibc's variables that keep large tensors in the process; see docs/performance.md.
MALLOC = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")

#: Turns these settings off.
NO_TUNING = "POTSTILL_NO_MALLOC_TUNING"


def tune_process() -> None:
    """Restart this process with the settings, unless it has them.

    glibc gives every tensor above 32 MB back to the system and asks for it again in the next step;
    keeping them makes training several times faster. OpenMP's threads wait for one another in a
    busy loop; where another program has the other core, one step of CHGNet took 13 s instead of
    0.2 s, and letting them sleep costs nothing measurable.
    """
    tuning = {name: str(2**35) for name in MALLOC} | {"OMP_WAIT_POLICY": "PASSIVE"}
    set_already = all(name in os.environ for name in tuning)
    if set_already or os.environ.get(NO_TUNING) or platform.libc_ver()[0] != "glibc":
        return
    for name, value in tuning.items():
        os.environ.setdefault(name, value)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def memory_tuning() -> str:
    """Say whether glibc keeps large tensors, and how to change that."""
    if all(os.environ.get(name) for name in MALLOC):
        return (
            f"large tensors stay in the process (faster, more memory; {NO_TUNING}=1 turns this off)"
        )
    return f"large tensors go back to the system: set {' and '.join(MALLOC)} for speed"
