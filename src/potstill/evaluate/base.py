"""What evaluations share: the protocol, what they work on and what they leave behind.

An evaluation is one file with a subclass of `Evaluation` and one line in
`potstill.evaluate.table`: `potstill evaluate`, the report of `distill` and studies then have it.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping
from enum import StrEnum
from functools import cached_property
from typing import Any, ClassVar, Self, TypeVar, cast

import ase
import numpy as np
from ase.calculators.calculator import BaseCalculator
from pydantic import BaseModel, ConfigDict, Field

from potstill.calculators import PotstillCalculator
from potstill.checkpoint import load_potential
from potstill.errors import ConfigError, DataError
from potstill.evaluate.tools import is_checkpoint, make_calculator
from potstill.metrics import metric_of
from potstill.models.base import Potential
from potstill.report.panels import Drawing
from potstill.report.tables import Row, Table
from potstill.report.verdicts import Verdict
from potstill.sample.replicas import ReplicaRun, ReplicaSettings
from potstill.sample.supercell import smallest_supercell
from potstill.structures import Properties, Structures

T = TypeVar("T")

# -- results -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Result:
    """Base of all results: a frozen dataclass that becomes plain JSON and is read back from it."""

    #: Properties that `to_json` writes beside the fields.
    derived: ClassVar[tuple[str, ...]] = ()

    def to_json(self) -> dict[str, Any]:
        """Fields as plain lists, numbers and strings; NaN and infinities become None."""
        names = [f.name for f in dataclasses.fields(self)]
        return {name: as_json(getattr(self, name)) for name in (*names, *self.derived)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of `to_json`, nested results included; None becomes NaN where a float belongs.

        Fields with a default may be absent, as in files from before they were added.

        Raises
        ------
        DataError
            If a field without a default is absent.
        """
        hints = typing.get_type_hints(cls)
        values = {}
        for f in dataclasses.fields(cls):
            if f.name in data:
                values[f.name] = _from_json(hints[f.name], data[f.name])
            elif f.default is f.default_factory is dataclasses.MISSING:
                raise DataError(f"a stored {cls.__name__} lacks '{f.name}': evaluate again")
        return cls(**values)


def _from_json(kind: Any, value: Any) -> Any:
    """Plain JSON as a value of a type that a result's field may have."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is np.ndarray:
        array = np.array(value)
        return array.astype(float) if array.dtype == object else array  # None becomes NaN
    if kind is float:
        return math.nan if value is None else value
    if origin in (typing.Union, types.UnionType):
        (inner,) = (arg for arg in args if arg is not type(None))
        return None if value is None else _from_json(inner, value)
    if origin is tuple:
        kinds = [args[0]] * len(value) if args[1:] == (...,) else args
        return tuple(_from_json(k, v) for k, v in zip(kinds, value, strict=True))
    if origin is dict:
        return {key: _from_json(args[1], item) for key, item in value.items()}
    if isinstance(kind, type) and issubclass(kind, Result):
        return kind.from_json(value)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return kind(**{key: _from_json(hints[key], item) for key, item in value.items()})
    return value


def as_json(value: Any) -> Any:
    """Turn nested results, arrays and numbers into what `json.dumps` accepts strictly."""
    if isinstance(value, Result):
        return value.to_json()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return as_json(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return as_json(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


# -- the protocol --------------------------------------------------------------------------------


class BenchSettings(BaseModel):
    """What all evaluations of a bench share.

    Parameters
    ----------
    n_atoms : int
        Minimum number of atoms in the supercell for MD.
    temperature : float
        MD temperature in K.
    timestep : float
        MD timestep in fs.
    batch_atoms : int
        Maximum number of atoms per batch of predictions.
    seed : int
        Seed of velocities and samples.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    n_atoms: int = Field(default=64, ge=1)
    temperature: float = Field(default=300.0, gt=0)
    timestep: float = Field(default=1.0, gt=0)
    batch_atoms: int = Field(default=4096, ge=1)
    seed: int = 0


