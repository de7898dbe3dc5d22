"""The errors that potstill raises on purpose.

Every message is one sentence or two that say what is wrong, where (file, frame, key) and what to
do. The command line prints them without a traceback.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class PotstillError(Exception):
    """Base class of all errors that a user can cause and fix."""


class DataError(PotstillError):
    """A file, frame or array is invalid."""


class MissingLabelError(DataError):
    """A label that a run asks for is absent."""


class StoreError(PotstillError):
    """A labeled store cannot be opened, or must not be written as asked."""


class ConfigError(PotstillError):
    """A setting is unknown, missing or out of range."""


class ModelError(PotstillError):
    """A model or checkpoint does not fit the request."""


class TeacherError(PotstillError):
    """A teacher cannot be made, or cannot give what a run needs."""


class DivergenceError(PotstillError):
    """Training or molecular dynamics diverged."""


class OptionalDependencyError(PotstillError):
    """A package that only some features need is not installed."""


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import an optional package, or say which extra of potstill brings it.

    `purpose` says what needs it, as the end of the sentence "... is needed ...".

    Raises
    ------
    OptionalDependencyError
        If the module cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise OptionalDependencyError(
            f"the package '{module.split('.')[0]}' is needed {purpose}: "
            f"install it with `pip install 'potstill[{extra}]'` ({error})"
        ) from error


def suggest(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for a near miss, else the list of what is known."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; known are {', '.join(known)}" if known else ""
