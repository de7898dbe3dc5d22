"""The runs of a study, several at a time, each once: what is finished is not done again."""

from __future__ import annotations

import datetime
import json
import multiprocessing
import multiprocessing.connection
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from potstill.errors import ConfigError
from potstill.evaluate.base import machine_description
from potstill.train.state import versions
from potstill.workflows.base import read_json, write_json


class NamedCell(Protocol):
    """One training run of a study."""

    @property
    def name(self) -> str:
        """Folder name."""


class AnyStudy(Protocol):
    """What the config of a study has."""

    @property
    def name(self) -> str:
        """Short name."""

    @property
    def title(self) -> str:
        """One line for the report."""

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of the runs."""

    def cells(self) -> Sequence[NamedCell]:
        """All runs."""

    def model_dump_json(self) -> str:
        """All settings."""


C = TypeVar("C", bound=NamedCell)


@dataclass(frozen=True)
class StudyProgress:
    """How far a study is; passed to the progress callback after every cell."""

    done: int
    total: int
    cell: NamedCell | None
    seconds: float
    seconds_left: float


def run_cells(
    cells: Sequence[C],
    work: Callable[[C, int], None],
    *,
    is_finished: Callable[[C], bool],
    is_ready: Callable[[C], bool],
    cost: Callable[[C], float],
    workers: int = 1,
    on_progress: Callable[[StudyProgress], None] | None = None,
) -> None:
    """Do every cell that is not finished yet.

    Parameters
    ----------
    cells : sequence
        All of them; earlier ones start first.
    work : callable
        Does one cell, given the cell and the number of threads, in a process of its own; can be
        pickled.
    is_finished, is_ready : callable
        Whether a cell is done, and whether what it builds upon is.
    cost : callable
        Relative cost of a cell, for the projected time.
    workers : int
        Processes; each uses one thread when there are several.
    on_progress : callable, optional
        Called after every cell.
    """
    waiting = [cell for cell in cells if not is_finished(cell)]
    started, total_cost = time.perf_counter(), sum(cost(cell) for cell in waiting)
    done_cost = 0.0
    threads = 1 if workers > 1 else torch.get_num_threads()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_follow_parent) as pool:
        running: dict[Future, C] = {}
        while waiting or running:
            for cell in [c for c in waiting if is_ready(c)]:
                if len(running) == workers:
                    break
                running[pool.submit(work, cell, threads)] = cell
                waiting.remove(cell)
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                cell = running.pop(future)
                future.result()
                done_cost += cost(cell)
                elapsed = time.perf_counter() - started
                left = elapsed / done_cost * (total_cost - done_cost)
                n_done = len(cells) - len(waiting) - len(running)
                if on_progress is not None:
                    on_progress(StudyProgress(n_done, len(cells), cell, elapsed, left))


def result_file(folder: Path, cell: NamedCell) -> Path:
    """What a finished cell leaves."""
    return folder / cell.name / "cell.json"


def finished_cells(study: AnyStudy, folder: Path) -> dict[str, Any]:
    """Records of the finished cells by name.

    Raises
    ------
    ConfigError
        If there are none.
    """
    files = {cell.name: result_file(folder, cell) for cell in study.cells()}
    records = {name: read_json(file) for name, file in files.items() if file.is_file()}
    if not records:
        raise ConfigError(f"{folder} holds no finished run of the study '{study.name}'")
    return records


def write_results(
    study: AnyStudy, folder: Path, command: str, records: Mapping[str, Any], **more: Any
) -> tuple[dict[str, Any], dict[str, str]]:
    """Write `results.json`: records, config, versions and machine.

    Returns
    -------
    result : dict
        What was written.
    about : dict of str to str
        The same in a few words, for the report.
    """
    n_cells = len(study.cells())
    result = {
        "study": study.name,
        "title": study.title,
        "command": command,
        "date": datetime.date.today().isoformat(),
        "n_cells": n_cells,
        "n_finished": len(records),
        "versions": versions(),
        "machine": machine_description(),
        "config": json.loads(study.model_dump_json()),
        "cells": dict(records),
        **more,
    }
    write_json(folder / "results.json", result)
    about = {
        "study": study.name,
        "command": command,
        "date": result["date"],
        "runs": f"{len(records)} of {n_cells}",
        "seeds": ", ".join(str(seed) for seed in study.seeds),
        "versions": ", ".join(f"{k} {v}" for k, v in versions().items()),
    }
    return result, about


def _follow_parent() -> None:
    """End this process with the study's: a run left behind would meet its successor's files."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
