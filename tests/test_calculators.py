"""The ASE calculator: its results, its neighbor list, and its warnings."""

import warnings

import ase
import numpy as np
import pytest
import torch
from ase import units
from ase.build import bulk
from ase.constraints import FixAtoms
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from ase.md.verlet import VelocityVerlet

from potstill.calculators import ExtrapolationWarning, PotstillCalculator
from potstill.checkpoint import save_potential
from potstill.errors import DataError, ModelError
from potstill.models import ANI, ZBL, SpeciesOffsets, SumPotential
from potstill.species import SpeciesTable
from potstill.structures import Structures

TABLE = SpeciesTable.from_symbols(["Cu", "Au"])


@pytest.fixture(scope="module")
def potential():
    torch.manual_seed(3)
    network = ANI(
        TABLE,
        radial_cutoff=4.0,
        angular_cutoff=3.2,
        eta_r=4.0,
        shifts_r=[1.5, 2.5, 3.5],
        eta_a=2.0,
        zeta=4.0,
        shifts_a=[2.0, 3.0],
        shifts_z=[0.4, 1.6, 2.7],
        hidden_widths=[8],
    ).double()
    # The repulsion keeps an untrained network's atoms apart.
    prior = ZBL(TABLE, inner=1.5, cutoff=3.4)
    return SumPotential(
        {"offsets": SpeciesOffsets(TABLE, [-3.0, -4.0]), "prior": prior, "network": network}
    )


def alloy(seed=0, repeat=2):
    atoms = bulk("Cu", cubic=True, a=3.8).repeat(repeat)
    atoms.numbers[::3] = 79
    atoms.rattle(0.05, rng=np.random.default_rng(seed))
    return atoms


def test_results_are_the_prediction(potential):
    atoms = alloy()
    atoms.calc = PotstillCalculator(potential)
    structures = Structures.from_ase(atoms)
    expected = potential.predict(
        structures, properties=["energy", "forces", "stress", "atomic_energies"]
    )
    assert atoms.get_potential_energy() == pytest.approx(float(expected["energy"][0]), rel=1e-13)
    assert atoms.get_potential_energy(force_consistent=True) == atoms.get_potential_energy()
    np.testing.assert_allclose(atoms.get_forces(), expected["forces"].numpy(), atol=1e-12)
    np.testing.assert_allclose(
        atoms.get_potential_energies(), expected["atomic_energies"].numpy(), atol=1e-12
    )
    stress = expected["stress"][0].numpy()
    np.testing.assert_allclose(atoms.get_stress(voigt=False), stress, atol=1e-13)
    voigt = [stress[k] for k in ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1))]
    np.testing.assert_allclose(atoms.get_stress(), voigt, atol=1e-13)
    assert atoms.get_potential_energies().sum() == pytest.approx(atoms.get_potential_energy())


def test_stress_is_the_derivative_of_the_energy(potential):
    atoms = alloy()
    atoms.calc = PotstillCalculator(potential)
    stress = atoms.get_stress(voigt=False)
    for a, b in ((0, 0), (1, 2)):
        energies = []
        for sign in (1.0, -1.0):
            strain = np.eye(3)
            strain[a, b] += sign * 5e-6
            strain[b, a] += sign * 5e-6
            strained = atoms.copy()
            strained.set_cell(atoms.cell.array @ strain, scale_atoms=True)
            strained.calc = atoms.calc
            energies.append(strained.get_potential_energy())
        slope = (energies[0] - energies[1]) / 2e-5 / atoms.get_volume()
        assert stress[a, b] == pytest.approx(slope, abs=1e-7)


def test_open_systems_have_no_stress(potential):
    atoms = alloy(repeat=1)
    atoms.pbc = [True, True, False]
    atoms.calc = PotstillCalculator(potential)
    atoms.get_forces()
    assert "stress" not in atoms.calc.results


def test_the_skin_changes_nothing_along_a_trajectory(potential):
    energies, builds = [], []
    for skin in (0.0, 0.4):
        atoms = alloy()
        atoms.calc = PotstillCalculator(potential, skin=skin)
        MaxwellBoltzmannDistribution(atoms, temperature_K=2000, rng=np.random.default_rng(1))
        dynamics = VelocityVerlet(atoms, 2 * units.fs)
        run = []
        for _ in range(40):
            dynamics.run(1)
            run.append(atoms.get_potential_energy())
        energies.append(run)
        builds.append(atoms.calc.n_neighbor_lists)
    np.testing.assert_allclose(energies[0], energies[1], rtol=0, atol=1e-10)
    assert builds[0] == 41  # without a skin, every step
    assert 2 <= builds[1] < 12


def test_cell_changes_as_in_npt(potential):
    kept, fresh = PotstillCalculator(potential, skin=0.6), None
    rng = np.random.default_rng(4)
    atoms = alloy()
    for _ in range(30):
        strain = np.eye(3) + 0.004 * rng.standard_normal((3, 3))
        atoms.set_cell(atoms.cell.array @ strain, scale_atoms=True)
        atoms.positions += 0.02 * rng.standard_normal(atoms.positions.shape)
        atoms.calc = kept
        energy, forces, stress = (
            atoms.get_potential_energy(),
            atoms.get_forces(),
            atoms.get_stress(),
        )
        fresh = PotstillCalculator(potential, skin=0.0)
        atoms.calc = fresh
        assert energy == pytest.approx(atoms.get_potential_energy(), abs=1e-10)
        np.testing.assert_allclose(forces, atoms.get_forces(), atol=1e-10)
        np.testing.assert_allclose(stress, atoms.get_stress(), atol=1e-12)
    assert kept.n_neighbor_lists < 20


