"""Evaluations against known answers: published constants, lattice sums, planted faults."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from types import SimpleNamespace

import ase
import numpy as np
import pytest
import torch
from ase.build import bulk, molecule
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones
from ase.constraints import FixAtoms

from data import tersoff_silicon
from potstill.errors import ConfigError, DataError, ModelError
from potstill.evaluate import memory
from potstill.evaluate.adf import angular_distributions
from potstill.evaluate.base import as_json
from potstill.evaluate.distributions import compare_distributions
from potstill.evaluate.elastic import deform, elastic_constants
from potstill.evaluate.eos import equation_of_state, fit_birch_murnaghan
from potstill.evaluate.errors import (
    compare,
    evaluate_errors,
    predict_all,
)
from potstill.evaluate.learning import read_learning_curves
from potstill.evaluate.memory import memory_per_atom
from potstill.evaluate.nve import fit_drift, run_nve
from potstill.evaluate.pareto import pareto_front
from potstill.evaluate.rdf import RadialDistribution, radial_distribution
from potstill.evaluate.speed import md_speed
from potstill.evaluate.tools import make_calculator, repeat_to, set_temperature
from potstill.models.prior import ZBL
from potstill.species import SpeciesTable
from potstill.structures import Properties, Structures
from potstill.units import BOLTZMANN, GPA


class NoStress(EMT):
    """EMT that cannot give stresses."""

    implemented_properties = ["energy", "forces"]  # noqa: RUF012


class Curl(Calculator):
    """EMT plus a force that circles around every atom's site: no energy has this gradient."""

    implemented_properties = ["energy", "forces"]  # noqa: RUF012

    def __init__(self, sites: np.ndarray, strength: float) -> None:
        super().__init__()
        self.sites, self.strength = sites, strength

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes) -> None:
        super().calculate(atoms, properties, system_changes)
        inner = self.atoms.copy()
        inner.calc = EMT()
        away = self.atoms.positions - self.sites
        curl = self.strength * np.cross([0.0, 0.0, 1.0], away)
        self.results = {
            "energy": inner.get_potential_energy(),
            "forces": inner.get_forces() + curl,
        }


def frames_of(symbol: str = "Cu", n: int = 6, seed: int = 0) -> list[ase.Atoms]:
    frames = []
    for k in range(n):
        atoms = bulk(symbol, cubic=True) * (1, 1, 1 + k % 3)
        atoms.rattle(0.1, seed=seed + k)
        atoms.info["config_type"] = "odd" if k % 2 else "even"
        frames.append(atoms)
    return frames


# -- errors --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def labelled():
    structures = Structures.from_ase(frames_of())
    teacher = predict_all(EMT(), structures, ("energy", "forces", "stress", "atomic_energies"))
    reference = Properties(
        {"energy": teacher["energy"] + 1.0, "forces": teacher["forces"] + 0.1},
    )
    return structures, teacher, reference


def test_three_channels_are_kept_apart(labelled):
    structures, teacher, reference = labelled
    student = Properties(
        {"energy": teacher["energy"] - 0.5, "forces": teacher["forces"] - 0.1},
    )
    labels = {"teacher": teacher, "reference": reference}
    report = evaluate_errors(student, structures, labels)
    assert set(report.channels) == {"student-teacher", "student-reference", "teacher-reference"}
    assert report.channels["student-teacher"]["energy_mae"] == pytest.approx(0.5)
    assert report.channels["student-reference"]["energy_mae"] == pytest.approx(1.5)
    assert report.channels["teacher-reference"]["energy_mae"] == pytest.approx(1.0)
    assert report.channels["student-reference"]["forces_rmse"] == pytest.approx(0.2)
    assert "stress_mae" not in report.channels["student-teacher"]
    assert set(report.groups) == {"odd", "even"}
    n = [report.groups[g]["student-teacher"]["energy_n"] for g in ("odd", "even")]
    assert n == [3, 3]
    json.dumps(report.to_json(), allow_nan=False)


