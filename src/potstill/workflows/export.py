"""Handing a student to other programs, with a proof that it is the same there."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import ase
import torch

from potstill.checkpoint import load_potential
from potstill.deploy import deploy
from potstill.deploy.lammps import why_not_native
from potstill.deploy.lammps_build import (
    Installation,
    build_plugin,
    core_folder,
    find_lammps,
    plugin_path,
    python_library,
)
from potstill.display import Display
from potstill.errors import ConfigError, require, suggest
from potstill.files import write_atomically
from potstill.models import HIPNN, ZBL, Potential, SpeciesOffsets, SumPotential
from potstill.species import SpeciesTable
from potstill.workflows.base import limited_threads, read_start
from potstill.workflows.lammps_check import LammpsRun, check_parity
from potstill.workflows.parity import Parity, by_ase, differences, is_single, random_structures

#: Executable, headers and headers of MPI; None for those of the wheel.
Place = tuple[Path | None, Path | None, Path | None]


def export(
    model: str | Path,
    target: str,
    folder: str | Path,
    *,
    structures: Sequence[Path] = (),
    check: bool = True,
    installation: Place = (None, None, None),
    display: Display | None = None,
) -> list[Path]:
    """Write a checkpoint for another program, and compare it there with the checkpoint.

    Parameters
    ----------
    model : path
        A checkpoint.
    target : str
        A key of `DEPLOYMENTS`.
    folder : path
        Where to write.
    structures : sequence of Path
        Files whose first structures are compared besides random ones.
    check : bool
        Whether to compare; of the targets `lammps` and `metatomic`.
    installation : tuple
        The LAMMPS to compare with, by default the wheel of this Python.
    display : Display, optional
        Receives the results.

    Returns
    -------
    list of Path
        What was written.

    Raises
    ------
    ModelError
        If the target cannot run the potential, or runs another one.
    OptionalDependencyError
        If a package that the target, or the comparison, needs is not installed.
    ConfigError
        If the pair style cannot be built.
    """
    display = display or Display()
    potential, info = load_potential(model)
    stem = Path(model).stem
    if target == "lammps" and (reason := why_not_native(potential)) is not None:
        display.say(
            f"{reason[0].upper()}{reason[1:]}. So this is for the pair style potstill/python, "
            "which calls PyTorch in every step and is many times slower"
        )
    if not check or target not in ("lammps", "metatomic"):
        return deploy(potential, target, folder, stem, info)
    lammps = find_lammps(*installation) if target == "lammps" else None
    low, high = (info.get("trained_on") or {}).get("density_g_cm3") or (None, None)
    density = None if low is None else 0.5 * (low + high)
    compare = {path.name: read_start(str(path))[0].to_ase()[0] for path in structures}
    compare |= random_structures(potential, density)
    with tempfile.TemporaryDirectory() as scratch:
        # What fails is not left behind.
        checked = deploy(potential, target, scratch, stem, info)
        if lammps is None:
            report(compare_in_metatomic(potential, checked[0], compare), display)
        else:
            report(compare_in_lammps(potential, checked[0], lammps, compare), display)
        files = [Path(folder) / file.name for file in checked]
        for file, place in zip(checked, files, strict=True):
            write_atomically(place, file.read_bytes())
    return files


def compare_in_lammps(
    potential: Potential, file: Path, lammps: Installation, structures: dict[str, ase.Atoms]
) -> Parity:
    """The self-test of an exported file, on one rank and, where there is mpiexec, on two."""
    plugin = build_plugin(lammps)
    with tempfile.TemporaryDirectory() as scratch, limited_threads(1):
        run = LammpsRun(lammps, plugin, file, potential.species_table.names, Path(scratch))
        several = lammps.mpiexec and (file.suffix == ".potstill" or math.isfinite(potential.reach))
        ranks = (1, 2) if several else (1,)
        return check_parity(potential, run, structures, ranks=ranks)


def compare_in_metatomic(
    potential: Potential, file: Path, structures: dict[str, ase.Atoms]
) -> Parity:
    """The self-test of an exported file, by metatomic's own calculator."""
    metatomic = require("metatomic_ase", extra="metatomic", purpose="to test its models")
    found = Parity("metatomic")
    calculator = metatomic.MetatomicCalculator(str(file), check_consistency=True, device="cpu")
    precision = "float32" if is_single(potential) else "float64"
    doubled = deepcopy(potential).double()
    for name, atoms in structures.items():
        checkpoint = by_ase(potential, atoms)
        noise = differences(by_ase(doubled, atoms), checkpoint)
        errors = differences(checkpoint, by_ase(potential, atoms, calculator))
        found.judge(name, precision, errors, noise)
    return found


