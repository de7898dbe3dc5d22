"""What an experiment is: data, variants and seeds.

A variant is a model with a loss, and perhaps a teacher whose terms are part of that loss. A control
is never written by hand: it is its student without the teacher's terms. A run is a variant with a
seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from typing import Any, Literal, Protocol

from pydantic import BaseModel

from potstill.distill import LossTerm
from potstill.distill.terms import Line
from potstill.errors import ConfigError, suggest
from potstill.evaluate.base import Role as Role
from potstill.experiments.exploration import Explored
from potstill.structures import Properties, Structures
from potstill.train import TrainSettings
from potstill.workflows.base import Settings, TeacherSettings, one_of
from potstill.workflows.data import DataSettings, FileData, is_store, read_labeled

#: The source of everything that a student learns from its teacher.
TEACHER = "teacher"


@dataclass(frozen=True)
class TrainedTeacher:
    """A variant of the experiment; students learn from its run of their own seed."""

    variant: str


@dataclass(frozen=True)
class Committee:
    """A variant of the experiment, whose runs of these seeds teach by their mean and spread."""

    variant: str
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class GivenTeacher:
    """An external teacher, and what the experiment calls it."""

    name: str
    model: TeacherSettings


@dataclass(frozen=True)
class StoredTeacher:
    """A label set of the store that holds the training data."""

    source: str


@dataclass(frozen=True, eq=False)
class GridPoint:
    """Place of a variant in a grid: options of one line of the loss, and their values."""

    grid: str
    options: Mapping[str, Any]

    def __str__(self) -> str:
        return ",".join(f"{key}={value}" for key, value in self.options.items())


@dataclass(frozen=True)
class Variant:
    """One way to train a model.

    Parameters
    ----------
    name : str
        Unique; the folder of a run is named after it.
    role : Role
        What it is for.
    strategy : str
        Name of this way of training in tables.
    group : str
        What it is compared within: its size, or its pair of models; "" for none.
    settings : TrainSettings
        Of the training, with the loss that it has without a teacher.
    taught : tuple of terms
        What the teacher adds to the loss.
    teacher : TrainedTeacher, Committee, GivenTeacher or StoredTeacher, optional
        Source of the values of these terms. A control keeps that of its student, for comparison.
    against : tuple of str
        Variants that it is judged by.
    point : GridPoint, optional
        Its place in a grid.
    seeds : tuple of int, optional
        Seeds; those of the experiment by default.
    bootstrap : bool
        Each run has as many training structures as there are, drawn with replacement by its seed.
    explored : Explored, optional
        Whose dynamics give more training structures, with labels of a committee alone.
    """

    name: str
    role: Role
    strategy: str
    group: str
    settings: TrainSettings
    taught: tuple[Line, ...] = ()
    teacher: TrainedTeacher | Committee | GivenTeacher | StoredTeacher | None = None
    against: tuple[str, ...] = ()
    point: GridPoint | None = None
    seeds: tuple[int, ...] | None = None
    bootstrap: bool = False
    explored: Explored | None = None

    def control(self, name: str, *, strategy: str = "", **weights: float) -> Variant:
        """The same without the teacher's terms.

        `weights`, by property, replace those of terms on labels; zero leaves a term out. The
        strategy is called like the variant where no other name is given.
        """
        loss = {term.name: term for term in self.settings.loss}
        known = {t.property: t for t in loss.values() if isinstance(t, LossTerm)}
        source = next(iter(known.values())).source if known else "reference"
        for key, weight in weights.items():
            term = known.get(key) or LossTerm(property=key, source=source)
            loss[term.name] = term.model_copy(update={"weight": weight})
            if weight == 0.0:
                del loss[term.name]
        kept = tuple(loss.values())
        return replace(
            self,
            name=name,
            role=Role.CONTROL,
            strategy=strategy or name,
            settings=self.settings.model_copy(update={"loss": kept}),
            taught=(),
            against=(),
            point=None,
            seeds=None,
            explored=None,
        )

    @property
    def teacher_name(self) -> str:
        """The variant or external teacher that it learns from."""
        if isinstance(self.teacher, TrainedTeacher | Committee):
            return self.teacher.variant
        return self.teacher.name if isinstance(self.teacher, GivenTeacher) else ""

    @property
    def learns_from(self) -> tuple[Any, ...]:
        """What decides on its training beside the settings."""
        return self.teacher if self.taught else None, self.bootstrap, self.explored

    def settings_of(self, seed: int) -> TrainSettings:
        """All settings of the training with a seed."""
        loss = (*self.settings.loss, *self.taught)
        return self.settings.model_copy(update={"loss": loss, "seed": seed})


@dataclass(frozen=True, eq=False)
class Run:
    """One training: a variant with a seed. Runs are equal where their names are."""

    variant: Variant
    seed: int

    @property
    def name(self) -> str:
        """Folder name."""
        return f"{self.variant.name}-{self.seed}"

    @property
    def settings(self) -> TrainSettings:
        """All settings of the training."""
        return self.variant.settings_of(self.seed)

    def __str__(self) -> str:
        return self.name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Run) and self.name == other.name

    def __hash__(self) -> int:
        return hash(self.name)


class HeldOutSet(Settings):
    """A test set.

    Parameters
    ----------
    file : FileData, optional
        File with labeled structures.
    store : str, optional
        Label store, instead of a file.
    forces_only : bool
        Report force errors only, for sets whose energies cannot be compared.
    """

    file: FileData | None = None
    store: str | None = None
    forces_only: bool = False

    _one_origin = one_of("file", "store")

    @classmethod
    def at(cls, path: str) -> HeldOutSet:
        """A store, or a file with energies and forces."""
        if is_store(path):
            return cls(store=path)
        return cls(file=FileData(path=path, require=("energy", "forces")))

    def read(self, source: str) -> tuple[Structures, Properties]:
        """Structures, and their labels of a source."""
        return read_labeled(self.store, [self.file] if self.file else [], source)


@dataclass(frozen=True)
class ExperimentData:
    """What all runs are trained and tested on.

    Parameters
    ----------
    parts : DataSettings
        Training and validation set.
    tests : dict of str to HeldOutSet
        By name.
    source : str
        The label set that plays the reference.
    features : {"stored", "online"}
        Whether a teacher's features are computed once for a run and kept, or for every batch.
    """

    parts: DataSettings
    tests: Mapping[str, HeldOutSet]
    source: str = "reference"
    features: Literal["stored", "online"] = "stored"


class Errors(StrEnum):
    """How runs are tested: all labels, pooled; or OC20's metrics, per frame and free atom."""

    PROPERTIES = "properties"
    S2EF = "s2ef"


