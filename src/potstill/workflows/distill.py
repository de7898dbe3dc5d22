"""`potstill distill`: from a teacher and a structure to a student, its report and its dynamics.

One run is a chain of stages, each of which leaves files in the run folder and is not done again:

sample -> label -> draft -> explore -> train -> dynamics -> evaluate -> report

The draft is a student after a few epochs. Its dynamics are cheap, so that it explores all
temperatures for long, and the teacher labels what it meets (on-policy): these frames, decorrelated
and where students go astray, are worth more than a trajectory of the teacher that costs as much.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from potstill.calculators import PotstillCalculator
from potstill.checkpoint import load_potential
from potstill.distill import LossTerm
from potstill.errors import DataError, DivergenceError
from potstill.readers import split_from_file, write_split
from potstill.report import write_report
from potstill.sample import (
    SampledFrames,
    SamplingPlan,
    run_plan,
    smallest_supercell,
    split_in_blocks,
    standard_plan,
)
from potstill.store import LabelledStore
from potstill.structures import Structures
from potstill.teachers import Teacher
from potstill.train import TrainingSet, TrainSettings
from potstill.train.settings import (
    EnergySettings,
    LearningRateSettings,
    ModelSettings,
    OptimizerSettings,
    RegularizationSettings,
    ScoreSettings,
)
from potstill.workflows.base import (
    Display,
    Duration,
    Range,
    Settings,
    Stages,
    TeacherSettings,
    claim_folder,
    potential_info,
    read_json,
    read_start,
    write_json,
)
from potstill.workflows.dynamics import MdConfig, simulate
from potstill.workflows.evaluation import BenchSettings, Candidate, bench_of, run_tests
from potstill.workflows.labeling import label_with_progress, learnable
from potstill.workflows.planning import (
    EQUILIBRATION,
    EXPLORING_STRIDE,
    STRIDE,
    Counts,
    Order,
    Plan,
    make_plan,
)
from potstill.workflows.summary import summarize
from potstill.workflows.training import train_with_progress

#: Shares of the teacher's dynamics; what is sampled otherwise is for training.
SPLIT = {"train": 0.5, "validation": 0.2, "test": 0.3}
#: Frames per block of the split, and frames left out between blocks.
BLOCK, GAP = 4, 1
#: The learning rate falls to this share of its start.
FINAL_RATE = 0.02


class Weights(Settings):
    """Weights of the student's loss; zero leaves a term out."""

    energy: float = Field(default=1.0, ge=0)
    forces: float = Field(default=30.0, ge=0)
    stress: float = Field(default=100.0, ge=0)
    atomic_energies: float = Field(default=100.0, ge=0)


def default_student() -> TrainSettings:
    """A small HIP-NN, trained fast."""
    return TrainSettings(
        model=ModelSettings(
            kind="hipnn",
            hyperparameters={
                "n_features": 32,
                "n_sensitivities": 16,
                "dist_soft_min": 1.6,
                "dist_soft_max": 4.5,
                "dist_hard_max": 5.5,
                "n_atom_layers": 2,
                "n_interaction_layers": 1,
                "l_max": 2,
            },
        ),
        energy=EnergySettings(zero="least_squares", prior="zbl"),
        # With the energies' zero subtracted the ratios of L_R would be ratios of noise.
        regularization=RegularizationSettings(l2=1e-6, hierarchicality=0.0),
        optimizer=OptimizerSettings(learning_rate=3e-3, ema_decay=0.99, clip_norm=None),
        learning_rate=LearningRateSettings(schedule="exponential"),
        batch_size=4,
        early_stopping=None,
    )


class DistillConfig(Settings):
    """Settings of `potstill distill`.

    Parameters
    ----------
    teacher : TeacherSettings
        Who is distilled.
    structure : str
        Where to start: a file (all structures in it), or `silicon`, which is built in.
    temperature : (low, high)
        K, of the dynamics that make structures. The default holds CHGNet's silicon well below
        where it melts.
    pressure : tuple of float
        GPa, of runs at constant pressure; none if empty.
    budget : float
        Seconds for all of it; configs may say `10min`.
    out : str
        The run folder.
    n_atoms : int
        Periodic structures are repeated until they have so many atoms.
    student : TrainSettings
        Model, optimizer and so on; loss, score, epochs and seed are filled in.
    weights : Weights
        Of the student's loss.
    controls : tuple of float
        Force weights of controls, students without the teacher's atomic energies.
    on_policy : bool
        Let a draft student explore, and label what it meets.
    counts : Counts
        Counts that the budget shall not decide.
    tests : dict of str to tuple of str
        Tests of the evaluation, and who undergoes them: `student`, `control`, `teacher`.
    seed : int
        Of everything.
    """

    teacher: TeacherSettings = TeacherSettings(spec="chgnet")
    structure: str = "silicon"
    temperature: Range = (300.0, 900.0)
    pressure: tuple[float, ...] = (0.0,)
    budget: Duration = 600.0
    out: str = "run"
    n_atoms: int = Field(default=48, ge=1)
    student: TrainSettings = Field(default_factory=default_student)
    weights: Weights = Weights()
    controls: tuple[float, ...] = (10.0,)
    on_policy: bool = True
    counts: Counts = Counts()
    tests: dict[str, tuple[str, ...]] = Field(
        default_factory=lambda: {
            "errors": ("student", "control"),
            "parity": ("student", "control"),
            "eos": ("student", "control", "teacher"),
            "elastic": ("student", "control", "teacher"),
            "rdf": ("student", "teacher"),
            "speed": ("student", "teacher"),
            "memory": ("student",),
            "nve": ("student", "control"),
        }
    )
    seed: int = Field(default=0, ge=0)


