"""The commands of `potstill coarse`: all-atom trajectories to force fields of beads."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from potstill.cli.base import app, command, display

Whole = Annotated[Path, typer.Argument(help="YAML file: map, train, run; see `potstill config`.")]
Folder = Annotated[Path | None, typer.Option(help="Folder for everything.")]
Workers = Annotated[
    int | None, typer.Option(help="Processes: trainings or models to run at a time.", min=1)
]

coarse = typer.Typer(
    help="Coarse-grained force fields: map a trajectory to beads, train, run.",
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
    from potstill.config import load_mapping
    from potstill.workflows.mapping import map_to_beads

    map_to_beads(load_mapping(config, out), display)


@command("Coarse graining", name="ibi", within=coarse)
def invert(
    config: Annotated[
        Path, typer.Argument(help="YAML file: out, store, model, dynamics; see `potstill config`.")
    ],
    out: Annotated[Path | None, typer.Option(help="Run folder.")] = None,
) -> None:
    """Find pair potentials that reproduce g(r): iterative Boltzmann inversion.

    Starts from the potential of mean force and corrects it after each run of dynamics by
    kT ln(g / g_target). An interrupted run continues. `potstill config coarse-ibi` prints all
    settings.

    [bold]Example[/bold]

      potstill coarse ibi ibi.yaml --out run/ibi
    """
    from potstill.config import IbiConfig, load_config
    from potstill.workflows.ibi import invert_distributions

    settings = load_config(config, IbiConfig, {"out": out})
    best = invert_distributions(settings, display)
    display.say(
        f"the result is iteration {best.number}, where g(r) differs by {best.mean_error:.4f}: "
        f"{settings.out}/best.pt, for LAMMPS {settings.out}/best.in"
    )


@command("Coarse graining", name="train", within=coarse)
def train(config: Whole, out: Folder = None, workers: Workers = None) -> None:
    """Train teachers on mapped forces, and students on what the teachers say; resumable.

    An ensemble of teachers is trained on the mapped forces alone. Students learn any combination of
    forces (mapped, of one teacher, of all) and energies (none, total, of each bead) from them. Maps
    the trajectory first, where that is not done, and fits the pair potentials of `baselines` last.

    [bold]Example[/bold]

      potstill coarse train studies/coarse_graining/reline.yaml --out run/reline --workers 2
    """
    from potstill.config import CoarseConfig, load_config
    from potstill.workflows.coarse import train_coarse

    train_coarse(load_config(config, CoarseConfig, {"out": out, "workers": workers}), display)


@command("Coarse graining", name="run", within=coarse)
def run(config: Whole, out: Folder = None, workers: Workers = None) -> None:
    """Run the trained models and compare their liquids with the mapped trajectory; resumable.

    Several runs of each model at a time, by Langevin dynamics. The report has distributions, how
    many runs failed, costs, and errors of forces.

    [bold]Example[/bold]

      potstill coarse run studies/coarse_graining/reline.yaml --out run/reline --workers 2
    """
    from potstill.config import CoarseConfig, load_config
    from potstill.workflows.coarse import run_coarse

    settings = load_config(config, CoarseConfig, {"out": out, "workers": workers})
    report = run_coarse(settings, display, command=shlex.join(["potstill", *sys.argv[1:]]))
    display.say(f"Report: {report}")


@command("Coarse graining", name="all", within=coarse)
def all_of_it(config: Whole, out: Folder = None, workers: Workers = None) -> None:
    """Turn an all-atom trajectory into validated force fields of beads: map, train, run; resumable.

    `potstill config coarse-all` prints all settings.

    [bold]Example[/bold]

      potstill coarse all studies/coarse_graining/reline.yaml --out run/reline --workers 2
    """
    from potstill.config import CoarseConfig, load_config
    from potstill.workflows.coarse import run_coarse, train_coarse

    settings = load_config(config, CoarseConfig, {"out": out, "workers": workers})
    train_coarse(settings, display)
    report = run_coarse(settings, display, command=shlex.join(["potstill", *sys.argv[1:]]))
    display.say(f"Report: {report}")
