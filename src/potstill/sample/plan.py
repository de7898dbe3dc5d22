"""Plans: which jobs make which frames, and running them so that a kill loses next to nothing."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from ase.calculators.calculator import BaseCalculator

from potstill.errors import ConfigError, DivergenceError
from potstill.files import write_atomically
from potstill.sample.base import Job, Progress, SampledFrames
from potstill.structures import Structures


@dataclass(frozen=True)
class SamplingPlan:
    """Jobs, run in order, each from a structure of `start`; all else follows from the seed."""

    start: Structures
    jobs: Sequence[Job]
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.jobs:
            raise ConfigError("a sampling plan needs at least one job")
        for job in self.jobs:
            if job.system >= self.start.n_systems:
                raise ConfigError(
                    f"the job '{job.name}' starts from structure {job.system}, but there are "
                    f"{self.start.n_systems}, counted from 0"
                )

    @property
    def n_evaluations(self) -> int:
        """Calls of the calculator, at least: what a plan costs."""
        return sum(job.n_evaluations for job in self.jobs)

    def fingerprint(self) -> str:
        """Short hash of the starting structures, the jobs and the seed."""
        text = json.dumps(self.to_json(), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def to_json(self) -> dict:
        """Seed, jobs and fingerprints of the starting structures as plain values."""
        return {
            "seed": self.seed,
            "start": self.start.fingerprints(),
            "jobs": [job.to_json() for job in self.jobs],
        }


def run_plan(
    plan: SamplingPlan,
    calculator: BaseCalculator | None,
    out_folder: Path | str,
    progress: Progress | None = None,
    *,
    driver: str = "",
    on_divergence: Callable[[DivergenceError], None] | None = None,
) -> SampledFrames:
    """Run the jobs of a plan, or what is left of them, and return all frames.

    Killed at any moment, the same call resumes from the last checkpoint, and its frames are the
    same bit for bit as those of a run that was not interrupted.

    Parameters
    ----------
    calculator : ase calculator, optional
        Drives molecular dynamics; it must be deterministic for runs to be the same bit for bit.
    out_folder : path
        Holds `plan.json`, one file of frames per finished job, and the checkpoints.
    driver : str
        Name or fingerprint of what the calculator computes, if known: a folder that was begun
        with another one is refused.
    on_divergence : callable, optional
        Called with the error of each job that becomes unstable; all frames of the job are left out,
        and the other jobs are run. Without it the error is raised.

    Raises
    ------
    ConfigError
        If the folder holds another plan, or a job cannot run with this start or calculator.
    DivergenceError
        If a job becomes unstable, or all of them do; frames up to there stay in the folder.
    """
    for job in plan.jobs:
        job.check(plan.start[job.system], calculator)
    folder = Path(out_folder)
    _claim(folder, plan, driver)
    parts, done = [], 0
    for number, job in enumerate(plan.jobs):

        def report(own: int, _: int, before: int = done) -> None:
            if progress is not None:
                progress(before + own, plan.n_evaluations)

        try:
            parts.append(_run_job(plan, number, calculator, folder, report))
        except DivergenceError as error:
            if on_divergence is None or (number == len(plan.jobs) - 1 and not parts):
                raise
            on_divergence(error)
        done += job.n_evaluations
        if progress is not None:
            progress(done, plan.n_evaluations)
    return SampledFrames.concatenate(parts)


def scratch_folder(folder: Path, number: int) -> Path:
    """Where a job of a plan keeps its checkpoints until it is done."""
    return folder / f"job_{number:03d}"


def _run_job(
    plan: SamplingPlan,
    number: int,
    calculator: BaseCalculator | None,
    folder: Path,
    progress: Progress | None,
) -> SampledFrames:
    """Frames of one job: read if it is done, else run or resumed."""
    path = folder / f"job_{number:03d}.npz"
    scratch = scratch_folder(folder, number)
    job = plan.jobs[number]
    if not path.exists():
        frames = job.run(
            plan.start[job.system],
            calculator,
            seed=plan.seed,
            number=number,
            folder=scratch,
            progress=progress,
        )
        replace(frames, job=torch.full_like(frames.job, number)).save(path)
    shutil.rmtree(scratch, ignore_errors=True)
    return SampledFrames.load(path)


def _claim(folder: Path, plan: SamplingPlan, driver: str) -> None:
    """Write the plan into a new folder, or check that the folder holds this one."""
    path = folder / "plan.json"
    mine = {"fingerprint": plan.fingerprint(), "driver": driver, **plan.to_json()}
    if path.exists():
        held = json.loads(path.read_text())
        if held.get("fingerprint") != mine["fingerprint"]:
            raise ConfigError(
                f"{folder} holds frames of another sampling plan (other structures, jobs or seed):"
                " choose another folder, or remove it"
            )
        if held.get("driver") != driver:
            raise ConfigError(
                f"{folder} holds frames sampled with '{held.get('driver')}', not '{driver}': "
                "choose another folder, or remove it"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(mine, indent=1))
