"""Training the student and its controls, side by side where there are cores."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from pathlib import Path

import torch

from potstill.train import TrainResult, TrainSettings
from potstill.workflows.base import Display, potential_info, threads
from potstill.workflows.distill_run import DistillConfig, Run
from potstill.workflows.training import train_with_progress

#: Seconds between two looks at the trainings under way.
_LOOK = 1.0


def train_students(run: Run) -> None:
    """Train the student and its controls, or what is left of them; writes `student.pt`.

    Small networks gain little from a second thread, so that two trainings side by side, with a
    share of the threads each, take hardly longer than one.
    """
    names = list(run.models)
    at_once = min(run.config.trainings_at_once, len(names))
    if at_once == 1:
        statuses = [train_model(run, name, run.models[name]).status for name in names]
    else:
        statuses = _side_by_side(run, names, at_once)
    if "interrupted" in statuses:
        raise KeyboardInterrupt
    shutil.copyfile(run.folder / "student" / "best.pt", run.folder / "student.pt")


def train_model(run: Run, name: str, settings: TrainSettings) -> TrainResult:
    """Train one model of a run in its folder, or continue."""
    training = run.data("train")
    info = potential_info(
        training.structures,
        teacher=run.store.source_info(run.source),
        temperature=run.config.temperature,
    )
    return train_with_progress(
        settings,
        training,
        run.data("validation"),
        run.folder / name,
        run.display,
        title=f"training {name}",
        info=info,
    )


def train_in_process(config: DistillConfig, name: str, n_threads: int) -> str:
    """Train one model in a process of its own, and return its status."""
    torch.set_num_threads(n_threads)
    run = Run.open(config, Display())
    return train_model(run, name, run.models[name]).status


def _side_by_side(run: Run, names: Sequence[str], at_once: int) -> list[str]:
    n_threads = max(1, threads() // at_once)
    context = multiprocessing.get_context("spawn")
    title = f"training {' and '.join(names)}"
    total = len(names) * (run.plan.counts.epochs or 1)
    with (
        run.display.task(title, total) as task,
        ProcessPoolExecutor(at_once, mp_context=context) as pool,
    ):
        waiting: set[Future[str]] = set()
        futures = [pool.submit(train_in_process, run.config, name, n_threads) for name in names]
        waiting.update(futures)
        while waiting:
            _, waiting = wait(waiting, timeout=_LOOK)
            epochs = [_latest(run.folder / name / "metrics.jsonl") for name in names]
            words = [f"{force:.3f}" for _, force in epochs if force is not None]
            note = f"forces {' and '.join(words)} eV/Å" if words else ""
            task.update(sum(epoch for epoch, _ in epochs), note=note)
        return [future.result() for future in futures]


def _latest(path: Path) -> tuple[int, float | None]:
    """Epoch and force error of the last whole line of a training's record."""
    if not path.is_file():
        return 0, None
    for line in reversed(path.read_text(encoding="utf-8").splitlines()):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # under way
            continue
        return int(record["epoch"]), record["validation"].get("forces_rmse")
    return 0, None
