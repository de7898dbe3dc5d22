"""Whether molecular dynamics holds above the temperatures that were asked for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from pydantic import Field

from potstill.evaluate.base import Bench, Candidate, Evaluation, Findings, Result
from potstill.evaluate.nve import run_nve
from potstill.evaluate.tools import limited_threads
from potstill.report.tables import Row
from potstill.report.verdicts import Verdict


@dataclass(frozen=True)
class HeadroomRuns(Result):
    """Runs at constant energy that start above the highest temperature of the other tests.

    Parameters
    ----------
    temperature : float
        At the start, K.
    duration : float
        Of each run, ps.
    n_atoms, n_runs, n_sound : int
        Atoms, runs, and those of them that reached their end.
    broke_at : float or None
        ps, when the first one that did not broke down.
    reason : str
        What happened to it; empty if all are sound.
    """

    temperature: float
    duration: float
    n_atoms: int
    n_runs: int
    n_sound: int
    broke_at: float | None
    reason: str


class Headroom(Evaluation):
    """Stability of molecular dynamics above the temperatures that were asked for.

    Longer training makes small errors smaller and may make extrapolation worse, which neither test
    errors nor MD at the trained temperature show.

    Parameters
    ----------
    factor : float
        The runs start at this many times the temperature of the other tests.
    duration : float
        Of each run, ps.
    runs : int
        Number of runs, with velocities of their own.
    """

    name = "headroom"
    title = "stability above the highest temperature"
    result = HeadroomRuns
    section = "Dynamics"
    needs = "structure"
    on_request = True

    factor: float = Field(default=4.0 / 3.0, gt=0)
    duration: float = Field(default=10.0, gt=0)
    runs: int = Field(default=3, ge=1)

    def run(self, bench: Bench, candidate: Candidate) -> HeadroomRuns:
        """Run the supercell; a checkpoint on one thread, since it is too small for more."""
        temperature = self.factor * bench.settings.temperature
        with limited_threads(1 if candidate.is_checkpoint else torch.get_num_threads()):
            found = [
                run_nve(
                    bench.supercell,
                    candidate.calculator,
                    temperature=temperature,
                    duration=self.duration,
                    timestep=bench.settings.timestep,
                    seed=bench.settings.seed + k,
                    trained=candidate.trained_on.get("shortest_distances"),
                )
                for k in range(self.runs)
            ]
        broken = [run for run in found if not run.stable]
        return HeadroomRuns(
            temperature=temperature,
            duration=self.duration,
            n_atoms=len(bench.supercell),
            n_runs=self.runs,
            n_sound=self.runs - len(broken),
            broke_at=broken[0].exploded_at if broken else None,
            reason=broken[0].reason if broken else "",
        )

    @classmethod
    def rows(cls, found: Findings) -> Iterable[Row]:
        """How many runs are sound."""
        runs = found.of(cls.name, HeadroomRuns)
        if runs:
            temperature = next(iter(runs.values())).temperature
            sound = {m: f"{r.n_sound} of {r.n_runs}" for m, r in runs.items()}
            yield Row(f"Sound NVE runs from {temperature:.0f} K", sound)

    @classmethod
    def verdicts(cls, found: Findings) -> Iterable[Verdict]:
        """Whether all runs of the student are sound."""
        runs = found.of(cls.name, HeadroomRuns).get(found.student)
        if runs is None:
            return
        met = runs.n_sound == runs.n_runs
        text = (
            f"Started at {runs.temperature:.0f} K, above the highest temperature asked for, "
            f"{runs.n_sound} of the student's {runs.n_runs} NVE runs of {runs.duration:g} ps stay "
            f"sound{'' if met else f'; one broke down after {runs.broke_at:g} ps: {runs.reason}'}."
        )
        bar = f"stable NVE MD from {runs.temperature:.0f} K ({runs.n_sound} of {runs.n_runs} runs)"
        yield Verdict(text, bar, met)