def report(parity: Parity, display: Display) -> None:
    """Show the tables of a self-test."""
    display.table(
        f"{parity.program} beside the checkpoint in ASE: largest relative differences",
        ("structure", "ranks", "precision", "energies", "forces", "stress"),
        parity.rows,
    )
    if parity.drift:
        display.table(
            f"{parity.steps} fs of NVE on one thread per rank",
            ("program", "ranks", "change of the energy, eV/atom", "µs per atom and step"),
            parity.drift,
        )


def lammps_plugin(
    action: str, installation: Place, *, core: bool = False, display: Display | None = None
) -> list[str]:
    """Build the plugin, say where it is, or test it.

    Parameters
    ----------
    action : {"build", "path", "doctor"}
        What to do.
    installation : tuple
        The LAMMPS that is meant.
    core : bool
        Whether `path` asks for the folder of potstill's core.
    display : Display, optional
        Receives the tables of `doctor`.

    Returns
    -------
    list of str
        Lines to print.

    Raises
    ------
    ConfigError
        If there is no such action, the plugin cannot be built, or its path is asked for before.
    ModelError
        If the test fails.
    """
    display = display or Display()
    actions = ("build", "path", "doctor")
    if action not in actions:
        raise ConfigError(f"`potstill lammps` does not know '{action}'{suggest(action, actions)}")
    if action == "path" and core:
        return [str(core_folder())]
    lammps = find_lammps(*installation)
    if action == "path":
        plugin = plugin_path(lammps)
        if not plugin.is_file():
            raise ConfigError("there is no plugin for this LAMMPS yet: run `potstill lammps build`")
        return [str(plugin)]
    plugin = build_plugin(lammps)
    if action == "build":
        return [f"The plugin for LAMMPS {lammps.version} is {plugin}"]
    facts = {
        "version": lammps.version,
        "program": lammps.program,
        "headers": lammps.include,
        "MPI headers": lammps.mpi_include,
        "mpiexec": lammps.mpiexec or "none: one rank only",
        "plugin": plugin,
        "Python": python_library() or "no shared library: potstill/python in LAMMPS' module only",
    }
    display.table("LAMMPS", ("", ""), [[name, str(value)] for name, value in facts.items()])
    potential = _small_potential()
    with tempfile.TemporaryDirectory() as folder:
        (file, _) = deploy(potential, "lammps", folder, "doctor")
        structures = random_structures(potential)
        report(compare_in_lammps(potential, file, lammps, structures), display)
    return ["The pair style works."]


def _small_potential() -> Potential:
    """Of two species and two interaction layers, untrained."""
    table = SpeciesTable.from_symbols(["Al", "Cu"])
    sizes: dict[str, Any] = {"n_features": 8, "n_sensitivities": 6, "n_interaction_layers": 2}
    distances = {"dist_soft_min": 1.6, "dist_soft_max": 4.5, "dist_hard_max": 5.0}
    torch.manual_seed(0)
    network = HIPNN(table, **sizes, **distances, n_atom_layers=1, l_max=2).double()
    offsets = SpeciesOffsets(table, [-3.0, -4.0])
    return SumPotential({"offsets": offsets, "prior": ZBL(table, 1.0, 2.0), "network": network})