@dataclass(frozen=True)
class DistillResult:
    """What `distill` leaves: the plan, and the run folder if it was not a dry run."""

    plan: Plan
    folder: Path
    summary: dict[str, Any]


def distill(
    config: DistillConfig, display: Display | None = None, *, dry_run: bool = False
) -> DistillResult:
    """Distil a teacher, or continue.

    Parameters
    ----------
    config : DistillConfig
        What to do.
    display : Display, optional
        Where progress is shown.
    dry_run : bool
        Stop after the plan is made, written and shown.
    """
    display = display or Display()
    run = Run.open(config, display)
    display.table("Plan", ("stage", "work", "expected"), run.plan.rows())
    if dry_run:
        return DistillResult(run.plan, run.folder, {})
    for name, stage in STAGES.items():
        if name not in run.stages:
            with run.stages.running(name) as entry:
                entry["note"] = stage(run) or ""
        elif run.stages.note(name):
            display.say(f"{name}: {run.stages.note(name)}")
    summary = read_json(run.folder / "summary.json")
    return DistillResult(run.plan, run.folder, summary)


@dataclass(frozen=True)
class Run:
    """What the stages of one run share."""

    config: DistillConfig
    plan: Plan
    folder: Path
    start: Structures
    display: Display
    stages: Stages

    @classmethod
    def open(cls, config: DistillConfig, display: Display) -> Run:
        """Make the run folder and the plan, or read them."""
        folder = Path(config.out)
        primitive = read_start(config.structure)
        start = Structures.concatenate(
            [
                smallest_supercell(primitive[s], min_atoms=config.n_atoms)
                for s in range(primitive.n_systems)
            ]
        )
        claim_folder(folder, config)
        file = folder / "plan.json"
        if file.is_file():
            plan = Plan.model_validate(read_json(file))
        else:
            plan = _make_plan(config, start, display)
            write_json(file, plan.model_dump(mode="json"))
        return cls(config, plan, folder, start, display, Stages(folder))

    @cached_property
    def teacher(self) -> Teacher:
        """Made when a stage needs it."""
        return self.config.teacher.make()

    @property
    def store(self) -> LabelledStore:
        """The labelled store, to read and add."""
        path = self.folder / "labels.zarr"
        if not path.exists():
            return LabelledStore.create(path, info={"seed": self.config.seed})
        return LabelledStore.open(path, "a")

    @property
    def source(self) -> str:
        """Name of the teacher's label set."""
        (name,) = (s for s in self.store.sources if s != "reference")
        return name

    def label(self, title: str) -> None:
        """Let the teacher label what has no labels yet."""
        label_with_progress(
            self.store, self.teacher, self.plan.properties, self.display, title=title
        )

    def data(self, part: str) -> TrainingSet:
        """Labelled structures of one part of the split."""
        store = self.store
        systems = split_from_file(self.folder / "split.json", store.n_systems)[part]
        labels = store.labels(self.source)
        systems = systems[labels.presence("energy", store.n_systems)[systems]]
        if not len(systems):
            raise DataError(f"{self.folder}: no structure for '{part}' has labels")
        return TrainingSet(store.structures(), {self.source: labels}).select(systems)

    @property
    def models(self) -> dict[str, TrainSettings]:
        """Settings of the student and its controls, by name."""
        epochs, given = self.plan.counts.epochs or 1, self.plan.properties
        student = student_settings(self.config, self.plan, self.source, epochs)
        controls = {
            f"control_wf{w:g}": student.model_copy(
                update={"loss": loss_terms(self.config.weights, given, self.source, control=w)}
            )
            for w in self.config.controls
        }
        return {"student": student, **controls}

    def sampling_plan(self, n_frames: int, md_share: float, **settings: Any) -> SamplingPlan:
        """Dynamics at the run's temperatures and pressures, and rattles and strains."""
        gives_stress = "stress" in self.plan.properties
        return standard_plan(
            self.start,
            temperature=self.config.temperature,
            n_frames=n_frames,
            pressure=self.config.pressure if gives_stress else (),
            n_temperatures=self.plan.counts.n_temperatures or 1,
            md_share=md_share,
            timestep=self.plan.timestep,
            **settings,
        )


