"""What the stages of `distill` share: settings, the plan, the store, the split, the losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import Field

from potstill.distill import LossTerm
from potstill.errors import DataError
from potstill.readers import split_from_file
from potstill.sample import SamplingPlan, smallest_supercell, standard_plan
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
    check_folder,
    claim_folder,
    cores,
    read_json,
    read_start,
    write_json,
)
from potstill.workflows.labeling import label_with_progress, learnable
from potstill.workflows.planning import Counts, Order, Plan, make_plan

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
        optimizer=OptimizerSettings(learning_rate=6e-3, ema_decay=0.99, clip_norm=None),
        learning_rate=LearningRateSettings(schedule="exponential"),
        batch_size=2,
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
        Force weights of controls, students without the teacher's atomic energies. The default is
        the student's own weight, so that nothing but the knowledge differs.
    on_policy : bool
        Let a draft student explore, and label what it meets.
    counts : Counts
        Counts that the budget shall not decide.
    tests : dict of str to tuple of str
        Tests of the evaluation, and who undergoes them: `student`, `control`, `teacher`.
    trainings_at_once : int
        Student and controls that are trained side by side; by default one per core.
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
    controls: tuple[float, ...] = (30.0,)
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
    trainings_at_once: int = Field(default_factory=cores, ge=1)
    seed: int = Field(default=0, ge=0)


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
        file = folder / "plan.json"
        if check_folder(folder, config) and file.is_file():
            plan = Plan.model_validate(read_json(file))
        else:
            plan = _make_plan(config, start, display)  # a teacher that fails leaves no folder
            claim_folder(folder, config)
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
            at_once=min(config.trainings_at_once, 1 + len(config.controls)),
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
