"""Jobs, several at a time, each once: what is finished is not done again.

One at a time they are done in this process. Several at a time each have a process of their own,
started from this module, so that a script that uses potstill needs no guard around its main part.
A process ends with the one that started it: a job left behind would meet its successor's files.
"""

from __future__ import annotations

import os
import pickle
import queue
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from potstill.errors import PotstillError

J = TypeVar("J")

#: Seconds between two looks at the processes.
_LOOK = 0.1

#: Seconds that an interrupted training has for its checkpoint.
_GRACE = 60.0


@dataclass(frozen=True)
class Progress(Generic[J]):
    """How far the jobs are; passed to the progress callback after every one."""

    done: int
    total: int
    job: J
    seconds: float
    seconds_left: float


def run_jobs(
    jobs: Sequence[J],
    work: Callable[[J, int], None],
    *,
    is_finished: Callable[[J], bool],
    is_ready: Callable[[J], bool] = lambda job: True,
    cost: Callable[[J], float] = lambda job: 1.0,
    workers: int = 1,
    threads: int = 1,
    on_progress: Callable[[Progress[J]], None] | None = None,
    on_look: Callable[[], None] | None = None,
) -> None:
    """Do every job that is not finished yet; earlier ones start first.

    Parameters
    ----------
    jobs : sequence
        All of them; messages call them by their `str`.
    work : callable
        Does one job, given the job and a number of threads. With several workers both are pickled.
    is_finished, is_ready : callable
        Whether a job is done, and whether what it builds upon is.
    cost : callable
        Relative cost of a job, for the projected time.
    workers, threads : int
        Jobs at a time, and threads of each.
    on_progress, on_look : callable, optional
        Called after every job; called again and again while several are under way.

    Raises
    ------
    PotstillError
        If a process ends without having finished its job.
    """
    waiting = [job for job in jobs if not is_finished(job)]
    workers = max(1, min(workers, len(waiting)))
    started, total_cost, done_cost = time.perf_counter(), sum(map(cost, waiting)), 0.0

    def finish(job: J, under_way: int) -> None:
        nonlocal done_cost
        done_cost += cost(job)
        elapsed = time.perf_counter() - started
        left = elapsed / done_cost * (total_cost - done_cost)
        n_done = len(jobs) - len(waiting) - under_way
        if on_progress is not None:
            on_progress(Progress(n_done, len(jobs), job, elapsed, left))

    def next_job() -> J | None:
        job = next((job for job in waiting if is_ready(job)), None)
        if job is not None:
            waiting.remove(job)
        return job

    if workers == 1:
        while (job := next_job()) is not None:
            work(job, threads)
            finish(job, 0)
        return
    with tempfile.TemporaryDirectory(prefix="potstill-") as folder:
        pool = [_Worker(Path(folder) / str(k), work, threads) for k in range(workers)]
        try:
            while True:
                for worker in pool:
                    if worker.job is None and (job := next_job()) is not None:
                        worker.begin(job)
                busy = [worker for worker in pool if worker.job is not None]
                if not busy:
                    return
                time.sleep(_LOOK)
                for worker in busy:
                    if worker.poll():
                        job, worker.job = worker.job, None
                        finish(job, sum(w.job is not None for w in pool))
                if on_look is not None:
                    on_look()
        finally:
            for worker in pool:
                worker.interrupt()
            for worker in pool:
                worker.close()


@dataclass
class _Worker:
    """A process that does one job after the other, started with its first."""

    folder: Path
    work: Callable[[Any, int], None]
    threads: int
    job: Any = None
    _process: subprocess.Popen | None = None
    _count: int = field(default=0)

    def begin(self, job: Any) -> None:
        """Hand over a job."""
        if self._process is None:
            self.folder.mkdir()
            command = [sys.executable, "-m", "potstill.experiments.scheduler", str(self.folder)]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE)
            self._send([path or os.getcwd() for path in sys.path])
            self._send(pickle.dumps((self.work, self.threads)))
        self.job = job
        self._count += 1
        self._send(pickle.dumps(job))

    def _send(self, value: Any) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        with suppress(OSError):  # its end is noticed by `poll`
            pickle.dump(value, self._process.stdin)
            self._process.stdin.flush()

    def poll(self) -> bool:
        """Whether the job is done; what it raised is raised here."""
        assert self._process is not None
        outcome = self.folder / f"{self._count}.pickle"
        code = self._process.poll()
        if not outcome.is_file():
            if code is not None:
                raise PotstillError(f"the process of '{self.job}' ended with exit code {code}")
            return False
        error = pickle.loads(outcome.read_bytes())
        if error is not None:
            raise error
        return True

    def interrupt(self) -> None:
        """Ask the current job to stop; a training writes a checkpoint first."""
        if self._process is not None and self.job is not None:
            self._process.terminate()

    def close(self) -> None:
        """End the process."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        if self.job is not None:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_GRACE)
        with suppress(OSError):
            self._process.stdin.close()
        self._process.wait()


# -- in the process of a worker --------------------------------------------------------------------


def _serve(folder: Path) -> None:
    """Do the jobs that come through standard input until it ends."""
    received: queue.Queue[bytes] = queue.Queue()

    def receive() -> None:
        with suppress(EOFError):
            while True:
                received.put(pickle.load(sys.stdin.buffer))
        os._exit(1)  # the process that started this one is gone, or needs it no longer

    sys.path[:] = pickle.load(sys.stdin.buffer)
    threading.Thread(target=receive, daemon=True).start()
    work, threads = pickle.loads(received.get())
    count = 0
    while True:
        job, count, error = pickle.loads(received.get()), count + 1, None
        try:
            work(job, threads)
        except BaseException as raised:
            error = raised
        part = folder / "outcome"
        part.write_bytes(_pickled(error))
        part.rename(folder / f"{count}.pickle")


def _pickled(error: BaseException | None) -> bytes:
    """An exception with its traceback, in words where it cannot be pickled."""
    if error is None:
        return pickle.dumps(None)
    text = "".join(traceback.format_exception(error))
    try:
        error.add_note(text)
        pickle.loads(pickle.dumps(error))
    except Exception:
        return pickle.dumps(PotstillError(text))
    return pickle.dumps(error)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        _serve(Path(sys.argv[1]))