def student_settings(config: DistillConfig, plan: Plan, source: str, epochs: int) -> TrainSettings:
    """The student's settings with its loss, its epochs and a learning rate that fits them."""
    rule = config.student.learning_rate
    if rule.schedule == "exponential":
        rule = rule.model_copy(update={"factor": FINAL_RATE ** (1.0 / epochs)})
    return config.student.model_copy(
        update={
            "loss": loss_terms(config.weights, plan.properties, source),
            "score": ScoreSettings(source=source),
            "learning_rate": rule,
            "epochs": epochs,
            "seed": config.seed,
        }
    )


def loss_terms(
    weights: Weights, properties: Sequence[str], source: str, *, control: float | None = None
) -> tuple[LossTerm, ...]:
    """Loss of the student; of a control with force weight `control`, no atomic energies."""
    values = weights.model_dump()
    if control is not None:
        values |= {"forces": control, "atomic_energies": 0.0}
    return tuple(
        LossTerm(property=name, source=source, weight=weight)  # type: ignore[arg-type]
        for name, weight in values.items()
        if weight > 0.0 and name in properties
    )


# -- stages: one function each; what it returns is shown when a run is continued -------------------


def _sample(run: Run) -> None:
    """Make structures with the teacher's dynamics, rattles and strains, and split them."""
    counts = run.plan.counts
    n_md, n_random = counts.n_md_frames or 0, counts.n_random_frames or 0
    plan = run.sampling_plan(
        n_md + n_random,
        n_md / (n_md + n_random),
        seed=run.config.seed,
        stride=STRIDE,
        equilibration=EQUILIBRATION,
    )
    with run.display.task(f"dynamics with {run.teacher.name}", plan.n_evaluations) as task:
        frames = run_plan(
            plan,
            run.teacher.ase_calculator(),
            run.folder / "sample",
            task.update,
            driver=run.teacher.info.fingerprint,
        )
    run.store.append(frames.structures, skip_existing=True)
    write_split(run.folder / "split.json", split_frames(frames, run.config.seed))


def split_frames(frames: SampledFrames, seed: int) -> dict[str, torch.Tensor]:
    """Split dynamics in blocks of time; independent frames are all for training."""
    moving = ~torch.isnan(frames.time)
    own = moving.nonzero()[:, 0]
    parts = split_in_blocks(frames.select(own), SPLIT, seed=seed, block=BLOCK, gap=GAP)
    split = {name: own[index] for name, index in parts.items()}
    split["train"] = torch.cat([split["train"], (~moving).nonzero()[:, 0]]).sort().values
    return split


def _label(run: Run) -> None:
    run.label(f"labelling with {run.teacher.name}")


def _draft(run: Run) -> str | None:
    """Train a draft student for a few epochs."""
    if not run.plan.counts.n_on_policy_frames:
        return "left out"
    epochs = run.plan.counts.draft_epochs or 1
    settings = student_settings(run.config, run.plan, run.source, epochs)
    _train(run, "draft", settings)
    return None


def _explore(run: Run) -> str | None:
    """Sample with the draft's dynamics, and label what it meets."""
    n_frames = run.plan.counts.n_on_policy_frames
    if not n_frames:
        return "left out"
    potential, _ = load_potential(run.folder / "draft" / "best.pt")
    plan = run.sampling_plan(
        n_frames, 1.0, seed=run.config.seed + 1, stride=EXPLORING_STRIDE, equilibration=300.0
    )
    note = None
    try:
        with run.display.task("dynamics with the draft", plan.n_evaluations) as task:
            run_plan(plan, PotstillCalculator(potential), run.folder / "explore", task.update)
    except DivergenceError as error:
        note = f"the draft's dynamics went astray, and what came after is left out: {error}"
        run.display.say(note)
    frames = _finished_jobs(run.folder / "explore")
    if frames is None:
        return note
    store = run.store
    store.append(frames.structures, skip_existing=True)
    split = split_from_file(run.folder / "split.json", store.n_systems)
    held_out = torch.cat([split["validation"], split["test"]])
    new = torch.arange(store.n_systems - len(frames), store.n_systems)
    assert not bool(torch.isin(new, held_out).any())
    split["train"] = torch.cat([split["train"], new]).unique()
    write_split(run.folder / "split.json", split)
    run.label(f"labelling the draft's frames with {run.teacher.name}")
    return note


