"""Thermal expansion against crystals that obey the Mie-Grüneisen equation exactly."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from ase.build import bulk, molecule
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones
from ase.io import write
from ase.neighborlist import neighbor_list
from ase.units import GPa, kB
from numpy.polynomial import Polynomial
from scipy.optimize import brentq

from data import tersoff_silicon
from potstill.errors import ConfigError, DataError, ModelError
from potstill.evaluate.base import Bench, BenchSettings, Findings
from potstill.evaluate.expansion import Expansion, ThermalExpansion, Unstable, thermal_expansion
from potstill.evaluate.phonons import displaced, phonons, with_forces
from potstill.report.verdicts import ordered_verdicts
from potstill.structures import Structures
from potstill.workflows.evaluation import EvaluateConfig, evaluate
from potstill.workflows.report import write_report
from potstill.workflows.summary import metrics_of

pytest.importorskip("phonopy")

#: eV per THz.
PLANCK = 4.135667696e-3
#: Small and quick: five volumes, a supercell of 27 atoms.
QUICK = {"n_volumes": 5, "min_length": 5.0}
COPPER = {**QUICK, "max_strain": 0.02, "max_temperature": 320.0}


class PowerLaw(Calculator):
    """Nearest neighbors at a power of the distance, and a term of the volume alone.

    e0 [(v/v0)^(-n/3) + n/3 (-v0/v)] per atom, in a perfect crystal: at rest at v0. Frequencies go
    with V^(-(n + 2)/6) at all volumes: all modes have the same Grüneisen parameter. For springs
    without a length (n = -2) it is zero.
    """

    implemented_properties = ("energy", "forces", "stress")

    def __init__(self, n, e0=1.0, v0=12.0):
        super().__init__()
        self.n, self.e0, self.v0 = n, e0, v0

    def calculate(self, atoms=None, properties=None, system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        v = atoms.get_volume() / len(atoms)
        i, d, vector = neighbor_list("idD", atoms, 1.35 * v ** (1.0 / 3.0))  # the first shell
        d0 = (2.0**0.5 * self.v0) ** (1.0 / 3.0)
        pairs = self.e0 / 12.0 * (d / d0) ** -self.n
        pull = (-self.n * pairs / d**2)[:, None] * vector  # both directions of a pair are listed
        forces = np.zeros((len(atoms), 3))
        np.add.at(forces, i, 2.0 * pull)
        mean = -self.n / 3.0 * self.e0 * self.v0 / v
        stress = np.einsum("pa,pb->ab", pull, vector) - len(atoms) * mean * np.eye(3)
        stress /= atoms.get_volume()
        self.results = {
            "energy": pairs.sum() + len(atoms) * mean,
            "forces": forces,
            "stress": stress[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]],
        }


class NoStress(EMT):
    """EMT that cannot give stresses."""

    implemented_properties = ["energy", "forces"]  # noqa: RUF012


@pytest.fixture(scope="module")
def copper():
    return thermal_expansion(bulk("Cu"), EMT(), **COPPER)


def atom(calculator, a, element="Cu"):
    """Energy, frequencies (THz) and volume of a primitive fcc cell of one atom."""
    atoms = bulk(element, a=a)
    found = phonons(atoms, calculator, min_length=5.0, relax_cell=False)
    atoms.calc = calculator
    frequencies = found.frequencies[np.any(found.frequencies > 0.05, axis=1)]
    return atoms.get_potential_energy(), frequencies, atoms.get_volume()


# -- against what is known exactly ---------------------------------------------------------------


def test_the_crystal_of_powers_is_consistent_and_has_one_grueneisen_parameter():
    calculator = PowerLaw(12)
    atoms = bulk("Cu", a=3.7).repeat(2)
    atoms.rattle(0.02, seed=0)
    atoms.calc = calculator
    numerical = calculator.calculate_numerical_forces
    assert np.allclose(atoms.get_forces(), numerical(atoms), atol=1e-6)
    _, before, small = atom(calculator, 3.6)
    _, after, large = atom(calculator, 3.7)
    ratio = np.log(after / before) / np.log(large / small)
    assert np.allclose(ratio, -14.0 / 6.0, atol=2e-3)


def test_expansion_of_a_mie_grueneisen_crystal():
    n, calculator = 12, PowerLaw(12)
    a = (4.0 * calculator.v0) ** (1.0 / 3.0)
    gamma = (n + 2) / 6.0
    _, frequencies, v0 = atom(calculator, a)

    def volume(t):
        """Where the pressures of lattice and phonons, gamma U / V, cancel."""

        def pressure(v):
            quanta = PLANCK * frequencies * (v / v0) ** -gamma
            energy = (quanta * (0.5 / np.tanh(0.5 * quanta / (kB * t)))).sum() / len(frequencies)
            lattice = calculator.e0 * n / 3.0 * ((v0 / v) ** (n / 3.0) - v0 / v)
            return (lattice + gamma * energy) / v

        return brentq(pressure, v0, 1.2 * v0)

    found = thermal_expansion(bulk("Cu", a=3.5), calculator, n_volumes=7, min_length=5.0)
    for t in (100.0, 300.0, 600.0):
        k = int(t / 10)
        assert found.temperatures[k] == t
        assert found.volume[k] == pytest.approx(volume(t), rel=2e-4)
        alpha = np.log(volume(t + 10) / volume(t - 10)) / 60.0
        assert found.alpha[k] == pytest.approx(alpha, rel=0.02)
    assert found.volume[0] == pytest.approx(volume(0.1), rel=2e-4)
    assert found.thermal_expansion == found.alpha[30]
    assert found.complete


def test_without_anharmonicity_nothing_expands():
    found = thermal_expansion(bulk("Cu", a=3.6), PowerLaw(-2), **QUICK)
    assert np.allclose(found.volume, 12.0, rtol=5e-5)  # as well as five volumes fit E(V)
    assert np.allclose(found.alpha, 0.0, atol=1e-9)
    assert 2.9 * 8.314 < found.heat_capacity[-1] < 3.0 * 8.3145


def test_copper_obeys_grueneisens_relation(copper):
    """The coefficient is sum_i gamma_i c_i / 3 B V: by finite differences at one volume."""
    t, a = copper.temperature, copper.lattice_constant
    (_, below, small), (_, here, v), (_, above, large) = (
        atom(EMT(), a * scale) for scale in (0.999, 1.0, 1.001)
    )
    gamma = -np.log(above / below) / np.log(large / small)
    x = PLANCK * here / (kB * t)
    capacity = kB * x**2 * np.exp(x) / np.expm1(x) ** 2

    def free_energy(scale):
        static, frequencies, volume = atom(EMT(), a * scale)
        y = PLANCK * frequencies / (kB * t)
        return volume, static + kB * t * (0.5 * y + np.log1p(-np.exp(-y))).sum() / len(y)

    volumes, energies = np.array([free_energy(s) for s in (0.994, 1.0, 1.006)]).T
    curve = Polynomial.fit(volumes, energies, 2)
    modulus = v * curve.deriv(2)(v)
    assert curve.deriv(1).roots()[0] == pytest.approx(v, rel=1e-3)
    assert copper.at(copper.bulk_modulus) == pytest.approx(modulus / GPa, rel=0.01)
    expected = (gamma * capacity).sum() / len(here) / (3.0 * modulus * v)
    assert copper.thermal_expansion == pytest.approx(expected, rel=0.01)
    # C_p = C_V (1 + 3 alpha gamma T), with C_V of 2.8 k_B.
    mean = (gamma * capacity).sum() / capacity.sum()
    ratio = 1.0 + 3.0 * expected * mean * t
    molar = capacity.sum() / len(here) * ratio / kB * 8.314463
    assert copper.at(copper.heat_capacity) == pytest.approx(molar, rel=0.01)


def test_phonopy_finds_the_same(copper):
    """Phonopy fits the same equation by iteration, and has another formula of the capacity."""
    core = pytest.importorskip("phonopy.qha.core")
    start = bulk("Cu", a=(4.0 * copper.volumes[1] / (1.0 + copper.strains[1]) ** 3) ** (1.0 / 3.0))
    crystal, temperatures = displaced(start, 0.01, min_length=5.0), np.arange(0.0, 331.0, 10.0)
    parts = []
    for strain in copper.strains:
        atoms = bulk("Cu", a=start.cell.lengths()[0] * 2.0**0.5 * (1.0 + strain))
        atoms.calc = EMT()
        moved = with_forces(crystal, atoms, 0.01)
        moved.run_mesh([10, 10, 10], is_mesh_symmetry=False)
        moved.run_thermal_properties(temperatures=temperatures)
        parts.append(moved.thermal_properties.thermal_properties[1:])
    free, entropy, heat = np.array(parts).transpose(1, 2, 0)
    qha = core.QHA(
        copper.volumes, copper.energies, temperatures, heat, entropy, free, eos="birch_murnaghan"
    )
    qha.run()
    assert np.allclose(copper.volume, qha.volume_temperature, rtol=1e-7)
    assert np.allclose(copper.alpha, np.array(qha.thermal_expansion) / 3.0, rtol=1e-3, atol=1e-10)
    assert np.allclose(copper.bulk_modulus, qha.bulk_modulus_temperature, rtol=1e-4)
    capacity = np.array(qha.heat_capacity_P_polyfit)
    assert np.allclose(copper.heat_capacity[10:], capacity[10:], rtol=2e-3)


def test_expansion_starts_at_zero_from_the_zero_point(copper):
    assert copper.alpha[0] == 0.0
    assert 0.0 < copper.alpha[1] < 0.02 * copper.thermal_expansion
    assert np.all(np.diff(copper.alpha) > 0.0)
    at_rest = 4.0 * np.interp(0.0, copper.strains, copper.volumes)
    assert copper.lattice_constants[0] > at_rest ** (1.0 / 3.0)
    assert copper.alpha_error < 0.02 * copper.thermal_expansion


def test_solid_argon_at_four_kelvin():
    """The zero point of the (12, 6) potential leads to the measured 5.31 Å (static: 5.24 Å)."""
    pair = LennardJones(sigma=3.405, epsilon=119.8 * kB, rc=10.0, ro=8.0, smooth=True)
    found = thermal_expansion(
        bulk("Ar", a=5.26), pair, temperature=20.0, max_temperature=40.0, step=2.0,
        min_strain=-0.005, max_strain=0.04, n_volumes=5, min_length=9.0,
    )  # fmt: skip
    assert found.lattice_constants[2] == pytest.approx(5.31, abs=0.03)
    assert 100e-6 < found.thermal_expansion < 400e-6


def test_tersoffs_silicon_has_no_negative_expansion():
    found = thermal_expansion(bulk("Si"), tersoff_silicon(), **QUICK)
    assert np.all(found.alpha > -5e-8)  # silicon itself: -0.5e-6 at 80 K
    assert 3e-6 < found.thermal_expansion < 6e-6
    assert 5.432 < found.lattice_constants[0] < found.lattice_constant < 5.46  # 5.432: at rest


@pytest.mark.parametrize("atoms", [bulk("Cu", cubic=True), bulk("Cu").repeat(2)])
def test_every_cell_of_a_crystal_has_the_same_constant(copper, atoms):
    found = thermal_expansion(atoms, EMT(), **COPPER)
    assert found.lattice_constant == pytest.approx(copper.lattice_constant, rel=2e-4)
    assert found.thermal_expansion == pytest.approx(copper.thermal_expansion, rel=0.02)
    assert found.volume[0] == pytest.approx(copper.volume[0], rel=3e-4)
    assert found.at(found.heat_capacity) == pytest.approx(copper.at(copper.heat_capacity), rel=0.01)


def test_hcp_crystals_are_scaled_in_all_directions(copper):
    found = thermal_expansion(bulk("Cu", "hcp", a=2.55, c=4.16), NoStress(), **COPPER)
    cubic = copper.lattice_constant / 2.0**0.5
    assert found.lattice_constant == pytest.approx(cubic, rel=5e-3)
    expanded = np.cbrt(found.volume / found.volume[0])
    assert np.allclose(found.lattice_constants / found.lattice_constants[0], expanded)
    assert found.thermal_expansion == pytest.approx(copper.thermal_expansion, rel=0.05)


# -- what cannot be done -------------------------------------------------------------------------


def test_unstable_crystals_have_a_sentence_and_no_number():
    with pytest.raises(ModelError, match=r"imaginary at strains of −1.0 % \(−.* THz\).*0 are left"):
        thermal_expansion(bulk("Cu", "sc", a=2.4), EMT(), **QUICK)


def test_unstable_volumes_are_left_out():
    found = thermal_expansion(
        bulk("Cu"), EMT(), max_strain=0.11, n_volumes=7, min_length=5.0, max_temperature=300.0
    )
    assert found.unstable
    assert min(u.strain for u in found.unstable) > found.strains.max()
    assert len(found.strains) + len(found.unstable) == 7
    assert found.thermal_expansion == pytest.approx(20.8e-6, rel=0.15)


def test_strains_that_do_not_hold_the_minimum():
    narrow = {"max_strain": 0.008, "min_strain": -0.005, **QUICK}
    with pytest.raises(ModelError, match=r"at \d+ K has no minimum .* \+0.80 %: raise max_strain"):
        thermal_expansion(bulk("Cu"), EMT(), **narrow)
    cold = thermal_expansion(bulk("Cu"), EMT(), temperature=100.0, **narrow)
    assert not cold.complete
    assert 100.0 <= cold.temperatures[-1] < 300.0
    texts = [v.text for v in Expansion.verdicts(Findings({"expansion": {"student": cold}}))]
    assert texts == [
        f"Thermal expansion of the student ends at {cold.temperatures[-1]:g} K: above, strains up "
        "to +0.80 % do not hold the free energy's minimum."
    ]


def test_what_expansion_applies_to():
    with pytest.raises(DataError, match="periodic"):
        thermal_expansion(molecule("H2O"), EMT())
    with pytest.raises(ConfigError, match="at least 5 volumes"):
        thermal_expansion(bulk("Cu"), EMT(), n_volumes=4)
    with pytest.raises(ValueError, match="temperature <= max_temperature"):
        Expansion(max_temperature=200.0)
    bench = Bench(BenchSettings(), Structures.from_ase(bulk("Cu")))
    assert Expansion().lacks(bench) == ""
    rattled = bulk("Cu", cubic=True)
    rattled.rattle(0.1, seed=0)
    bench = Bench(BenchSettings(), Structures.from_ase(rattled))
    assert "displacements by symmetry" in Expansion(max_displacements=5).lacks(bench)
    assert Expansion(max_atoms=3).lacks(bench) == "a crystal of at most 3 atoms"


# -- in reports ----------------------------------------------------------------------------------


def test_expansion_survives_json(copper):
    for result in (copper, replace(copper, unstable=(Unstable(0.02, -1.0),), alpha_error=np.nan)):
        stored = json.loads(json.dumps(result.to_json(), allow_nan=False))
        again = ThermalExpansion.from_json(stored)
        assert again.to_json() == stored
        assert again.unstable == result.unstable
        assert again.thermal_expansion == result.thermal_expansion


def said(**results):
    return ordered_verdicts(list(Expansion.verdicts(Findings({"expansion": results}))))


def test_verdicts(copper):
    other = replace(copper, alpha=1.1 * copper.alpha, lattice_constants=copper.lattice_constants)
    (sentence,) = said(student=copper, teacher=other)
    assert sentence.startswith("Quasi-harmonic thermal expansion at 300 K: 20.")
    assert "·10⁻⁶/K (teacher 23." in sentence
    assert sentence.endswith("lattice constant 3.614 Å (teacher 3.614 Å, +0 %).")
    rough = replace(copper, alpha_error=5e-6)
    first, _ = said(student=copper, teacher=rough)
    assert first == (
        "Thermal expansion of the teacher is uncertain: its standard error is 5.00·10⁻⁶/K "
        "(jackknife over the volumes). Displacements larger than 0.01 Å may give smoother phonons."
    )
    assert said(student=replace(copper, alpha_error=np.nan)) == (
        "Thermal expansion of the student is uncertain: without one of the volumes there may be "
        "none. Displacements larger than 0.01 Å may give smoother phonons.",
    )
    assert said(student=copper, teacher=replace(other, temperature=200.0)) == ()
    left_out = replace(copper, unstable=(Unstable(0.02, -1.25),))
    found = Findings({"expansion": {"student": copper, "teacher": left_out}})
    rows = {row.label: row.values for row in Expansion.rows(found)}
    assert rows["Strains left out of it, with imaginary phonons"] == {
        "student": "none",
        "teacher": "+2.0 % (−1.25 THz)",
    }


def test_evaluate_compares_potentials(tmp_path, monkeypatch):
    write(tmp_path / "Cu.xyz", bulk("Cu"))
    emt = "ase.calculators.emt:EMT"
    config = {
        "models": {
            "student": {"spec": emt, "args": {"asap_cutoff": True}},
            "teacher": {"spec": emt},
        },
        "structure": str(tmp_path / "Cu.xyz"),
        "tests": {"expansion": COPPER},
        "out": str(tmp_path / "run" / "evaluation"),
    }
    found = evaluate(EvaluateConfig.model_validate(config))
    numbers = metrics_of(found)
    ours, theirs = numbers["student"], numbers["teacher"]
    assert theirs["thermal_expansion"] == pytest.approx(20.8e-6, rel=0.02)
    apart = ours["thermal_expansion"] - theirs["thermal_expansion"]
    assert ours["thermal_expansion_deviation"] == apart != 0.0
    ratio = ours["thermal_lattice_constant"] / theirs["thermal_lattice_constant"]
    assert ours["thermal_lattice_deviation"] == ratio - 1.0
    assert "thermal_expansion_deviation" not in theirs
    write_report(tmp_path / "run")
    table = (tmp_path / "run" / "report" / "table_properties.md").read_text()
    assert "Linear thermal expansion at 300 K (10⁻⁶/K)" in table
    assert (tmp_path / "run" / "report" / "expansion.png").is_file()
    ran = []

    def note(bench, chosen, folder, display):
        ran.extend(evaluation.name for evaluation, _ in chosen)
        return Findings({})

    monkeypatch.setattr("potstill.workflows.evaluation.run_evaluations", note)
    config = {**config, "tests": None, "out": str(tmp_path / "other")}
    evaluate(EvaluateConfig.model_validate(config))
    assert "phonons" in ran
    assert "expansion" not in ran
