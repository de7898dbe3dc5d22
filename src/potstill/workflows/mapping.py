"""`potstill coarse map`: an all-atom trajectory with forces to beads in a label store."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from pydantic import Field, field_validator

from potstill.coarse import (
    MappingReport,
    MappingSettings,
    Residue,
    TrajectoryFile,
    map_trajectory,
    open_trajectory,
)
from potstill.readers import KeyMap, Units
from potstill.workflows.base import Display, Task
from potstill.workflows.data import FileSource


class MapConfig(MappingSettings):
    """Settings of `potstill coarse map`.

    Parameters
    ----------
    out : str
        Label store for the beads; must not exist.
    trajectory : tuple of FileSource
        File with positions and forces, or several that follow one another: any format of MDAnalysis
        (GROMACS' TRR, LAMMPS' dumps), extended XYZ or a NumPy archive.
    topology : str, optional
        File with names, residues, masses and bonds, for MDAnalysis: TPR, data of LAMMPS, PDB, GRO.
    residues : tuple of Residue
        Names of the atoms where no topology file tells them.
    masses : dict of str to float
        Masses in amu by names of atoms, where the files do not tell them or others are wanted.
    temperature : float, optional
        Temperature of the trajectory in K, kept in the store.
    info : dict of str to str
        Facts to keep in the store: license, citation, level_of_theory.
    chunk : int, optional
        Frames that are written at a time; by default about 100,000 beads.
    """

    out: str
    trajectory: tuple[FileSource, ...] = Field(min_length=1)
    topology: str | None = None
    residues: tuple[Residue, ...] = ()
    masses: dict[str, float] = Field(default_factory=dict)
    temperature: float | None = Field(default=None, gt=0.0)
    info: dict[str, str] = Field(default_factory=dict)
    chunk: int | None = Field(default=None, ge=1)

    @field_validator("trajectory", mode="before")
    @classmethod
    def _one_file_is_enough(cls, value: Any) -> Any:
        return value if isinstance(value, list | tuple) else [value]


def map_to_beads(config: MapConfig, display: Display | None = None) -> MappingReport:
    """Map a trajectory to beads; called again after an interruption, it resumes."""
    display = display or Display()
    files = [
        TrajectoryFile(
            path=file.path,
            format=file.format,
            keys=KeyMap(**file.keys),
            units=Units(**file.units),  # type: ignore[arg-type]
            index=file.index,
        )
        for file in config.trajectory
    ]
    trajectory = open_trajectory(
        files, topology=config.topology, residues=config.residues, masses=config.masses
    )
    source = config.model_dump(
        mode="json", include={"trajectory", "topology", "residues", "masses"}
    )
    info: dict[str, Any] = {**config.info, "source": source}
    if config.temperature is not None:
        info["temperature"] = config.temperature
    settings = MappingSettings.model_validate(
        config.model_dump(include=set(MappingSettings.model_fields))
    )
    with _passes(display) as progress:
        report = map_trajectory(
            trajectory, settings, config.out, info=info, chunk=config.chunk, progress=progress
        )
    show_mapping(report, display)
    return report


@contextlib.contextmanager
def _passes(display: Display) -> Iterator[Any]:
    """A progress bar for each pass over the trajectory."""
    with contextlib.ExitStack() as stack:
        tasks: dict[str, Task] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                stack.close()
                tasks[what] = stack.enter_context(display.task(what, total))
            tasks[what].update(done, total)

        yield progress


def show_mapping(report: MappingReport, display: Display) -> None:
    """Show what a mapping found: beads, forces by either map, and constrained bonds."""

    def number(value: float | None, digits: int = 4) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    rows = []
    for name, bead in report.beads.items():
        plain, optimal = bead["rms_sum"], bead["rms_optimal"]
        row = [name, str(bead["count"]), number(bead["mass"], 3), number(plain)]
        if report.molecules:
            ratio = number((optimal / plain) ** 2, 3) if plain and optimal else ""
            row += [number(optimal), number(plain and plain**2), number(optimal**2), ratio]
        rows.append(row)
    columns = ("bead", "count", "amu", "rms: sum", "optimal", "variance: sum", "optimal", "ratio")
    display.table(
        "Beads, and the components of the force on them in eV/Å",
        columns if report.molecules else (*columns[:3], "rms"),
        rows,
    )
    for molecule in report.molecules:
        atoms, pairs = molecule["atoms"], molecule["constrained"]
        kinds = dict.fromkeys("-".join(sorted((atoms[i], atoms[j]))) for i, j in pairs)
        words = f"{len(pairs) or 'no'} constrained distances"
        words += f" ({', '.join(kinds)})" if pairs else ""
        words += f", {molecule['cut']} of them cut by the mapping" if molecule["cut"] else ""
        display.say(f"{molecule['count']} x {molecule['name']}: {words}")
        if molecule["samples"] < 10 * len(atoms):
            display.say(
                f"  {molecule['samples']} configurations are few for a force map of {len(atoms)} "
                f"atoms: consider ridge: 0.1"
            )
    net = report.net_force
    display.say(
        f"Total force of a frame, rms of a component: {net['atoms']:.4f} eV/Å of all atoms, "
        f"{net['beads']:.4f} eV/Å of the beads by the plain sum"
    )
    if report.density is not None:
        display.say(f"Density: {report.density:.4f} g/cm³")
    n_beads = sum(bead["count"] for bead in report.beads.values())
    display.say(f"{report.n_frames} frames of {n_beads} beads in {report.path}")
