"""potstill distills accurate interatomic potentials into fast ones.

All names below come from where `_NAMES` says, and are imported when they are first used: `import
potstill` alone imports neither torch nor ASE. See `potstill.session` for the functions.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from potstill.calculators import PotstillCalculator as Calculator  # noqa: F401
    from potstill.checkpoint import load_potential as load  # noqa: F401
    from potstill.errors import PotstillError as PotstillError
    from potstill.readers import read as read
    from potstill.session import distill as distill
    from potstill.session import evaluate as evaluate
    from potstill.session import label as label
    from potstill.session import md as md
    from potstill.session import sample as sample
    from potstill.session import train as train
    from potstill.structures import Structures as Structures
    from potstill.teachers import make_teacher as make_teacher

#: What `import potstill` offers, and where it is.
_NAMES = {
    "read": "potstill.readers:read",
    "sample": "potstill.session:sample",
    "label": "potstill.session:label",
    "train": "potstill.session:train",
    "evaluate": "potstill.session:evaluate",
    "distill": "potstill.session:distill",
    "md": "potstill.session:md",
    "load": "potstill.checkpoint:load_potential",
    "Calculator": "potstill.calculators:PotstillCalculator",
    "Structures": "potstill.structures:Structures",
    "make_teacher": "potstill.teachers:make_teacher",
    "PotstillError": "potstill.errors:PotstillError",
}

#: Names of modules as well: `potstill.train(...)` trains, and `potstill.train.loop` is a module.
_JOBS = ("sample", "label", "train", "evaluate", "distill")

__all__ = ["__version__", *_NAMES]


def _find(name: str) -> Any:
    module, _, attribute = _NAMES[name].partition(":")
    return getattr(import_module(module), attribute)


class _Job(ModuleType):
    """A module that does its job when it is called."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _find(self.__name__.rpartition(".")[2])(*args, **kwargs)


class _Package(ModuleType):
    """The package itself: Python sets its submodules as attributes, and some of them are jobs."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _JOBS and isinstance(value, ModuleType):
            value.__class__ = _Job
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'potstill' has no attribute '{name}'")
    value = import_module(f"potstill.{name}") if name in _JOBS else _find(name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
