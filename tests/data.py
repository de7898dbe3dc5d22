"""Data of the tests: small frames, and where the reference data outside the repository are."""

from __future__ import annotations

import os
from pathlib import Path

import ase
import pytest
from ase.build import bulk
from ase.calculators.calculator import Calculator
from ase.calculators.emt import EMT


def rattled_copper(n: int, displacement: float) -> list[ase.Atoms]:
    """Cubic cells of copper, displaced at random (Å), with EMT's energy, forces and stress."""
    frames = []
    for seed in range(n):
        atoms = bulk("Cu", cubic=True)
        atoms.rattle(displacement, seed=seed)
        atoms.calc = EMT()
        atoms.get_stress()
        frames.append(atoms)
    return frames


def tersoff_silicon() -> Calculator:
    """Tersoff's potential of 1988 (T3); skips the test where ASE has none."""
    tersoff = pytest.importorskip("ase.calculators.tersoff")
    parameters = tersoff.TersoffParameters(
        m=3, gamma=1.0, lambda3=0.0, c=1.0039e5, d=16.217, h=-0.59825, n=0.78734, beta=1.1e-6,
        lambda2=1.73222, B=471.18, R=2.85, D=0.15, lambda1=2.4799, A=1830.8,
    )  # fmt: skip
    return tersoff.Tersoff({("Si", "Si", "Si"): parameters})


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
