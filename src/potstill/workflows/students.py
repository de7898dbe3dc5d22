"""Training the student and its controls, side by side where there are cores."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from potstill.errors import PotstillError
from potstill.train import TrainResult, TrainSettings
from potstill.workflows.base import Display, Task, potential_info, threads
from potstill.workflows.distill_run import DistillConfig, Run
from potstill.workflows.training import train_with_progress

#: Seconds between two looks at the trainings under way.
_LOOK = 1.0
#: Exit code of a training's process that was interrupted, or had one of potstill's own errors.
_INTERRUPTED, _MISTAKE = 3, 4


def train_students(run: Run) -> None:
    """Train the student and its controls, or what is left of them.

    Small networks gain little from a second thread, so that two trainings side by side, with a
    share of the threads each, take hardly longer than one.
    """
    names = [n for n in run.models if not (run.folder / n / "result.json").is_file()]
    at_once = min(run.config.trainings_at_once, len(names))
    if at_once > 1:
        _side_by_side(run, names, at_once)
    else:
        for name in names:
            if train_model(run, name, run.models[name]).status == "interrupted":
                raise KeyboardInterrupt


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


# -- side by side ----------------------------------------------------------------------------------


def _side_by_side(run: Run, names: Sequence[str], at_once: int) -> None:
    """Train each model in a process of its own, at most so many at a time."""
    n_threads = max(1, threads() // at_once)
    queue, running = list(names), dict[str, subprocess.Popen]()
    total = len(names) * (run.plan.counts.epochs or 1)
    try:
        with run.display.task(f"training {' and '.join(names)}", total) as task:
            while queue or running:
                while queue and len(running) < at_once:
                    name = queue.pop(0)
                    running[name] = _start(run, name, n_threads)
                time.sleep(_LOOK)
                for name in [n for n, process in running.items() if process.poll() is not None]:
                    _check(run, name, running.pop(name).returncode)
                task.update(*_progress(run, names))
    finally:  # they stop with a checkpoint
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()


def _start(run: Run, name: str, n_threads: int) -> subprocess.Popen:
    """Start the process of one training: this module, with the config as its input."""
    command = [sys.executable, "-m", "potstill.workflows.students", name, str(n_threads)]
    with (run.folder / f"{name}.log").open("w") as log:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log)
    assert process.stdin is not None
    process.stdin.write(run.config.model_dump_json().encode())
    process.stdin.close()
    return process


def _check(run: Run, name: str, code: int) -> None:
    """Pass on how the process of a training ended."""
    log = run.folder / f"{name}.log"
    if code == _INTERRUPTED:
        raise KeyboardInterrupt
    if code == _MISTAKE:
        raise PotstillError(log.read_text(encoding="utf-8").strip().splitlines()[-1])
    if code != 0:
        raise PotstillError(f"training {name} ended with exit code {code}: see {log}")
    log.unlink()


def _progress(run: Run, names: Sequence[str]) -> tuple[float, None, str]:
    """Epochs done by all, and their force errors in words."""
    epochs = [_latest(run.folder / name / "metrics.jsonl") for name in names]
    words = [f"{force:.3f}" for _, force in epochs if force is not None]
    note = f"forces {' and '.join(words)} eV/Å" if words else ""
    return sum(epoch for epoch, _ in epochs), None, note


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


class _WithParent(Display):
    """Stops the training, with a checkpoint, once the process that started it is gone."""

    def __init__(self) -> None:
        self._parent = os.getppid()

    @contextmanager
    def task(self, title: str, total: float | None = None) -> Iterator[Task]:
        """Look after every epoch."""
        parent = self._parent

        class Watch(Task):
            def update(self, done: float, total: float | None = None, note: str = "") -> None:
                if os.getppid() != parent:
                    signal.raise_signal(signal.SIGTERM)

        yield Watch()


def _main(name: str, n_threads: int) -> int:
    """One training in a process of its own; its config comes from standard input."""
    config = DistillConfig.model_validate_json(sys.stdin.read())
    torch.set_num_threads(n_threads)
    try:
        run = Run.open(config, _WithParent())
        status = train_model(run, name, run.models[name]).status
    except PotstillError as error:
        print(error)
        return _MISTAKE
    return _INTERRUPTED if status == "interrupted" else 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1], int(sys.argv[2])))
