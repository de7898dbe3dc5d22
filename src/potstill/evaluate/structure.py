"""Evaluations of the structure in dynamics: distributions beside those of the reference."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from potstill.errors import DivergenceError
from potstill.evaluate.base import Bench, Candidate, Evaluation, Findings
from potstill.evaluate.distributions import (
    Couples,
    Distribution,
    Distributions,
    as_periodic,
    compare_distributions,
)
from potstill.report.panels import Drawing, Panel, Series
from potstill.report.tables import Row, Table, number
from potstill.report.verdicts import Verdict
from potstill.soundness import closest_pairs, fused
from potstill.structures import Structures


class DistributionEvaluation(Evaluation):
    """Base of evaluations of a trajectory that give distributions, beside those of the reference.

    Parameters
    ----------
    n_blocks : int
        Consecutive blocks of frames, whose scatter gives the errors.
    """

    section = "Dynamics"
    needs = "frames"
    result: ClassVar[type[Distributions]]

    #: What the distributions are called in tables, the unit of their integral, and the start of the
    #: keys of their metrics.
    symbol: ClassVar[str]
    unit: ClassVar[str] = ""
    key: ClassVar[str]
    #: Labels of the axes of figures.
    axes: ClassVar[tuple[str, str]]
    #: Whether the sum over bins is shown, too: studies of others report it for g(r).
    sums: ClassVar[bool] = False
    #: What the names of the distributions mean, for captions.
    names: ClassVar[str] = ""
    #: Panels that a figure holds at most: those with the largest differences.
    n_panels: ClassVar[int] = 12

    n_blocks: int = Field(default=10, ge=1)

    def frames_of(self, bench: Bench, candidate: Candidate) -> Structures:
        """The trajectory of a candidate.

        Raises
        ------
        DivergenceError
            If its atoms have fused.
        """
        frames = bench.trajectory_of(candidate)
        if self.needs == "frames":
            frames = as_periodic(frames)
        if symptom := fused(closest_pairs(frames), candidate.trained_on.get("shortest_distances")):
            raise DivergenceError(f"its trajectory is unsound: {symptom}")
        return frames

    @classmethod
    def axes_of(cls, part: Distribution) -> tuple[str, str]:
        """Labels of the axes of a panel; `axes` for all by default."""
        return cls.axes

    @classmethod
    def beside(cls, found: Findings) -> tuple[str, dict[str, Couples]]:
        """The model that others are compared with, and their distributions beside its own."""
        results = found.of(cls.name, cls.result)
        standard = found.standard(results)
        if standard not in results:
            return standard, {}
        theirs = results.pop(standard)
        couples = {model: result.beside(theirs) for model, result in results.items()}
        return standard, {model: both for model, both in couples.items() if both[0]}

    @classmethod
    def against(cls, result: Any, standard: Any) -> dict[str, float]:
        """Average differences from the reference's, with the limits of noise."""
        ours, theirs = result.beside(standard)
        if not ours:
            return {}
        mean = compare_distributions(ours, theirs)
        return {
            f"{cls.key}_error": mean.integrated_absolute_error,
            f"{cls.key}_noise": mean.noise_limit,
            f"{cls.key}_divergence": mean.divergence,
        }

    @classmethod
    def tables(cls, found: Findings) -> Iterable[Table]:
        """All differences from the reference, one row for each distribution and model."""
        standard, couples = cls.beside(found)
        unit = f", {cls.unit}" if cls.unit else ""
        labels = {
            "integrated_absolute_error": f"integrated distance{unit}",
            "error": "its standard error",
            "expected_from_noise": "expected from noise",
            "noise_limit": "95 % of noise below",
            "relative_error": "relative to the integral",
            "divergence": "Jensen-Shannon divergence, bits",
            "divergence_error": "its standard error ",
            "divergence_noise": "expected from noise ",
            "divergence_limit": "95 % of noise below ",
            "total_absolute_error": "sum over bins",
            "largest": "largest difference",
        }
        rows = []
        for model, (ours, theirs) in couples.items():
            for label, first, second in (
                ("mean", ours, theirs),
                *((a.label, [a], [b]) for a, b in zip(ours, theirs, strict=True)),
            ):
                difference = compare_distributions(first, second)
                values = [getattr(difference, name) for name in labels]
                clear = "clear" if difference.clear else "unclear"
                rows.append((model, label, *values, clear))
        columns = ("model", cls.symbol, *labels.values(), f"differs from {standard}")
        plural = cls.title if cls.title.endswith("s") else f"{cls.title}s"
        title = f"Differences of {plural} from those of {standard}"
        if rows:
            yield Table(f"{cls.name}_differences", title, columns, tuple(rows))

    @classmethod
    def rows(cls, found: Findings) -> Iterable[Row]:
        """Distance from the reference's, what chance alone would give, and where it is more."""
        standard, couples = cls.beside(found)
        means = {model: compare_distributions(*couple) for model, couple in couples.items()}
        unit = f" ({cls.unit})" if cls.unit else ""
        whose = f"the {standard}'s"
        labels = {
            f"{cls.symbol}: integrated distance from {whose}{unit}": "integrated_absolute_error",
            f"{cls.symbol}: standard error of the distance{unit}": "error",
            f"{cls.symbol}: distance expected from noise{unit}": "expected_from_noise",
            f"{cls.symbol}: 95 % of noise is below{unit}": "noise_limit",
            f"{cls.symbol}: Jensen-Shannon divergence from {whose} (bits)": "divergence",
        }
        if cls.sums:
            labels[f"{cls.symbol}: sum over bins of absolute differences"] = "total_absolute_error"
        yield from cls.attribute_rows(means, labels)
        clear = {}
        for model, (ours, theirs) in couples.items():
            differ = [compare_distributions(a, b).clear for a, b in zip(ours, theirs, strict=True)]
            clear[model] = f"{sum(differ)} of {len(differ)}"
        if any(len(ours) > 1 for ours, _ in couples.values()):
            yield Row(f"{cls.symbol}: beyond noise", clear)

    @classmethod
    def drawings(cls, found: Findings) -> Iterable[Drawing]:
        """The distributions, one panel each; of one alone also the difference."""
        results = found.of(cls.name, cls.result)
        standard, couples = cls.beside(found)
        labels = list(dict.fromkeys(k for result in results.values() for k in result.parts))
        chosen = most_different(labels, couples, cls.n_panels)
        single = len(chosen) == 1
        panels = []
        for label in chosen:
            parts = {m: r.parts[label] for m, r in results.items() if label in r.parts}
            ends = [np.flatnonzero(d.values).max(initial=0) + 2 for d in parts.values()]
            end = max(ends)  # no trailing zeros
            series = [
                Series(
                    m,
                    d.grid[0][:end],
                    d.values[:end],
                    kind="line",
                    y_spread=np.nan_to_num(d.error[:end]),
                )
                for m, d in sorted(parts.items(), key=lambda item: item[0] != standard)
            ]
            title = "Distribution" if single else label
            axes = cls.axes_of(next(iter(parts.values())))
            panels.append(Panel(*axes, series, title, from_zero=True))
        if single:
            differences = [
                Series(m, a.grid[0], a.values - b.values, kind="line",
                       y_spread=np.nan_to_num(np.hypot(a.error, b.error)))
                for m, ((a, *_), (b, *_)) in couples.items()
            ]  # fmt: skip
            if differences:
                name = f"Difference in {cls.symbol}"
                title = f"Minus {standard}"
                panels.append(Panel(axes[0], name, differences, title, zero_line=True))
        apart = f", and its difference from the {standard}'s" if len(panels) > 1 and single else ""
        some = (
            f" The {len(chosen)} of {len(labels)} that differ most are shown."
            if len(chosen) < len(labels)
            else ""
        )
        caption = (
            f"{cls.title.capitalize()} in molecular dynamics{apart}; bands are standard errors "
            f"from blocks of the trajectories.{some}" + (f" {cls.names}" if len(labels) > 1 else "")
        )
        heading = cls.title.capitalize()
        yield Drawing(cls.name, heading, caption, panels, height=3.3 if single else 2.5)

    @classmethod
    def verdicts(cls, found: Findings) -> Iterable[Verdict]:
        """How far the student's structure is from the reference's, and whether controls' is closer.

        Only beside a reference: a teacher's dynamics are what a student should do, not a liquid.
        """
        standard, couples = cls.beside(found)
        if found.student not in couples or standard != found.reference:
            return
        ours = compare_distributions(*couples[found.student])
        unit = f" {cls.unit}" if cls.unit else ""
        value, error = number(ours.integrated_absolute_error), number(ours.error, 2)
        level = f"noise alone gives up to {number(ours.noise_limit, 2)}{unit}"
        word = "beyond noise" if ours.clear else "unclear"
        yield Verdict(
            f"The student's {cls.symbol} is {value} ± {error}{unit} from the {standard}'s ({word}: "
            f"{level})."
        )
        for control in found.controls:
            if control not in couples:
                continue
            theirs = compare_distributions(*couples[control])
            gain = theirs.integrated_absolute_error - ours.integrated_absolute_error
            spread = math.hypot(ours.error, theirs.error)
            closer = "closer to" if gain > 0.0 else "farther from"
            clear = "" if abs(gain) > 2.0 * spread else ", which is unclear"
            yield Verdict(
                f"The student's {cls.symbol} is {number(abs(gain), 2)} ± {number(spread, 1)}{unit} "
                f"{closer} the {standard}'s than that of {control}{clear}."
            )


def most_different(
    labels: Sequence[str],
    couples: Mapping[str, Couples],
    n: int,
) -> list[str]:
    """Up to `n` labels: those with the largest differences over all models, in their order."""
    worst = dict.fromkeys(labels, 0.0)
    for ours, theirs in couples.values():
        for a, b in zip(ours, theirs, strict=True):
            area = float((np.abs(a.values - b.values) * a.measure).sum())
            worst[a.label] = max(worst[a.label], area)
    shown = set(sorted(labels, key=lambda label: -worst[label])[:n])
    return [label for label in labels if label in shown]
