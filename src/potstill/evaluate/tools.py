"""What evaluations do to atoms, calculators made from text, and the machine they run on."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ase
import numpy as np
import torch
from ase.calculators.calculator import BaseCalculator
from ase.filters import FrechetCellFilter
from ase.optimize import BFGS

from potstill.ase_bridge import fixed_atoms as fixed_atoms
from potstill.calculators import PotstillCalculator
from potstill.errors import DataError, ModelError
from potstill.sample.md import draw_momenta
from potstill.sample.supercell import smallest_supercell
from potstill.structures import Structures
from potstill.teachers import make_teacher
from potstill.teachers.base import versions_of
from potstill.units import BOLTZMANN


def with_calculator(atoms: ase.Atoms, calculator: BaseCalculator) -> ase.Atoms:
    """Return a copy of the atoms that uses the calculator; the original is left alone."""
    copy = atoms.copy()
    copy.calc = calculator
    return copy


def require_periodic(atoms: ase.Atoms, purpose: str) -> None:
    """Refuse structures that are not periodic along three lattice vectors.

    Raises
    ------
    DataError
        If `atoms` is open along an axis or has no volume.
    """
    if not atoms.pbc.all() or atoms.cell.rank < 3:
        raise DataError(
            f"{purpose} needs a structure that is periodic along all three axes; "
            f"{atoms.get_chemical_formula()} is not"
        )


def relax(atoms: ase.Atoms, *, fmax: float, max_steps: int, cell: bool = False) -> None:
    """Relax the atoms, and with `cell` the shape and volume of their cell, in place.

    Parameters
    ----------
    atoms : ase.Atoms
        With a calculator.
    fmax, max_steps : float, int
        Largest remaining force in eV/Å (with `cell`, ASE's measure for the cell's gradient, too),
        and steps to take at most.

    Raises
    ------
    ModelError
        If the forces do not fall below `fmax`.
    """
    if len(atoms) == 1 and not cell:
        return  # no internal degree of freedom
    target = FrechetCellFilter(atoms) if cell else atoms
    optimizer = BFGS(target, logfile=None)  # type: ignore[arg-type]
    if not optimizer.run(fmax=fmax, steps=max_steps):
        left = float(np.linalg.norm(atoms.get_forces(), axis=1).max())
        raise ModelError(
            f"relaxing {atoms.get_chemical_formula()} did not reach {fmax:g} eV/Å in {max_steps} "
            f"steps (largest force {left:.3g} eV/Å): allow more steps or a larger fmax"
        )


def set_temperature(atoms: ase.Atoms, temperature: float, rng: np.random.Generator) -> None:
    """Draw velocities of exactly this kinetic temperature (K) of the free atoms.

    Where no atom is fixed the whole is at rest, which takes three degrees of freedom.
    """
    held = fixed_atoms(atoms)
    masses = atoms.get_masses()[:, None]
    momenta = draw_momenta(masses[:, 0], held, temperature, rng)
    degrees = 3 * int((~held).sum())
    if not held.any() and len(atoms) > 1:
        momenta -= masses * momenta.sum(axis=0) / masses.sum()
        degrees -= 3
    drawn = float((momenta**2 / masses).sum())
    if drawn > 0.0:
        momenta *= np.sqrt(degrees * BOLTZMANN * temperature / drawn)
    atoms.set_momenta(momenta)


def repeat_to(atoms: ase.Atoms, n_atoms: int) -> ase.Atoms:
    """Repeat a structure until it has `n_atoms` or more, its thinnest periodic direction first.

    A molecule is set side by side with its copies, too far apart to interact.
    """
    if atoms.pbc.any():
        return smallest_supercell(Structures.from_ase(atoms), min_atoms=n_atoms).to_ase()[0]
    copies = math.ceil((n_atoms / len(atoms)) ** (1.0 / 3.0))
    box = atoms.copy()
    box.set_cell(np.diag(np.ptp(atoms.positions, axis=0) + _APART))
    repeated = box.repeat((copies, copies, copies))[: len(atoms) * math.ceil(n_atoms / len(atoms))]
    repeated.set_cell(np.zeros((3, 3)))
    return repeated


#: Å between copies of a molecule.
_APART = 15.0


def is_checkpoint(spec: str) -> bool:
    """Whether a spec names a potstill checkpoint."""
    return spec.endswith(".pt") and "," not in spec and "*" not in spec


def make_calculator(spec: str, args: dict[str, Any] | None = None) -> BaseCalculator:
    """Make an ASE calculator from a spec, as a new process can do as well.

    Parameters
    ----------
    spec : str
        A potstill checkpoint (`*.pt`) or a teacher: `chgnet`, `module:factory`.
    args : dict, optional
        Keyword arguments.
    """
    if is_checkpoint(spec):
        return PotstillCalculator(Path(spec), **(args or {}))
    return make_teacher(spec, args).ase_calculator()


@contextmanager
def limited_threads(n: int) -> Iterator[None]:
    """Let torch compute with `n` threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def machine_description() -> dict[str, Any]:
    """Processor, threads and versions that timings and memory figures belong to."""
    packages = versions_of("potstill", "torch", "numpy", "ase", "vesin")
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "versions": {"python": platform.python_version(), **packages},
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