def _train_all(run: Run) -> None:
    """Train the student and its controls."""
    for name, settings in run.models.items():
        _train(run, name, settings)
    shutil.copyfile(run.folder / "student" / "best.pt", run.folder / "student.pt")


def _train(run: Run, name: str, settings: TrainSettings) -> None:
    training = run.data("train")
    result = train_with_progress(
        settings,
        training,
        run.data("validation"),
        run.folder / name,
        run.display,
        title=f"training {name}",
        info=potential_info(
            training.structures,
            teacher=run.store.source_info(run.source),
            temperature=run.config.temperature,
        ),
    )
    if result.status == "interrupted":
        raise KeyboardInterrupt


def _dynamics(run: Run) -> None:
    """Run the student at the highest temperature, and write its trajectory."""
    config = MdConfig(
        model=TeacherSettings(spec=str(run.folder / "student.pt")),
        structure=run.config.structure,
        out=str(run.folder / "md"),
        temperature=(run.config.temperature[1], run.config.temperature[1]),
        duration=run.plan.counts.md_duration or 1.0,
        equilibration=1.0,
        stride=2 * STRIDE,
        timestep=run.plan.timestep,
        seed=run.config.seed,
    )
    potential, info = load_potential(run.folder / "student.pt")
    calculator = PotstillCalculator(potential, info=info)
    simulate(config, run.start[0], calculator, run.folder / "md", run.display)


def _evaluate(run: Run) -> None:
    """Do the tests of the config for student, controls and teacher."""
    bench = bench_of(
        run.data("test"),
        run.source,
        settings=BenchSettings(
            n_atoms=run.plan.n_atoms,
            temperature=run.config.temperature[1],
            nve_duration=run.plan.counts.nve_duration or 1.0,
            timestep=run.plan.timestep,
            seed=run.config.seed,
        ),
        structure=read_start(run.config.structure)[0],
        frames=_hot_frames(run),
    )
    groups = {"teacher": [Candidate("teacher", run.config.teacher)]}
    for name in run.models:
        path = str(run.folder / name / "best.pt")
        candidate = Candidate(name, TeacherSettings(spec=path))
        groups.setdefault(name.partition("_")[0], []).append(candidate)
    wanted = {
        test: [c for group in names for c in groups.get(group, [])]
        for test, names in run.config.tests.items()
    }
    run_tests(bench, wanted, run.folder / "evaluation", run.display)


def _hot_frames(run: Run) -> dict[str, Structures]:
    """Trajectories of student and teacher at the highest temperature and constant volume."""
    frames = {}
    for name, folder in (("student", "md/frames"), ("teacher", "sample")):
        joined = _finished_jobs(run.folder / folder)
        if joined is None:
            continue
        hot = (joined.temperature == run.config.temperature[1]) & torch.isnan(joined.pressure)
        if bool(hot.any()):
            frames[name] = joined.structures.select(hot.nonzero()[:, 0])
    return frames


def _finished_jobs(folder: Path) -> SampledFrames | None:
    """Frames of the jobs of a sampling folder that came to their end."""
    parts = [SampledFrames.load(file) for file in sorted(folder.glob("job_*.npz"))]
    return SampledFrames.concatenate(parts) if parts else None


def _report(run: Run) -> None:
    """Gather the main numbers, and write the report."""
    write_json(run.folder / "summary.json", summarize(run.folder))
    write_report(run.folder)


STAGES: dict[str, Callable[[Run], str | None]] = {
    "sample": _sample,
    "label": _label,
    "draft": _draft,
    "explore": _explore,
    "train": _train_all,
    "dynamics": _dynamics,
    "evaluate": _evaluate,
    "report": _report,
}


def _make_plan(config: DistillConfig, start: Structures, display: Display) -> Plan:
    with display.task("timing a few labels, steps and epochs"):
        teacher = config.teacher.make()
        properties = learnable(teacher, start)
        periodic = int(start.pbc.all(dim=1).sum())
        n_pressures = len(config.pressure) if "stress" in properties else 0
        order = Order(
            start=start,
            budget=config.budget,
            n_runs=lambda n: n * (start.n_systems + n_pressures * periodic),
            n_controls=len(config.controls),
            on_policy=config.on_policy,
            fixed=config.counts,
        )
        settings = config.student.model_copy(
            update={
                "loss": loss_terms(config.weights, properties, teacher.name),
                "score": ScoreSettings(source=teacher.name),
            }
        )
        return make_plan(order, teacher, properties, settings)