class Role(StrEnum):
    """What a model is for, in the order of tables."""

    STUDENT = "student"
    CONTROL = "control"
    TEACHER = "teacher"
    REFERENCE = "reference"
    DRAFT = "draft"
    OTHER = "other"

    @classmethod
    def of_name(cls, name: str) -> Role:
        """Role by the start of a name, for models without a stated role, as in older folders."""
        return next((role for role in cls if name.startswith(role)), cls.OTHER)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A potential under test: its name, and how to make it.

    Parameters
    ----------
    name : str
        What tables call it.
    spec : str
        A checkpoint, or the spec of a teacher.
    args : dict
        Of the calculator.
    role : Role, optional
        What it is for: students are compared with the teacher and with controls. By default the
        one that its name begins with.
    """

    name: str
    spec: str
    args: dict[str, Any] = dataclasses.field(default_factory=dict)
    role: Role | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "role", self.role or Role.of_name(self.name))

    @property
    def is_checkpoint(self) -> bool:
        """Whether it is one of potstill's own files."""
        return is_checkpoint(self.spec)

    @cached_property
    def potential(self) -> Potential | None:
        """The potential itself, if it is a checkpoint."""
        return load_potential(self.spec)[0] if self.is_checkpoint else None

    @cached_property
    def trained_on(self) -> dict[str, Any]:
        """What a checkpoint says of its training structures; empty for others."""
        return (load_potential(self.spec)[1].get("trained_on") or {}) if self.is_checkpoint else {}

    @cached_property
    def calculator(self) -> BaseCalculator:
        """An ASE calculator."""
        if self.is_checkpoint:
            # Tests look at what a model does, extrapolating or not: no warnings.
            return PotstillCalculator(load_potential(self.spec)[0])
        return make_calculator(self.spec, self.args)

    @property
    def predictor(self) -> Potential | BaseCalculator:
        """What predicts in batches, else the calculator."""
        return self.potential or self.calculator


@dataclasses.dataclass(frozen=True)
class Bench:
    """What the evaluations work on.

    Parameters
    ----------
    settings : BenchSettings
        What they share.
    structure : Structures, optional
        One system to start from.
    structures, labels, channel
        Held-out structures, their labels, and who gave them: "teacher" or "reference".
    frames, strides, splits : mapping
        Trajectories, and fs between their frames where it is known, by name of the potential;
        validation sets by name, for OC20's metrics.
    standard : str
        Name of the trajectory that others are compared with, if there is one.
    runs : mapping
        Models' own dynamics, by name, with their settings.
    memory : dict
        What `once` has found.
    """

    settings: BenchSettings
    structure: Structures | None = None
    structures: Structures | None = None
    labels: Properties | None = None
    channel: str = "reference"
    frames: Mapping[str, Structures] | None = None
    strides: Mapping[str, float] = dataclasses.field(default_factory=dict)
    splits: Mapping[str, tuple[Structures, Properties]] = dataclasses.field(default_factory=dict)
    standard: str = ""
    runs: Mapping[str, tuple[ReplicaRun, ReplicaSettings]] = dataclasses.field(default_factory=dict)
    memory: dict[Hashable, Any] = dataclasses.field(default_factory=dict, repr=False)

    def once(self, key: Hashable, work: Callable[[], T]) -> T:
        """The result of some work that several candidates share, which is done only once."""
        if key not in self.memory:
            self.memory[key] = work()
        return cast(T, self.memory[key])

    def standard_for(self, candidate: Candidate) -> tuple[str, Structures]:
        """The trajectory that decides cutoffs and the like: the standard, else the candidate's."""
        name = self.standard or candidate.name
        return name, (self.frames or {}).get(name) or self.trajectory_of(candidate)

    @property
    def sets(self) -> Mapping[str, tuple[Structures, Properties]]:
        """The validation sets, or the held-out structures as the only one."""
        if self.splits or self.structures is None or self.labels is None:
            return self.splits
        return {"all": (self.structures, self.labels)}

    @property
    def held_out(self) -> tuple[Structures, Properties]:
        """The held-out structures with their labels."""
        assert self.structures is not None
        assert self.labels is not None
        return self.structures, self.labels

    def trajectory_of(self, candidate: Candidate) -> Structures:
        """The frames of a candidate's dynamics.

        Raises
        ------
        ConfigError
            If there are none.
        """
        frames = (self.frames or {}).get(candidate.name)
        if frames is None:
            raise ConfigError("there is no trajectory of it")
        return frames

    def stride_of(self, candidate: Candidate) -> float:
        """Time between the frames of a candidate's dynamics, fs.

        Raises
        ------
        ConfigError
            If it is not known.
        """
        if candidate.name not in self.strides:
            raise ConfigError(
                "its file does not say the time between frames: give it as 'stride', in fs"
            )
        return self.strides[candidate.name]

    @property
    def atoms(self) -> ase.Atoms:
        """The structure as it was given."""
        assert self.structure is not None
        return self.structure.to_ase()[0]

    @property
    def supercell(self) -> ase.Atoms:
        """The structure, repeated for dynamics."""
        assert self.structure is not None
        return smallest_supercell(self.structure, min_atoms=self.settings.n_atoms).to_ase()[0]