def test_potential_in_batches_equals_potential_at_once():
    table = SpeciesTable.from_symbols(["Cu"])
    potential = ZBL(table, 1.0, 3.0)
    structures = Structures.from_ase(frames_of())
    wanted = ("energy", "forces", "stress", "atomic_energies")
    whole = potential.predict(structures, properties=wanted).properties
    parts = predict_all(potential, structures, wanted, max_atoms=9)
    for name in wanted:
        torch.testing.assert_close(parts[name], whole[name], rtol=0, atol=1e-12)
    report = evaluate_errors(potential, structures, {"reference": whole}, name="control")
    assert report.channels["control-reference"]["forces_rmse"] < 1e-12
    assert report.channels["control-reference"]["atomic_energies_n"] == structures.n_atoms


def test_ase_calculators_are_predictors_too(labelled):
    structures, teacher, _ = labelled
    report = evaluate_errors(EMT(), structures, {"teacher": teacher})
    for key in ("energy_rmse", "forces_rmse", "stress_rmse", "atomic_energies_rmse"):
        assert report.channels["student-teacher"][key] == pytest.approx(0.0, abs=1e-12)
    open_system = Structures.from_ase([molecule("O2"), bulk("Cu", cubic=True)])
    stress = predict_all(EMT(), open_system, ("energy", "stress"))
    assert stress.present["stress"].tolist() == [False, True]


def test_errors_refuse_unknown_sources(labelled):
    structures, teacher, _ = labelled
    with pytest.raises(DataError, match="did you mean 'teacher'"):
        evaluate_errors(teacher, structures, {"teachers": teacher})


def test_compare_some_systems(labelled):
    structures, teacher, reference = labelled
    some = compare(teacher, reference, structures, [1, 4])
    assert some["forces_n"] == 3 * 16


# -- radial and angular distributions ------------------------------------------------------------


def test_fcc_shells_hold_12_6_24():
    atoms = bulk("Cu", a=3.6, cubic=True) * (2, 2, 2)
    rdf = radial_distribution([atoms], r_max=4.6, n_bins=92)
    nearest = 3.6 / math.sqrt(2.0)
    upper = rdf.r + 0.5 * rdf.bin_width
    between = [0.5, 1.2, 1.55, 1.78]  # of the nearest distance: shells lie at 1, 1.41, 1.73
    counts = [rdf.coordination[np.searchsorted(upper, x * nearest) - 1] for x in between]
    assert [b - a for a, b in pairwise(counts)] == pytest.approx([12, 6, 24])
    shells = 4.0 / 3.0 * math.pi * np.diff(np.append(0.0, upper) ** 3)
    integral = np.cumsum(rdf.g * rdf.density * shells)
    np.testing.assert_allclose(integral, rdf.coordination, rtol=1e-12)
    # one atom and its images are the same crystal
    primitive = radial_distribution([bulk("Cu", a=3.6)], r_max=4.6, n_bins=92)
    np.testing.assert_allclose(primitive.coordination, rdf.coordination, atol=1e-9)


def ideal_gas(n_frames: int, seed: int, numbers: list[int] | None = None) -> list[ase.Atoms]:
    rng = np.random.default_rng(seed)
    numbers = numbers or [18] * 200
    return [
        ase.Atoms(
            numbers, scaled_positions=rng.random((len(numbers), 3)), cell=[12.0] * 3, pbc=True
        )
        for _ in range(n_frames)
    ]


def test_ideal_gas_is_structureless_within_its_error():
    rdf = radial_distribution(ideal_gas(20, 0), r_max=6.0, n_bins=12)
    expected = 1.0 - 1.0 / 200
    assert rdf.g[4:] == pytest.approx(expected, abs=0.02)
    pull = (rdf.g - expected)[2:] / rdf.error[2:]
    assert np.sqrt(np.mean(pull**2)) < 3.0
    assert rdf.n_blocks == 5


