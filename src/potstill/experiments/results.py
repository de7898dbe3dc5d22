"""Results of the runs of a study: one row per run, the seeds of a variant together.

Tables and figures take every mean over seeds, and every comparison of a student with what it is
judged by, from here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from potstill.errors import DataError
from potstill.evaluate.errors import GapShare, S2EFErrors, estimate_over_seeds, share_of_gap
from potstill.evaluate.learning import LearningCurves
from potstill.evaluate.rdf import RadialDistribution
from potstill.experiments.spec import GridPoint, Role, Run, Variant
from potstill.metrics import Estimate, Metric, metric_of
from potstill.report.panels import LOOKS
from potstill.report.tables import Spread
from potstill.report.verdicts import Comparison, compare

_ORDER = tuple(LOOKS)


@dataclass(frozen=True)
class RunRow:
    """One trained model in tables and figures.

    Parameters
    ----------
    run : Run
        Variant and seed; an external teacher has the seed -1.
    metrics : mapping
        By the keys of `potstill.metrics.METRICS`: on the first test set, and what was measured.
    tests : S2EFErrors, optional
        By test set and averaged.
    taps : (str, str), optional
        Tap of the student that learned from one of the teacher's.
    curve, rdf : LearningCurves, RadialDistribution, optional
        Of the training and of the liquid.
    """

    run: Run
    n_parameters: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    tests: S2EFErrors | None = None
    taps: tuple[str, str] | None = None
    curve: LearningCurves | None = None
    rdf: RadialDistribution | None = None

    def estimate(self, key: str, split: str | None = None) -> Estimate | None:
        """OC20's metric of a test set, or averaged over all."""
        if self.tests is None:
            return None
        return (self.tests.average if split is None else self.tests.splits[split]).get(key)

    def value(self, key: str, split: str | None = None) -> float:
        """One metric, or `n_parameters`; NaN where it was not measured."""
        if key == "n_parameters":
            return float(self.n_parameters)
        found = self.estimate(key, split)
        number = self.metrics.get(key) if split is None else None
        number = number if found is None else found.value
        return math.nan if number is None else float(number)


@dataclass(frozen=True)
class Group:
    """The runs of one variant, in the order of their seeds."""

    rows: tuple[RunRow, ...]

    @property
    def variant(self) -> Variant:
        """How they were trained."""
        return self.rows[0].run.variant

    @property
    def strategy(self) -> str:
        """Name of the strategy in tables."""
        return self.variant.strategy

    @property
    def size(self) -> str:
        """Size or pair of models that it is compared within."""
        return self.variant.group

    @property
    def seeds(self) -> set[int]:
        """Those that have been trained."""
        return {row.run.seed for row in self.rows}

    def at(self, seeds: set[int]) -> Group:
        """Runs of these seeds; an external teacher has none (-1) and belongs to all."""
        return Group(tuple(r for r in self.rows if r.run.seed in seeds or r.run.seed < 0))

    def values(self, key: str, split: str | None = None) -> list[float]:
        """A metric of the runs that have it."""
        values = (row.value(key, split) for row in self.rows)
        return [value for value in values if math.isfinite(value)]

    def spread(self, metric: Metric, split: str | None = None) -> Spread:
        """Mean and standard deviation over seeds, in the unit that is shown."""
        return Spread.of(self.values(metric.key, split)).scaled(metric.scale)

    def estimate(self, key: str, split: str | None = None) -> Estimate | None:
        """Mean with its standard error over seeds; of a single run, over its frames."""
        found = [e for row in self.rows if (e := row.estimate(key, split)) is not None]
        if len(found) < 2:
            return found[0] if found else None
        return estimate_over_seeds([estimate.value for estimate in found])


@dataclass(frozen=True)
class Compared:
    """A variant beside one that it is judged by."""

    ours: Group
    theirs: Group
    comparison: Comparison


