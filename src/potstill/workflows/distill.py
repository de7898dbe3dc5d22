"""`potstill distill`: from a teacher and a structure to a student, its report and MD with it.

One run is a chain of stages, each of which leaves files in the run folder and is not done again:

sample -> label -> draft -> explore -> train -> dynamics -> evaluate -> report

The draft is a student after a few epochs. MD with it is cheap, so that it explores all temperatures
for long, and the teacher labels what it visits (on-policy): these frames, decorrelated and where
students go wrong, are worth more than a trajectory of the teacher that costs as much.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from potstill.calculators import PotstillCalculator
from potstill.checkpoint import load_potential
from potstill.errors import DataError, DivergenceError
from potstill.evaluate.base import Bench, BenchSettings, Candidate, Role
from potstill.evaluate.headroom import Headroom
from potstill.readers import split_from_file, write_split
from potstill.report.panels import plain_label
from potstill.sample import (
    SampledFrames,
    SamplingPlan,
    even_parts,
    run_plan,
    split_in_blocks,
)
from potstill.structures import Structures
from potstill.workflows.base import (
    Display,
    TeacherSettings,
    limited_threads,
    read_json,
    read_start,
    write_json,
)
from potstill.workflows.distill_run import DistillConfig, Run
from potstill.workflows.distill_run import default_student as default_student
from potstill.workflows.dynamics import MdConfig, simulate
from potstill.workflows.evaluation import bench_of, evaluation_class, run_evaluations
from potstill.workflows.planning import EXPLORING_STRIDE, FULL, Plan
from potstill.workflows.report import write_report
from potstill.workflows.students import train_model, train_students
from potstill.workflows.summary import summarize

#: Shares of the teacher's dynamics; what is sampled otherwise, the larger part, is for training.
SPLIT = {"train": 0.3, "validation": 0.25, "test": 0.45}
#: Shares of what the draft visits at the temperatures of the run: the teacher's own MD affords too
#: few frames to hold out for errors that mean something.
EXPLORED_SPLIT = {"train": 0.85, "validation": 0.05, "test": 0.1}
#: Frames per block of the two splits, and frames left out between blocks.
BLOCK, EXPLORED_BLOCK, GAP = 4, 8, 1
#: Share of the exploring above the temperatures of the run, where `headroom` starts, and how often
#: each such run is done. There bonds break, which the teacher's short MD may show in a held-out
#: frame and never in training, and some students have a hole. A draft may have one, too.
HOT_SHARE, HOT_RUNS = 0.2, 2


@dataclass(frozen=True)
class DistillResult:
    """What `distill` leaves: the plan, and the run folder if it was not a dry run."""

    plan: Plan
    folder: Path
    summary: dict[str, Any]


def distill(
    config: DistillConfig, display: Display | None = None, *, dry_run: bool = False
) -> DistillResult:
    """Distill a teacher, or resume; a dry run stops after the plan is made, written and shown."""
    display = display or Display()
    run = Run.open(config, display)
    display.table("Plan", ("stage", "work", "expected"), run.plan.rows())
    if dry_run:
        return DistillResult(run.plan, run.folder, {})
    for name, stage in STAGES.items():
        if name not in run.stages:
            with run.stages.running(name) as entry:
                entry["note"] = stage(run) or ""
        elif run.stages.note(name):
            display.say(f"{name}: {run.stages.note(name)}")
    return DistillResult(run.plan, run.folder, summarize(run.folder))


# -- stages: one function each; what it returns is shown when a run is continued -------------------


def _sample(run: Run) -> None:
    """Make structures by MD with the teacher, rattling and straining, and split them.

    Runs from before frames near the minimum were sampled have none, and resume without.
    """
    counts = run.plan.counts
    n_md, n_random = counts.n_md_frames or 0, counts.n_random_frames or 0
    plan = run.sampling_plan(
        counts.n_sampled,
        n_md / (n_md + n_random),
        n_minimum=counts.n_minimum_frames or 0,
        seed=run.config.seed,
        stride=run.plan.teacher_md.stride,
        equilibration=run.plan.teacher_md.equilibration,
    )
    with run.display.task(f"MD with {run.teacher.name}", plan.n_evaluations) as task:
        frames = run_plan(
            plan,
            run.teacher.ase_calculator(),
            run.folder / "sample",
            task.update,
            driver=run.teacher.info.fingerprint,
        )
    run.store.append(frames.structures, skip_existing=True)
    write_split(run.folder / "split.json", split_frames(frames, run.config.seed))


def split_frames(frames: SampledFrames, seed: int) -> dict[str, torch.Tensor]:
    """Split MD in blocks of time; independent frames are all for training.

    Raises
    ------
    DataError
        If a part would be empty.
    """
    moving = ~torch.isnan(frames.time)
    own = moving.nonzero()[:, 0]
    parts = split_in_blocks(frames.select(own), SPLIT, seed=seed, block=BLOCK, gap=GAP)
    split = {name: own[index] for name, index in parts.items()}
    for name, systems in split.items():
        if not len(systems):
            raise DataError(
                f"{len(own)} MD frames are too few to provide any for '{name}': "
                f"raise the budget, or n_md_frames among the counts"
            )
    split["train"] = torch.cat([split["train"], (~moving).nonzero()[:, 0]]).sort().values
    return split


def _label(run: Run) -> None:
    run.label(f"labeling with {run.teacher.name}")


def _draft(run: Run) -> str | None:
    """Train a draft student for a few epochs."""
    if not run.plan.counts.n_on_policy_frames:
        return "left out"
    draft = replace(run.student(run.plan.counts.draft_epochs), role=Role.DRAFT)
    train_model(run, "draft", draft)
    return None


def _explore(run: Run) -> str | None:
    """Sample by MD with the draft, and label what it visits."""
    n_frames = run.plan.counts.n_on_policy_frames
    if not n_frames:
        return "left out"
    potential, _ = load_potential(run.folder / "draft" / "best.pt")
    plan = exploring_plan(run, n_frames)
    unstable: list[str] = []

    def note() -> str | None:
        if not unstable:
            return None
        text = f"MD with the draft student became unstable in {len(unstable)} of "
        text += f"{len(plan.jobs)} runs, whose frames are discarded: {unstable[0]}"
        run.display.say(text)
        return text

    try:
        with (
            run.display.task("MD with the draft", plan.n_evaluations) as task,
            limited_threads(1),  # one system of the student is too small for more
        ):
            frames = run_plan(
                plan,
                PotstillCalculator(potential),
                run.folder / "explore",
                task.update,
                on_divergence=lambda error: unstable.append(str(error)),
            )
    except DivergenceError as error:
        unstable.append(str(error))
        return note()
    parts = split_explored(frames, run.config.temperature[1], run.config.seed)
    kept = torch.cat(list(parts.values())).sort().values
    store = run.store
    store.append(frames.structures.select(kept), skip_existing=True)
    split = split_from_file(run.folder / "split.json", store.n_systems)
    first = store.n_systems - len(kept)
    for name, index in parts.items():
        new = first + torch.searchsorted(kept, index)
        split[name] = torch.cat([split[name], new]).unique()
    write_split(run.folder / "split.json", split)
    run.label(f"labeling the draft's frames with {run.teacher.name}")
    return note()


def exploring_plan(run: Run, n_frames: int) -> SamplingPlan:
    """MD with the draft: at the temperatures of the run, and a part of it above them."""
    settings: dict[str, Any] = {"stride": EXPLORING_STRIDE, "equilibration": 300.0}
    settings["seed"] = run.config.seed + 1
    n_hot = round(HOT_SHARE * n_frames)
    plans = [run.sampling_plan(n_frames - n_hot, 1.0, **settings)]
    settings["temperature"] = Headroom().factor * run.config.temperature[1]
    plans += [run.sampling_plan(n, 1.0, **settings) for n in even_parts(n_hot, HOT_RUNS) if n]
    return replace(plans[0], jobs=[job for plan in plans for job in plan.jobs])


def split_explored(frames: SampledFrames, highest: float, seed: int) -> dict[str, torch.Tensor]:
    """Split the draft's MD up to the highest temperature; what is hotter is for training."""
    asked = (frames.temperature <= highest).nonzero()[:, 0]
    parts = split_in_blocks(
        frames.select(asked), EXPLORED_SPLIT, seed=seed, block=EXPLORED_BLOCK, gap=GAP
    )
    split = {name: asked[index] for name, index in parts.items()}
    hotter = (frames.temperature > highest).nonzero()[:, 0]
    return split | {"train": torch.cat([split["train"], hotter])}


