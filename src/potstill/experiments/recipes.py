"""The protocols of two papers: settings of a study, as configs hold them, to an experiment.

`SizesStudy` is that of Matin et al.: sizes of students x strategies, with the weights of Table 1.
`PairsStudy` is that of Ekström Kelvinius et al.: pairs of models x strategies of feature
distillation, and grids of their options.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

from pydantic import Field, model_validator

from potstill.distill import LossTerm, Schedule
from potstill.distill.feature_terms import KINDS
from potstill.distill.taps import CHOSEN_PAIRS
from potstill.errors import suggest
from potstill.experiments.measures import EvaluationsSettings, LiquidSettings, SimilaritySettings
from potstill.experiments.spec import (
    TEACHER,
    Errors,
    Experiment,
    ExperimentData,
    GivenTeacher,
    GridPoint,
    HeldOutSet,
    Measure,
    Role,
    StoredTeacher,
    TrainedTeacher,
    Variant,
)
from potstill.models import TapSpec, build_model
from potstill.species import SpeciesTable
from potstill.train import TrainSettings
from potstill.train.settings import ModelSettings, ScoreSettings
from potstill.workflows.base import Settings, TeacherSettings, merged, one_of
from potstill.workflows.data import DataSettings, FileData, SplitData, is_store

#: Table 1 of Matin et al.: first epoch of each stage, and the weights from there on.
BORN_AGAIN_EPOCHS = (1, 200, 250, 300, 350, 400)
BORN_AGAIN_WEIGHTS = {
    "energy": (0.0, 0.2, 0.4, 0.6, 0.8, 1.0),
    "forces": (75.0, 63.0, 51.0, 39.0, 27.0, 15.0),
    "atomic_energies": (200.0, 160.0, 120.0, 80.0, 40.0, 0.0),
}


class Study(Settings):
    """What studies of all kinds have.

    Parameters
    ----------
    name : str
        Short name of the study.
    title : str
        Title of the report.
    seeds : tuple of int
        Every variant is trained once per seed.
    common : TrainSettings
        Training settings of all runs; the study fills in model, loss, score and seed.
    evaluations : EvaluationsSettings, optional
        Evaluations of every trained model.
    """

    name: str
    title: str
    seeds: tuple[int, ...] = (0, 1, 2)
    common: TrainSettings = Field(default_factory=TrainSettings)
    measure: LiquidSettings | SimilaritySettings | None = None
    evaluations: EvaluationsSettings | None = None

    def _experiment(
        self, data: ExperimentData, variants: Iterable[Variant], **own: Any
    ) -> Experiment:
        """Variants on data, with what studies of all kinds have."""
        name = "similarity" if isinstance(self.measure, SimilaritySettings) else "liquid"
        asked: dict[str, Measure | None] = {name: self.measure, "evaluations": self.evaluations}
        return Experiment(
            self.name,
            self.title,
            data,
            tuple(variants),
            self.seeds,
            measures={name: measure for name, measure in asked.items() if measure is not None},
            config=self,
            **own,
        )

    @model_validator(mode="before")
    @classmethod
    def _zero_of_the_papers(cls, data: Any) -> Any:
        """Studies take energies as they are unless they say otherwise, as the papers do."""
        if isinstance(data, Mapping) and isinstance(data.get("common", {}), Mapping):
            plain = {"energy": {"zero": "none"}}
            return {**data, "common": merged(plain, data.get("common", {}))}
        return data


# -- Matin et al. ----------------------------------------------------------------------------------


class Strategy(Settings):
    """How one kind of run is trained.

    Parameters
    ----------
    role : {"teacher", "student", "control"}
        A student also learns the atomic energies of its teacher; a control is the first student
        without them.
    teacher : str
        For students: the strategy, of role `teacher`, that trains their teachers.
    w_energy, w_forces, w_atomic_energies : float
        Static weight of Eq. 5.
    born_again : bool
        Use the schedule of Table 1 instead of the static weights.
    last_w_forces : float, optional
        With `born_again`, final force weight of the schedule: Table 1 ends at 15, while the text
        of the paper says that it ends at 10, as for the teacher.
    sizes : tuple of str, optional
        Sizes to train; all by default.
    """

    role: Literal[Role.TEACHER, Role.STUDENT, Role.CONTROL]
    teacher: str = "teacher"
    w_energy: float = 1.0
    w_forces: float = 10.0
    w_atomic_energies: float = 0.0
    born_again: bool = False
    last_w_forces: float | None = None
    sizes: tuple[str, ...] | None = None

    def weights(self, schedule_factor: float) -> dict[str, float | Schedule]:
        """Weights by property, with the epochs of the schedule multiplied by a factor."""
        if not self.born_again:
            return {
                "energy": self.w_energy,
                "forces": self.w_forces,
                "atomic_energies": self.w_atomic_energies,
            }
        values = dict(BORN_AGAIN_WEIGHTS)
        if self.last_w_forces is not None:
            values["forces"] = (*values["forces"][:-1], self.last_w_forces)
        return {
            name: Schedule(epochs=BORN_AGAIN_EPOCHS, values=v).compressed(schedule_factor)
            for name, v in values.items()
        }


#: The strategies of Matin et al. by name; a study may add its own.
STRATEGIES: dict[str, Strategy] = {
    "teacher": Strategy(role=Role.TEACHER),
    "student": Strategy(role=Role.STUDENT, w_forces=30.0, w_atomic_energies=100.0),
    "control_wf10": Strategy(role=Role.CONTROL, w_forces=10.0),
    "control_wf30": Strategy(role=Role.CONTROL, w_forces=30.0),
    "born_again": Strategy(role=Role.STUDENT, born_again=True, sizes=("teacher",)),
    "born_again_wf10": Strategy(
        role=Role.STUDENT, born_again=True, last_w_forces=10.0, sizes=("teacher",)
    ),
    "born_again_static": Strategy(
        role=Role.STUDENT, w_forces=30.0, w_atomic_energies=100.0, sizes=("teacher",)
    ),
}


class SizesData(Settings):
    """Structures and labels of a study.

    Parameters
    ----------
    train : str
        Structure file or label store to train on.
    tests : dict of str to str
        Held-out files or stores by name; tables show the first.
    source : str
        Label set that serves as the reference: `reference`, or the name of a teacher in the store.
    validation_fraction : float
        Fraction of the training data held out for validation, evenly over its groups.
    validation_seed : int
        Seed of that split, the same for all runs.
    atomic_energies_from : str, optional
        Label set of the store with atomic energies, for example those of a published ensemble,
        instead of the teachers trained in the study.
    """

    train: str
    tests: dict[str, str]
    source: str = "reference"
    validation_fraction: float = Field(default=0.1, gt=0, lt=1)
    validation_seed: int = 0
    atomic_energies_from: str | None = None

    @property
    def parts(self) -> DataSettings:
        """Training and validation set."""
        fractions = {"validation": self.validation_fraction}
        split = SplitData(seed=self.validation_seed, fractions=fractions, of_every_group=True)
        if is_store(self.train):
            return DataSettings(store=self.train, sources=(self.source,), split=split)
        file = FileData(path=self.train, require=("energy", "forces"))
        return DataSettings(files=(file,), split=split)


class SizesStudy(Study):
    """Sizes of students x strategies x seeds.

    Parameters
    ----------
    data : SizesData
        Training and test sets.
    sizes : dict of str to dict
        Hyper-parameters by size; `teacher`, the size of the teacher, is required.
    strategies : tuple of str
        Strategies to train: keys of `STRATEGIES` or `extra_strategies`.
    extra_strategies : dict of str to Strategy
        Additional strategies, such as a second teacher and its students.
    measure : LiquidSettings, optional
        MD with the trained models; none by default.
    baselines : dict of str to dict
        Published potentials and their errors on the first test set, by the keys of
        `potstill.metrics`.
    schedule_factor : float
        Factor of the epochs in Table 1.
    """

    data: SizesData
    sizes: dict[str, dict[str, Any]]
    strategies: tuple[str, ...] = tuple(STRATEGIES)
    extra_strategies: dict[str, Strategy] = Field(default_factory=dict)
    measure: LiquidSettings | None = None
    baselines: dict[str, dict[str, float]] = Field(default_factory=dict)
    schedule_factor: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _check(self) -> SizesStudy:
        if "teacher" not in self.sizes:
            raise ValueError("sizes must name the teacher's size as 'teacher'")
        if not is_store(self.data.train) and self.data.source != "reference":
            raise ValueError(f"a file cannot hold labels of '{self.data.source}': use a store")
        known = self._known
        for name in self.strategies:
            if name not in known:
                raise ValueError(f"unknown strategy '{name}'{suggest(name, STRATEGIES)}")
            own = known[name]
            for size in own.sizes or ():
                if size not in self.sizes:
                    raise ValueError(f"'{name}' names an unknown size '{size}'")
            if own.role is not Role.STUDENT or self.data.atomic_energies_from is not None:
                continue
            if own.teacher not in self.strategies or known[own.teacher].role is not Role.TEACHER:
                raise ValueError(
                    f"the strategy '{name}' learns from '{own.teacher}', which is not among the "
                    "study's strategies of role 'teacher'"
                )
        return self

    @cached_property
    def experiment(self) -> Experiment:
        """Its variants: every strategy at every size; teachers at their own."""
        strategies = {name: self._known[name] for name in self.strategies}
        variants = [
            self.variant(name, size)
            for name, own in strategies.items()
            for size in self._sizes(own)
        ]
        variants = [replace(v, against=_judges(v, variants, strategies)) for v in variants]
        data = ExperimentData(
            self.data.parts,
            {name: HeldOutSet.at(path) for name, path in self.data.tests.items()},
            self.data.source,
        )
        return self._experiment(data, variants, baselines=self.baselines)

    @property
    def _known(self) -> dict[str, Strategy]:
        return {**STRATEGIES, **self.extra_strategies}

    def _sizes(self, own: Strategy) -> Sequence[str]:
        if own.role is Role.TEACHER:
            return ("teacher",)
        return own.sizes or [size for size in self.sizes if size != "teacher"]

    def variant(self, name: str, size: str) -> Variant:
        """One strategy at one size; a control is the first student without its teacher."""
        own = self._known[name]
        if own.role is Role.CONTROL:
            students = (s for s in self.strategies if self._known[s].role is Role.STUDENT)
            student = self.variant(next(students, "student"), size)
            weights = {"energy": own.w_energy, "forces": own.w_forces}
            return student.control(f"{name}-{size}", strategy=name, **weights)
        source = self.data.source
        terms = {
            key: LossTerm(
                property=key,
                source=TEACHER if key == "atomic_energies" else source,
                weight=weight,
            )
            for key, weight in own.weights(self.schedule_factor).items()
            if weight != 0.0
        }
        taught = terms.pop("atomic_energies", None)
        model = self.common.model
        hyperparameters = {**model.hyperparameters, **self.sizes[size]}
        settings = self.common.model_copy(
            update={
                "model": model.model_copy(update={"hyperparameters": hyperparameters}),
                "loss": tuple(terms.values()),
                "score": ScoreSettings(source=source, weights=self.common.score.weights),
            }
        )
        teacher: StoredTeacher | TrainedTeacher | None = None
        if own.role is Role.STUDENT:
            stored = self.data.atomic_energies_from
            trained = TrainedTeacher(f"{own.teacher}-teacher")
            teacher = trained if stored is None else StoredTeacher(stored)
        return Variant(
            f"{name}-{size}",
            own.role,
            strategy=name,
            group=size,
            settings=settings,
            taught=() if taught is None else (taught,),
            teacher=teacher,
        )


def _judges(
    variant: Variant, variants: Sequence[Variant], strategies: Mapping[str, Strategy]
) -> tuple[str, ...]:
    """Controls of a student of its size; at the teacher's size, the teacher and static weights."""
    if variant.role is not Role.STUDENT:
        return ()
    scheduled = strategies[variant.strategy].born_again
    found = [
        other.name
        for other in variants
        if other.group == variant.group
        and (
            other.role is Role.CONTROL
            or variant.teacher == TrainedTeacher(other.name)
            or (
                (scheduled and other.role is variant.role)
                and not strategies[other.strategy].born_again
            )
        )
    ]
    return tuple(found)


