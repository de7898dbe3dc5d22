"""The runs of a study, several at a time, each once: what is finished is not done again."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch


class NamedCell(Protocol):
    """One training run of a study."""

    @property
    def name(self) -> str:
        """Folder name."""


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


def _follow_parent() -> None:
    """End this process with the study's: a run left behind would meet its successor's files."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