def _train(run: Run) -> str:
    """Train the student and its controls, and hand out one of them."""
    train_students(run)
    choice = _choice(run)
    shutil.copyfile(run.folder / choice["model"] / "best.pt", run.folder / "student.pt")
    write_json(run.folder / "choice.json", choice)
    words = ", ".join(f"{name} {score:.4g}" for name, score in choice["validation_scores"].items())
    note = (
        f"student.pt is {choice['model']}, which {choice['reason']} (validation scores, lower is "
        f"better: {words})"
    )
    run.display.say(note)
    return note


def _choice(run: Run) -> dict[str, Any]:
    """The model that is best on validation, of those whose MD is sound above the trained range.

    Errors do not show a hole in the energy where there were no structures. The runs start with
    other velocities than those of the evaluation, which judges the choice.
    """
    scores = {
        name: float(read_json(run.folder / name / "result.json")["best_score"])
        for name in run.models
    }
    order = sorted(scores, key=lambda name: (not math.isfinite(scores[name]), scores[name]))
    bench, test = _bench(run), Headroom.model_validate(_options(run)["headroom"])
    others = bench.settings.model_copy(update={"seed": run.config.seed + test.runs})
    best, reason, tried = order[0], "was best on validation", {}
    for name in [name for name in order if math.isfinite(scores[name])]:
        found = test.run(replace(bench, settings=others), _candidate(run, name))
        tried[name] = f"{found.n_sound} of {found.n_runs}"
        if found.n_sound < found.n_runs:
            continue
        if name != best:
            reason = (
                f"stays sound in MD from {found.temperature:.0f} K, where the "
                f"{plain_label(best)}, better on validation, breaks down"
            )
            best = name
        break
    return {"model": best, "reason": reason, "validation_scores": scores, "sound_runs": tried}


