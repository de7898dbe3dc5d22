"""Training the student and its controls, side by side where there are cores."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from potstill.evaluate.learning import read_learning_curves
from potstill.experiments.scheduler import run_jobs
from potstill.experiments.spec import Variant
from potstill.workflows.base import Display, potential_info
from potstill.workflows.distill_run import DistillConfig, Run
from potstill.workflows.training import train_with_progress


def train_students(run: Run) -> None:
    """Train the student and its controls, or those that are left.

    Small networks gain little from a second thread, so that two trainings side by side, with a
    share of the threads each, take hardly longer than one.
    """
    names = [n for n in run.models if not (run.folder / n / "result.json").is_file()]
    at_once = min(run.config.trainings_at_once, len(names))
    if at_once > 1:
        total = len(names) * (run.plan.counts.epochs or 1)
        with run.display.task(f"training {' and '.join(names)}", total) as task:
            run_jobs(
                names,
                partial(_train_apart, run.config),
                is_finished=lambda name: False,
                workers=at_once,
                threads=max(1, torch.get_num_threads() // at_once),
                on_look=lambda: task.update(*_progress(run, names)),
            )
    else:
        for name in names:
            train_model(run, name, run.models[name])


def train_model(run: Run, name: str, variant: Variant) -> None:
    """Train one model of a run in its folder, or continue.

    Raises
    ------
    KeyboardInterrupt
        If the training is interrupted; its folder holds a checkpoint then.
    """
    training = run.data("train")
    info = potential_info(
        training.structures,
        teacher=run.store.source_info(run.source),
        temperature=run.config.temperature,
        role=variant.role,
    )
    result = train_with_progress(
        variant.settings_of(run.config.seed),
        training,
        run.data("validation"),
        run.folder / name,
        run.display,
        title=f"training {name}",
        info=info,
    )
    if result.status == "interrupted":
        raise KeyboardInterrupt


def _train_apart(config: DistillConfig, name: str, n_threads: int) -> None:
    """Train in a process of its own."""
    torch.set_num_threads(n_threads)
    run = Run.open(config, Display())
    train_model(run, name, run.models[name])


def _progress(run: Run, names: Sequence[str]) -> tuple[float, None, str]:
    """Epochs done by all, and their force errors in words."""
    files = [run.folder / name / "metrics.jsonl" for name in names]
    curves = [read_learning_curves(file) for file in files if file.is_file()]
    key = "validation/forces_rmse"
    errors = [c[key][-1] for c in curves if key in c.series]
    note = f"forces {' and '.join(f'{e:.3f}' for e in errors)} eV/Å" if errors else ""
    return sum(len(c.epochs) for c in curves), None, note
