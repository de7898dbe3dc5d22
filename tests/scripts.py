"""Scripts of the repository, loaded as modules."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

STUDIES = Path(__file__).parents[1] / "studies"


@contextmanager
def loaded(path: Path) -> Iterator[ModuleType]:
    """A script as a module; it can be imported by its name until the end."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[path.stem]
