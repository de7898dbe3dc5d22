"""From a time budget to counts: how many structures, steps and epochs `distill` can afford.

A few labels, steps and epochs are timed; everything afterwards uses the counts, so that a run can
be repeated and resumed whatever the machine does meanwhile.
"""

from __future__ import annotations

import itertools
import math
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field

from potstill.calculators import PotstillCalculator
from potstill.checkpoint import load_potential
from potstill.errors import ConfigError, TeacherError
from potstill.evaluate.base import Bench, BenchSettings
from potstill.evaluate.phonons import PhononsEvaluation
from potstill.evaluate.table import evaluation_class
from potstill.sample import RattleJob
from potstill.structures import Structures
from potstill.teachers import Teacher
from potstill.train import TrainingSet, TrainSettings, train
from potstill.workflows.base import Settings, limited_threads, seconds_in_words

#: Shares of the time that is left for sampling and training.
TEACHER_SHARE = 0.55
#: Share of MD in the teacher's time; the rest labels frames that need no MD.
DYNAMICS_SHARE = 0.45
#: Of the training time: the draft that explores.
DRAFT_SHARE = 0.25
#: Epochs times atoms, 40,000 steps of 128: beyond, errors hardly fall, and students without triples
#: fell apart in MD at a third above the temperatures of their training.
MAX_VISITS = 40_000 * 128
#: Share of the budget for MD with the student at the end.
STUDENT_MD_SHARE = 0.2
#: More structures than this do not help one material as much as more epochs.
MAX_FRAMES = 1100
#: Rattled and strained structures beside on-policy ones: they teach what MD does not visit.
MAX_RANDOM = 100
#: Of the frames that need no MD with the teacher, small displacements and strains of the relaxed
#: structure: what elastic constants and phonons are made of, and MD does not visit. Their forces
#: are small, and beside MD above the highest temperature half as many left phonons to chance.
MINIMUM_SHARE, MAX_MINIMUM = 0.2, 200
#: Fewer frames of MD with the teacher leave nothing to hold out: four blocks of the split.
MIN_MD_FRAMES = 16
#: Frames that need no MD with the teacher: rattled, strained, or visited by the draft.
MIN_FREE_FRAMES = 24
#: Seconds that evaluation takes at least: starting processes, timing rounds, figures.
EVALUATION_SECONDS = 40.0
#: fs between frames of MD with the draft.
EXPLORING_STRIDE = 100.0
#: A plan may exceed its budget by this factor: timings are no better than that.
TOLERANCE = 1.1
#: What a slow teacher gets: multiples of the smallest numbers of frames, and the largest share of
#: the budget for all but training.
SCALES, BEFORE_TRAINING = (8.0, 4.0, 2.0, 1.4, 1.0), 0.6
#: Teacher calls for E(V), elastic constants at four strains and a relaxation, and MD steps per size
#: timed.
EOS_CALLS, ELASTIC_CALLS, RELAXATION_CALLS, TIMED_STEPS = 40, 300, 10, 6
#: Numbers of atoms that speed is measured for.
SPEED_SIZES = (64, 512)
#: Periodic cells are not made smaller than this for a slow teacher.
MIN_ATOMS = 8


@dataclass(frozen=True)
class TeacherMD:
    """How the teacher's MD is run."""

    stride: float  # fs between frames
    equilibration: float  # fs before the first
    at_pressure: bool  # constant-pressure runs as well; strained frames show other volumes, too
    frames_per_run: int  # at least


FULL, LEAN = TeacherMD(30.0, 90.0, True, 5), TeacherMD(15.0, 45.0, False, 2)


