"""The native core compiles with the compilers that users have, as the standard it declares."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

#: Compiler, more settings of cmake, and what runs the program where this machine cannot.
COMPILERS = {
    "gcc 11": ("g++-11", [], []),
    "clang": ("clang++", [], []),
    "arm64": (
        "aarch64-linux-gnu-g++",
        ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64"],
        ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"],
    ),
}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")
@pytest.mark.parametrize("name", COMPILERS)
def test_core_compiles_and_passes_its_own_test(name, tmp_path):
    compiler, settings, emulator = COMPILERS[name]
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    # Only messages about vectors in calls, which concern other compilers' objects, are let pass.
    flags = "-Wall -Wextra -Wpedantic -Werror -Wno-psabi"
    configure = ["cmake", "-S", str(ROOT), "-B", str(tmp_path), "-DPOTSTILL_TESTS=ON"]
    configure += ["-DPOTSTILL_SANITIZE=OFF", f"-DCMAKE_CXX_COMPILER={compiler}"]
    configure += [f"-DCMAKE_CXX_FLAGS={flags}", *settings]
    for command in (configure, ["cmake", "--build", str(tmp_path)]):
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
    if emulator and shutil.which(emulator[0]) is None:
        return  # that it compiles is what can be seen here
    result = subprocess.run(
        [*emulator, str(tmp_path / "test_core")], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith("all passed\n")


#: A model that compiled kernels would serve, where there are none.
WITHOUT_KERNELS = """
import sys
sys.modules["potstill.core._native"] = None
from ase.build import bulk
from potstill.models import HIPNN
from potstill.structures import Structures
crystal = Structures.from_ase(bulk("Al"))
model = HIPNN(crystal.species_table, 4, 4, 1.9, 4.0, 4.5, 1)
model.use_core("torch")
model.predict(crystal)
print("chosen", file=sys.stderr)
model.use_core("auto")
for _ in range(2):
    model.predict(crystal)
"""


def run_without_kernels(required: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_KERNELS],
        env={**os.environ, "POTSTILL_REQUIRE_NATIVE": required},
        capture_output=True,
        text=True,
    )


def test_missing_kernels_are_told_once():
    result = run_without_kernels("")
    assert result.returncode == 0, result.stderr
    before, _, after = result.stderr.partition("chosen\n")
    assert before == "", "PyTorch's kernels were asked for"
    (line,) = after.splitlines()
    assert "several times slower" in line
    assert "C++ compiler" in line


def test_missing_kernels_can_be_an_error():
    result = run_without_kernels("1")
    assert result.returncode != 0
    assert "chosen" in result.stderr
    last = result.stderr.splitlines()[-1]
    assert "ModelError" in last
    assert "POTSTILL_REQUIRE_NATIVE" in last
