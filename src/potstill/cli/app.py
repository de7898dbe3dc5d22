"""The commands of `potstill`.

What they need is imported inside of them: help and mistakes in options cost nothing then.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from potstill import __version__
from potstill.cli.base import app, command, display, quiet_warnings
from potstill.errors import ConfigError

Config = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="YAML file of settings; see `potstill config`."),
]
Args = Annotated[
    list[str] | None,
    typer.Option("--teacher-arg", help="Argument of the teacher as key=value; repeatable."),
]
Seed = Annotated[int | None, typer.Option(help="Seed of all random numbers.")]
RunFolder = Annotated[Path | None, typer.Option(help="Run folder.")]
OtherTeacher = Annotated[str | None, typer.Option(help="As for distill.")]
Drawn = Annotated[int | None, typer.Option(help="Number of structures to draw.")]


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    quiet_warnings(Console(stderr=True))
    if version:
        display.say(f"potstill {__version__}")
        raise typer.Exit


@command("Distill")
def distill(
    teacher: Annotated[
        str | None,
        typer.Option(help="chgnet, gfn2-xtb, ani-al, a checkpoint, or module:factory."),
    ] = None,
    teacher_arg: Args = None,
    structure: Annotated[
        str | None, typer.Option(help="Structure file, or 'silicon', which is built in.")
    ] = None,
    temperature: Annotated[
        str | None, typer.Option(help="MD temperature range in K, e.g. 300:900.")
    ] = None,
    pressure: Annotated[
        list[float] | None,
        typer.Option(help="Pressure in GPa of constant-pressure MD; repeatable."),
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="Wall time for everything, e.g. 10min or 2h.")
    ] = None,
    out: RunFolder = None,
    seed: Seed = None,
    config: Config = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
) -> None:
    """Distill a teacher for one material: structures, labels, student, control, report, MD.

    Without options: CHGNet, silicon, 300 to 900 K (CHGNet's silicon stays a crystal there),
    fourteen minutes, into ./run. A few labels, MD steps and epochs are timed first, and a plan is
    made that fits the budget. An interrupted run resumes when the same command is given again.
    `potstill config distill` prints all settings.

    [bold]Examples[/bold]

      potstill distill --out run/silicon

      potstill distill --teacher chgnet --structure LiF.cif --temperature 300:700 --budget 30min

      potstill distill --teacher ase.calculators.emt:EMT --structure Cu.xyz --dry-run
    """
    given = _named(locals(), "dry_run", pressure=pressure or None)
    from potstill.config import DistillConfig, load_config
    from potstill.workflows.distill import distill as work
    from potstill.workflows.summary import summary_rows

    result = work(load_config(config, DistillConfig, given), display, dry_run=dry_run)
    if dry_run:
        display.say(f"The plan is in {result.folder}/plan.json; run it without --dry-run.")
        return
    for line in (*result.summary.get("verdicts", ()), *result.summary.get("problems", ())):
        display.say(line)
    display.table("Results", ("", "model", ""), summary_rows(result.summary))
    display.say(f"Student: {result.folder}/student.pt")
    display.say(f"Report:  {result.folder}/report.html")


@command("Prepare data")
def sample(
    config: Annotated[
        Path, typer.Argument(help="YAML file: start, jobs, teacher, out; see `potstill config`.")
    ],
    out: Annotated[Path | None, typer.Option(help="Folder for the structures.")] = None,
    teacher: OtherTeacher = None,
    teacher_arg: Args = None,
    seed: Seed = None,
) -> None:
    """Generate structures to label: rattling, jitter, strain, MD, relaxation, gradient ascent.

    Writes structures.extxyz. An interrupted run resumes where it stopped.
    `potstill config sample` prints all settings.

    [bold]Examples[/bold]

      potstill sample jobs.yaml --teacher run/teacher/best.pt --out synthetic

      potstill label synthetic.zarr synthetic/structures.extxyz --teacher run/teacher/best.pt
    """
    from potstill.config import SampleConfig, load_config
    from potstill.workflows.sampling import FILE
    from potstill.workflows.sampling import sample as work

    given = None if teacher is None else _teacher(teacher, teacher_arg)
    settings = load_config(config, SampleConfig, {"out": out, "seed": seed, "teacher": given})
    frames = work(settings, display)
    display.say(f"{len(frames)} structures in {Path(settings.out) / FILE}")


@command("Prepare data")
def label(
    store: Annotated[Path, typer.Argument(help="Label store; created if it does not exist.")],
    files: Annotated[
        list[Path] | None, typer.Argument(help="Structure files to add to it first.")
    ] = None,
    teacher: OtherTeacher = None,
    teacher_arg: Args = None,
    properties: Annotated[
        str | None,
        typer.Option(help="Comma-separated; default: all that can be learned; or 'none'."),
    ] = None,
    taps: Annotated[
        str | None,
        typer.Option(help="Internal features to store, comma-separated; or 'default'."),
    ] = None,
    config: Config = None,
) -> None:
    """Label structures with a teacher, in the teacher's own environment if it needs one.

    A store holds the labels of any number of teachers next to the reference labels. An interrupted
    run resumes where it stopped; frames that the teacher fails on are skipped, counted and listed.
    `potstill config label` prints all settings.

    [bold]Examples[/bold]

      potstill label labels.zarr structures.extxyz --teacher chgnet

      potstill label labels.zarr --teacher 'run/seed*/best.pt'

      potstill label labels.zarr --teacher chgnet --taps default
    """
    given = _named(
        locals(),
        files=_files(files),
        properties=[] if properties == "none" else _listed(properties),
        taps=_listed(taps),
    )
    from potstill.config import LabelConfig, load_config
    from potstill.workflows.labeling import label as work

    report = work(load_config(config, LabelConfig, given), display)
    display.say(f"{report.n_labeled} structures labeled, {report.n_failed} failed")


@command("Train")
def train(
    config: Annotated[
        Path, typer.Argument(help="YAML file: out, data, train, stages; see `potstill config`.")
    ],
    out: RunFolder = None,
    seed: Seed = None,
) -> None:
    """Train a model on reference labels, a teacher's labels, or both.

    The labels that the loss needs are checked before the first step. Each stage starts from the
    best network of the one before: pretraining on teacher labels, then fine-tuning, for example.
    `potstill config train` prints all settings.

    [bold]Example[/bold]

      potstill train train.yaml --out run/student --seed 1
    """
    from potstill.config import TrainConfig, load_config
    from potstill.workflows.training import train_from_config

    settings = load_config(config, TrainConfig, {"out": out, "train": {"seed": seed}})
    result = train_from_config(settings, display)
    if result.status == "interrupted":
        raise KeyboardInterrupt
    display.say(
        f"{result.status} after {result.epochs} epochs; the best, epoch {result.best_epoch}, "
        f"is {result.best}"
    )


@command("Train")
def fit(
    config: Annotated[
        Path, typer.Argument(help="YAML file: out, data, model, weights; see `potstill config`.")
    ],
    out: RunFolder = None,
) -> None:
    """Fit a linear model (SNAP, pair potentials) by least squares, and write it for LAMMPS as well.

    [bold]Example[/bold]

      potstill config fit > fit.yaml

      potstill fit fit.yaml --out run/snap
    """
    from potstill.config import FitConfig, load_config
    from potstill.workflows.fitting import fit as work

    settings = load_config(config, FitConfig, {"out": out})
    found = work(settings, display)
    commands = Path(settings.out) / "best.in"
    lammps = f", for LAMMPS {commands}" if commands.is_file() else ""
    display.say(
        f"{found.rank} of {found.n_coefficients} coefficients are determined by {found.n_rows} "
        f"labels (ridge {found.ridge:g}); the potential is "
        f"{settings.out}/best.pt{lammps}"
    )


@command("Train")
def epsilon(
    config: Annotated[Path, typer.Argument(help="YAML file with data and train, as for train.")],
    out: Annotated[Path, typer.Option(help="Folder for the results.")],
    model: Annotated[
        Path | None, typer.Option(help="Checkpoint; without one, an untrained model.")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="float32 or float64.")] = None,
    loss: Annotated[
        str | None, typer.Option(help="quadratic (default), or training: the config's loss.")
    ] = None,
    n_structures: Drawn = None,
    exact: Annotated[
        bool | None,
        typer.Option("--exact/--proxy-only", help="Compare with exact gradients as well."),
    ] = None,
) -> None:
    """Find the displacement for force training by central differences.

    Writes the errors of the gradient and of its proxy against epsilon as JSON, CSV and plot, and
    recommends the epsilon with the smallest proxy.

    [bold]Example[/bold]

      potstill epsilon train.yaml --model run/student/best.pt --precision float32 --out epsilon
    """
    given = _named(locals(), "model", "precision", initial=model, train={"precision": precision})
    from potstill.config import EpsilonConfig, load_config
    from potstill.workflows.epsilon import find_epsilon, scan_table

    scan = find_epsilon(load_config(config, EpsilonConfig, given), display)
    table = scan_table(scan)
    rows = [["" if x is None else f"{x:.1e}" for x in row] for row in table.rows]
    display.table(table.title, table.columns, rows)
    display.say(f"Recommended: epsilon = {scan.recommended:.1e}")
    display.say(f"Plot: {out / 'epsilon_scan.svg'}")


@command("Train")
def study(
    config: Annotated[Path, typer.Argument(help="YAML file of a study; see `potstill config`.")],
    out: Annotated[Path, typer.Option(help="Folder of the study.")],
    workers: Annotated[int, typer.Option(help="Number of runs in parallel.", min=1)] = 1,
) -> None:
    """Train many models from one config, compare them and write a report; resumable.

    Sizes x strategies x seeds of teachers and students; or, with `kind: features`, pairs of models
    x strategies of feature distillation x seeds, and grids of taps, losses and transformations.
    Then measure what the config asks for, and write report.html and results.json.

    [bold]Example[/bold]

      potstill study studies/teacher_student/molybdenum.yaml --out run/mo --workers 2

      potstill study studies/feature_distillation/3bpa.yaml --out run/3bpa --workers 2
    """
    from potstill.config import load_study
    from potstill.experiments.report import report_experiment
    from potstill.experiments.run import train_with_progress

    experiment = load_study(config)
    command = shlex.join(["potstill", *sys.argv[1:]])
    train_with_progress(experiment, out, display, workers=workers)
    report_experiment(experiment, out, command=command, on_model=display.say)
    display.say(f"Report: {out / 'report.html'}")


@command("Check")
def evaluate(
    models: Annotated[
        list[str] | None,
        typer.Argument(help="Checkpoints or teachers; name=run/best.pt gives one a name."),
    ] = None,
    store: Annotated[Path | None, typer.Option(help="Label store to compare with.")] = None,
    source: Annotated[str | None, typer.Option(help="Label set of the store.")] = None,
    data: Annotated[
        list[Path] | None, typer.Option(help="File with reference labels instead; repeatable.")
    ] = None,
    structure: Annotated[
        str | None, typer.Option(help="Starting structure for properties and MD.")
    ] = None,
    trajectory: Annotated[
        list[str] | None,
        typer.Option(help="Trajectory to analyze, name=file; repeatable."),
    ] = None,
    types: Annotated[
        str | None, typer.Option(help="Elements of a LAMMPS dump by atom type: 'Al Cu'.")
    ] = None,
    stride: Annotated[
        float | None, typer.Option(help="Time between frames of trajectories in fs.")
    ] = None,
    tests: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated: errors, s2ef, throughput, eos, elastic, vibrations, phonons, "
            "defects, expansion, rdf, adf, cdf, coordination, internal, free_energy, "
            "diffusion, density, pressure, melting, speed, memory, nve, stability, headroom."
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Trajectories to analyze at a time.", min=1)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the results.")] = None,
    config: Config = None,
) -> None:
    """Compare potentials in the same tests: errors, E(V), elasticity, speed, memory, NVE.

    With --trajectory also distributions of distances, angles and both, diffusion, density and
    pressure of molecular dynamics, by `potstill md` or LAMMPS, beside those of the one called
    reference.

    `potstill config evaluate` prints all settings.

    [bold]Examples[/bold]

      potstill evaluate run/student.pt --store run/labels.zarr --source chgnet --out results

      potstill evaluate student=run/student.pt teacher=chgnet --structure silicon --out results

      potstill evaluate --trajectory liquid=dump.lammpstrj --types Al --stride 40
      --tests rdf,diffusion --out analysis
    """
    given = _named(
        locals(),
        *("data", "trajectory", "types", "stride"),
        models=_models(models or []) or None,
        trajectories=_trajectories(trajectory or [], types, stride) or None,
        files=_files(data),
        tests=_listed(tests),
    )
    from potstill.config import EvaluateConfig, load_config
    from potstill.workflows.evaluation import evaluate as work
    from potstill.workflows.report import verdicts
    from potstill.workflows.summary import result_rows

    found = work(load_config(config, EvaluateConfig, given), display)
    for line in (*verdicts(found), *found.problems):
        display.say(line)
    display.table("Results", ("", "model", ""), result_rows(found))


@command("Check")
def cka(
    student: Annotated[str, typer.Argument(help="Checkpoint.")],
    teacher: Annotated[str, typer.Argument(help="Checkpoint.")],
    data: Annotated[str, typer.Argument(help="Label store, or a file with structures.")],
    out: Annotated[Path, typer.Option(help="Folder for the results.")],
    before: Annotated[
        str | None, typer.Option(help="Student without distillation, to show gains.")
    ] = None,
    source: Annotated[str | None, typer.Option(help="Label set of the store, for probes.")] = None,
    run: Annotated[
        str | None, typer.Option(help="Run folder with CKA recorded during training.")
    ] = None,
    n_structures: Drawn = None,
    probes: Annotated[
        bool | None, typer.Option("--probes/--no-probes", help="Fit linear probes.")
    ] = None,
    seed: Seed = None,
    config: Config = None,
) -> None:
    """Compare the features of a student and its teacher by linear CKA, tap by tap.

    Writes cka.json and heat maps; with a student from before distillation also the gain. Linear
    probes show how well energies and forces can be read off each tap.

    [bold]Example[/bold]

      potstill cka n2n/best.pt teacher/best.pt labels.zarr --before control/best.pt --out cka
    """
    given = _named(locals(), teacher=teacher)  # a checkpoint, no other teacher
    from potstill.config import CKAConfig, load_config
    from potstill.workflows.cka import compare_features

    report = compare_features(load_config(config, CKAConfig, given), display)
    display.table("Taps of the student", report.COLUMNS, report.rows())
    display.say(f"Figures and cka.json are in {out}")


@command("Check")
def inspect(
    path: Annotated[Path, typer.Argument(help="Store, checkpoint, run folder or structure file.")],
) -> None:
    """Show what a label store, checkpoint, run folder or structure file contains."""
    from potstill.workflows.inspection import inspect as work

    for card in work(path):
        display.table(card.title, card.columns, card.rows)


@command("Use")
def md(
    model: Annotated[str | None, typer.Argument(help="Checkpoint, or a teacher.")] = None,
    structure: Annotated[str | None, typer.Argument(help="Structure file, or silicon.")] = None,
    ensemble: Annotated[str | None, typer.Option(help="nve, langevin or npt.")] = None,
    temperature: Annotated[
        str | None, typer.Option(help="Temperature in K; 300:600 is a ramp.")
    ] = None,
    pressure: Annotated[float | None, typer.Option(help="Pressure in GPa, with npt.")] = None,
    duration: Annotated[float | None, typer.Option(help="Duration in ps.")] = None,
    timestep: Annotated[float | None, typer.Option(help="Timestep in fs.")] = None,
    stride: Annotated[float | None, typer.Option(help="Time between frames in fs.")] = None,
    n_atoms: Annotated[
        int | None, typer.Option(help="Repeat the unit cell until it has this many atoms.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the trajectory.")] = None,
    seed: Seed = None,
    force_nonconservative: Annotated[
        bool | None,
        typer.Option("--force-nonconservative", help="Allow NVE with direct forces."),
    ] = None,
    allow_dissociation: Annotated[
        bool | None,
        typer.Option("--allow-dissociation", help="Continue if the structure comes apart."),
    ] = None,
    engine: Annotated[
        str | None, typer.Option(help="ase, or lammps, for students and LAMMPS' own potentials.")
    ] = None,
    n_ranks: Annotated[int | None, typer.Option(help="MPI ranks of LAMMPS.")] = None,
    n_replicas: Annotated[
        int | None, typer.Option(help="Runs at a time, each with velocities of its own.")
    ] = None,
    config: Config = None,
) -> None:
    """Run molecular dynamics with a student; writes trajectory.extxyz and thermo.csv.

    An interrupted run resumes where it stopped. There is a warning where the student leaves what
    it was trained on. `potstill config md` prints all settings.

    [bold]Examples[/bold]

      potstill md run/student.pt silicon --temperature 600 --duration 20 --out md600

      potstill md run/student.pt surface.cif --ensemble nve --n-atoms 500 --out nve

      potstill md run/student.pt al.cif --n-atoms 4000 --engine lammps --n-ranks 2 --out large
    """
    given = _named(locals(), model={"spec": model})
    from potstill.config import MdConfig, load_config
    from potstill.workflows.dynamics import run_dynamics

    result = run_dynamics(load_config(config, MdConfig, given), display)
    display.say(f"{len(result.frames)} frames in {result.trajectory}")
    if result.closest:
        display.say(result.closest)
    display.say(f"Temperature and energies in {result.thermo}")


@command("Help")
def config(
    command: Annotated[
        str,
        typer.Argument(
            help="distill, sample, label, train, fit, epsilon, evaluate, cka, md, coarse-map, "
            "study or feature-study."
        ),
    ],
) -> None:
    """Print a commented YAML file with all settings of a command and their defaults.

    [bold]Example[/bold]

      potstill config train > train.yaml
    """
    from potstill.config import config_template

    typer.echo(config_template(command), nl=False)


@command("Help")
def doctor() -> None:
    """Show what is installed, which extras work, and run a self-test of about ten seconds."""
    from potstill.workflows.doctor import examine

    found = examine(display)
    display.table("potstill " + __version__, ("", ""), found.machine)
    display.table("extras", ("extra", "version", "for"), found.extras)
    rows = [[c.name, "works" if c.works else "FAILS", c.note] for c in found.checks]
    display.table("self-test", ("", "", ""), rows)
    if failing := ", ".join(check.name for check in found.checks if not check.works):
        display.console.print(
            f"potstill: this installation has a problem: {failing}", style="bold red"
        )
        raise typer.Exit(1)


def _named(options: dict[str, Any], *others: str, **settings: Any) -> dict[str, Any]:
    """Settings from the options that are named as they are, without `others`, and from `settings`.

    A teacher is made of its two options.
    """
    rest = {k: v for k, v in options.items() if k not in ("config", "teacher_arg", *others)}
    if "teacher" in options:
        rest["teacher"] = _teacher(options["teacher"], options.get("teacher_arg"))
    return rest | settings


def _files(paths: list[Path] | None) -> list[dict[str, str]] | None:
    return [{"path": str(path)} for path in paths] if paths else None


def _teacher(spec: str | None, args: list[str] | None) -> dict[str, Any]:
    """The settings of a teacher from its options."""
    values = {}
    for text in args or []:
        key, equals, value = text.partition("=")
        if not equals:
            raise typer.BadParameter(f"--teacher-arg takes key=value, not '{text}'")
        values[key] = _plain(value)
    return {"spec": spec, "args": values}


def _plain(text: str) -> Any:
    """A number or truth value, if it reads as one."""
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text.lower(), text)


def _listed(text: str | None) -> list[str] | None:
    """Words between commas."""
    return None if text is None else text.replace(" ", "").split(",")


def _trajectories(texts: list[str], types: str | None, stride: float | None) -> dict[str, Any]:
    """Trajectories by name, all of the same kind."""
    keys = {"types": types} if types else {}
    return {
        name: {"path": model["spec"], "keys": keys, "stride": stride}
        for name, model in _models(texts).items()
    }


def _models(texts: list[str]) -> dict[str, Any]:
    """Models by name from `name=spec` or `spec`."""
    models: dict[str, Any] = {}
    for text in texts:
        name, equals, spec = text.partition("=")
        if not equals:
            name, spec = Path(text).stem, text
        if name in models:
            raise ConfigError(
                f"two models are called '{name}': give each its own name, as in student={spec}"
            )
        models[name] = {"spec": spec}
    return models
