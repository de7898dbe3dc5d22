"""Potentials for other programs. `DEPLOYMENTS` is the explicit table of targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from potstill.deploy.lammps import write_lammps
from potstill.deploy.lammps_snap import write_lammps_snap
from potstill.deploy.lammps_table import write_lammps_table
from potstill.deploy.metatomic import write_metatomic
from potstill.errors import ConfigError, suggest
from potstill.models import Potential

#: By target: writes a potential, and what is known of it, into a folder, under a stem, and returns
#: the files.
DEPLOYMENTS: dict[str, Callable[[Potential, Path, str, Mapping[str, Any]], list[Path]]] = {
    "lammps": write_lammps,
    "lammps-snap": write_lammps_snap,
    "lammps-table": write_lammps_table,
    "metatomic": write_metatomic,
}


def deploy(
    potential: Potential,
    target: str,
    folder: str | Path,
    stem: str = "student",
    info: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write a potential for another program.

    Parameters
    ----------
    potential : Potential
        What `load_potential` gives.
    target : str
        A key of `DEPLOYMENTS`.
    folder : path
        Made if it does not exist.
    stem : str
        The files' names without endings.
    info : mapping, optional
        What is known of the potential, as `load_potential` returns it.

    Raises
    ------
    ConfigError
        If there is no such target.
    ModelError
        If the target cannot run this potential.
    """
    if target not in DEPLOYMENTS:
        raise ConfigError(f"there is no deployment '{target}'{suggest(target, DEPLOYMENTS)}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return DEPLOYMENTS[target](potential, folder, stem, info or {})
