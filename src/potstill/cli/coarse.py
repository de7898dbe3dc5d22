"""The commands of `potstill coarse`: all-atom trajectories to force fields of beads."""

from __future__ import annotations

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
    done = invert_distributions(settings, display)
    best = min(done, key=lambda iteration: iteration.mean_error)
    display.say(
        f"the best is iteration {best.number}, with a mean error of g(r) of {best.mean_error:.4f}: "
        f"{settings.out}/best.pt, for LAMMPS {settings.out}/best.in"
    )