def test_partial_distributions_are_normalized_by_their_own_density():
    frames = ideal_gas(10, 1, [18] * 150 + [10] * 50)
    for pair in (("Ar", "Ne"), ("Ne", "Ar"), ("Ne", "Ne")):
        rdf = radial_distribution(frames, r_max=6.0, n_bins=6, pair=pair)
        assert rdf.g[2:] == pytest.approx(1.0, abs=0.08)
    with pytest.raises(DataError, match="holds no Xe"):
        radial_distribution(frames, pair=("Ar", "Xe"))


def test_difference_of_equal_liquids_is_noise_and_of_unequal_ones_is_not():
    first = radial_distribution(ideal_gas(20, 2), r_max=6.0, n_bins=30)
    second = radial_distribution(ideal_gas(20, 3), r_max=6.0, n_bins=30)
    same = compare_distributions(first, second)
    assert 0.3 < same.integrated_absolute_error / same.expected_from_noise < 3.0
    width = 6.0 / 30
    assert same.total_absolute_error == pytest.approx(same.integrated_absolute_error / width)
    crystal = radial_distribution([bulk("Ar", cubic=True) * (2, 2, 2)], r_max=6.0, n_bins=30)
    assert compare_distributions(first, crystal).integrated_absolute_error > 1.0
    with pytest.raises(DataError, match="cannot be compared"):
        compare_distributions(first, radial_distribution(ideal_gas(2, 0), r_max=5.0, n_bins=30))


def test_distributions_survive_json():
    for n_frames in (1, 5):  # one frame has no error: NaN, which JSON does not know
        rdf = radial_distribution(ideal_gas(n_frames, 4), r_max=5.0, n_bins=10)
        copy = RadialDistribution.from_json(json.loads(json.dumps(rdf.to_json(), allow_nan=False)))
        np.testing.assert_array_equal(copy.error, rdf.error)
        assert compare_distributions(copy, rdf).total_absolute_error == 0.0


def test_distributions_refuse_open_and_empty_trajectories():
    with pytest.raises(DataError, match="at least one frame"):
        radial_distribution([])
    with pytest.raises(DataError, match="periodic along all three axes"):
        radial_distribution([molecule("H2O")])


def test_angles_of_diamond_and_fcc():
    diamond = angular_distributions([bulk("Si", cubic=True)], cutoffs=2.6, n_bins=180)["all"]
    assert diamond.angle[diamond.density > 0] == pytest.approx([109.47], abs=0.5)
    fcc = angular_distributions([bulk("Cu", cubic=True)], cutoffs=3.0, n_bins=36)["all"]
    weights = fcc.density * 5.0
    assert weights.sum() == pytest.approx(1.0)
    assert weights[fcc.angle > 175] == pytest.approx(6 / 66)  # 66 pairs among 12 neighbors
    with pytest.raises(DataError, match="no atom has two neighbors"):
        angular_distributions([bulk("Cu", cubic=True)], cutoffs=1.0)


# -- equation of state and elastic constants -----------------------------------------------------


def test_birch_murnaghan_returns_its_own_parameters():
    v0, e0, b0, slope = 11.3, -3.2, 0.85, 4.7
    volumes = np.linspace(0.9, 1.1, 9) * v0
    eta = (v0 / volumes) ** (2.0 / 3.0) - 1.0
    # as published: E0 + 9 V0 B0 / 16 (eta^3 B0' + eta^2 (6 - 4 (V0/V)^(2/3)))
    energies = e0 + 9 * v0 * b0 / 16 * (
        eta**3 * slope + eta**2 * (6 - 4 * (v0 / volumes) ** (2.0 / 3.0))
    )
    assert fit_birch_murnaghan(volumes, energies) == pytest.approx((v0, e0, b0, slope), rel=1e-7)
    assert fit_birch_murnaghan(volumes, -energies) is None


