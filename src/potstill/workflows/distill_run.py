"""What the stages of `distill` share: settings, the plan, the store, the split, the losses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from potstill.distill import LossTerm
from potstill.distill.schedules import Schedule
from potstill.errors import DataError
from potstill.experiments.spec import Role, Variant
from potstill.readers import split_from_file
from potstill.sample import SamplingPlan, smallest_supercell, standard_plan
from potstill.store import LabeledStore
from potstill.structures import Structures
from potstill.teachers import Teacher, check_derivatives
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
    cores,
    read_json,
    read_start,
    stored_settings,
    write_json,
    write_settings,
)
from potstill.workflows.labeling import label_with_progress, learnable
from potstill.workflows.planning import MIN_ATOMS, Counts, Order, Plan, make_plan

#: The learning rate falls to this share of its start.
FINAL_RATE = 0.02


#: Who can undergo a test.
Candidates = Literal["student", "control", "teacher"]


class Weights(Settings):
    """Weights of the student's loss; zero leaves a term out.

    Parameters
    ----------
    energy, forces, stress, atomic_energies : float
        Weights of the error terms, which are in eV, eV/Å, eV/Å³ and eV. That of atomic energies is
        the first one: it falls to zero in the first half of the epochs.
    """

    energy: float = Field(default=1.0, ge=0)
    forces: float = Field(default=30.0, ge=0)
    stress: float = Field(default=100.0, ge=0)
    atomic_energies: float = Field(default=100.0, ge=0)


def default_student() -> TrainSettings:
    """A HIP-NN larger than its defaults (rank 4, all channels form triples): data are plentiful."""
    return TrainSettings(
        model=ModelSettings(kind="hipnn", hyperparameters={"l_max": 4, "n_triples": 24}),
        energy=EnergySettings(zero="least_squares", refit=True, prior="zbl"),
        # With the energies' zero subtracted the ratios of L_R would be ratios of noise.
        regularization=RegularizationSettings(l2=1e-6, hierarchicality=0.0),
        optimizer=OptimizerSettings(learning_rate=5e-3, ema_decay="auto", beta2=0.99),
        learning_rate=LearningRateSettings(schedule="one_cycle"),
        batch_atoms=128,
        early_stopping=None,
    )


def default_tests() -> dict[str, tuple[Candidates, ...]]:
    """Tests of the evaluation, and who undergoes them."""
    return {
        "errors": ("student", "control"),
        "parity": ("student", "control"),
        "eos": ("student", "control", "teacher"),
        "elastic": ("student", "control", "teacher"),
        "vibrations": ("student", "teacher"),
        "phonons": ("student", "control", "teacher"),
        "rdf": ("student", "teacher"),
        "speed": ("student", "teacher"),
        "memory": ("student",),
        "nve": ("student", "control"),
        "headroom": ("student", "control"),
    }


class DistillConfig(Settings):
    """Settings of `potstill distill`.

    Parameters
    ----------
    teacher : TeacherSettings
        The potential to distill.
    structure : str
        Starting structures: a file (all structures in it), or `silicon`, which is built in.
    temperature : (low, high)
        MD temperature range in K, e.g. `300:900`. CHGNet's silicon melts well above the default.
    pressure : tuple of float
        Pressures in GPa of constant-pressure MD; none if empty.
    budget : float
        Wall time for everything, in seconds or as in `10min` and `2h`.
    out : str
        Run folder.
    n_atoms : int
        Repeat periodic structures until they have this many atoms; fewer if the teacher is slow.
    student : TrainSettings
        Model, optimizer and so on; loss, score, epochs and seed are filled in.
    weights : Weights
        Weights of the student's loss.
    controls : tuple of float
        Force weights of the controls, students that do not learn the teacher's atomic energies. By
        default the student's own weight, so that nothing else differs.
    on_policy : bool
        Explore with a draft student, and label the frames that it visits.
    counts : Counts
        Counts that the budget does not decide.
    tests : dict of str to tuple of str
        Evaluations, and what they are done for: `student`, `control`, `teacher`.
    trainings_at_once : int
        Number of training runs in parallel; by default one per core.
    seed : int
        Seed of all random numbers.
    """

    teacher: TeacherSettings = TeacherSettings(spec="chgnet")
    structure: str = "silicon"
    temperature: Range = (300.0, 900.0)
    pressure: tuple[float, ...] = (0.0,)
    budget: Duration = 840.0
    out: str = "run"
    n_atoms: int = Field(default=48, ge=1)
    student: TrainSettings = Field(default_factory=default_student)
    weights: Weights = Weights()
    controls: tuple[float, ...] = (30.0,)
    on_policy: bool = True
    counts: Counts = Counts()
    tests: dict[str, tuple[Candidates, ...]] = Field(default_factory=default_tests)
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
        """Make the run folder and the plan, or read them.

        Raises
        ------
        ConfigError
            If the folder holds another run, or the budget is too short for the teacher.
        """
        folder = Path(config.out)
        primitive = read_start(config.structure)
        file = folder / "plan.json"
        stored = stored_settings(folder).get("tests")
        if stored and "tests" not in config.model_fields_set:  # the defaults may have been others
            config = config.model_copy(update={"tests": {k: tuple(v) for k, v in stored.items()}})
        started = check_folder(folder, config, lambda key: _not_begun(folder, key))
        if started and file.is_file():
            plan = Plan.model_validate(read_json(file))
            counts = plan.counts.model_copy(update=config.counts.given())
            plan = plan.model_copy(update={"counts": counts})
        else:
            plan = _make_plan(config, primitive, display)  # a teacher that fails leaves no folder
            folder.mkdir(parents=True, exist_ok=True)
        write_settings(folder / "config.yaml", config)
        write_json(file, plan.model_dump(mode="json"))
        start = supercells(primitive, plan.min_atoms or config.n_atoms)
        return cls(config, plan, folder, start, display, Stages(folder))

    @cached_property
    def teacher(self) -> Teacher:
        """Made when a stage needs it."""
        return self.config.teacher.make()

    @property
    def store(self) -> LabeledStore:
        """The label store, to read and add."""
        path = self.folder / "labels.zarr"
        if not path.exists():
            return LabeledStore.create(path, info={"seed": self.config.seed})
        return LabeledStore.open(path, "a")

    @property
    def source(self) -> str:
        """Name of the teacher's label set."""
        (name,) = (s for s in self.store.sources if s != "reference")
        return name

    def label(self, title: str) -> None:
        """Let the teacher label what has no labels yet."""
        what = (self.store, self.teacher, self.plan.properties, self.display)
        label_with_progress(*what, title=title, check=False)  # the plan did

    def data(self, part: str) -> TrainingSet:
        """Labelled structures of one part of the split."""
        store = self.store
        systems = split_from_file(self.folder / "split.json", store.n_systems)[part]
        labels = store.labels(self.source)
        systems = systems[labels.presence("energy", store.n_systems)[systems]]
        if not len(systems):
            raise DataError(f"{self.folder}: no structure for '{part}' has labels")
        return TrainingSet(store.structures(), {self.source: labels}).select(systems)

    def student(self, epochs: int | None) -> Variant:
        """The student; the teacher's own are the atomic energies, which controls do not learn."""
        config, properties = self.config, self.plan.properties
        settings = settings_for(
            config.student, config.weights, properties, self.source, epochs or 1, config.seed
        )
        taught = tuple(t for t in settings.label_terms if t.property == "atomic_energies")
        plain = tuple(t for t in settings.label_terms if t.property != "atomic_energies")
        settings = settings.model_copy(update={"loss": plain})
        return Variant("student", Role.STUDENT, "student", "", settings, taught)

    @property
    def models(self) -> dict[str, Variant]:
        """The student, and the same without the teacher's atomic energies as its controls."""
        student = self.student(self.plan.counts.epochs)
        names = {f"control_wf{w:g}": w for w in self.config.controls}
        controls = {name: student.control(name, forces=w) for name, w in names.items()}
        return {"student": student, **controls}

    def sampling_plan(self, n_frames: int, md_share: float, **settings: Any) -> SamplingPlan:
        """MD at the run's temperatures and pressures, or at others, and rattles and strains."""
        at_pressure = "stress" in self.plan.properties and self.plan.teacher_md.at_pressure
        own: dict[str, Any] = {
            "temperature": self.config.temperature,
            "pressure": self.config.pressure if at_pressure else (),
            "n_temperatures": self.plan.counts.n_temperatures or 1,
        }
        return standard_plan(
            self.start,
            n_frames=n_frames,
            md_share=md_share,
            timestep=self.plan.timestep,
            **(own | settings),
        )