def test_wrapping_numbers_and_periodicity_may_change(potential):
    calculator = PotstillCalculator(potential)
    atoms = alloy()
    atoms.positions += 0.1
    atoms.calc = calculator
    before = atoms.get_potential_energy()
    atoms.positions[0] += atoms.cell[0]
    assert atoms.get_potential_energy() == pytest.approx(before, abs=1e-9)
    for change in ("numbers", "pbc", "delete"):
        if change == "numbers":
            atoms.numbers[:5] = 79
        elif change == "pbc":
            atoms.pbc = [False, True, True]
        else:
            del atoms[3]
        reused = atoms.get_potential_energy()
        atoms.calc = PotstillCalculator(potential)
        assert reused == pytest.approx(atoms.get_potential_energy(), abs=1e-10)
        atoms.calc = calculator


def test_positions_are_not_shared_with_the_atoms(potential):
    atoms = alloy()
    calculator = PotstillCalculator(potential)
    atoms.calc = calculator
    first = atoms.get_forces().copy()
    atoms.positions[0] += 1.0  # in place, as integrators do
    moved = atoms.get_forces()
    assert np.abs(first - moved).max() > 1e-3
    atoms.calc = PotstillCalculator(potential, skin=0.0)
    np.testing.assert_allclose(moved, atoms.get_forces(), atol=1e-10)


def test_constraints_do_not_enter_the_results(potential):
    atoms = alloy(repeat=1)
    atoms.calc = PotstillCalculator(potential)
    free = atoms.get_forces()
    atoms.set_constraint(FixAtoms([0]))
    np.testing.assert_allclose(atoms.get_forces(apply_constraint=False), free, atol=1e-12)


def test_one_atom_and_no_atoms(potential):
    atom = ase.Atoms("Cu", positions=[[1.0, 2.0, 3.0]])
    atom.calc = PotstillCalculator(potential)
    np.testing.assert_array_equal(atom.get_forces(), np.zeros((1, 3)))
    nothing = ase.Atoms()
    nothing.calc = PotstillCalculator(potential)
    assert nothing.get_potential_energy() == 0.0
    assert nothing.get_forces().shape == (0, 3)


INFO = {
    "trained_on": {
        "elements": ["Cu", "Au"],
        "density_g_cm3": [10.0, 14.0],
        "temperature_K": [300.0, 600.0],
        "shortest_distances": {"Cu-Cu": 2.3, "Cu-Au": 2.4, "Au-Au": 2.5},
        "n_frames": 10,
    }
}


def test_no_warning_inside_the_training_range(potential):
    atoms = alloy()
    atoms.calc = PotstillCalculator(potential, info=INFO)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        atoms.get_forces()


def test_density_outside_warns_once(potential):
    atoms = alloy()
    atoms.set_cell(1.1 * atoms.cell.array, scale_atoms=True)
    atoms.calc = PotstillCalculator(potential, info=INFO)
    with pytest.warns(ExtrapolationWarning, match="density of 9"):
        atoms.get_forces()
    atoms.positions[0] += 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        atoms.get_forces()


def test_short_distance_warns_with_its_own_limit(potential):
    # 2.2 Å is fine for Cu-Cu (0.9 x 2.3 = 2.07) and too short for Au-Au (0.9 x 2.5 = 2.25).
    dimer = ase.Atoms("Cu2", positions=[[0, 0, 0], [0, 0, 2.2]])
    dimer.calc = PotstillCalculator(potential, info=INFO)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dimer.get_forces()
    dimer.numbers[:] = 79
    with pytest.warns(ExtrapolationWarning, match=r"atoms 0 and 1 \(Au-Au\) are 2.200 Å apart"):
        dimer.get_forces()


@pytest.mark.parametrize("shrinks", [False, True])
@pytest.mark.parametrize("skin", [0.05, 1.0])
def test_short_distances_are_noticed_at_the_first_step(potential, shrinks, skin):
    atoms = bulk("Cu", cubic=True, a=3.8).repeat(2)
    info = {"trained_on": {"shortest_distances": {"Cu-Cu": 2.3}}}
    atoms.calc = PotstillCalculator(potential, skin=skin, info=info)
    for _ in range(100):
        if shrinks:
            atoms.set_cell(0.99 * atoms.cell.array, scale_atoms=True)
        else:
            atoms.positions[0] += 0.02 * (atoms.positions[1] - atoms.positions[0])
        shortest = atoms.get_all_distances(mic=True)[np.triu_indices(len(atoms), 1)].min()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            atoms.get_forces()
        assert bool(caught) == (shortest < 0.9 * 2.3)
        if caught:
            return
    raise AssertionError("the atoms never came close")


def test_foreign_elements_are_refused(potential):
    atoms = ase.Atoms("CuAl", positions=[[0, 0, 0], [0, 0, 2.6]])
    atoms.calc = PotstillCalculator(potential)
    with pytest.raises(DataError, match="holds Al, but the potential knows only Au, Cu"):
        atoms.get_potential_energy()
    only_copper = {"trained_on": {"elements": ["Cu"]}}
    atoms = alloy()
    atoms.calc = PotstillCalculator(potential, info=only_copper)
    with pytest.raises(DataError, match="holds Au"):
        atoms.get_potential_energy()


def test_from_a_checkpoint(potential, tmp_path):
    path = tmp_path / "student.pt"
    save_potential(path, potential, INFO)
    atoms = alloy()
    atoms.calc = PotstillCalculator(path)
    energy = atoms.get_potential_energy()
    assert atoms.calc.info == INFO
    atoms.calc = PotstillCalculator(potential)
    assert energy == pytest.approx(atoms.get_potential_energy(), rel=1e-13)


def test_negative_skin_is_refused(potential):
    with pytest.raises(ModelError, match="skin"):
        PotstillCalculator(potential, skin=-0.1)