def test_equation_of_state_of_silver_in_emt():
    # ASE's tutorial gives 100.14 GPa for this potential.
    state = equation_of_state(bulk("Ag", cubic=True), EMT())
    assert state.bulk_modulus == pytest.approx(100.1, abs=0.5)
    assert state.lattice_constant == pytest.approx(4.064, abs=0.002)
    np.testing.assert_allclose(state.fitted_energy(state.volumes), state.energies, atol=1e-4)
    assert state.residual < 1e-4
    record = json.loads(json.dumps(state.to_json(), allow_nan=False))
    assert record["lattice_constant"] == state.lattice_constant


def test_equation_of_state_finds_a_far_minimum():
    near = equation_of_state(bulk("Cu", a=3.6), EMT())
    far = equation_of_state(bulk("Cu", a=4.0), EMT())
    assert far.volume == pytest.approx(near.volume, rel=1e-4)
    assert far.cell_lengths[0] * math.sqrt(2.0) == pytest.approx(3.590, abs=0.002)


def test_equation_of_state_says_when_there_is_no_minimum():
    potential_without_one = LennardJones(sigma=1.0, epsilon=0.0)
    potential_without_one.parameters.epsilon = -1.0
    with pytest.raises(ModelError, match="has no minimum"):
        equation_of_state(bulk("Ar", a=2.0), potential_without_one, n_points=5)
    with pytest.raises(DataError, match="periodic along all three"):
        equation_of_state(molecule("H2O"), EMT())
    with pytest.raises(ConfigError, match="at least 5"):
        equation_of_state(bulk("Cu"), EMT(), n_points=3)


@pytest.fixture(scope="module")
def copper():
    state = equation_of_state(bulk("Cu", cubic=True), EMT(), max_strain=0.01)
    return state, bulk("Cu", a=state.lattice_constant, cubic=True)


def energy_after(atoms: ase.Atoms, voigt: list[float]) -> float:
    strained = deform(atoms, np.array(voigt))
    strained.calc = EMT()
    return strained.get_potential_energy()


def test_elastic_constants_of_copper_against_energies(copper):
    state, atoms = copper
    elastic = elastic_constants(atoms, EMT())
    assert elastic.method == "stress"
    assert elastic.cubic_deviation < 1e-6
    assert elastic.asymmetry < 1e-6
    assert abs(elastic.pressure) < 0.05
    assert elastic.stable
    assert elastic.bulk_modulus == pytest.approx(state.bulk_modulus, rel=0.005)
    # independent: second differences of the energy along tetragonal and shear strains
    h, volume = 0.002, atoms.get_volume()
    middle = 2.0 * energy_after(atoms, [0.0] * 6)
    tetragonal = energy_after(atoms, [h, -h, 0, 0, 0, 0]) + energy_after(atoms, [-h, h, 0, 0, 0, 0])
    shear = energy_after(atoms, [0, 0, 0, h, 0, 0]) + energy_after(atoms, [0, 0, 0, -h, 0, 0])
    difference = (tetragonal - middle) / (2.0 * h**2 * volume) / GPA
    assert elastic.c11 - elastic.c12 == pytest.approx(difference, rel=0.002)
    assert elastic.c44 == pytest.approx((shear - middle) / (h**2 * volume) / GPA, rel=0.002)


def test_elastic_constants_without_stresses(copper):
    _, atoms = copper
    stress = elastic_constants(atoms, EMT())
    energy = elastic_constants(bulk("Cu", a=atoms.cell[0, 0]), NoStress())
    assert energy.method == "energy"
    np.testing.assert_allclose(energy.tensor, stress.tensor, atol=0.2)
    assert energy.pressure == pytest.approx(stress.pressure, abs=0.01)
    with pytest.raises(ConfigError, match="gives no stress"):
        elastic_constants(atoms, NoStress(), method="stress")


