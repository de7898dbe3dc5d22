"""The program of a worker process: an ASE calculator that answers questions about frames.

`potstill.isolation` starts it by its path, so that it begins within a fraction of a second and
imports only what the calculator needs. Questions and answers are pickles on the standard input and
output. What the calculator prints goes to the standard error; only the last frame's is kept.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import pickle
import signal
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any


class CannotMakeError(Exception):
    """The calculator cannot be made, and why."""


def make_calculator(spec: str, arguments: Mapping[str, Any]) -> Any:
    """Call `factory(**arguments)` of "module:factory"; what is wrong is a `CannotMakeError`."""
    module, _, path = spec.partition(":")
    try:
        factory: Any = importlib.import_module(module)
        for part in path.split("."):
            factory = getattr(factory, part)
    except (ImportError, AttributeError) as error:
        raise CannotMakeError(f"teacher '{spec}': {error}") from error
    try:
        calculator = factory(**arguments)
    except (Exception, SystemExit) as error:
        raise CannotMakeError(
            f"teacher '{spec}' could not be created: {reason_of(error)}"
        ) from error
    if inspect.isclass(calculator) or not hasattr(calculator, "implemented_properties"):
        kind = type(calculator).__name__
        raise CannotMakeError(f"teacher '{spec}' returned {kind}, not an ASE calculator")
    return calculator


def reason_of(error: BaseException) -> str:
    """Say in one line what went wrong."""
    if isinstance(error, SystemExit):
        return f"it called sys.exit({error.code!r})"
    return " ".join(str(error).split())[:300] or type(error).__name__


def ask(
    calculator: Any,
    atoms: Any,
    properties: Sequence[str],
    settings: Mapping[str, Any],
    forget: bool,
) -> dict[str, Any]:
    """Results of one frame: those asked for, and what else the calculator has computed.

    With `forget` the calculator is reset before, so that nothing of earlier frames shapes the
    answer.
    """
    if forget and hasattr(calculator, "reset"):
        calculator.reset()
    if settings:
        calculator.set(**settings)
    asked = {name: calculator.get_property(name, atoms) for name in properties}
    computed = getattr(calculator, "results", None) or {}
    return {k: v for k, v in computed.items() if k in calculator.implemented_properties} | asked


def main() -> None:
    """Answer until the standard input ends."""
    inbox, outbox = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    # Ctrl-C reaches all processes of a terminal; the parent decides what it means.
    signal.signal(signal.SIGINT, lambda *_: None)
    caught: list[str] = []
    warnings.showwarning = lambda message, *_, **__: caught.append(str(message))
    spec, arguments, sys.path[:], home = pickle.load(inbox)
    calculator: Any = None

    def answer(question: tuple | None) -> bytes:
        nonlocal calculator
        try:
            if calculator is None:
                calculator = make_calculator(spec, arguments)
            if question is None:
                return pickle.dumps(("made", list(calculator.implemented_properties), caught))
            return pickle.dumps(("done", ask(calculator, *question), caught))
        except CannotMakeError as error:
            return pickle.dumps(("refused", str(error), caught))
        except (Exception, SystemExit) as error:
            calculator = None  # the next frame gets a new one: this one's state may be damaged
            return pickle.dumps(("failed", reason_of(error), caught))
        finally:
            caught.clear()
            with contextlib.suppress(OSError):
                os.chdir(home)

    with contextlib.suppress(EOFError):
        while True:
            question = pickle.load(inbox)
            with contextlib.suppress(OSError):  # the last frame's output is enough
                os.ftruncate(2, 0)
                os.lseek(2, 0, os.SEEK_SET)
            outbox.write(answer(question))
            outbox.flush()


if __name__ == "__main__":
    main()