# -- Ekström Kelvinius et al. ----------------------------------------------------------------------


class StudyModel(Settings):
    """A model of the study.

    Parameters
    ----------
    kind, hyperparameters
        Of a model to train, as in `ModelSettings`.
    checkpoint : TeacherSettings, optional
        An external, trained teacher, instead of a kind.
    train : dict
        Training settings that differ from `common`, nested alike.
    """

    kind: str = ""
    hyperparameters: dict[str, Any] = Field(default_factory=dict)
    checkpoint: TeacherSettings | None = None
    train: dict[str, Any] = Field(default_factory=dict)

    _one_origin = one_of("kind", "checkpoint")

    @cached_property
    def taps(self) -> Mapping[str, TapSpec]:
        """Its features by name; the model or teacher is made once to ask it."""
        if self.checkpoint is not None:
            return self.checkpoint.make().taps
        return build_model(self.kind, SpeciesTable.from_symbols(["H"]), self.hyperparameters).taps


class Grid(Settings):
    """Runs of one pair that differ in options of one line: taps, losses, transformations, weights.

    Parameters
    ----------
    line : dict
        The line of the loss.
    over : dict of str to tuple
        Values of its options; every combination is a run. `all` stands for all taps that fit.
    seeds : tuple of int, optional
        Seeds; those of the study by default.
    """

    line: dict[str, Any]
    over: dict[str, tuple[Any, ...] | Literal["all"]]
    seeds: tuple[int, ...] | None = None

    def points(self, name: str, student: StudyModel, teacher: StudyModel) -> list[GridPoint]:
        """Every combination of the options."""
        kinds = KINDS.get(str(self.line.get("distill")))
        asked = [option for option, values in self.over.items() if values == "all"]
        if asked and (kinds is None or not set(asked) <= {"student_tap", "teacher_tap"}):
            raise ValueError(
                f"'all' stands for the taps of one strategy on features, not for {', '.join(asked)}"
            )
        values: dict[str, Sequence[Any]] = {}
        for option, own in self.over.items():
            values[option] = own
            if own == "all":
                assert kinds is not None
                of_student = option == "student_tap"
                taps = (student if of_student else teacher).taps
                fitting = (kinds.student,) if of_student else kinds.teacher
                values[option] = [
                    k for k, t in taps.items() if t.kind in fitting and k != CHOSEN_PAIRS
                ]
        return [
            GridPoint(name, dict(zip(values, combination, strict=True)))
            for combination in itertools.product(*values.values())
        ]


