"""What the evaluations share: results as plain JSON, relaxation, velocities, the machine."""

from __future__ import annotations

import dataclasses
import math
import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar, Self

import ase
import numpy as np
import torch
from ase.calculators.calculator import BaseCalculator
from ase.filters import FrechetCellFilter
from ase.optimize import BFGS

from potstill.errors import DataError, ModelError
from potstill.sample.supercell import smallest_supercell
from potstill.structures import Structures
from potstill.units import BOLTZMANN


@dataclasses.dataclass(frozen=True)
class Result:
    """Base of all results: a frozen dataclass that turns into plain JSON."""

    #: Properties that `to_json` writes beside the fields.
    derived: ClassVar[tuple[str, ...]] = ()

    def to_json(self) -> dict[str, Any]:
        """Fields as plain lists, numbers and strings; NaN and infinities become None."""
        names = [f.name for f in dataclasses.fields(self)]
        return {name: as_json(getattr(self, name)) for name in (*names, *self.derived)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of `to_json` for results without nested ones; None becomes NaN."""
        values = {}
        for f in dataclasses.fields(cls):
            value, kind = data[f.name], str(f.type)
            if kind == "np.ndarray":
                value = np.array([math.nan if x is None else x for x in value])
            elif kind == "float" and value is None:
                value = math.nan
            elif kind.startswith("tuple"):
                value = tuple(value)
            values[f.name] = value
        return cls(**values)


def as_json(value: Any) -> Any:
    """Turn nested results, arrays and numbers into what `json.dumps` accepts strictly."""
    if isinstance(value, Result):
        return value.to_json()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return as_json(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return as_json(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


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
    """Relax the atoms, and their cell if asked, in place.

    Parameters
    ----------
    atoms : ase.Atoms
        With a calculator.
    fmax : float
        Largest remaining force, eV/Å; with `cell`, ASE's measure for the cell's gradient too.
    max_steps : int
        Steps to take at most.
    cell : bool
        Relax the shape and volume of the cell as well.

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
    """Draw velocities of exactly this kinetic temperature (K), without motion of the whole."""
    masses = atoms.get_masses()[:, None]
    momenta = np.sqrt(masses * BOLTZMANN * temperature) * rng.normal(size=(len(atoms), 3))
    if len(atoms) > 1 and not atoms.constraints:
        momenta -= masses * momenta.sum(axis=0) / masses.sum()
    atoms.set_momenta(momenta)  # constraints hold what is fixed
    drawn = atoms.get_temperature()
    if drawn > 0.0:
        atoms.set_momenta(atoms.get_momenta() * np.sqrt(temperature / drawn))


def repeat_to(atoms: ase.Atoms, n_atoms: int) -> ase.Atoms:
    """Repeat a periodic structure, thinnest direction first, until it has `n_atoms` or more."""
    require_periodic(atoms, "making a supercell")
    return smallest_supercell(Structures.from_ase(atoms), min_atoms=n_atoms).to_ase()[0]


def make_calculator(spec: str, args: dict[str, Any] | None = None) -> BaseCalculator:
    """Make an ASE calculator from text, so that a fresh process can make the same one.

    Parameters
    ----------
    spec : str
        A potstill checkpoint (`*.pt`), or whatever names a teacher: `chgnet`, `module:factory`.
    args : dict, optional
        Keyword arguments.

    Returns
    -------
    BaseCalculator
    """
    if spec.endswith(".pt") and "," not in spec and "*" not in spec:
        from potstill.calculators import PotstillCalculator

        return PotstillCalculator(Path(spec), **(args or {}))
    from potstill.teachers import make_teacher

    return make_teacher(spec, args).ase_calculator()


def machine_description() -> dict[str, Any]:
    """Say what timings and memory figures were taken on: processor, threads, versions."""
    versions = {"python": platform.python_version()}
    for package in ("potstill", "torch", "numpy", "ase", "vesin"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "versions": versions,
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
