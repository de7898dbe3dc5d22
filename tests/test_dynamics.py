"""`potstill md`: temperatures, densities, pressures and timesteps that are what they say."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import ase
import numpy as np
import pytest
from ase.build import bulk, fcc111, molecule
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms
from ase.io import write
from pydantic import ValidationError

from potstill.evaluate.vibrations import fastest_period
from potstill.structures import Structures
from potstill.workflows.base import Display
from potstill.workflows.dynamics import MdConfig, run_dynamics, simulate, timestep_warning
from test_soundness import Bond, carbon_monoxide


def config(folder: Path, **changes: object) -> MdConfig:
    settings = {
        "model": {"spec": "ase.calculators.emt:EMT"},
        "structure": str(folder / "start.extxyz"),
        "out": str(folder / "md"),
        "equilibration": 0.2,
        "timestep": 2.0,
    }
    return MdConfig.model_validate({**settings, **changes})


def thermo(folder: Path, atoms: ase.Atoms, **changes: object) -> list[dict[str, str]]:
    """`thermo.csv` of copper in EMT."""
    folder.mkdir(exist_ok=True)
    (folder / "md").mkdir()
    settings = config(folder, **changes)
    simulate(settings, Structures.from_ase(atoms), EMT(), folder / "md", Display())
    return list(csv.DictReader((folder / "md" / "thermo.csv").read_text().splitlines()))


@pytest.mark.parametrize("ensemble", ["langevin", "nve"])
def test_a_slab_with_fixed_atoms_has_the_temperature_asked_for(tmp_path, ensemble):
    slab = fcc111("Cu", (2, 2, 3), vacuum=6.0)
    slab.set_constraint(FixAtoms(indices=[0, 1, 2, 3]))
    duration = 3.0 if ensemble == "langevin" else 0.1
    times = {"duration": duration, "stride": 50.0, "timestep": 5.0}
    rows = thermo(tmp_path, slab, ensemble=ensemble, **times)
    temperatures = np.array([float(row["temperature_K"]) for row in rows])
    # Divided by all 36 degrees of freedom instead of 24 it would be 200 K. In NVE a single start
    # spreads by 300 K / sqrt(24): it is compared with its own kinetic energy.
    if ensemble == "langevin":
        error = temperatures.std() / math.sqrt(len(temperatures) / 2)
        assert temperatures.mean() == pytest.approx(300.0, abs=4.0 * error)
        assert abs(temperatures.mean() - 200.0) > 4.0 * error
    kinetic = np.array([float(row["kinetic_eV"]) for row in rows])
    np.testing.assert_allclose(temperatures, 2.0 * kinetic / (24 * 8.617333e-5), rtol=1e-5)


def test_what_is_not_a_crystal_has_no_density(tmp_path):
    rows = thermo(tmp_path, molecule("N2"), duration=0.1, temperature=(50.0, 50.0), timestep=0.5)
    assert {row["density_g_cm3"] for row in rows} == {""}
    crystal = thermo(tmp_path / "crystal", bulk("Cu", cubic=True), duration=0.1)
    assert float(crystal[0]["density_g_cm3"]) == pytest.approx(8.93, abs=0.05)


def test_a_pressure_needs_a_barostat(tmp_path):
    for ensemble in ("langevin", "nve"):
        with pytest.raises(ValidationError, match="needs the ensemble npt"):
            config(tmp_path, pressure=10.0, ensemble=ensemble)
    assert config(tmp_path, pressure=10.0, ensemble="npt").pressure == 10.0
    assert config(tmp_path, ensemble="npt").pressure is None


def test_the_fastest_period_is_that_of_the_stiffest_bond():
    # Two masses on a spring: omega² = k (1/m1 + 1/m2).
    atoms, constant = carbon_monoxide(), 50.0
    reduced = 1.0 / (1.0 / atoms.get_masses()).sum()
    period = 2.0 * math.pi * math.sqrt(reduced / constant) / ase.units.fs
    assert fastest_period(atoms, Bond(1.13, constant)) == pytest.approx(period, rel=1e-3)
    atoms.set_constraint(FixAtoms([1]))
    heavy = period * math.sqrt(atoms.get_masses()[0] / reduced)
    assert fastest_period(atoms, Bond(1.13, constant)) == pytest.approx(heavy, rel=1e-3)
    atoms.set_constraint(FixAtoms([0, 1]))
    assert fastest_period(atoms, Bond(1.13, constant)) == math.inf


def test_a_long_timestep_is_warned_of(tmp_path):
    start = Structures.from_ase(carbon_monoxide())
    warning = timestep_warning(20.0, start, Bond(1.13, 50.0))
    assert "more than a tenth of the period of the fastest vibration" in warning
    assert "the lightest atom is C" in warning
    assert timestep_warning(0.5, start, Bond(1.13, 50.0)) == ""
    said: list[str] = []

    class Listening(Display):
        def say(self, text: str) -> None:
            said.append(text)

    write(tmp_path / "start.extxyz", bulk("Cu", cubic=True))
    run_dynamics(config(tmp_path, timestep=20.0, duration=0.1, equilibration=0.0), Listening())
    assert any("a timestep of 20 fs is more than a tenth" in line for line in said)


def test_a_run_says_how_close_atoms_came(tmp_path):
    write(tmp_path / "start.extxyz", bulk("Cu", cubic=True))
    result = run_dynamics(config(tmp_path, duration=0.1))
    assert result.closest.startswith("Closest pair: Cu-Cu at 2.")
