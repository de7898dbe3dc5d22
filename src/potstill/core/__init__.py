"""The seam for native kernels; today every kernel is its PyTorch twin.

The native core is to be an optional extension module `potstill.core._native` (C++, nanobind, not
linked to torch) built by the same `pip install`; CONTRIBUTING.md says how it joins. Layers above
ask this package alone whether it is there, so that they need not change when it comes, and the
PyTorch twin of a kernel stays its oracle and its fallback.
"""

from __future__ import annotations

import importlib.util

#: Whether compiled kernels were built with this installation.
NATIVE_AVAILABLE: bool = importlib.util.find_spec("potstill.core._native") is not None


def describe_core() -> str:
    """Say in one sentence which kernels are in use, for `potstill doctor` and run folders."""
    if NATIVE_AVAILABLE:
        return "native kernels (C++)"
    return "PyTorch kernels (this version has no native ones)"