class Counts(Settings):
    """What a plan decides; any of them can be fixed in the config.

    Parameters
    ----------
    n_temperatures : int
        MD temperatures, evenly spaced.
    n_md_frames : int
        Frames of MD with the teacher; the held-out ones are among them.
    n_random_frames : int
        Rattled and strained structures.
    n_minimum_frames : int
        Small displacements and strains of the relaxed structures, for elastic constants and
        phonons.
    n_on_policy_frames : int
        Frames of MD with the draft student; zero for none.
    draft_epochs, epochs : int
        Epochs of the draft, and of the student and each control.
    nve_duration, md_duration : float
        Duration in ps of the student's NVE test and of the final trajectory.
    """

    n_temperatures: int | None = Field(default=None, ge=1)
    n_md_frames: int | None = Field(default=None, ge=1)
    n_random_frames: int | None = Field(default=None, ge=0)
    n_minimum_frames: int | None = Field(default=None, ge=0)
    n_on_policy_frames: int | None = Field(default=None, ge=0)
    draft_epochs: int | None = Field(default=None, ge=1)
    epochs: int | None = Field(default=None, ge=1)
    nve_duration: float | None = Field(default=None, gt=0)
    md_duration: float | None = Field(default=None, gt=0)

    def given(self) -> dict[str, Any]:
        """Those that are fixed."""
        return self.model_dump(exclude_none=True)

    @property
    def complete(self) -> bool:
        """Whether all are fixed, so that the budget decides nothing.

        Frames near the minimum are few, and configs from before there were any do not fix them.
        """
        return None not in self.model_dump(exclude={"n_minimum_frames"}).values()

    @property
    def n_sampled(self) -> int:
        """Frames that the first stage makes: all but those of the draft."""
        counts = (self.n_md_frames, self.n_random_frames, self.n_minimum_frames)
        return sum(n or 0 for n in counts)


class Timings(Settings):
    """Seconds that were measured."""

    label: float  # of the teacher, per structure
    step: float  # of the teacher, per MD step
    train: float  # per structure and epoch
    student_step: float  # of the student, per MD step


class Plan(Settings):
    """Counts that a run keeps to, and what they are expected to cost."""

    n_atoms: int  # per structure
    min_atoms: int | None = None  # what `n_atoms` of the config became for a slow teacher
    lean: bool = False  # whether a slow teacher made MD shorter (`LEAN`)
    timestep: float  # fs
    counts: Counts
    properties: tuple[str, ...]  # that the teacher is asked for
    timings: Timings
    seconds: dict[str, float]  # expected, by stage

    @property
    def teacher_md(self) -> TeacherMD:
        """How the teacher's MD is run."""
        return LEAN if self.lean else FULL

    @property
    def speed_sizes(self) -> tuple[int, ...]:
        """Numbers of atoms that speed is measured for."""
        return (self.n_atoms,) if self.lean else SPEED_SIZES

    @property
    def total_seconds(self) -> float:
        """Expected duration of everything."""
        return sum(self.seconds.values())

    def rows(self) -> list[list[str]]:
        """Stage, what it does, expected duration: for a table."""
        c = self.counts
        work = {
            "sample": f"{c.n_md_frames} frames from MD with the teacher at {c.n_temperatures} "
            f"temperatures, {c.n_random_frames} rattled or strained, {c.n_minimum_frames or 0} "
            "near the minimum",
            "label": f"{c.n_sampled} structures of {self.n_atoms} atoms: "
            f"{', '.join(self.properties)}",
            "draft": f"{c.draft_epochs} epochs",
            "explore": f"{c.n_on_policy_frames} frames from MD with the draft, labeled",
            "train": f"{c.epochs} epochs each for the student and its controls",
            "dynamics": f"{c.md_duration:g} ps with the student",
            "evaluate": "errors, elasticity, phonons or vibrations, speed, memory, "
            f"{c.nve_duration:g} ps of NVE and the same a third hotter",
        }
        rows = [[k, work.get(k, ""), seconds_in_words(s)] for k, s in self.seconds.items()]
        return [*rows, ["total", "", seconds_in_words(self.total_seconds)]]


