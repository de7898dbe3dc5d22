"""`potstill sample`: structures to label, by the jobs of a config."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from potstill.errors import ConfigError
from potstill.evaluate.tools import make_calculator
from potstill.sample import Job, SampledFrames, SamplingPlan, make_job, run_plan
from potstill.structures import Structures
from potstill.workflows.base import (
    Display,
    Settings,
    TeacherSettings,
    claim_folder,
    read_start,
    write_extxyz,
)

#: What `sample` writes.
FILE = "structures.extxyz"


class SampleConfig(Settings):
    """Settings of `potstill sample`.

    Parameters
    ----------
    start : str
        A file with starting structures, or a built-in one.
    index : str
        Which of them, as in `read`: `::10`.
    jobs : tuple of dict
        Each with its `kind` (rattle, jitter, ascent, strain, volume, md, relax) and its settings. A
        job that names no `system` runs for every starting structure.
    out : str
        Folder for the structures.
    teacher : TeacherSettings, optional
        Potential for MD and relaxations, and the reference of gradient ascent.
    seed : int
        Seed of all random numbers.
    """

    start: str
    index: str = ":"
    jobs: tuple[dict[str, Any], ...] = Field(min_length=1)
    out: str
    teacher: TeacherSettings | None = None
    seed: int = Field(default=0, ge=0)

    @field_validator("jobs")
    @classmethod
    def _good_jobs(cls, jobs: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
        for job in jobs:
            try:
                make_job(job)
            except ConfigError as error:
                raise ValueError(str(error)) from None
        return jobs

    def plan(self, start: Structures) -> SamplingPlan:
        """The jobs of all starting structures."""
        jobs: list[Job] = []
        for settings in self.jobs:
            systems = [settings["system"]] if "system" in settings else range(len(start))
            jobs += [make_job({**settings, "system": system}) for system in systems]
        return SamplingPlan(start, jobs, self.seed)


def sample(config: SampleConfig, display: Display | None = None) -> SampledFrames:
    """Run the jobs, or those that are left, and write `structures.extxyz` for `potstill label`.

    Raises
    ------
    ConfigError
        If a job cannot start from its structure, or needs a teacher.
    DivergenceError
        If atoms explode.
    """
    display = display or Display()
    folder = Path(config.out)
    start = read_start(config.start, index=config.index)
    plan = config.plan(start)
    calculator, driver = None, ""
    if config.teacher is not None:
        calculator = make_calculator(config.teacher.spec, config.teacher.args)
        driver = config.teacher.spec
    for job in plan.jobs:
        job.check(start[job.system], calculator)
    claim_folder(folder, config)
    with display.task("sampling", plan.n_evaluations or None) as task:
        frames = run_plan(plan, calculator, folder / "jobs", task.update, driver=driver)
    write_structures(folder / FILE, frames.structures)
    return frames


def write_structures(path: Path, structures: Structures) -> None:
    """Write structures as extended XYZ, with fixed atoms and tags, atomically."""
    images = replace(structures, velocities=None).to_ase()
    columns = ["symbols", "positions"]
    for name in ("fixed", "tags"):
        values = getattr(structures, name)
        if values is not None:
            columns.append(name)
            parts = values.split(structures.n_atoms_per_system.tolist())
            for atoms, part in zip(images, parts, strict=True):
                atoms.arrays[name] = part.numpy().astype(int)
    write_extxyz(path, images, columns)
