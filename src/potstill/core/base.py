"""Whether the native kernels are there, and which instructions they use.

`potstill.core._native` is an extension module in C++ (sources in `core/`), compiled by the same
`pip install` as the package where there is a compiler. It is not linked to torch. Layers above ask
this package alone, and fall back to the PyTorch twin of a kernel, which also is its oracle.
"""

from __future__ import annotations

import importlib
import os
import sys
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from potstill.errors import ConfigError, ModelError

#: What the kernels compute in.
DTYPES = (torch.float32, torch.float64)


def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("potstill.core._native"), None
    except ModuleNotFoundError:
        return None, "potstill was installed without a C++ compiler, or compilation failed"
    except ImportError as error:  # compiled, and a library it needs is missing
        return None, f"the compiled kernels cannot be loaded: {error}"


_NATIVE, _REASON = _load()


def available() -> bool:
    """Whether compiled kernels can be used."""
    return _NATIVE is not None


def why_unavailable() -> str | None:
    """Why there are no compiled kernels, as part of a sentence; None where there are."""
    return _REASON


def note_missing_kernels() -> None:
    """Say once per process, on stderr, that compiled kernels would have served and are missing.

    Raises
    ------
    ModelError
        If they are missing and the environment variable POTSTILL_REQUIRE_NATIVE is 1.
    """
    if available():
        return
    remedy = f"{_REASON}; install a C++ compiler, then reinstall potstill"
    if os.environ.get("POTSTILL_REQUIRE_NATIVE", "").lower() in ("1", "true", "yes", "on"):
        raise ModelError(f"POTSTILL_REQUIRE_NATIVE is set, and {remedy}")
    _tell(f"MD and training use PyTorch kernels, several times slower: {remedy}")


@cache
def _tell(message: str) -> None:
    print(f"potstill: warning: {message}", file=sys.stderr)


def native() -> ModuleType:
    """Return the extension module.

    Raises
    ------
    ModelError
        If it was not compiled or cannot be loaded.
    """
    if _NATIVE is None:
        raise ModelError(f"there are no native kernels: {_REASON}; use the torch core")
    return _NATIVE


def call(function: Any, *arguments: Any) -> Any:
    """Call a native function; what it refuses is a ModelError."""
    instruction_set()  # a wrong POTSTILL_SIMD is a setting to mend, not a fault of the model
    try:
        return function(*arguments)
    except RuntimeError as error:
        raise ModelError(f"native kernels: {error}") from None


def array(tensor: Tensor, dtype: torch.dtype) -> Any:
    """Contiguous numpy view (or copy, where dtype or strides differ) of a CPU tensor."""
    return tensor.detach().to(dtype).contiguous().numpy()


def instruction_sets() -> dict[str, bool]:
    """Instruction sets that were compiled, and whether this processor runs them."""
    return {name: native().runnable(name) for name in native().compiled_instruction_sets()}


def instruction_set() -> str:
    """Name of the instruction set in use: baseline, avx2 or avx512.

    The best that runs here, or what the environment variable POTSTILL_SIMD says.

    Raises
    ------
    ConfigError
        If POTSTILL_SIMD names an unknown instruction set, or one this processor cannot run.
    """
    try:
        return native().instruction_set()
    except RuntimeError as error:
        raise ConfigError(str(error)) from None


def select_instruction_set(name: str | None) -> None:
    """Use an instruction set from now on, for the whole process; None goes back to the default.

    Raises
    ------
    ConfigError
        If it is unknown, or this processor cannot run it.
    """
    try:
        native().select(name)
    except RuntimeError as error:
        raise ConfigError(str(error)) from None


def release_memory() -> None:
    """Give back the scratch memory that the kernels keep for the calling thread."""
    native().release_memory()


def describe_core() -> str:
    """Say in one sentence which kernels are in use, for `potstill doctor` and run folders."""
    if not available():
        return f"PyTorch kernels ({why_unavailable()})"
    try:
        return f"native kernels (C++, {instruction_set()})"
    except ConfigError as error:
        return f"native kernels that cannot run: {error}"