class StudyPair(Settings):
    """A teacher and a student.

    Parameters
    ----------
    teacher, student : str
        Name of a model.
    strategies : dict of str to dict
        Lines of the loss by name, without `source`; a weight may be `preset:PAIR`, one of those
        in the paper (`potstill.distill.strategies.PRESETS`).
    grids : dict of str to Grid
        Ablations by name.
    """

    teacher: str
    student: str
    strategies: dict[str, dict[str, Any]] = Field(default_factory=dict)
    grids: dict[str, Grid] = Field(default_factory=dict)


class PairsStudy(Study):
    """Pairs of models x strategies of feature distillation x seeds.

    Parameters
    ----------
    kind : {"features"}
        Marks the config as a study of feature distillation.
    data : DataSettings
        Training and validation sets.
    tests : dict of str to HeldOutSet
        Test sets by name; tables show each of them and their average.
    models : dict of str to StudyModel
        Models by name.
    pairs : dict of str to StudyPair
        Pairs of teacher and student by name.
    features : {"stored", "online"}
        Compute the features of teachers once per run and store them, or for every batch.
    measure : SimilaritySettings
        Measurements of throughput and similarity of features.
    """

    kind: Literal["features"]
    data: DataSettings
    tests: dict[str, HeldOutSet]
    models: dict[str, StudyModel]
    pairs: dict[str, StudyPair]
    features: Literal["stored", "online"] = "stored"
    measure: SimilaritySettings = Field(default_factory=SimilaritySettings)

    @model_validator(mode="after")
    def _check(self) -> PairsStudy:
        for name, pair in self.pairs.items():
            for model in (pair.teacher, pair.student):
                if model not in self.models:
                    raise ValueError(
                        f"the pair '{name}' names an unknown model '{model}'"
                        f"{suggest(model, self.models)}"
                    )
            if self.models[pair.student].checkpoint is not None:
                raise ValueError(f"the student of '{name}' is trained: give it a 'kind'")
        _ = self.experiment  # every line of the loss is right
        return self

    @cached_property
    def experiment(self) -> Experiment:
        """Its variants: models alone, and every strategy and point of a grid of every pair."""
        students = [variant for name in self.pairs for variant in self._students(name)]
        used = {model for pair in self.pairs.values() for model in (pair.teacher, pair.student)}
        alone = [
            self._alone(name, students)
            for name, model in self.models.items()
            if name in used and model.checkpoint is None
        ]
        data = ExperimentData(self.data, self.tests, features=self.features)
        return self._experiment(data, (*alone, *students), errors=Errors.S2EF)

    def _students(self, name: str) -> list[Variant]:
        """The strategies of a pair, then its grids."""
        pair = self.pairs[name]
        student, teacher = self.models[pair.student], self.models[pair.teacher]
        found = [self._student(name, run, line) for run, line in pair.strategies.items()]
        for key, grid in pair.grids.items():
            for point in grid.points(key, student, teacher):
                run = self._student(name, f"{key}[{point}]", {**grid.line, **point.options})
                found.append(replace(run, point=point, seeds=grid.seeds))
        return found

    def _student(self, name: str, strategy: str, line: Mapping[str, Any]) -> Variant:
        pair = self.pairs[name]
        settings = self._settings(pair.student, line)
        own = [term for term in settings.loss if term.source != TEACHER]
        taught = [term for term in settings.loss if term.source == TEACHER]
        teacher = self.models[pair.teacher].checkpoint
        return Variant(
            f"{name}.{strategy}",
            Role.STUDENT,
            strategy=strategy,
            group=name,
            settings=settings.model_copy(update={"loss": tuple(own)}),
            taught=tuple(taught),
            teacher=TrainedTeacher(pair.teacher)
            if teacher is None
            else GivenTeacher(pair.teacher, teacher),
            against=(pair.student,),
        )

    def _alone(self, model: str, students: Sequence[Variant]) -> Variant:
        """A model without a teacher: the control of its pairs, the teacher of others."""
        own = (s for s in students if self.pairs[s.group].student == model)
        student = next(own, None)
        role = Role.CONTROL
        if any(pair.teacher == model for pair in self.pairs.values()):
            role = Role.TEACHER
        if student is not None:
            return replace(student.control(model), role=role, group="", teacher=None)
        return Variant(model, role, strategy=model, group="", settings=self._settings(model))

    def _settings(self, name: str, line: Mapping[str, Any] | None = None) -> TrainSettings:
        """The settings of a model, with a line of the loss."""
        model = self.models[name]
        settings = merged(self.common.model_dump(), model.train)
        settings["model"] = ModelSettings(kind=model.kind, hyperparameters=model.hyperparameters)
        own = [term for term in settings["loss"] if term.get("source", "reference") != TEACHER]
        settings["loss"] = own if line is None else [*own, {**line, "source": TEACHER}]
        return TrainSettings.model_validate(settings)