@dataclass(frozen=True, eq=False)
class Results:
    """All runs of a study, and what tables and figures show beside them.

    `baselines` are metrics of published potentials; `liquid` is the name and g(r) of an external
    potential; `similarity` is what `potstill.experiments.measures.SimilaritySettings` measures.

    Raises
    ------
    DataError
        If there are no rows, or two share a name.
    """

    rows: Sequence[RunRow]
    baselines: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    liquid: tuple[str, RadialDistribution] | None = None
    similarity: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.rows:
            raise DataError("a study report needs at least one run")
        names = [row.run.name for row in self.rows]
        for name in names:
            if names.count(name) > 1:
                raise DataError(
                    f"two runs of the study are called '{name}': give each its own name"
                )

    @cached_property
    def variants(self) -> dict[str, Group]:
        """Runs by variant."""
        found: dict[str, list[RunRow]] = {}
        for row in sorted(self.rows, key=lambda row: row.run.seed):
            found.setdefault(row.run.variant.name, []).append(row)
        names = dict.fromkeys(row.run.variant.name for row in self.rows)
        return {name: Group(tuple(found[name])) for name in names}

    @cached_property
    def ordered(self) -> list[Group]:
        """Variants from small to large, in the order of strategies; last what is no run."""

        def key(group: Group) -> tuple[Any, ...]:
            return (group.rows[0].n_parameters, group.size, _rank(group.strategy))

        groups = sorted(self.variants.values(), key=key)
        sizes = list(dict.fromkeys(group.size for group in groups))

        def place(group: Group) -> tuple[Any, ...]:
            beside = group.variant.role is Role.OTHER
            return (sizes.index(group.size), beside, _rank(group.strategy))

        return sorted(groups, key=place)

    @property
    def sizes(self) -> list[str]:
        """Sizes (or pairs) by increasing number of parameters."""
        return list(dict.fromkeys(group.size for group in self.ordered))

    @property
    def strategies(self) -> list[str]:
        """Known strategies in the order of their looks, then the others by name."""
        return sorted({group.strategy for group in self.ordered}, key=_rank)

    @property
    def splits(self) -> list[str]:
        """Test sets whose errors are kept apart."""
        tests = self.rows[0].tests
        return [] if tests is None else list(tests.splits)

    @cached_property
    def pairs(self) -> dict[str, list[Group]]:
        """By pair of models: the students of OC20-like tests, without those of grids."""
        found: dict[str, list[Group]] = {}
        for group in self._students:
            if group.variant.point is None:
                found.setdefault(group.size, []).append(group)
        return found

    @cached_property
    def grids(self) -> dict[tuple[str, str], dict[GridPoint, Group]]:
        """Students by pair and grid, and their place in it."""
        found: dict[tuple[str, str], dict[GridPoint, Group]] = {}
        for group in self._students:
            if (point := group.variant.point) is not None:
                found.setdefault((group.size, point.grid), {})[point] = group
        return found

    @property
    def _students(self) -> list[Group]:
        groups = self.variants.values()
        return [g for g in groups if g.variant.against and g.rows[0].tests is not None]

    def measured(self, keys: Iterable[str]) -> list[Metric]:
        """Metrics for which at least one run has a finite value."""
        groups = self.variants.values()
        return [metric_of(key) for key in keys if any(group.values(key) for group in groups)]

    def control(self, group: Group) -> Group:
        """The first variant that one is judged by, at its seeds; empty if it is not trained."""
        return self._beside(group, group.variant.against[0])

    def teacher(self, group: Group) -> Group:
        """The teacher of a student, at its seeds; empty if it is not trained."""
        return self._beside(group, group.variant.teacher_name)

    def _beside(self, group: Group, name: str) -> Group:
        return self.variants.get(name, Group(())).at(group.seeds)

    def change(self, group: Group, metric: Metric, split: str | None = None) -> Comparison:
        """A metric of a student against its control at the same seeds."""
        return _compare(group, self.control(group), metric, split)

    def share(self, group: Group, metric: Metric, split: str | None = None) -> GapShare | None:
        """Share of the gap between control and teacher that a student closes."""
        beside = (group, self.control(group), self.teacher(group))
        ours, control, teacher = (one.estimate(metric.key, split) for one in beside)
        if ours is None or control is None or teacher is None:
            return None
        return share_of_gap(ours, control, teacher)

    def comparisons(self, metrics: Sequence[Metric]) -> list[Compared]:
        """Every variant beside all that it is judged by, in the order of strategies."""
        pairs = [
            (group, self.variants[name])
            for group in self.ordered
            for name in group.variant.against
            if name in self.variants
        ]
        pairs.sort(key=lambda pair: (_rank(pair[0].strategy), _rank(pair[1].strategy)))
        return [
            Compared(ours, theirs, _compare(ours, theirs, metric))
            for ours, theirs in pairs
            for metric in metrics
        ]


def _compare(ours: Group, theirs: Group, metric: Metric, split: str | None = None) -> Comparison:
    return compare(metric, ours.values(metric.key, split), theirs.values(metric.key, split))


def _rank(strategy: str) -> tuple[int, str]:
    return (_ORDER.index(strategy) if strategy in _ORDER else len(_ORDER), strategy)
