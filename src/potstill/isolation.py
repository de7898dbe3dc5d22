"""ASE calculators in a process of their own: one that crashes does not take the run with it."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import ase
from ase.calculators.calculator import CalculationFailed, Calculator, all_changes

from potstill.errors import TeacherError

_PROGRAM = Path(__file__).with_name("worker.py")

#: A calculator whose process dies this often, and has never answered, is given up.
_HOPELESS = 6


class FrameError(TeacherError, CalculationFailed):
    """A teacher failed on one frame, and may do the next."""

    def __init__(self, teacher: str, reason: str) -> None:
        super().__init__(f"the teacher '{teacher}' failed on a frame: {reason}")
        self.reason = reason


class WorkerCalculator(Calculator):
    """An ASE calculator that is made and asked in a worker process.

    A frame on which it raises, calls `sys.exit` or kills its process is a `FrameError`, once a new
    calculator has failed on it as well: one frame's failure never shapes the answer to another. The
    worker keeps to its working directory; its output is shown only if it dies.

    Parameters
    ----------
    spec, arguments : str, mapping
        "module:factory", importable from `sys.path` or the working directory, and its picklable
        keyword arguments.
    conservative : bool
        Whether forces are the negative gradient of the energy.
    settings_of : callable, optional
        Returns the settings (keywords of the calculator's `set`) that a frame needs.

    Raises
    ------
    TeacherError
        If the calculator cannot be made.
    """

    def __init__(
        self,
        spec: str,
        arguments: Mapping[str, Any],
        name: str,
        *,
        conservative: bool = True,
        settings_of: Callable[[ase.Atoms], dict[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        self.teacher = name
        self.conservative = conservative
        self._settings_of = settings_of
        paths = [os.path.abspath(path) for path in sys.path]
        home = os.getcwd()
        try:
            self._order = pickle.dumps((spec, dict(arguments), [*paths, home], home))
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            raise TeacherError(
                f"an argument of the teacher '{spec}' cannot be passed to its process: {error}"
            ) from error
        self._worker: _Worker | None = None
        self._forget = False
        self._used = False  # whether the worker's calculator has answered since it was made
        self._deaths: int | None = 0  # None once it has answered
        try:
            self.implemented_properties = self._ask(None)
        except _FailedError as error:
            raise TeacherError(f"teacher '{spec}' could not be created: {error}") from None

    def reset(self) -> None:
        """Forget all earlier frames, here and in the worker."""
        super().reset()
        self._forget = True

    def calculate(
        self,
        atoms: ase.Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = all_changes,
    ) -> None:
        """Ask the worker, twice if the calculator that fails is not new."""
        super().calculate(atoms, properties, system_changes)
        settings = self._settings_of(self.atoms) if self._settings_of else {}
        question = (self.atoms, list(properties), settings, self._forget)
        self._forget = False
        for again in (True, False):
            used, self._used = self._used, False
            try:
                self.results = self._ask(question)
            except _FailedError as error:
                if not (used and again):
                    raise FrameError(self.teacher, str(error)) from None
            else:
                self._used, self._deaths = True, None
                return

    def _ask(self, question: tuple | None) -> Any:
        if self._worker is None or self._worker.owner != os.getpid():
            self._worker = _Worker(self._order)
        try:
            kind, content, caught = self._worker.ask(question)
        except _FailedError as error:
            self._worker = None
            if self._deaths is not None:
                self._deaths += 1
                if self._deaths >= _HOPELESS:
                    raise TeacherError(
                        f"the teacher '{self.teacher}' failed {_HOPELESS} times and never "
                        f"answered: {error}"
                    ) from None
            raise
        except BaseException:  # an interruption: the answer may still be on its way
            self._worker.stop()
            self._worker = None
            raise
        for message in caught:
            warnings.warn(f"{self.teacher}: {message}", stacklevel=2)
        if kind == "refused":
            raise TeacherError(content)
        if kind == "failed":
            raise _FailedError(content)
        return content

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_worker": None, "_used": False}


class _FailedError(Exception):
    """Why there is no answer."""


class _Worker:
    """A worker process; it ends with this object, or with the process that started it."""

    def __init__(self, order: bytes) -> None:
        self.owner = os.getpid()
        self._output = tempfile.TemporaryFile()  # noqa: SIM115, closed by `stop`
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._output,
        )
        self.stop = weakref.finalize(self, _stop, self._process, self._output, self.owner)
        self._send(order)

    def ask(self, question: tuple | None) -> tuple[str, Any, list[str]]:
        """Return (kind, content, warnings), or raise `_FailedError` with how the process died."""
        self._send(pickle.dumps(question))
        assert self._process.stdout is not None
        try:
            return pickle.load(self._process.stdout)
        except (EOFError, pickle.UnpicklingError):
            raise _FailedError(self._death()) from None

    def _send(self, message: bytes) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(message)
            self._process.stdin.flush()
        except OSError:
            raise _FailedError(self._death()) from None

    def _death(self) -> str:
        """Signal or exit code of the process that closed its pipe, and its last words."""
        try:
            code = self._process.wait(5.0)
        except subprocess.TimeoutExpired:  # it lives, but does not speak any more
            self._process.kill()
            code = self._process.wait()
        self._output.seek(0)
        lines = [x.strip("\0 ") for x in self._output.read().decode(errors="replace").splitlines()]
        self.stop()
        words = f"its process ended with exit code {code}"
        if code < 0:
            words = f"its process was killed by signal {-code} ({signal.Signals(-code).name})"
        return ": ".join([words, *[x[:200] for x in lines if x][-1:]])


def _stop(process: subprocess.Popen, output: IO[bytes], owner: int) -> None:
    """Let a worker end, or end it; in a forked copy of its owner it is not ours to end."""
    if os.getpid() != owner:
        return
    for pipe in (process.stdin, process.stdout, output):
        assert pipe is not None
        with contextlib.suppress(OSError):  # what was not flushed has no reader
            pipe.close()
    try:
        process.wait(2.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