R = TypeVar("R", bound=Result)


@dataclasses.dataclass(frozen=True)
class Findings:
    """All results of a run or bench, and what is known of its models.

    Parameters
    ----------
    results : mapping
        Evaluation to model to result.
    n_parameters : mapping
        By model.
    trained_on : mapping
        What the student's file says of its training structures.
    roles : mapping
        By model; a model without one has the role that its name begins with.
    problems : tuple of str
        What does not apply or could not be done, and why.
    failed : mapping
        Evaluation to model to why it could not be done.
    """

    results: Mapping[str, Mapping[str, Result]]
    n_parameters: Mapping[str, int] = dataclasses.field(default_factory=dict)
    trained_on: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    roles: Mapping[str, Role] = dataclasses.field(default_factory=dict)
    problems: tuple[str, ...] = ()
    failed: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)

    @cached_property
    def models(self) -> tuple[str, ...]:
        """Students, controls, teacher, then others."""
        order, names = list(Role), {m for found in self.results.values() for m in found}
        return tuple(sorted(names, key=lambda name: (order.index(self.role(name)), name)))

    def role(self, model: str) -> Role:
        """What a model is for."""
        return self.roles.get(model) or Role.of_name(model)

    @property
    def controls(self) -> tuple[str, ...]:
        """Names of the control students."""
        return tuple(name for name in self.models if self.role(name) is Role.CONTROL)

    @property
    def student(self) -> str:
        """The model that sentences are about: the first student."""
        return self._first(Role.STUDENT)

    @property
    def teacher(self) -> str:
        """The model that others are compared with: the first teacher."""
        return self._first(Role.TEACHER)

    @property
    def reference(self) -> str:
        """The trajectory that those of models are compared with: the first reference."""
        return self._first(Role.REFERENCE)

    def standard(self, results: Mapping[str, Any]) -> str:
        """What others are compared with in an evaluation: the reference, else the teacher."""
        return self.reference if self.reference in results else self.teacher

    def _first(self, role: Role) -> str:
        return next((name for name in self.models if self.role(name) is role), str(role))

    def of(self, evaluation: str, kind: type[R]) -> dict[str, R]:
        """Results of one evaluation by model, in the order of `models`; empty if it was not done.

        `kind` is the type of its results.
        """
        found = self.results.get(evaluation, {})
        ordered = {model: found.get(model) for model in self.models}
        return {model: result for model, result in ordered.items() if isinstance(result, kind)}


#: Sections of a report in order: title to the name and title of its table, and a note below it.
SECTIONS: dict[str, tuple[str, str, str]] = {
    "Accuracy": (
        "table_errors",
        "Errors",
        "Each column is a model, and whose labels it is compared with. EFwT: share of structures "
        "with an energy error below 0.02 eV and no force error above 0.03 eV/Å. The relative error "
        "is the RMSE over the standard deviation of the labels.",
    ),
    "Cost": (
        "table_cost",
        "Cost of molecular dynamics",
        "Median time of ASE MD. Memory: slope of the peak of fresh processes against the "
        "number of atoms. Molecules are replicated to reach a size.",
    ),
    "Properties": (
        "table_properties",
        "Properties at 0 K",
        "E(V): Birch-Murnaghan fit; the lattice constant is that of the conventional cell. Elastic "
        "constants: of cubic crystals averages over the axes, at the strain stated. Phonons: each "
        "model at its own minimum, RMSE over a mesh of the Brillouin zone. Deviations are from the "
        "teacher; those of elastic constants at a strain of 0.02 if it was taken. Vacancies and "
        "surfaces: relaxed in a fixed cell of each model's own crystal, without reconstruction. "
        "Expansion: quasi-harmonic, with a standard error from leaving out one volume at a time.",
    ),
    "Dynamics": (
        "table_dynamics",
        "Molecular dynamics",
        "Slope: least squares, with its standard error for correlated samples; drift: slope times "
        "duration; fluctuation: root mean square about the fitted line. Distances of distributions "
        "are integrals of absolute differences, averaged over pairs or triples; noise is that of "
        "the blocks of both trajectories.",
    ),
}


