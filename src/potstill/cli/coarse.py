"""The commands of `potstill coarse`: all-atom trajectories to force fields of beads."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from potstill.cli.base import app, command, display

coarse = typer.Typer(
    help="Coarse-grained force fields: trajectories mapped to beads.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
app.add_typer(coarse, name="coarse", rich_help_panel="Coarse graining")


@command("Coarse graining", name="map", within=coarse)
def map_trajectory(
    config: Annotated[
        Path,
        typer.Argument(help="YAML file: trajectory, topology, beads; see `potstill config`."),
    ],
    out: Annotated[Path | None, typer.Option(help="Label store for the beads.")] = None,
) -> None:
    """Map an all-atom trajectory with forces to beads, into a label store.

    Reads what MDAnalysis reads (GROMACS, LAMMPS and others; extra `coarse`) frame by frame, and
    extended XYZ and NumPy archives. Forces are mapped by the plain sum, or by the linear map with
    the least noise that fits the beads and the constraints found in the trajectory; the variance
    of both is shown. An interrupted run resumes. `potstill config coarse-map` prints all settings.

    [bold]Example[/bold]

      potstill coarse map studies/coarse_graining/reline.yaml --out reline.zarr
    """
    from potstill.config import MapConfig, load_config
    from potstill.workflows.mapping import map_to_beads

    map_to_beads(load_config(config, MapConfig, {"out": out}), display)


@command("Coarse graining", name="all", within=coarse)
def all_of_it(
    config: Annotated[
        Path, typer.Argument(help="YAML file: map, train, run; see `potstill config`.")
    ],
    out: Annotated[Path | None, typer.Option(help="Folder for everything.")] = None,
    workers: Annotated[int | None, typer.Option(help="Trainings at a time.", min=1)] = None,
) -> None:
    """Turn an all-atom trajectory into validated force fields of beads, with a report; resumable.

    Maps the trajectory, trains an ensemble of teachers on the mapped forces and students on what
    these say, runs all of them, and compares their liquids with the mapped one.
    `potstill config coarse-all` prints all settings.

    [bold]Example[/bold]

      potstill coarse all studies/coarse_graining/reline.yaml --out run/reline --workers 2
    """
    from potstill.config import CoarseConfig, load_config
    from potstill.workflows.coarse import coarse as work

    settings = load_config(config, CoarseConfig, {"out": out, "workers": workers})
    report = work(settings, display, command=shlex.join(["potstill", *sys.argv[1:]]))
    display.say(f"Report: {report}")
