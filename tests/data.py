"""Where the reference data of the tests are: outside the repository, and not everywhere."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_BESIDE = Path(__file__).resolve().parents[2] / "shared" / "data"


def data_path(name: str) -> Path:
    """Path of a file or folder of the reference data; skips the test where it is absent.

    The data lie in `../shared/data` beside the repository, or where POTSTILL_DATA says.
    """
    root = Path(os.environ.get("POTSTILL_DATA", _BESIDE))
    path = root / name
    if not path.exists():
        pytest.skip(f"reference data '{name}' are not in {root}; set POTSTILL_DATA")
    return path