class Measure(Protocol):
    """What is measured once runs are trained; see `potstill.experiments.measures`."""

    def measure(self, finished: Any) -> dict[str, Any]:
        """Measure the finished runs; plain values."""


@dataclass(frozen=True)
class Experiment:
    """Data, variants and seeds.

    Parameters
    ----------
    title : str
        One line for the report.
    variants : tuple of Variant
        In the order of tables.
    seeds : tuple of int
        Every variant is trained once for each.
    errors : Errors
        How runs are tested.
    measures : mapping of str to Measure
        What is measured once runs are trained.
    baselines : mapping
        Published potentials and their errors on the first test set.
    config : BaseModel, optional
        The settings that the experiment was made from, as they are recorded.
    """

    name: str
    title: str
    data: ExperimentData
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    errors: Errors = Errors.PROPERTIES
    measures: Mapping[str, Measure] = field(default_factory=dict)
    baselines: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    config: BaseModel | None = None

    def __post_init__(self) -> None:
        names = [variant.name for variant in self.variants]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"two variants of the experiment are called '{name}'")
        trained = {v.name: v.teacher for v in self.variants if v.taught}
        for name, teacher in trained.items():
            if isinstance(teacher, TrainedTeacher | Committee) and teacher.variant not in names:
                raise ConfigError(f"'{name}' learns from '{teacher.variant}', which does not exist")
        self._check_explorers()

    def _check_explorers(self) -> None:
        """Those whose dynamics others learn from exist, and nobody waits for itself."""
        explorers = {v.name: v.explored.variants for v in self.variants if v.explored is not None}
        for name, own in explorers.items():
            for other in own:
                if other not in self.by_name:
                    raise ConfigError(
                        f"'{name}' is explored by '{other}', which does not exist"
                        f"{suggest(other, list(self.by_name))}"
                    )
            seen, ahead = set[str](), list(own)
            while ahead:
                if (other := ahead.pop()) == name:
                    raise ConfigError(
                        f"'{name}' is explored by itself, or by one that waits for it"
                    )
                if other not in seen:
                    seen.add(other)
                    ahead += explorers.get(other, ())

    @cached_property
    def by_name(self) -> dict[str, Variant]:
        """Variants by name."""
        return {variant.name: variant for variant in self.variants}

    def runs(self) -> list[Run]:
        """All runs: teachers first, grids last, otherwise seed by seed.

        An experiment that is cut short still says something.
        """
        own = [v.seeds for v in self.variants if v.seeds]
        every = sorted({*self.seeds, *(seed for seeds in own for seed in seeds)})
        runs = []
        for variant in self.variants:
            # What grids are judged by has their seeds as well.
            alone = variant.seeds is None and not variant.taught and bool(own)
            seeds = variant.seeds or (every if alone else self.seeds)
            runs += [Run(variant, seed) for seed in seeds]
        return sorted(runs, key=lambda run: (_rank(run.variant), run.seed))

    def teacher_of(self, run: Run) -> Run | None:
        """The run that a run learns from, or whose dynamics its own are compared with."""
        teacher = run.variant.teacher
        if isinstance(teacher, TrainedTeacher) and teacher.variant in self.by_name:
            return Run(self.by_name[teacher.variant], run.seed)
        if run.variant.role is Role.TEACHER:
            return None
        first = next((v for v in self.variants if v.role is Role.TEACHER), None)
        return None if first is None else Run(first, run.seed)

    def needed_by(self, run: Run) -> list[Run]:
        """The runs that have to be finished before a run: its teachers, and those that explore."""
        return [*self.teachers_of(run), *self.explorers_of(run)]

    def explorers_of(self, run: Run) -> list[Run]:
        """The runs whose dynamics gives a run more to learn."""
        explored = run.variant.explored
        names = () if explored is None else explored.variants
        return [Run(self.by_name[name], run.seed) for name in names]

    def teachers_of(self, run: Run) -> list[Run]:
        """The runs that a run learns from."""
        teacher = run.variant.teacher
        if not run.variant.taught or not isinstance(teacher, TrainedTeacher | Committee):
            return []
        seeds = teacher.seeds if isinstance(teacher, Committee) else (run.seed,)
        return [Run(self.by_name[teacher.variant], seed) for seed in seeds]

    @property
    def given_teachers(self) -> dict[str, TeacherSettings]:
        """External teachers by name."""
        found = [v.teacher for v in self.variants if isinstance(v.teacher, GivenTeacher)]
        return {teacher.name: teacher.model for teacher in found}


def _rank(variant: Variant) -> int:
    if variant.role is Role.TEACHER:
        return 0
    return 1 if variant.point is None else 2
