"""The commands of `potstill`."""

from __future__ import annotations

import inspect as inspect_module
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar

import typer
from rich.console import Console

from potstill import __version__
from potstill.cli.base import RichDisplay, one_sentence, print_tables, quiet_warnings, tune_process
from potstill.errors import ConfigError

P = ParamSpec("P")
T = TypeVar("T")

app = typer.Typer(
    name="potstill",
    help="""Distil accurate interatomic potentials into fast ones.

    A teacher (any potential) labels structures; a small student learns from them; it runs in ASE.

    Start with: [bold]potstill distill[/bold]
    """,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console()

Config = Annotated[Path | None, typer.Option("--config", "-c", help="A YAML file of settings.")]
Args = Annotated[
    list[str] | None,
    typer.Option("--teacher-arg", help="An argument of the teacher, as key=value; repeatable."),
]
Seed = Annotated[int | None, typer.Option(help="Seed of all random numbers.")]


def main() -> None:
    """Entry point of the command `potstill`."""
    tune_process()
    app()


def _command(panel: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Register a command; the lines of each paragraph of its help are joined, to fill any width."""

    def register(function: Callable[P, T]) -> Callable[P, T]:
        paragraphs = inspect_module.cleandoc(function.__doc__ or "").split("\n\n")
        text = "\n\n".join(" ".join(paragraph.splitlines()) for paragraph in paragraphs)
        return app.command(help=text, rich_help_panel=panel)(function)

    return register


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    quiet_warnings(Console(stderr=True))
    if version:
        console.print(f"potstill {__version__}", highlight=False)
        raise typer.Exit


@_command("From a teacher to a student")
def distill(
    teacher: Annotated[
        str | None,
        typer.Option(help="chgnet, gfn2-xtb, ani-al, a checkpoint, or module:factory."),
    ] = None,
    teacher_arg: Args = None,
    structure: Annotated[
        str | None, typer.Option(help="A structure file, or 'silicon', which is built in.")
    ] = None,
    temperature: Annotated[
        str | None, typer.Option(help="K, lowest and highest of the dynamics: 300:900.")
    ] = None,
    pressure: Annotated[
        list[float] | None,
        typer.Option(help="GPa, of runs at constant pressure; repeatable."),
    ] = None,
    budget: Annotated[str | None, typer.Option(help="Time for all of it: 10min, 2h.")] = None,
    out: Annotated[Path | None, typer.Option(help="The run folder.")] = None,
    seed: Seed = None,
    config: Config = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Stop after the plan is made and shown.")
    ] = False,
) -> None:
    """Distil a teacher for one material: structures, labels, student, control, report, dynamics.

    Without options: CHGNet, silicon, 300 to 900 K (where CHGNet's silicon stays a crystal), ten
    minutes, into ./run. A few labels, steps and epochs are timed first; the plan that follows from
    the budget is shown and kept. An interrupted run goes on when the same command is given again.

    [bold]Examples[/bold]

      potstill distill --out run/silicon

      potstill distill --teacher chgnet --structure LiF.cif --temperature 300:700 --budget 30min

      potstill distill --teacher ase.calculators.emt:EMT --structure Cu.xyz --dry-run
    """
    from potstill.config import DistillConfig, load_config
    from potstill.workflows.distill import distill as work
    from potstill.workflows.summary import summary_rows

    overrides = {
        "teacher": _teacher(teacher, teacher_arg),
        "structure": structure,
        "temperature": temperature,
        "pressure": pressure or None,
        "budget": budget,
        "out": None if out is None else str(out),
        "seed": seed,
    }
    with one_sentence():
        settings = load_config(config, DistillConfig, overrides)
        result = work(settings, RichDisplay(console), dry_run=dry_run)
        if dry_run:
            console.print(f"The plan is in {result.folder}/plan.json; without --dry-run it is run.")
            return
        print_tables(console, "Results", ("", "model", ""), summary_rows(result.summary))
        console.print(f"Student: {result.folder}/student.pt", highlight=False)
        console.print(f"Report:  {result.folder}/report.html", highlight=False)


@_command("Step by step")
def sample(
    config: Annotated[Path, typer.Argument(help="A YAML file: start, jobs, teacher, out.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the frames.")] = None,
    teacher: Annotated[str | None, typer.Option(help="As of distill.")] = None,
    teacher_arg: Args = None,
    seed: Seed = None,
) -> None:
    """Make structures to be labelled: jitter, gradient ascent, relaxations, dynamics, strains.

    Writes structures.extxyz. A killed run goes on where it was.

    [bold]Examples[/bold]

      potstill sample jobs.yaml --teacher run/teacher/best.pt --out synthetic

      potstill label synthetic.zarr synthetic/structures.extxyz --teacher run/teacher/best.pt
    """
    from potstill.config import SampleConfig, load_config
    from potstill.workflows.sampling import FILE
    from potstill.workflows.sampling import sample as work

    overrides: dict[str, Any] = {"out": None if out is None else str(out), "seed": seed}
    if teacher is not None:
        overrides["teacher"] = _teacher(teacher, teacher_arg)
    with one_sentence():
        settings = load_config(config, SampleConfig, overrides)
        frames = work(settings, RichDisplay(console))
        path = Path(settings.out) / FILE
        console.print(f"{len(frames)} structures in {path}", highlight=False)


@_command("Step by step")
def label(
    store: Annotated[Path, typer.Argument(help="The labelled store; made if it does not exist.")],
    files: Annotated[
        list[Path] | None, typer.Argument(help="Structure files to put into it first.")
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="As of distill.")] = None,
    teacher_arg: Args = None,
    properties: Annotated[
        str | None,
        typer.Option(help="With commas; all that can be learnt by default, or 'none'."),
    ] = None,
    taps: Annotated[
        str | None,
        typer.Option(help="Internal features to store as well, with commas; or 'default'."),
    ] = None,
    config: Config = None,
) -> None:
    """Let a teacher label a store, in the teacher's own environment if it needs one.

    Labels of any number of teachers stand beside the reference labels. A killed run goes on where
    it was; frames that a teacher cannot label are skipped, counted and listed.

    [bold]Examples[/bold]

      potstill label labels.zarr structures.extxyz --teacher chgnet

      potstill label labels.zarr --teacher 'run/seed*/best.pt'

      potstill label labels.zarr --teacher chgnet --taps default
    """
    from potstill.config import LabelConfig, load_config
    from potstill.workflows.labeling import label as work

    overrides = {
        "store": str(store),
        "files": [{"path": str(file)} for file in files] if files else None,
        "teacher": _teacher(teacher, teacher_arg),
        "properties": [] if properties == "none" else _listed(properties),
        "taps": _listed(taps),
    }
    with one_sentence():
        report = work(load_config(config, LabelConfig, overrides), RichDisplay(console))
        console.print(f"{report.n_labelled} structures labelled, {report.n_failed} failed")


@_command("Step by step")
def train(
    config: Annotated[Path, typer.Argument(help="A YAML file: out, data, train, stages.")],
    out: Annotated[Path | None, typer.Option(help="The run folder.")] = None,
    seed: Seed = None,
) -> None:
    """Train a student on reference labels, a teacher's labels, or both.

    The labels that the loss asks for are checked before the first step. Stages hand their best
    network on: pre-training on structures that a teacher has labelled, then fine-tuning.

    [bold]Example[/bold]

      potstill train train.yaml --out run/student --seed 1
    """
    from potstill.config import TrainConfig, load_config
    from potstill.workflows.training import train_from_config

    overrides = {"out": None if out is None else str(out), "train": {"seed": seed}}
    with one_sentence():
        settings = load_config(config, TrainConfig, overrides)
        result = train_from_config(settings, RichDisplay(console))
        if result.status == "interrupted":
            raise KeyboardInterrupt
        console.print(
            f"{result.status} after {result.epochs} epochs; the best, epoch {result.best_epoch}, "
            f"is {result.best}",
            highlight=False,
        )


@_command("Step by step")
def epsilon(
    config: Annotated[Path, typer.Argument(help="A YAML file: data, train; as of train.")],
    out: Annotated[Path, typer.Option(help="Folder of the results.")],
    model: Annotated[
        Path | None, typer.Option(help="A checkpoint; without one, a fresh model.")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="float32 or float64.")] = None,
    loss: Annotated[
        str | None, typer.Option(help="quadratic (the default), or training: that of the config.")
    ] = None,
    n_structures: Annotated[int | None, typer.Option(help="How many to draw.")] = None,
    exact: Annotated[
        bool | None,
        typer.Option("--exact/--proxy-only", help="Compare with exact gradients as well."),
    ] = None,
) -> None:
    """Find the epsilon of central-difference force training for a model, data and precision.

    Writes the errors of the gradient and of its proxy by epsilon as JSON, CSV and plot, and
    recommends the value with the smallest proxy.

    [bold]Example[/bold]

      potstill epsilon train.yaml --model run/student/best.pt --precision float32 --out epsilon
    """
    from potstill.config import EpsilonConfig, load_config
    from potstill.workflows.epsilon import find_epsilon, scan_table

    overrides = {
        "out": str(out),
        "initial": None if model is None else str(model),
        "train": {"precision": precision},
        "loss": loss,
        "n_structures": n_structures,
        "exact": exact,
    }
    with one_sentence():
        scan = find_epsilon(load_config(config, EpsilonConfig, overrides), RichDisplay(console))
        table = scan_table(scan)
        rows = [["" if x is None else f"{x:.1e}" for x in row] for row in table.rows]
        print_tables(console, table.title, table.columns, rows)
        console.print(f"Recommended: epsilon = {scan.recommended:.1e}", highlight=False)
        console.print(f"The plot is {out / 'epsilon_scan.svg'}", highlight=False)


@_command("Step by step")
def evaluate(
    models: Annotated[
        list[str] | None,
        typer.Argument(help="Checkpoints or teachers; name=run/best.pt gives a name."),
    ] = None,
    store: Annotated[Path | None, typer.Option(help="A labelled store to compare with.")] = None,
    source: Annotated[str | None, typer.Option(help="Its label set.")] = None,
    data: Annotated[
        list[Path] | None, typer.Option(help="A file with reference labels, instead; repeatable.")
    ] = None,
    structure: Annotated[
        str | None, typer.Option(help="Where properties and dynamics start from.")
    ] = None,
    tests: Annotated[
        str | None,
        typer.Option(
            help="With commas: errors, s2ef, throughput, eos, elastic, speed, memory, nve."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the results.")] = None,
    config: Config = None,
) -> None:
    """Put potentials to the same tests: errors, E(V), elasticity, speed, memory, stability.

    [bold]Examples[/bold]

      potstill evaluate run/student.pt --store run/labels.zarr --source chgnet --out results

      potstill evaluate student=run/student.pt teacher=chgnet --structure silicon --out results
    """
    from potstill.config import EvaluateConfig, load_config
    from potstill.workflows.evaluation import evaluate as work
    from potstill.workflows.inspection import result_cards

    with one_sentence():
        overrides = {
            "models": _models(models or []),
            "store": None if store is None else str(store),
            "source": source,
            "files": [{"path": str(file)} for file in data] if data else None,
            "structure": structure,
            "tests": None if tests is None else tests.replace(" ", "").split(","),
            "out": None if out is None else str(out),
        }
        results = work(load_config(config, EvaluateConfig, overrides), RichDisplay(console))
        for card in result_cards(results):
            print_tables(console, card.title, card.columns, card.rows)


@_command("Step by step")
def cka(
    student: Annotated[str, typer.Argument(help="A checkpoint.")],
    teacher: Annotated[str, typer.Argument(help="A checkpoint.")],
    data: Annotated[str, typer.Argument(help="A labelled store, or a file with structures.")],
    out: Annotated[Path, typer.Option(help="Folder of the results.")],
    before: Annotated[
        str | None, typer.Option(help="The student without distillation, for gains.")
    ] = None,
    source: Annotated[str | None, typer.Option(help="Label set of a store, for probes.")] = None,
    run: Annotated[
        str | None, typer.Option(help="A run folder with CKA recorded during training.")
    ] = None,
    n_structures: Annotated[int | None, typer.Option(help="How many to draw.")] = None,
    probes: Annotated[
        bool | None, typer.Option("--probes/--no-probes", help="Fit linear probes.")
    ] = None,
    seed: Seed = None,
    config: Config = None,
) -> None:
    """Compare the features of a student and its teacher by linear CKA, tap by tap.

    Writes cka.json and heat maps; with a student from before distillation also the gain. Beside
    it, how well energies and forces follow linearly from each tap.

    [bold]Example[/bold]

      potstill cka n2n/best.pt teacher/best.pt labels.zarr --before control/best.pt --out cka
    """
    from potstill.config import CKAConfig, load_config
    from potstill.workflows.cka import compare_features

    overrides = {
        "student": student,
        "teacher": teacher,
        "data": data,
        "out": str(out),
        "before": before,
        "source": source,
        "run": run,
        "n_structures": n_structures,
        "probes": probes,
        "seed": seed,
    }
    with one_sentence():
        report = compare_features(load_config(config, CKAConfig, overrides), RichDisplay(console))
        print_tables(console, "Taps of the student", report.COLUMNS, report.rows())
        console.print(f"Figures and cka.json are in {out}", highlight=False)


@_command("Step by step")
def md(
    model: Annotated[str | None, typer.Argument(help="A checkpoint, or a teacher.")] = None,
    structure: Annotated[str | None, typer.Argument(help="A structure file, or silicon.")] = None,
    ensemble: Annotated[str | None, typer.Option(help="nve, langevin or npt.")] = None,
    temperature: Annotated[str | None, typer.Option(help="K; 300:600 is a ramp.")] = None,
    pressure: Annotated[float | None, typer.Option(help="GPa, with npt.")] = None,
    duration: Annotated[float | None, typer.Option(help="ps.")] = None,
    timestep: Annotated[float | None, typer.Option(help="fs.")] = None,
    stride: Annotated[float | None, typer.Option(help="fs between frames.")] = None,
    n_atoms: Annotated[int | None, typer.Option(help="Repeat the cell up to so many.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the trajectory.")] = None,
    seed: Seed = None,
    force_nonconservative: Annotated[
        bool | None,
        typer.Option("--force-nonconservative", help="NVE even with direct forces."),
    ] = None,
    config: Config = None,
) -> None:
    """Run molecular dynamics with a student; writes trajectory.extxyz and thermo.csv.

    A killed run goes on where it was. Outside of what the student was trained on it warns.

    [bold]Examples[/bold]

      potstill md run/student.pt silicon --temperature 600 --duration 20 --out md600

      potstill md run/student.pt surface.cif --ensemble nve --n-atoms 500 --out nve
    """
    from potstill.config import MdConfig, load_config
    from potstill.workflows.dynamics import run_dynamics

    overrides = {
        "model": _teacher(model, None),
        "structure": structure,
        "ensemble": ensemble,
        "temperature": temperature,
        "pressure": pressure,
        "duration": duration,
        "timestep": timestep,
        "stride": stride,
        "n_atoms": n_atoms,
        "out": None if out is None else str(out),
        "seed": seed,
        "force_nonconservative": force_nonconservative,
    }
    with one_sentence():
        result = run_dynamics(load_config(config, MdConfig, overrides), RichDisplay(console))
        console.print(f"{len(result.frames)} frames in {result.trajectory}", highlight=False)
        console.print(f"Temperature and energies in {result.thermo}", highlight=False)


@_command("Studies")
def study(
    config: Annotated[Path, typer.Argument(help="A YAML file of a study.")],
    out: Annotated[Path, typer.Option(help="Folder of the study.")],
    workers: Annotated[int, typer.Option(help="Trainings at a time.", min=1)] = 1,
) -> None:
    """Train all runs of a study from one config, and continue where it was interrupted.

    Sizes x strategies x seeds of teachers and students; or, with `kind: features`, pairs of models
    x strategies of feature distillation x seeds, and grids of taps, losses and transformations.
    Then measure what the config asks for, and write report.html and results.json.

    [bold]Example[/bold]

      potstill study studies/teacher_student/molybdenum.yaml --out run/mo --workers 2

      potstill study studies/feature_distillation/3bpa.yaml --out run/3bpa --workers 2
    """
    from potstill.config import load_study
    from potstill.workflows.base import seconds_in_words
    from potstill.workflows.cells import StudyProgress
    from potstill.workflows.feature_study import (
        FeatureStudyConfig,
        report_feature_study,
        run_feature_study,
    )
    from potstill.workflows.study import report_study, run_study

    def note(progress: StudyProgress) -> str:
        cell = progress.cell.name if progress.cell else ""
        return f"{cell}, about {seconds_in_words(progress.seconds_left)} left"

    def show(progress: StudyProgress) -> None:
        task.update(progress.done, note=note(progress))

    with one_sentence():
        settings = load_study(config)
        display = RichDisplay(console)
        command = shlex.join(["potstill", *sys.argv[1:]])
        with display.task(settings.title, len(settings.cells())) as task:
            if isinstance(settings, FeatureStudyConfig):
                run_feature_study(settings, out, workers=workers, on_progress=show)
            else:
                run_study(settings, out, workers=workers, on_progress=show)
        if isinstance(settings, FeatureStudyConfig):
            report_feature_study(settings, out, command=command, on_model=display.say)
        else:
            report_study(settings, out, command=command, on_model=display.say)
        console.print(f"The report is {out / 'report.html'}", highlight=False)


@_command("Looking around")
def inspect(
    path: Annotated[Path, typer.Argument(help="Store, checkpoint, run folder or structures.")],
) -> None:
    """Say what a labelled store, a checkpoint, a run folder or a structure file holds."""
    from potstill.workflows.inspection import inspect as work

    with one_sentence():
        for card in work(path):
            print_tables(console, card.title, card.columns, card.rows)


@_command("Looking around")
def doctor() -> None:
    """Say what is installed and which extras work, and do a self-test of about ten seconds."""
    from potstill.workflows.doctor import examine

    with one_sentence():
        found = examine(RichDisplay(console))
        print_tables(console, "potstill " + __version__, ("", ""), found.machine)
        print_tables(console, "extras", ("extra", "version", "for"), found.extras)
        rows = [[c.name, "works" if c.works else "FAILS", c.note] for c in found.checks]
        print_tables(console, "self-test", ("", "", ""), rows)
        if not found.healthy:
            raise typer.Exit(1)


def _teacher(spec: str | None, args: list[str] | None) -> dict[str, Any]:
    """The settings of a teacher from its options."""
    values = {}
    for text in args or []:
        key, equals, value = text.partition("=")
        if not equals:
            raise typer.BadParameter(f"--teacher-arg wants key=value, not '{text}'")
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


def _models(texts: list[str]) -> dict[str, Any]:
    """Models by name from `name=spec` or `spec`."""
    models: dict[str, Any] = {}
    for text in texts:
        name, equals, spec = text.partition("=")
        if not equals:
            name, spec = Path(text).stem, text
        if name in models:
            raise ConfigError(f"two models are called '{name}': name them, as in student={spec}")
        models[name] = {"spec": spec}
    return models
