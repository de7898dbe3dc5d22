"""Thermal expansion of a crystal in the quasi-harmonic approximation, beside the teacher's.

At each of several volumes V the atoms relax, and the phonons give the free energy

    F(V, T) = E(V) + sum_i [ h nu_i(V) / 2 + k_B T ln(1 - exp(-h nu_i(V) / k_B T)) ]

per wave vector, with the zero point (phonopy). The Birch-Murnaghan equation gives its minimum V(T)
at each temperature, with the free energy G(T) there; the linear coefficient is V'(T) / 3 V(T), the
heat capacity at constant pressure -T G''(T) (Togo, Chaput, Tanaka and Hug, Phys. Rev. B 81, 174301,
2010). The equation is fitted here rather than by phonopy: it is a linear problem, and where F(V) is
flat phonopy's iteration diverges and does not say so.

Crystals are scaled isotropically, whatever their lattice: of those that are not cubic a third of
the volumetric expansion is the mean of the three axes, at the shape they have at 0 K. Phonons
depend on one another through the volume only, so that the result is worth less the closer a crystal
is to melting.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import ase
import numpy as np
from ase.calculators.calculator import BaseCalculator
from pydantic import model_validator

from potstill.errors import ConfigError, ModelError
from potstill.evaluate.base import Bench, Candidate, Findings, Result
from potstill.evaluate.eos import fit_birch_murnaghan, relaxed_crystal
from potstill.evaluate.lattice import conventional_lengths
from potstill.evaluate.phonons import (
    IMAGINARY,
    FiniteDisplacements,
    displaced,
    frequencies_at,
    mesh_of,
    mesh_points,
    to_ase,
    with_forces,
)
from potstill.evaluate.tools import relax, require_periodic, with_calculator
from potstill.metrics import metric_of
from potstill.report.panels import Drawing, Panel, Series, plain_label
from potstill.report.tables import Row, number, signed
from potstill.report.verdicts import Verdict
from potstill.units import ENERGY, GPA

#: Volumes without imaginary modes that a fit needs.
_FEWEST = 5
#: Share of the coefficient that its standard error may be.
_ROUGH = 0.1
#: Settings that only make sense together.
_RANGES = {"temperature", "max_temperature", "step", "min_strain", "max_strain", "n_volumes"}


@dataclass(frozen=True)
class Unstable:
    """A linear strain at which phonons are imaginary, and the lowest of them, THz."""

    strain: float
    frequency: float

    def __str__(self) -> str:
        return f"{signed(100.0 * self.strain)} % ({number(self.frequency)} THz)"


@dataclass(frozen=True)
class ThermalExpansion(Result):
    """Quasi-harmonic expansion of one potential's own crystal.

    Parameters
    ----------
    strains, volumes, energies : ndarray
        (n_volumes,) linear strains from the minimum of E(V), and Å³ and eV per atom there.
    unstable : tuple of Unstable
        Strains that were left out of the fits.
    temperatures : ndarray
        (n,) K from zero on, equally spaced; no further than the strains hold the minimum.
    volume : ndarray
        (n,) equilibrium volume, Å³ per atom.
    lattice_constants : ndarray
        (n,) first length of the conventional cell, Å.
    alpha : ndarray
        (n,) linear expansion coefficient, 1/K.
    bulk_modulus : ndarray
        (n,) isothermal, GPa.
    heat_capacity : ndarray
        (n,) at constant pressure, J/(mol K), per mole of atoms.
    temperature : float
        K, where numbers are quoted.
    max_temperature : float
        K that was asked for.
    alpha_error : float
        1/K, standard error of the coefficient at `temperature` from fits that leave out one volume:
        how rough energies and phonons are. NaN if such a fit has no minimum.
    displacement : float
        Å, of phonons.
    """

    derived = ("lattice_constant", "thermal_expansion")

    strains: np.ndarray
    volumes: np.ndarray
    energies: np.ndarray
    unstable: tuple[Unstable, ...]
    temperatures: np.ndarray
    volume: np.ndarray
    lattice_constants: np.ndarray
    alpha: np.ndarray
    bulk_modulus: np.ndarray
    heat_capacity: np.ndarray
    temperature: float
    max_temperature: float
    alpha_error: float
    displacement: float

    def at(self, values: np.ndarray) -> float:
        """One of the curves at the temperature where numbers are quoted."""
        return float(np.interp(self.temperature, self.temperatures, values))

    @property
    def lattice_constant(self) -> float:
        """At `temperature`, Å."""
        return self.at(self.lattice_constants)

    @property
    def thermal_expansion(self) -> float:
        """Linear coefficient at `temperature`, 1/K."""
        return self.at(self.alpha)

    @property
    def complete(self) -> bool:
        """Whether the strains hold the minimum up to the temperature that was asked for."""
        return bool(self.temperatures[-1] >= self.max_temperature)


def thermal_expansion(
    atoms: ase.Atoms,
    calculator: BaseCalculator,
    *,
    temperature: float = 300.0,
    max_temperature: float = 800.0,
    step: float = 10.0,
    min_strain: float = -0.01,
    max_strain: float = 0.03,
    n_volumes: int = 7,
    displacement: float = 0.01,
    min_length: float = 10.0,
    max_atoms: int = 200,
    fmax: float = 1e-3,
    max_steps: int = 500,
) -> ThermalExpansion:
    """Relax the crystal, scale it, and minimize the free energy over the volume.

    Parameters
    ----------
    atoms, calculator : ase.Atoms, BaseCalculator
        A crystal: primitive, conventional or a supercell.
    temperature : float
        K, where numbers are quoted.
    max_temperature, step : float
        K, end and spacing of the curves.
    min_strain, max_strain, n_volumes : float, float, int
        Linear strains from the minimum of E(V), equally spaced. They should hold the equilibrium of
        all temperatures; curves end where they do not.
    displacement : float
        Å, of phonons.
    min_length, max_atoms : float, int
        Of the supercell of phonons, Å and atoms.
    fmax, max_steps : float, int
        Of relaxations, eV/Å.

    Raises
    ------
    OptionalDependencyError
        If phonopy is not installed.
    DataError
        If the structure is not periodic.
    ConfigError
        If strains or temperatures make no sense.
    ModelError
        If a relaxation does not converge, fewer than five volumes have no imaginary modes, or the
        strains do not hold the equilibrium at `temperature`.
    """
    require_periodic(atoms, "thermal expansion")
    if wrong := _wrong(temperature, max_temperature, step, min_strain, max_strain, n_volumes):
        raise ConfigError(wrong)
    crystal = displaced(atoms, displacement, min_length, max_atoms)
    start = relaxed_crystal(to_ase(crystal.primitive), calculator)
    # An even mesh without its center, whose acoustic modes have no free energy.
    mesh = [n + n % 2 for n in mesh_of(crystal.primitive)]
    temperatures = step * np.arange(np.ceil(max_temperature / step) + 2.0)
    kept, energies, free, unstable = [], [], [], []
    for strain in np.linspace(min_strain, max_strain, n_volumes).tolist():
        scaled = with_calculator(start, calculator)
        scaled.set_cell(start.cell * (1.0 + strain), scale_atoms=True)
        relax(scaled, fmax=fmax, max_steps=max_steps)
        moved = with_forces(crystal, scaled, displacement)
        moved.run_mesh(mesh, is_mesh_symmetry=False)
        lowest = min(
            float(frequencies.min())  # zone center and boundary are in the other mesh only
            for frequencies in (moved.mesh.frequencies, frequencies_at(moved, mesh_points(mesh)))
        )
        if lowest < -IMAGINARY:
            unstable.append(Unstable(strain, lowest))
            continue
        kept.append(strain)
        energies.append(scaled.get_potential_energy())
        free.append(_free_energy(moved, temperatures))
    formula, strains, n = start.get_chemical_formula(), np.array(kept), len(start)
    if len(kept) < _FEWEST:
        raise ModelError(
            f"phonons of {formula} are imaginary at strains of {_listed(unstable)}: the thermal "
            f"expansion needs {_FEWEST} volumes without, and {len(kept)} are left"
        )
    volumes = start.get_volume() * (1.0 + strains) ** 3
    total = np.array(energies) - min(energies) + np.array(free).T  # (temperatures, volumes)
    minima = _minima(volumes, total)
    held = len(minima)
    # Derivatives are central differences: the last temperature has none.
    if held < 3 or temperatures[held - 2] < temperature:
        raise ModelError(
            f"the free energy of {formula} at {temperatures[held]:g} K has no minimum between "
            f"linear strains of {signed(100.0 * kept[0])} and {signed(100.0 * kept[-1])} %: "
            f"{_remedy(kept, total[held], unstable)}"
        )
    volume, least, modulus = minima.T
    alpha, heat = np.zeros(held - 1), np.zeros(held - 1)
    alpha[1:] = np.log(volume[2:] / volume[:-2]) / (6.0 * step)
    heat[1:] = -temperatures[1 : held - 1] * np.diff(least, 2) / step**2
    length = float(conventional_lengths(start)[0])
    return ThermalExpansion(
        strains=strains,
        volumes=volumes / n,
        energies=np.array(energies) / n,
        unstable=tuple(unstable),
        temperatures=temperatures[: held - 1],
        volume=volume[:-1] / n,
        lattice_constants=length * np.cbrt(volume[:-1] / start.get_volume()),
        alpha=alpha,
        bulk_modulus=modulus[:-1] / GPA,
        heat_capacity=heat * 1e3 / ENERGY["kJ/mol"] / n,
        temperature=temperature,
        max_temperature=max_temperature,
        alpha_error=_left_out_one(volumes, total, int(temperature / step + 0.5), step),
        displacement=displacement,
    )


def _wrong(
    temperature: float,
    max_temperature: float,
    step: float,
    min_strain: float,
    max_strain: float,
    n_volumes: int,
) -> str:
    """What makes no sense in the settings, in words."""
    if not 0.0 < step <= temperature <= max_temperature:
        return (
            "thermal expansion needs 0 < step <= temperature <= max_temperature, not "
            f"{step:g}, {temperature:g} and {max_temperature:g} K"
        )
    if not -0.2 < min_strain < 0.0 < max_strain < 0.2 or n_volumes < _FEWEST:
        return (
            f"thermal expansion needs at least {_FEWEST} volumes, from a min_strain below to a "
            f"max_strain above zero (at most 0.2), not {n_volumes} from {min_strain:g} to "
            f"{max_strain:g}"
        )
    return ""


def _listed(unstable: Sequence[Unstable]) -> str:
    return ", ".join(map(str, unstable))


def _free_energy(moved: Any, temperatures: np.ndarray) -> np.ndarray:
    """(n_temperatures,) free energy of the phonons on the mesh, eV per primitive cell."""
    moved.run_thermal_properties(temperatures=temperatures)
    return np.array(moved.thermal_properties.thermal_properties[1]) * ENERGY["kJ/mol"]


def _remedy(strains: Sequence[float], free: np.ndarray, unstable: Sequence[Unstable]) -> str:
    """What to do where the least of the free energies stands at an end of the strains."""
    low = free.argmin() < len(free) // 2
    ends = [u for u in unstable if (u.strain < strains[0] if low else u.strain > strains[-1])]
    if ends:
        return f"beyond, phonons are imaginary: {_listed(ends)}"
    return "lower min_strain" if low else "raise max_strain"


def _minima(volumes: np.ndarray, total: np.ndarray) -> np.ndarray:
    """(n, 3) volume, free energy and bulk modulus from 0 K on, while the strains hold the minimum.

    `total` are free energies (n_temperatures, n_volumes). The lowest value must not stand at an
    end: a fit alone finds minima that no value supports.
    """
    found = []
    for free in total:
        inside = 0 < free.argmin() < len(free) - 1
        fit = fit_birch_murnaghan(volumes, free) if inside else None
        if fit is None:
            break
        found.append(fit[:3])
    return np.array(found)


def _left_out_one(volumes: np.ndarray, total: np.ndarray, k: int, step: float) -> float:
    """Standard error of alpha at temperature k from fits that leave out one volume (jackknife).

    NaN if one of them has no minimum.
    """
    alphas = []
    for left_out in range(len(volumes)):
        before, after = (
            fit_birch_murnaghan(np.delete(volumes, left_out), np.delete(total[j], left_out))
            for j in (k - 1, k + 1)
        )
        if before is None or after is None:
            return float("nan")
        alphas.append(np.log(after[0] / before[0]) / (6.0 * step))
    return float(np.sqrt(len(alphas) - 1.0) * np.std(alphas))


class Expansion(FiniteDisplacements):
    """Quasi-harmonic thermal expansion beside the teacher's.

    Parameters
    ----------
    temperature : float
        K, where numbers are quoted.
    max_temperature, step : float
        K, end and spacing of the curves.
    min_strain, max_strain, n_volumes : float, float, int
        Linear strains from each model's own minimum; phonons are computed at each. They should hold
        the equilibrium of all temperatures.
    """

    name = "expansion"
    title = "thermal expansion"
    result = ThermalExpansion
    on_request = True

    temperature: float = 300.0
    max_temperature: float = 800.0
    step: float = 10.0
    min_strain: float = -0.01
    max_strain: float = 0.03
    n_volumes: int = 7

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        own = self.model_dump(include=_RANGES)
        if wrong := _wrong(**own):
            raise ValueError(wrong)
        return self

    def run(self, bench: Bench, candidate: Candidate) -> ThermalExpansion:
        """Expansion of the candidate's own crystal."""
        own = self.model_dump(exclude={"max_displacements"})
        return thermal_expansion(bench.atoms, candidate.calculator, **own)

    @classmethod
    def metrics(cls, result: ThermalExpansion) -> dict[str, float]:
        """Coefficient and heat capacity; the lattice constant, also at 0 K."""
        return {
            "zero_point_lattice_constant": float(result.lattice_constants[0]),
            "thermal_lattice_constant": result.lattice_constant,
            "thermal_expansion": result.thermal_expansion,
            "heat_capacity": result.at(result.heat_capacity),
        }

    @classmethod
    def against(cls, result: ThermalExpansion, teacher: ThermalExpansion) -> dict[str, float]:
        """Deviations from the teacher's at the same temperature."""
        if result.temperature != teacher.temperature:
            return {}
        return {
            "thermal_expansion_deviation": result.thermal_expansion - teacher.thermal_expansion,
            "thermal_lattice_deviation": result.lattice_constant / teacher.lattice_constant - 1.0,
        }

    @classmethod
    def rows(cls, found: Findings) -> Iterable[Row]:
        """Numbers at the temperature, how sure they are, and what was left out."""
        results = found.of(cls.name, ThermalExpansion)
        if not results:
            return
        place = f" at {next(iter(results.values())).temperature:g} K"
        for key, row in cls.metric_rows(found):
            metric = metric_of(key)
            where = "" if key == "zero_point_lattice_constant" else place
            label = f"{metric.name}{where} ({metric.unit})"
            yield Row(label, row.values)
        errors = {
            m: r.alpha_error * metric_of("thermal_expansion").scale for m, r in results.items()
        }
        yield Row("Its standard error, one volume left out (10⁻⁶/K)", errors)
        if any(r.unstable for r in results.values()):
            words = {m: _listed(r.unstable) or "none" for m, r in results.items()}
            yield Row("Strains left out of it, with imaginary phonons", words)

    @classmethod
    def drawings(cls, found: Findings) -> Iterable[Drawing]:
        """Coefficient and lattice constant against the temperature."""
        results = found.of(cls.name, ThermalExpansion)
        panels = [
            Panel(
                "Temperature (K)",
                label,
                [
                    Series(m, r.temperatures, scale * getattr(r, name), kind="line")
                    for m, r in results.items()
                ],
                zero_line=name == "alpha",
            )
            for label, name, scale in (
                ("Linear expansion coefficient (10⁻⁶/K)", "alpha", 1e6),
                ("Lattice constant a (Å)", "lattice_constants", 1.0),
            )
        ]
        caption = (
            "Quasi-harmonic, with zero point, of each model's own crystal. Crystals are scaled "
            "isotropically: the coefficient is a third of the volumetric one."
        )
        yield Drawing("expansion", "Thermal expansion", caption, panels)

    @classmethod
    def verdicts(cls, found: Findings) -> Iterable[Verdict]:
        """Expansion beside the teacher's, and where curves end early."""
        results = found.of(cls.name, ThermalExpansion)
        ours, theirs = results.get(found.student), results.get(found.teacher)
        for model in (found.student, found.teacher):
            r = results.get(model)
            if r is not None and not r.complete:
                yield Verdict(
                    f"Thermal expansion of the {plain_label(model)} ends at "
                    f"{r.temperatures[-1]:g} K: above, strains up to "
                    f"{signed(100.0 * r.strains[-1])} % do not hold the free energy's minimum."
                )
            if r is not None and not r.alpha_error <= _ROUGH * abs(r.thermal_expansion):
                error = number(1e6 * r.alpha_error)
                reason = (
                    "without one of the volumes there may be none"
                    if error == "–"
                    else f"its standard error is {error}·10⁻⁶/K (jackknife over the volumes)"
                )
                yield Verdict(
                    f"Thermal expansion of the {plain_label(model)} is uncertain: {reason}. "
                    f"Displacements larger than {r.displacement:g} Å may give smoother phonons."
                )
        if ours is None or theirs is None or ours.temperature != theirs.temperature:
            return
        apart = signed(100.0 * cls.against(ours, theirs)["thermal_lattice_deviation"])
        yield Verdict(
            f"Quasi-harmonic thermal expansion at {ours.temperature:g} K: "
            f"{number(1e6 * ours.thermal_expansion)}·10⁻⁶/K (teacher "
            f"{number(1e6 * theirs.thermal_expansion)}·10⁻⁶/K), lattice constant "
            f"{ours.lattice_constant:.3f} Å (teacher {theirs.lattice_constant:.3f} Å, {apart} %)."
        )