class Evaluation(BaseModel, ABC):
    """One evaluation; its fields are its settings.

    To add one, write a subclass and put it into `potstill.evaluate.table.EVALUATIONS`. Give its
    numbers by the keys of `potstill.metrics.METRICS` (with a row there for a new one): `metrics`
    alone puts them into the terminal, the summary, the report's table and studies; `against` adds
    those that take the teacher's result.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    #: Name of the evaluation and of its file of results; title; type of its results.
    name: ClassVar[str]
    title: ClassVar[str]
    result: ClassVar[type[Result]]
    #: Where a report shows it, a key of `SECTIONS`.
    section: ClassVar[str]
    #: What it works on: "labels", "sets", "structure", "crystal", "frames"
    #: (periodic ones), "trajectories" (any) or "runs".
    needs: ClassVar[str]
    #: Whether it takes a model, beside a trajectory.
    needs_model: ClassVar[bool] = False
    #: Whether it is only done when it is asked for.
    on_request: ClassVar[bool] = False
    #: Attributes of the result by the keys of the metrics that they are.
    numbers: ClassVar[Mapping[str, str]] = {}

    def lacks(self, bench: Bench) -> str:
        """What the bench lacks for this evaluation, in words; empty if it applies."""
        structure = bench.structure
        elements = structure is None or bool((structure.atomic_numbers > 0).all())
        crystal = elements and structure is not None and bool(structure.pbc.all())
        kind = "" if elements else "of chemical elements "
        frames = (bench.frames or {}).values()
        periodic = all(bool(trajectory.pbc.all()) for trajectory in frames)
        wanted: dict[str, tuple[bool, str]] = {
            "labels": (bench.structures is not None, "structures with labels"),
            "sets": (bool(bench.sets), "structures with labels"),
            "structure": (structure is not None, "a structure"),
            "crystal": (crystal, f"a structure {kind}that is periodic along all three axes"),
            "runs": (bool(bench.runs), "'dynamics' of the models"),
            "trajectories": (bool(frames), "trajectories"),
            "frames": (
                bool(frames) and periodic,
                "trajectories of a structure that is periodic along all three axes",
            ),
        }
        there, what = wanted[self.needs]
        return "" if there else what

    def require(self, bench: Bench) -> None:
        """Raise `ConfigError` where the evaluation does not apply to a bench."""
        if lacking := self.lacks(bench):
            raise ConfigError(f"the evaluation '{self.name}' needs {lacking}")

    @abstractmethod
    def run(self, bench: Bench, candidate: Candidate) -> Result:
        """Evaluate one candidate.

        Raises
        ------
        PotstillError
            If it cannot be done: a result of its own, not the end of the others.
        """

    @classmethod
    def metrics(cls, result: Any) -> dict[str, float]:
        """Numbers of a result by the keys of `potstill.metrics.METRICS`: those of `numbers`."""
        return {key: getattr(result, attribute) for key, attribute in cls.numbers.items()}

    @classmethod
    def against(cls, result: Any, teacher: Any) -> dict[str, float]:
        """Numbers of a result beside the reference's or teacher's, by the same keys."""
        return {}

    @classmethod
    def numbers_of(cls, found: Findings) -> dict[str, dict[str, float]]:
        """Model to its `metrics`, and for others than the standard to those `against` it."""
        results = found.of(cls.name, cls.result)
        numbers = {model: cls.metrics(result) for model, result in results.items()}
        standard = found.standard(results)
        if standard in results:
            for model in results.keys() - {standard}:
                numbers[model] |= cls.against(results[model], results[standard])
        return numbers

    @classmethod
    def metric_rows(cls, found: Findings) -> Iterable[tuple[str, Row]]:
        """Key and row of every metric, with a column per model."""
        numbers = cls.numbers_of(found)
        for key in dict.fromkeys(key for metrics in numbers.values() for key in metrics):
            metric = metric_of(key)
            scaled = {m: v[key] * metric.scale for m, v in numbers.items() if key in v}
            yield key, Row(metric.label, scaled)

    @classmethod
    def rows(cls, found: Findings) -> Iterable[Row]:
        """Rows of the section's table: one per metric, with a column per model."""
        return (row for _, row in cls.metric_rows(found))

    @staticmethod
    def attribute_rows(results: Mapping[str, Result], labels: Mapping[str, str]) -> Iterable[Row]:
        """Rows by label of the attributes that it maps to; none without results."""
        for label, name in labels.items() if results else ():
            yield Row(label, {model: getattr(r, name) for model, r in results.items()})

    @classmethod
    def drawings(cls, found: Findings) -> Iterable[Drawing]:
        """Figures, none by default; those without any series are left out."""
        return ()

    @classmethod
    def tables(cls, found: Findings) -> Iterable[Table]:
        """Tables of their own, besides the rows; none by default."""
        return ()

    @classmethod
    def verdicts(cls, found: Findings) -> Iterable[Verdict]:
        """Sentences about the student, with whether a bar is met."""
        return ()