def _dynamics(run: Run) -> None:
    """Run the student at the highest temperature, and write its trajectory."""
    config = MdConfig(
        # Its name within the folder: a run that is moved resumes.
        model=TeacherSettings(spec="student.pt"),
        structure=run.config.structure,
        out=str(run.folder / "md"),
        temperature=(run.config.temperature[1], run.config.temperature[1]),
        duration=run.plan.counts.md_duration or 1.0,
        equilibration=min(1.0, run.plan.counts.md_duration or 1.0),
        stride=2 * FULL.stride,
        timestep=run.plan.timestep,
        seed=run.config.seed,
    )
    potential, info = load_potential(run.folder / "student.pt")
    calculator = PotstillCalculator(potential, info=info)
    with limited_threads(1):
        simulate(config, run.start[0], calculator, run.folder / "md", run.display)


def _evaluate(run: Run) -> None:
    """Do the tests of the config for student, controls and teacher."""
    teacher, options = run.config.teacher, _options(run)
    candidates = [Candidate("teacher", teacher.spec, teacher.args, Role.TEACHER)]
    candidates += [_candidate(run, name) for name in run.models]
    chosen = [
        (
            evaluation_class(name).model_validate(options.get(name, {})),
            [candidate for role in roles for candidate in candidates if candidate.role == role],
        )
        for name, roles in run.config.tests.items()
    ]
    run_evaluations(_bench(run, _hot_frames(run)), chosen, run.folder / "evaluation", run.display)


def _bench(run: Run, frames: dict[str, Structures] | None = None) -> Bench:
    """What models are evaluated on."""
    return bench_of(
        run.data("test"),
        run.source,
        settings=BenchSettings(
            n_atoms=run.plan.n_atoms,
            temperature=run.config.temperature[1],
            timestep=run.plan.timestep,
            seed=run.config.seed,
        ),
        structure=read_start(run.config.structure)[0],
        frames=frames or {},
    )


def _candidate(run: Run, name: str) -> Candidate:
    return Candidate(name, str(run.folder / name / "best.pt"), role=run.models[name].role)


def _options(run: Run) -> dict[str, dict[str, Any]]:
    """Settings of evaluations that the plan decides."""
    nve = run.plan.counts.nve_duration or 1.0
    return {
        "nve": {"duration": nve},
        "headroom": {"duration": max(0.5 * nve, 0.1), "runs": 2},
        "speed": {"sizes": run.plan.speed_sizes},
    }


def _hot_frames(run: Run) -> dict[str, Structures]:
    """Trajectories of student and teacher at the highest temperature and constant volume."""
    frames = {}
    for name, folder in (("student", "md/frames"), ("teacher", "sample")):
        files = sorted((run.folder / folder).glob("job_*.npz"))  # of jobs that came to their end
        if not files:
            continue
        joined = SampledFrames.concatenate([SampledFrames.load(file) for file in files])
        hot = (joined.temperature == run.config.temperature[1]) & torch.isnan(joined.pressure)
        if bool(hot.any()):
            frames[name] = joined.structures.select(hot.nonzero()[:, 0])
    return frames


def _report(run: Run) -> None:
    """Gather the main numbers, and write the report."""
    write_json(run.folder / "summary.json", summarize(run.folder))
    write_report(run.folder)


STAGES: dict[str, Callable[[Run], str | None]] = {
    "sample": _sample,
    "label": _label,
    "draft": _draft,
    "explore": _explore,
    "train": _train,
    "dynamics": _dynamics,
    "evaluate": _evaluate,
    "report": _report,
}