def test_relaxed_and_clamped_ions_of_silicon():
    # Tersoff, Phys. Rev. B 38, 9902 (1988): C11 142.5, C12 75.4, C44 69.0, C44 clamped 118.8 GPa.
    calculator = tersoff_silicon()
    state = equation_of_state(bulk("Si"), calculator, max_strain=0.015, n_points=7)
    assert state.lattice_constant == pytest.approx(5.432, abs=0.001)
    assert state.energy == pytest.approx(-4.63, abs=0.005)
    atoms = bulk("Si", a=state.lattice_constant)
    relaxed = elastic_constants(atoms, calculator)
    clamped = elastic_constants(atoms, calculator, relax_ions=False)
    assert (relaxed.c11, relaxed.c12) == pytest.approx((142.5, 75.4), abs=0.1)
    assert relaxed.c44 == pytest.approx(69.0, abs=0.1)
    assert clamped.c44 == pytest.approx(118.8, abs=0.1)


def test_lennard_jones_obeys_the_cauchy_relation():
    # Lattice sums of the fcc crystal: E = -8.61 epsilon, and C12 = C44 at zero pressure.
    calculator = LennardJones(sigma=1.0, epsilon=1.0, rc=7.0)
    state = equation_of_state(bulk("Ar", a=1.54), calculator, n_points=7, max_strain=0.01)
    assert state.energy == pytest.approx(-8.61, rel=0.01)
    nearest = (2.0 * 12.13188 / 14.45392) ** (1.0 / 6.0)
    assert state.cell_lengths[0] == pytest.approx(nearest, rel=0.002)
    atoms = bulk("Ar", a=state.cell_lengths[0] * math.sqrt(2.0))
    elastic = elastic_constants(atoms, calculator, relax_ions=False)
    assert elastic.c12 == pytest.approx(elastic.c44, rel=0.01)


def test_relaxing_the_cell_first():
    atoms = bulk("Cu", a=3.65)
    elastic = elastic_constants(atoms, EMT(), relax_cell=True)
    assert abs(elastic.pressure) < 0.1
    assert elastic.c11 == pytest.approx(172.6, rel=0.01)
    assert atoms.cell[0, 1] == pytest.approx(3.65 / 2)  # the given structure is left alone
    with pytest.raises(ModelError, match="did not reach"):
        elastic_constants(atoms, EMT(), relax_cell=True, max_steps=1)


# -- constant energy -----------------------------------------------------------------------------


def test_emt_conserves_energy():
    atoms = bulk("Cu", cubic=True) * (2, 2, 2)
    run = run_nve(atoms, EMT(), temperature=600, duration=1.0, timestep=2.0, thermalization=0.1)
    assert run.stable
    assert abs(run.drift) < 0.1
    assert abs(run.slope) < 4 * run.slope_error + 0.02
    assert run.duration == pytest.approx(1.0)
    assert 200 < run.mean_temperature < 900
    assert 1.9 < run.shortest_distances["Cu-Cu"] < 2.5
    json.dumps(run.to_json(), allow_nan=False)


def test_nonconservative_forces_show_as_drift():
    atoms = bulk("Cu", cubic=True) * (2, 2, 2)
    settings = {"temperature": 600, "duration": 0.6, "timestep": 2.0, "thermalization": 0.0}
    sound = run_nve(atoms, EMT(), **settings)
    curled = run_nve(atoms, Curl(atoms.positions.copy(), 0.5), **settings)
    assert abs(curled.slope) > 20 * abs(sound.slope)
    assert curled.slope > 5 * curled.slope_error


def test_explosion_is_seen_and_dated():
    atoms = bulk("Cu", cubic=True) * (2, 2, 2)
    settings = {"temperature": 900, "timestep": 40.0, "thermalization": 0.0, "sample_every": 5}
    run = run_nve(atoms, EMT(), duration=20.0, **settings)
    assert not run.stable
    assert 0.0 < run.exploded_at < 20.0
    assert run.reason
    json.dumps(run.to_json(), allow_nan=False)


