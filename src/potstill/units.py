"""The only conversion numbers in potstill.

Inside, everything is in Å, eV, amu and fs (stress in eV/Å³, ASE's sign: positive in tension).
Readers convert on the way in; the ASE calculator speaks the same units as ASE except for time.
"""

from __future__ import annotations

import numpy as _np
from ase import units as _ase

from potstill.errors import ConfigError, suggest

#: Length units in Å.
LENGTH: dict[str, float] = {"Angstrom": 1.0, "A": 1.0, "Bohr": _ase.Bohr, "nm": _ase.nm}

#: Energy units in eV.
ENERGY: dict[str, float] = {
    "eV": 1.0,
    "meV": 1e-3,
    "Hartree": _ase.Hartree,
    "Rydberg": _ase.Rydberg,
    "kcal/mol": _ase.kcal / _ase.mol,
    "kJ/mol": _ase.kJ / _ase.mol,
}

#: Pressure and stress units in eV/Å³.
PRESSURE: dict[str, float] = {
    "eV/A^3": 1.0,
    "GPa": _ase.GPa,
    "kB": 0.1 * _ase.GPa,
    "kbar": 0.1 * _ase.GPa,
    "bar": _ase.bar,
    "Hartree/Bohr^3": _ase.Hartree / _ase.Bohr**3,
}

#: Time: one femtosecond in ASE's own unit of time (Å sqrt(amu/eV)).
FS_IN_ASE_TIME: float = _ase.fs

#: Boltzmann's constant in eV/K.
BOLTZMANN: float = _ase.kB

#: One GPa in eV/Å³.
GPA: float = _ase.GPa

#: One J/m² in eV/Å², for surface energies.
JOULE_PER_SQUARE_METER: float = _ase.J / _ase.m**2

#: One amu/Å³ in g/cm³.
AMU_PER_A3_IN_G_PER_CM3: float = 1.66053906660

#: Angular frequency sqrt(eV/(Å² amu)) in wave numbers, 1/cm.
OMEGA_IN_WAVE_NUMBERS: float = _ase.s / (2.0e2 * _np.pi * _ase._c)

#: Coulomb's constant e²/(4 pi eps0) in eV Å.
COULOMB: float = _ase.Hartree * _ase.Bohr


def energy_factor(unit: str) -> float:
    """Return the number of eV in one `unit` of energy."""
    return _lookup(ENERGY, unit, "energy")


def length_factor(unit: str) -> float:
    """Return the number of Å in one `unit` of length."""
    return _lookup(LENGTH, unit, "length")


def pressure_factor(unit: str) -> float:
    """Return the number of eV/Å³ in one `unit` of pressure or stress."""
    return _lookup(PRESSURE, unit, "pressure")


def force_factor(unit: str) -> float:
    """Return the number of eV/Å in one `unit` of force, written as `<energy>/<length>`.

    The last slash separates energy from length: `kcal/mol/Angstrom` is kcal/mol per Å.
    """
    energy, _, length = unit.rpartition("/")
    if not energy:
        raise ConfigError(f"force unit '{unit}' is not of the form <energy>/<length>, as in 'eV/A'")
    return energy_factor(energy) / length_factor(length)


def _lookup(table: dict[str, float], unit: str, kind: str) -> float:
    if unit not in table:
        raise ConfigError(f"unknown {kind} unit '{unit}'{suggest(unit, table)}")
    return table[unit]