def settings_for(
    student: TrainSettings,
    weights: Weights,
    properties: Sequence[str],
    source: str,
    epochs: int,
    seed: int,
) -> TrainSettings:
    """Settings for the labels of one source, and a learning rate that fits the epochs."""
    rule = student.learning_rate
    if rule.schedule == "exponential":
        rule = rule.model_copy(update={"factor": FINAL_RATE ** (1.0 / epochs)})
    score, energy = ScoreSettings(source=source), student.energy
    if "energy" not in properties:  # forces alone, as of beads
        score = ScoreSettings(source=source, weights={"forces_rmse": 1.0})
        energy = energy.model_copy(update={"refit": False})
    return student.model_copy(
        update={
            "loss": loss_terms(weights, properties, source, epochs),
            "score": score,
            "energy": energy,
            "learning_rate": rule,
            "epochs": epochs,
            "seed": seed,
        }
    )


def loss_terms(
    weights: Weights, properties: Sequence[str], source: str, epochs: int = 1
) -> tuple[LossTerm, ...]:
    """Loss of the student.

    The weight of atomic energies falls to zero in the first half of the epochs: what a small
    student learns of them to the end costs it accuracy in energies and forces.
    """
    terms = []
    for name, weight in weights.model_dump().items():
        if weight > 0.0 and name in properties:
            if name == "atomic_energies" and epochs >= 4:
                values = (weight, 0.0)
                weight = Schedule(epochs=(1, epochs // 2), values=values, interpolation="linear")
            terms.append(LossTerm(property=name, source=source, weight=weight))
    return tuple(terms)


#: Folders by the settings that what is in them depends on; none for what changes no result.
_USED_IN = {
    "trainings_at_once": "",
    "counts.n_temperatures": "sample",
    "counts.n_md_frames": "sample",
    "counts.n_random_frames": "sample",
    "counts.n_minimum_frames": "sample",
    "counts.draft_epochs": "draft",
    "counts.n_on_policy_frames": "draft",
    "counts.epochs": "student",
    "counts.md_duration": "md",
    "counts.nve_duration": "evaluation",
    "tests": "evaluation",
}


def _not_begun(folder: Path, key: str) -> bool:
    """Whether a setting can still be changed: what depends on it has not begun."""
    for name, user in _USED_IN.items():
        if key == name or key.startswith((f"{name}.", f"{name}[")):
            return not user or not (folder / user).exists()
    return False


def supercells(primitive: Structures, min_atoms: int) -> Structures:
    """Starting structures, repeated where they are periodic."""
    parts = [smallest_supercell(primitive[s], min_atoms=min_atoms) for s in range(len(primitive))]
    return Structures.concatenate(parts)


def _make_plan(config: DistillConfig, primitive: Structures, display: Display) -> Plan:
    with display.task("timing a few labels, steps and epochs"):
        teacher = config.teacher.make()
        properties = learnable(teacher, primitive)
        check_derivatives(teacher, supercells(primitive, 2), properties)
        settings = config.student.model_copy(
            update={
                "loss": loss_terms(config.weights, properties, teacher.name),
                "score": ScoreSettings(source=teacher.name),
            }
        )
        plan = make_plan(_orders(config, primitive, properties), teacher, properties, settings)
    if plan.lean or plan.min_atoms != config.n_atoms:
        display.say(
            f"{teacher.name} is slow for this budget ({plan.timings.step:.2g} s per MD step of "
            f"{plan.n_atoms} atoms): smaller cells, less MD and more rattled frames make it fit"
        )
    return plan


def _orders(
    config: DistillConfig, primitive: Structures, properties: Sequence[str]
) -> Iterator[Order]:
    """What the plan is for: with cells of `n_atoms` first, and with half as many and fewer."""
    periodic = int(primitive.pbc.all(dim=1).sum())
    n_pressures = len(config.pressure) if "stress" in properties else 0
    n_atoms, before = config.n_atoms, 0
    while True:
        start = supercells(primitive, n_atoms)
        if start.n_atoms != before:
            yield Order(
                start=start,
                min_atoms=n_atoms,
                budget=config.budget,
                n_pressure_runs=n_pressures * periodic,
                n_controls=len(config.controls),
                at_once=min(config.trainings_at_once, 1 + len(config.controls)),
                on_policy=config.on_policy,
                fixed=config.counts,
                unit_cell=primitive[0],
                teacher_tests=tuple(t for t, who in config.tests.items() if "teacher" in who),
            )
        if n_atoms <= MIN_ATOMS or not bool(primitive.pbc.any()):
            return
        n_atoms, before = max(n_atoms // 2, MIN_ATOMS), start.n_atoms