def test_failing_calculator_ends_the_run_with_its_message():
    class Failing(EMT):
        calls = 0

        def calculate(self, *args, **kwargs) -> None:
            self.calls += 1
            if self.calls > 30:
                raise ValueError("out of my depth")
            super().calculate(*args, **kwargs)

    atoms = bulk("Cu", cubic=True)
    run = run_nve(atoms, Failing(), temperature=300, duration=0.1, thermalization=0.0)
    assert not run.stable
    assert "out of my depth" in run.reason
    with pytest.raises(ConfigError, match="at least one sample"):
        run_nve(atoms, EMT(), temperature=300, duration=0.001)


def test_slope_error_allows_for_correlation():
    rng = np.random.default_rng(0)
    time = np.linspace(0.0, 10.0, 400)
    slopes, errors = [], []
    for _ in range(200):
        noise = np.zeros(400)
        for k in range(1, 400):
            noise[k] = 0.9 * noise[k - 1] + rng.normal()
        slope, error, _ = fit_drift(time, 0.5 * time + noise)
        slopes.append(slope)
        errors.append(error)
    assert np.mean(slopes) == pytest.approx(0.5, abs=3 * np.std(slopes) / math.sqrt(200))
    assert np.mean(errors) == pytest.approx(np.std(slopes), rel=0.25)
    assert all(math.isnan(x) for x in fit_drift(np.zeros(2), np.zeros(2)))


# -- speed, memory, curves, fronts ---------------------------------------------------------------


def test_speed_by_turns():
    class Slow(EMT):
        def calculate(self, *args, **kwargs) -> None:
            for _ in range(4):
                super().calculate(*args, **kwargs)

    table = md_speed(
        {"emt": EMT(), "slow": Slow()},
        bulk("Cu", cubic=True),
        sizes=(8, 32),
        rounds=3,
        seconds_per_round=0.02,
    )
    rows = {(row.name, row.n_atoms): row for row in table.rows}
    assert set(rows) == {("emt", 8), ("emt", 32), ("slow", 8), ("slow", 32)}
    for n in (8, 32):
        ratio = rows["slow", n].cpu_seconds_per_step / rows["emt", n].cpu_seconds_per_step
        assert ratio > 1.5
    row = rows["emt", 32]
    assert row.microseconds_per_atom == pytest.approx(1e6 * row.seconds_per_step / 32)
    assert row.fastest <= row.seconds_per_step <= row.slowest
    assert table.machine["threads"] == torch.get_num_threads()
    json.dumps(table.to_json(), allow_nan=False)


MODULE = """
import numpy as np
from ase.calculators.emt import EMT


class Hungry(EMT):
    def calculate(self, atoms=None, *args, **kwargs):
        block = np.ones((len(atoms), 32 * 1024 // 8))  # 32 KiB per atom
        super().calculate(atoms, *args, **kwargs)
        del block
"""


def test_memory_per_atom_of_a_fresh_process(tmp_path, monkeypatch):
    (tmp_path / "hungry.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    use = memory_per_atom("hungry:Hungry", bulk("Cu", cubic=True), sizes=(500, 2000), n_steps=1)
    assert 30 * 1024 < use.bytes_per_atom < 60 * 1024
    assert use.baseline_bytes > 50e6
    budget = (use.baseline_bytes + 10_000 * use.bytes_per_atom) / 2**30
    assert use.largest_system(budget) == pytest.approx(10_000, abs=1)
    assert use.largest_system(0.0) == 0


def test_memory_leaves_out_what_may_not_fit(monkeypatch):
    asked = []

    def measure(job, label):
        asked.append(job["n_atoms"])
        return job["n_atoms"], 2**28 + job["n_atoms"] * 2**22

    monkeypatch.setattr(memory, "_measure", measure)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=2**33))
    use = memory_per_atom("any", bulk("Cu"), sizes=(4000, 100, 1000, 200))
    assert asked == [100, 200, 1000]
    assert use.left_out == (4000,)
    assert use.bytes_per_atom == pytest.approx(2**22)
    with pytest.raises(DataError, match="choose smaller sizes"):
        memory_per_atom("any", bulk("Cu"), sizes=(100, 10_000))