@dataclass(frozen=True)
class Order:
    """What a plan is made for."""

    start: Structures  # supercells
    min_atoms: int  # that they were made for
    budget: float  # s
    n_pressure_runs: int  # of MD per temperature, over all structures
    n_controls: int
    at_once: int  # trainings that run side by side
    on_policy: bool  # whether a draft student explores
    fixed: Counts  # by the user
    unit_cell: Structures | None = None  # whose lattice constant and elasticity are computed
    teacher_tests: tuple[str, ...] = ()  # of the evaluation

    @property
    def n_atoms(self) -> int:
        """Atoms per structure."""
        return int(self.start.n_atoms_per_system[0])

    def n_runs(self, n_temperatures: int, md: TeacherMD) -> int:
        """MD runs of the teacher."""
        return n_temperatures * (self.start.n_systems + self.n_pressure_runs * md.at_pressure)

    def teacher_calls(self, lean: bool) -> float:
        """What the evaluation asks the teacher, in MD steps of the starting structures."""
        speed = TIMED_STEPS * sum([self.n_atoms] if lean else SPEED_SIZES)
        speed *= "speed" in self.teacher_tests
        return (speed + self._calls_for_properties) / self.n_atoms

    @cached_property
    def _calls_for_properties(self) -> int:
        """Atoms of the unit cell times teacher calls, over all evaluations that apply to it."""
        if self.unit_cell is None:
            return 0
        bench, n = Bench(BenchSettings(), self.unit_cell), self.unit_cell.n_atoms
        calls = {
            "eos": lambda: EOS_CALLS * n,
            "elastic": lambda: ELASTIC_CALLS * n,
            "vibrations": lambda: (RELAXATION_CALLS + 6 * n) * n,
            "phonons": lambda: RELAXATION_CALLS * n + PhononsEvaluation().work(bench.atoms),
        }
        asked = [name for name in calls if name in self.teacher_tests]
        return sum(calls[name]() for name in asked if not evaluation_class(name)().lacks(bench))


def timestep_for(structures: Structures) -> float:
    """Timestep in fs by the lightest atom: 2 above 20 amu, 1 above 4, 0.5 with hydrogen."""
    lightest = float(structures.masses.min())
    return 2.0 if lightest > 20.0 else 1.0 if lightest > 4.0 else 0.5


def make_plan(
    orders: Iterable[Order], teacher: Teacher, properties: Sequence[str], settings: TrainSettings
) -> Plan:
    """Time a few labels, steps and epochs, and decide the counts.

    `orders` are one order with structures of fewer and fewer atoms, for teachers that are too slow
    for the budget with more; `properties` is what the teacher is asked for, `settings` are the
    student's.

    Raises
    ------
    TeacherError
        If the teacher fails on the starting structure.
    BudgetError
        If no plan fits the budget; it says which budget would do.
    """
    least = math.inf
    for order in orders:
        timings = measure(order.start[0], teacher, properties, settings, order.at_once)
        timestep = timestep_for(order.start)
        try:
            counts, md = decide(order, timings, timestep)
        except BudgetError as error:
            least = min(least, error.least)
            continue
        return Plan(
            n_atoms=order.n_atoms,
            min_atoms=order.min_atoms,
            lean=md is LEAN,
            timestep=timestep,
            counts=counts,
            properties=tuple(properties),
            timings=timings,
            seconds=expected_seconds(order, counts, timings, timestep, md),
        )
    raise BudgetError(order.budget, least)


# -- counts from timings ---------------------------------------------------------------------------


class BudgetError(ConfigError):
    """Refuses a budget that is too short, and says which would do: `least`, in seconds."""

    def __init__(self, budget: float, least: float) -> None:
        self.least = least
        minutes = math.ceil(least / 60.0)
        super().__init__(
            f"a budget of {seconds_in_words(budget)} is too short for this teacher and structure: "
            f"give at least --budget {minutes}min, a faster teacher or a smaller structure"
        )


def decide(order: Order, timings: Timings, timestep: float) -> tuple[Counts, TeacherMD]:
    """Divide the budget; pure arithmetic.

    Where the usual plan does not fit, because the teacher is slow, MD is run for a shorter time and
    gives fewer of the frames.

    Raises
    ------
    BudgetError
        If the smallest plan does not fit.
    """

    def total(counts: Counts, md: TeacherMD) -> float:
        return sum(expected_seconds(order, counts, timings, timestep, md).values())

    counts = _full(order, timings, timestep)
    if total(counts, FULL) <= TOLERANCE * order.budget or order.fixed.complete:
        return counts, FULL
    for scale in SCALES:
        counts, spent = _lean(order, timings, timestep, scale)
        enough_left = scale == 1.0 or spent <= BEFORE_TRAINING * order.budget
        if enough_left and total(counts, LEAN) <= order.budget:
            return counts, LEAN
    smallest, _ = _lean(replace(order, budget=0.0), timings, timestep, 1.0)
    least = total(smallest, LEAN)
    if least > TOLERANCE * order.budget:
        raise BudgetError(order.budget, least)
    return smallest, LEAN