def test_memory_says_why_a_process_failed():
    with pytest.raises(DataError, match="ended with status 1"):
        memory_per_atom("no_such_module:factory", bulk("Cu"), sizes=(1, 2))
    with pytest.raises(ConfigError, match="two sizes"):
        memory_per_atom("chgnet", bulk("Cu"), sizes=(1,))


def test_calculators_from_text():
    atoms = bulk("Cu", cubic=True)
    calculator = make_calculator("ase.calculators.emt:EMT")
    assert calculator.get_property("energy", atoms) == EMT().get_property("energy", atoms)


def test_speed_counts_the_process_of_a_calculator():
    calculators = {"worker": make_calculator("ase.calculators.emt:EMT"), "here": EMT()}
    table = md_speed(
        calculators, bulk("Cu", cubic=True), sizes=(200,), rounds=2, seconds_per_round=0.4
    )
    used = {row.name: row.cpu_seconds_per_step for row in table.rows}
    assert used["worker"] > 0.6 * used["here"]


def test_learning_curves(tmp_path):
    lines = [
        {"event": "start"},
        {"epoch": 1, "validation": {"forces_rmse": 0.5}, "best": True},
        {"epoch": 2, "validation": {"forces_rmse": 0.4}},
        {"epoch": 2, "validation": {"forces_rmse": 0.3}, "score": None},
        {"epoch": 3, "learning_rate": 0.1},
    ]
    text = "\n".join(json.dumps(line) for line in lines) + '\n{"epoch": 4, "valid'
    (tmp_path / "metrics.jsonl").write_text(text)
    curves = read_learning_curves(tmp_path)
    assert curves.epochs == (1, 2, 3)
    assert curves["validation/forces_rmse"][:2] == (0.5, 0.3)
    assert math.isnan(curves["validation/forces_rmse"][2])
    assert "best" not in curves.series
    with pytest.raises(DataError, match="recorded no"):
        curves["loss"]
    with pytest.raises(DataError, match="does not exist"):
        read_learning_curves(tmp_path / "elsewhere")
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\nrubbish\n{"epoch": 2}\n')
    with pytest.raises(DataError, match="line 2: not JSON"):
        read_learning_curves(tmp_path)


def test_pareto_front():
    costs = [[1, 5], [2, 3], [3, 3], [4, 1], [2, 3], [5, math.nan]]
    assert pareto_front(costs).tolist() == [True, True, False, True, True, False]
    assert pareto_front(np.zeros((0, 2))).tolist() == []
    with pytest.raises(DataError, match="shape"):
        pareto_front([1.0, 2.0])


def test_velocities_have_exactly_the_temperature_and_no_motion_of_the_whole():
    atoms = bulk("Cu", cubic=True) * (2, 2, 2)
    set_temperature(atoms, 450.0, np.random.default_rng(0))
    # The whole is at rest: 3N - 3 degrees of freedom share the energy.
    kinetic = 0.5 * (3 * len(atoms) - 3) * BOLTZMANN * 450.0
    assert atoms.get_kinetic_energy() == pytest.approx(kinetic)
    np.testing.assert_allclose(atoms.get_momenta().sum(axis=0), 0.0, atol=1e-10)
    atoms.set_constraint(FixAtoms([0, 1]))
    set_temperature(atoms, 450.0, np.random.default_rng(0))
    assert atoms.get_temperature() == pytest.approx(450.0)
    assert not atoms.get_momenta()[:2].any()


def test_supercells_and_json():
    assert len(repeat_to(bulk("Cu", cubic=True), 30)) == 32
    assert as_json({"a": np.float64("nan"), "b": (np.arange(2), 1.5)}) == {
        "a": None,
        "b": [[0, 1], 1.5],
    }