def _full(order: Order, timings: Timings, timestep: float) -> Counts:
    """Counts that share the budget between the teacher, training and the student's MD."""
    nve = min(20.0, STUDENT_MD_SHARE * order.budget * timestep / timings.student_step / 1000.0)
    nve = max(1.0, round(nve, 1))
    md = max(1.0, round(0.25 * nve, 1))
    own = (2.0 * nve + md) * 1000.0 / timestep * timings.student_step + EVALUATION_SECONDS
    rest = max(order.budget - own, 0.3 * order.budget)
    teacher_time = TEACHER_SHARE * rest
    n_temperatures = 3 if order.budget >= 1200.0 else 2
    n_runs = order.n_runs(n_temperatures, FULL)
    frame = FULL.stride / timestep * timings.step + timings.label
    warm_up = n_runs * FULL.equilibration / timestep * timings.step
    n_md = int((DYNAMICS_SHARE * teacher_time - warm_up) / frame)
    n_md = min(max(n_md, FULL.frames_per_run * n_runs, MIN_MD_FRAMES), MAX_FRAMES // 2)
    left = teacher_time - warm_up - n_md * frame
    left -= RELAXATION_CALLS * order.start.n_systems * timings.step
    n_free = min(max(int(left / timings.label), MIN_FREE_FRAMES), MAX_FRAMES - n_md)
    n_minimum = min(int(MINIMUM_SHARE * n_free), MAX_MINIMUM)
    n_random = min(n_free // 4, MAX_RANDOM) if order.on_policy else n_free - n_minimum
    counts = Counts(
        n_temperatures=n_temperatures,
        n_md_frames=n_md,
        n_random_frames=n_random,
        n_minimum_frames=n_minimum,
        n_on_policy_frames=n_free - n_minimum - n_random,
        nve_duration=nve,
        md_duration=md,
    ).model_copy(update=order.fixed.given())
    return _with_epochs(counts, order, timings, rest - teacher_time)


def _lean(order: Order, timings: Timings, timestep: float, scale: float) -> tuple[Counts, float]:
    """Counts with `scale` times the smallest numbers of frames, and seconds beside training."""
    nve = 0.5 * STUDENT_MD_SHARE * order.budget * timestep / timings.student_step / 1000.0
    n_md = max(int(scale * MIN_MD_FRAMES), LEAN.frames_per_run * order.n_runs(2, LEAN))
    n_free = int(scale * MIN_FREE_FRAMES)
    n_minimum = min(int(MINIMUM_SHARE * n_free), MAX_MINIMUM)
    n_random = n_free // 2 if order.on_policy else n_free - n_minimum
    counts = Counts(
        n_temperatures=2,
        n_md_frames=n_md,
        n_random_frames=n_random,
        n_minimum_frames=n_minimum,
        n_on_policy_frames=n_free - n_minimum - n_random,
        nve_duration=min(20.0, round(nve, 1)) if scale > 1.0 and nve > 1.0 else 1.0,
        md_duration=1.0,
    )
    counts = counts.model_copy(update=order.fixed.given())
    seconds = expected_seconds(order, counts, timings, timestep, LEAN)
    spent = sum(value for stage, value in seconds.items() if stage not in ("draft", "train"))
    return _with_epochs(counts, order, timings, max(order.budget - spent, 0.0)), spent


def _with_epochs(counts: Counts, order: Order, timings: Timings, seconds: float) -> Counts:
    """Fill in the epochs that the time for training pays."""
    n_draft = counts.n_sampled
    n_all = n_draft + (counts.n_on_policy_frames or 0)
    share = DRAFT_SHARE if counts.n_on_policy_frames else 0.0
    draft = int(share * seconds / (n_draft * timings.train))
    rounds = math.ceil((1 + order.n_controls) / order.at_once)
    final = int((1.0 - share) * seconds / (rounds * n_all * timings.train))
    final = min(final, 150, MAX_VISITS // (n_all * order.n_atoms))
    epochs = {"draft_epochs": min(max(draft, 10), 60), "epochs": max(final, 8)}
    return counts.model_copy(update={**epochs, **order.fixed.given()})


def expected_seconds(
    order: Order, counts: Counts, timings: Timings, timestep: float, md: TeacherMD = FULL
) -> dict[str, float]:
    """Expected duration of each stage."""
    n_md, n_sampled = counts.n_md_frames or 0, counts.n_sampled
    n_policy = counts.n_on_policy_frames or 0
    steps = order.n_runs(counts.n_temperatures or 1, md) * md.equilibration + n_md * md.stride
    steps /= timestep
    if counts.n_minimum_frames:
        steps += RELAXATION_CALLS * order.start.n_systems
    student = timings.student_step / timestep * 1000.0
    seconds = {
        "sample": steps * timings.step,
        "label": n_sampled * timings.label,
    }
    if n_policy:
        seconds["draft"] = (counts.draft_epochs or 0) * n_sampled * timings.train
        seconds["explore"] = n_policy * (timings.label + EXPLORING_STRIDE / 1000.0 * student)
    n_all = n_sampled + n_policy
    rounds = math.ceil((1 + order.n_controls) / order.at_once)
    seconds["train"] = rounds * (counts.epochs or 0) * n_all * timings.train
    seconds["dynamics"] = (counts.md_duration or 0.0) * student
    seconds["evaluate"] = (
        2.0 * (counts.nve_duration or 0.0) * student  # at two temperatures
        + EVALUATION_SECONDS
        + order.teacher_calls(md is LEAN) * timings.step
    )
    return {name: round(value, 1) for name, value in seconds.items()}


# -- timings ---------------------------------------------------------------------------------------


def measure(
    start: Structures,
    teacher: Teacher,
    properties: Sequence[str],
    settings: TrainSettings,
    at_once: int = 1,
) -> Timings:
    """Time the teacher and the student's training and MD on a few rattled structures."""
    frames = RattleJob(n_frames=4, displacement=(0.02, 0.1)).run(start, None, seed=0).structures
    first, rest = frames.select([0]), frames.select([1, 2, 3])
    teacher.label(first, properties)  # the first call pays for what is loaded and compiled
    began = time.perf_counter()
    labels, failures = teacher.label(rest, properties)
    label = (time.perf_counter() - began) / 3
    if failures:
        raise TeacherError(
            f"the teacher '{teacher.name}' fails on the rattled starting structure: "
            f"{failures[0].reason}"
        )
    step = _time_steps(rest, teacher.ase_calculator())
    data = TrainingSet(rest, {teacher.name: labels})
    with tempfile.TemporaryDirectory() as folder:
        with limited_threads(max(1, torch.get_num_threads() // at_once)):
            per_frame, path = _time_training(data, settings, Path(folder))
        with limited_threads(1):
            calculator = PotstillCalculator(load_potential(path)[0])
            student_step = _time_steps(rest, calculator, repeats=5)
    return Timings(label=label, step=step, train=per_frame, student_step=student_step)


def _time_steps(frames: Structures, calculator: Any, repeats: int = 1) -> float:
    """Seconds per call of an ASE calculator on structures that differ as steps do."""
    generator = np.random.default_rng(0)
    atoms = frames.to_ase()[0]
    atoms.calc = calculator
    times = []
    for _ in range(3 * repeats + 1):
        atoms.positions += generator.normal(0.0, 0.005, atoms.positions.shape)
        began = time.perf_counter()
        atoms.get_forces()
        times.append(time.perf_counter() - began)
    return float(np.median(times[1:]))


def _time_training(data: TrainingSet, settings: TrainSettings, folder: Path) -> tuple[float, Path]:
    """Seconds per structure and epoch, and the potential that came of it."""
    repeated = data.select(torch.arange(9) % len(data))
    seconds: list[float] = []
    result = train(
        settings.model_copy(update={"epochs": 4}),
        repeated,
        data.select(torch.tensor([0])),
        folder,
        on_epoch=lambda record: seconds.append(record["seconds"]),
    )
    per_epoch = min(b - a for a, b in itertools.pairwise(seconds))
    return max(per_epoch, 1e-6) / len(repeated), result.best
