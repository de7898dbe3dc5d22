import json
import os
from dataclasses import replace
from pathlib import Path

import ase
import numpy as np
import pytest
import torch
from ase.build import bulk, fcc111, molecule
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones
from ase.constraints import FixAtoms

from kill_helper import kill_until_done
from potstill.calculators import PotstillCalculator
from potstill.errors import ConfigError, DataError, DivergenceError
from potstill.models.prior import ZBL
from potstill.neighbors import build_neighbor_list
from potstill.sample import (
    MDJob,
    MinimumJob,
    RattleJob,
    SampledFrames,
    SamplingPlan,
    StrainJob,
    VolumeJob,
    distance_fingerprints,
    drop_duplicates,
    even_in_temperature,
    farthest_points,
    make_job,
    rattle,
    run_md,
    run_plan,
    smallest_supercell,
    split_in_blocks,
    standard_plan,
)
from potstill.sample import md as md_module
from potstill.sample.base import dump_generator, load_generator, make_generator
from potstill.sample.rattle import shortest_distance
from potstill.sample.supercell import cell_heights
from potstill.structures import Structures
from potstill.units import BOLTZMANN, FS_IN_ASE_TIME, GPA
from sample_runner import small_plan

HERE = Path(__file__).parent


def copper(min_atoms: int = 4) -> Structures:
    return smallest_supercell(Structures.from_ase(bulk("Cu", cubic=True)), min_atoms=min_atoms)


class Springs(Calculator):
    """Each atom on a spring of its own to where it was first: cheap, with known fluctuations."""

    implemented_properties = ("energy", "forces")
    constant = 2.0  # eV/Å²

    def __init__(self, home):
        super().__init__()
        self.home = home

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        step = self.atoms.positions - self.home
        self.results = {
            "energy": 0.5 * self.constant * float((step**2).sum()),
            "forces": -self.constant * step,
        }


def assert_same(a: SampledFrames, b: SampledFrames):
    """Bit for bit."""
    for name in ("positions", "velocities", "cell", "species", "system_index", "pbc"):
        assert torch.equal(getattr(a.structures, name), getattr(b.structures, name)), name
    assert a.structures.group == b.structures.group
    assert a.structures.frame_id == b.structures.frame_id
    for name in ("temperature", "pressure", "energy", "job", "time"):
        x, y = getattr(a, name).numpy(), getattr(b, name).numpy()
        assert x.tobytes() == y.tobytes(), name


def temperatures(frames: SampledFrames) -> torch.Tensor:
    """(S,) kinetic temperatures in K."""
    s = frames.structures
    per_atom = 0.5 * s.masses[:, None] * (s.velocities / FS_IN_ASE_TIME) ** 2
    kinetic = torch.zeros(s.n_systems, dtype=torch.float64)
    kinetic.index_add_(0, s.system_index, per_atom.sum(1))
    return kinetic / (1.5 * BOLTZMANN * s.n_atoms_per_system)


# -- random numbers and records ------------------------------------------------------------------


def test_generator_goes_on_where_it_was_saved():
    generator = make_generator(3, 1, 4)
    generator.normal(size=5)
    copy = load_generator(dump_generator(generator))
    assert np.array_equal(generator.normal(size=9), copy.normal(size=9))
    assert not np.array_equal(
        make_generator(3, 1).normal(size=3), make_generator(3, 2).normal(size=3)
    )


def test_frames_survive_a_file_bit_for_bit(tmp_path):
    frames = RattleJob(n_frames=3).run(copper(), seed=1)
    frames.save(tmp_path / "f.npz")
    assert_same(frames, SampledFrames.load(tmp_path / "f.npz"))
    assert_same(SampledFrames.concatenate([frames.select([0]), frames.select([1, 2])]), frames)


def test_load_says_what_is_wrong(tmp_path):
    (tmp_path / "f.npz").write_text("no archive")
    with pytest.raises(DataError, match=r"f\.npz is not a file of sampled frames"):
        SampledFrames.load(tmp_path / "f.npz")


# -- rattle, strain, supercell -------------------------------------------------------------------


def test_rattle_has_the_width_asked_for_and_leaves_fixed_atoms():
    atoms = bulk("Cu", cubic=True) * (4, 4, 4)
    atoms.set_constraint(FixAtoms([0, 1]))
    start = Structures.from_ase(atoms)
    step = rattle(start, 0.1, make_generator(0)).positions - start.positions
    assert not step[:2].any()
    assert float(step[2:].std()) == pytest.approx(0.1, rel=0.1)


def test_rattle_keeps_atoms_apart_or_says_so():
    start = copper()
    nearest = shortest_distance(start)
    assert nearest == pytest.approx(3.61 / 2**0.5)
    frames = RattleJob(n_frames=10, displacement=0.3, closest=0.7).run(start, seed=0)
    assert build_neighbor_list(frames.structures, 0.7 * nearest).n_pairs == 0
    with pytest.raises(ConfigError, match="smaller displacement"):
        rattle(start, 5.0, make_generator(0), closest=2.4)


def test_an_isolated_atom_can_be_rattled():
    start = Structures.from_ase(ase.Atoms("Cu"))
    assert shortest_distance(start) == float("inf")
    assert len(RattleJob(n_frames=2).run(start, seed=0)) == 2


def test_strain_deforms_cell_and_positions_alike():
    start = copper()
    frames = StrainJob(n_frames=20, max_strain=0.1).run(start, seed=5).structures
    fractional = torch.linalg.solve(
        frames.cell.transpose(1, 2), frames.positions.reshape(20, 4, 3).transpose(1, 2)
    )
    assert torch.allclose(fractional[0].T, start.positions @ torch.linalg.inv(start.cell[0]))
    gradient = torch.linalg.inv(start.cell[0]) @ frames.cell
    assert torch.allclose(gradient, gradient.transpose(1, 2))
    largest = float((gradient - torch.eye(3)).abs().max())
    assert 0.08 < largest < 0.1


def test_volume_scan_covers_its_range_evenly():
    frames = VolumeJob(n_frames=5, volume=(0.8, 1.2)).run(copper(), seed=0).structures
    ratio = frames.volume / copper().volume
    assert torch.allclose(ratio, torch.tensor([0.8, 0.9, 1.0, 1.1, 1.2], dtype=torch.float64))


def test_strain_refuses_a_molecule():
    water = Structures.from_ase(molecule("H2O"))
    with pytest.raises(ConfigError, match="not periodic"):
        run_plan(SamplingPlan(water, [StrainJob(n_frames=1)]), None, "unused")


def test_supercell_repeats_like_ase():
    atoms = bulk("NaCl", "rocksalt", a=5.6)
    ours = Structures.from_ase(atoms).repeat((2, 1, 3))
    with pytest.raises(ConfigError, match="not 2"):
        Structures.from_ase([atoms, atoms]).repeat((1, 1, 1))
    theirs = Structures.from_ase(atoms * (2, 1, 3))
    assert torch.allclose(ours.positions, theirs.positions)
    assert torch.allclose(ours.cell, theirs.cell)
    assert torch.equal(ours.species, theirs.species)


@pytest.mark.parametrize(
    ("min_atoms", "min_length", "n_atoms"),
    [(1, 0.0, 2), (64, 0.0, 72), (60, 0.0, 72), (54, 0.0, 54), (1, 8.0, 54)],
)
def test_smallest_supercell(min_atoms, min_length, n_atoms):
    silicon = Structures.from_ase(bulk("Si"))  # heights of 3.135 Å
    big = smallest_supercell(silicon, min_atoms=min_atoms, min_length=min_length)
    assert big.n_atoms == n_atoms
    assert float(cell_heights(big).min()) >= min_length


def test_supercell_of_a_slab_grows_in_its_plane_only():
    slab = Structures.from_ase(fcc111("Cu", (1, 1, 3), vacuum=6.0))
    big = smallest_supercell(slab, min_atoms=24)
    assert big.n_atoms == 27
    assert torch.equal(big.cell[0, 2], slab.cell[0, 2])


def test_supercell_refuses_more_atoms_than_allowed():
    with pytest.raises(ConfigError, match="more than 50"):
        smallest_supercell(copper(), min_length=10.0, max_atoms=50)


# -- molecular dynamics --------------------------------------------------------------------------


def test_langevin_temperature_and_fluctuations_of_springs():
    # 50 atoms on springs: <T> and <u^2> = kT / k are known, and the block error is small.
    start = Structures.from_ase(ase.Atoms("Al50", positions=np.arange(150.0).reshape(50, 3)))
    frames = run_md(
        start,
        Springs(start.positions.numpy()),
        temperature=400.0,
        n_frames=250,
        stride=100.0,
        timestep=4.0,
        thermostat_time=50.0,
        equilibration=1000.0,
        seed=2,
    )
    t = temperatures(frames)
    error = float(t.std()) / len(t) ** 0.5
    assert float(t.mean()) == pytest.approx(400.0, abs=4.0 * error)
    # The width of the canonical distribution: T sqrt(2 / 3N).
    assert float(t.std()) == pytest.approx(400.0 * (2.0 / 150.0) ** 0.5, rel=0.2)
    step = frames.structures.positions.reshape(-1, 50, 3) - start.positions
    expected = BOLTZMANN * 400.0 / Springs.constant
    assert float(step.square().mean()) == pytest.approx(expected, rel=0.05)


def test_pressure_reaches_its_target():
    start = copper(32)
    frames = {
        p: run_md(
            start,
            EMT(),
            temperature=300.0,
            pressure=p,
            n_frames=40,
            stride=40.0,
            timestep=5.0,
            barostat_time=300.0,
            equilibration=400.0,
            seed=1,
        )
        for p in (0.0, 10.0)
    }
    volume = {p: float(f.structures.volume.mean()) / 32 for p, f in frames.items()}
    # EMT copper has a bulk modulus of about 134 GPa: 10 GPa press it by 6 to 7 percent.
    assert volume[10.0] / volume[0.0] == pytest.approx(0.94, abs=0.01)
    pressures = []
    for atoms in frames[10.0].structures.to_ase():
        atoms.calc = EMT()
        pressures.append(-atoms.get_stress(include_ideal_gas=True)[:3].mean() / GPA)
    error = np.std(pressures) / len(pressures) ** 0.5
    assert np.mean(pressures) == pytest.approx(10.0, abs=4.0 * error)
    assert bool((frames[10.0].pressure == 10.0).all())


def test_the_cell_may_change_its_shape_if_asked():
    settings = {"temperature": 300.0, "pressure": 0.0, "n_frames": 2, "stride": 50.0, "seed": 0}
    free = run_md(copper(), EMT(), isotropic=False, equilibration=0.0, **settings).structures
    kept = run_md(copper(), EMT(), isotropic=True, equilibration=0.0, **settings).structures
    for frames, changes in ((free, True), (kept, False)):
        lengths = torch.linalg.vector_norm(frames.cell[-1], dim=1)
        assert bool(lengths.max() - lengths.min() > 1e-6) == changes


def test_ramp_and_times():
    frames = run_md(
        copper(),
        EMT(),
        temperature=(300.0, 700.0),
        n_frames=5,
        stride=20.0,
        timestep=4.0,
        equilibration=30.0,
        seed=0,
    )
    assert frames.temperature.tolist() == [300.0, 400.0, 500.0, 600.0, 700.0]
    assert frames.time.tolist() == [60.0, 80.0, 100.0, 120.0, 140.0]
    assert frames.structures.frame_id[0] == "md 300-700 K: 60 fs"


def test_energies_belong_to_frames():
    frames = run_md(copper(), EMT(), temperature=300.0, n_frames=2, stride=20.0, seed=0)
    for atoms, energy in zip(frames.structures.to_ase(), frames.energy, strict=True):
        atoms.calc = EMT()
        assert atoms.get_potential_energy() == pytest.approx(float(energy), abs=1e-10)


def test_seeds_reproduce_and_differ():
    settings = {"temperature": 300.0, "n_frames": 3, "stride": 20.0, "equilibration": 20.0}
    first = run_md(copper(), EMT(), seed=1, **settings)
    assert_same(first, run_md(copper(), EMT(), seed=1, **settings))
    other = run_md(copper(), EMT(), seed=2, **settings)
    assert not torch.equal(first.structures.positions, other.structures.positions)


def test_force_decorrelation_waits():
    start = Structures.from_ase(ase.Atoms("Al20", positions=np.arange(60.0).reshape(20, 3)))
    settings = {"temperature": 300.0, "n_frames": 10, "stride": 8.0, "timestep": 4.0, "seed": 0}
    springs = Springs(start.positions.numpy())

    def correlations(limit):
        frames = run_md(start, springs, max_force_correlation=limit, **settings)
        steps = frames.structures.positions.reshape(-1, 20, 3) - start.positions
        pairs = zip(steps[:-1].numpy(), steps[1:].numpy(), strict=True)
        return [md_module.force_correlation(a, b) for a, b in pairs], frames.time

    close, _ = correlations(None)
    apart, time = correlations(0.2)
    assert max(close) > 0.8
    assert max(apart) <= 0.2
    assert float(time.diff().max()) > 8.0


def test_fixed_atoms_do_not_move():
    atoms = fcc111("Cu", (2, 2, 3), vacuum=6.0)
    atoms.set_constraint(FixAtoms(indices=[0, 1, 2, 3]))
    start = Structures.from_ase(atoms)
    frames = run_md(start, EMT(), temperature=600.0, n_frames=2, stride=20.0, seed=0).structures
    moved = (frames.positions.reshape(2, 12, 3) - start.positions).abs().amax(dim=(0, 2))
    assert not moved[:4].any()
    assert bool((moved[4:] > 0.01).all())
    with pytest.raises(ConfigError, match=r"not periodic|fixed atoms"):
        run_md(start, EMT(), temperature=600.0, pressure=0.0, n_frames=1, seed=0)


@pytest.mark.parametrize("spacing", [0.3, 1e-9])
def test_explosions_are_reported_in_words(spacing):
    atoms = ase.Atoms("Ar2", positions=[[0, 0, 0], [spacing, 0, 0]], cell=[9, 9, 9], pbc=True)
    start = Structures.from_ase(atoms)
    with pytest.raises(DivergenceError, match=r"'md 300 K' exploded after .* fs"):
        run_md(start, LennardJones(sigma=3.4, epsilon=0.01), temperature=300.0, n_frames=2, seed=0)


def test_md_refuses_what_it_cannot_do():
    start = copper()
    with pytest.raises(ConfigError, match="gives no stress"):
        run_md(
            start,
            Springs(start.positions.numpy()),
            temperature=1.0,
            pressure=0.0,
            n_frames=1,
            seed=0,
        )
    with pytest.raises(ConfigError, match="needs a calculator"):
        run_plan(SamplingPlan(start, [MDJob(temperature=300.0, n_frames=1)]), None, "unused")
    with pytest.raises(ConfigError, match="one structure with atoms"):
        run_md(Structures.concatenate([start, start]), EMT(), temperature=1.0, n_frames=1, seed=0)
    with pytest.raises(ConfigError, match="shorter than its timestep"):
        MDJob(temperature=300.0, n_frames=1, stride=1.0)
    with pytest.raises(ConfigError, match="must be positive"):
        MDJob(temperature=0.0, n_frames=1)


# -- plans ---------------------------------------------------------------------------------------


def test_plan_counts_calls_and_reports_progress(tmp_path):
    class Counting(EMT):
        calls = 0

        def calculate(self, *arguments, **keywords):
            type(self).calls += 1
            super().calculate(*arguments, **keywords)

    jobs = [
        RattleJob(n_frames=2),
        MDJob(temperature=300.0, n_frames=3, stride=10.0, equilibration=25.0),
    ]
    plan = SamplingPlan(copper(), jobs, seed=0)
    seen = []
    frames = run_plan(plan, Counting(), tmp_path, lambda done, total: seen.append((done, total)))
    assert len(frames) == 5
    assert Counting.calls == plan.n_evaluations
    assert seen[-1] == (plan.n_evaluations, plan.n_evaluations)
    assert seen == sorted(seen)
    assert frames.job.tolist() == [0, 0, 1, 1, 1]


def test_plan_refuses_a_folder_of_another_plan(tmp_path):
    plan = SamplingPlan(copper(), [RattleJob(n_frames=2)], seed=0)
    frames = run_plan(plan, None, tmp_path, driver="emt")
    assert_same(run_plan(plan, None, tmp_path, driver="emt"), frames)
    with pytest.raises(ConfigError, match="another sampling plan"):
        run_plan(replace(plan, seed=1), None, tmp_path, driver="emt")
    with pytest.raises(ConfigError, match="frames sampled with 'emt', not 'chgnet'"):
        run_plan(plan, None, tmp_path, driver="chgnet")


class Died(BaseException):
    pass


@pytest.mark.parametrize("after", [False, True])
def test_resumes_after_dying_at_every_replacement_of_a_file(tmp_path, monkeypatch, after):
    plan = small_plan(2)
    whole = run_plan(plan, EMT(), tmp_path / "whole")
    real, calls, deaths = os.replace, 0, 0

    def dying_replace(source, target):
        # Each attempt dies just after its first replacement, or just before its second.
        nonlocal calls
        calls += 1
        if after or calls == 1:
            real(source, target)
        if after or calls == 2:
            raise Died

    monkeypatch.setattr(os, "replace", dying_replace)
    while True:
        calls = 0
        try:
            frames = run_plan(plan, EMT(), tmp_path / "killed")
            break
        except Died:
            deaths += 1
    assert deaths > 15
    assert_same(frames, whole)
    left = sorted(path.name for path in (tmp_path / "killed").iterdir())
    assert left == [*(f"job_{k:03d}.npz" for k in range(5)), "plan.json"]


def test_reused_neighbor_lists_do_not_disturb_resuming(tmp_path, monkeypatch):
    start = copper(32)
    potential = ZBL(start.species_table, inner=2.0, cutoff=4.5)
    job = MDJob(temperature=1500.0, n_frames=8, stride=40.0, timestep=4.0, equilibration=0.0)

    def calculator():
        return PotstillCalculator(potential, skin=1.5)

    once = calculator()
    whole = job.run(start, once, seed=0)
    assert once.n_neighbor_lists < job.n_evaluations / 2
    monkeypatch.setattr(md_module.History, "append", _append_and_die(md_module.History.append))
    for _ in range(8):
        with pytest.raises(Died):
            job.run(start, calculator(), seed=0, folder=tmp_path)
    assert_same(job.run(start, calculator(), seed=0, folder=tmp_path), whole)


def _append_and_die(append):
    def dying(history, state, *, taken):
        append(history, state, taken=taken)
        raise Died

    return dying


#: Of about 630 in all: before the plan is in place, and in every job of dynamics.
OPERATIONS = (4, 153, 299, 51, 12, 30, 7, 15, 23, 11)


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_resumes_after_kill_9(tmp_path, kills):
    script, result = str(HERE / "sample_runner.py"), tmp_path / "frames.npz"
    arguments, folder = [script, str(tmp_path / "killed"), str(result)], tmp_path / "killed"
    assert kill_until_done(arguments, folder, OPERATIONS[:kills]) == [-9] * kills
    frames = SampledFrames.load(result)
    assert_same(frames, run_plan(small_plan(40), EMT(), tmp_path / "whole"))
    assert len(set(frames.structures.fingerprints())) == len(frames)


def test_jobs_from_plain_values():
    for job in small_plan().jobs:
        assert make_job(json.loads(json.dumps(job.to_json()))).to_json() == json.loads(
            json.dumps(job.to_json())
        )
    with pytest.raises(ConfigError, match="did you mean 'rattle'"):
        make_job({"kind": "ratle", "n_frames": 1})
    with pytest.raises(ConfigError, match="did you mean 'stride'"):
        make_job({"kind": "md", "n_frames": 1, "temperature": 300, "strides": 1.0})
    with pytest.raises(ConfigError, match="temperature"):
        make_job({"kind": "md", "n_frames": 1})


def test_standard_plan_shares_frames():
    start = Structures.concatenate([copper(), Structures.from_ase(bulk("Cu"))])
    plan = standard_plan(start, temperature=(300, 1500), n_frames=101, seed=0, pressure=(0.0, 5.0))
    assert sum(job.n_frames for job in plan.jobs) == 101
    kinds = [job.kind for job in plan.jobs]
    assert kinds.count("md") == 2 * 3 * 4
    assert {job.system for job in plan.jobs} == {0, 1}
    water = Structures.from_ase(molecule("H2O"))
    plan = standard_plan(water, temperature=300, n_frames=10, seed=0, pressure=(0.0,))
    assert [job.kind for job in plan.jobs] == ["md", "rattle"]
    plan = standard_plan(start, temperature=300, n_frames=100, seed=0, n_minimum=10)
    assert sum(job.n_frames for job in plan.jobs) == 100
    assert [job.n_frames for job in plan.jobs if job.kind == "minimum"] == [5, 5]
    assert sum(job.n_frames for job in plan.jobs if job.kind == "md") == round(0.75 * 45) * 2


def test_frames_near_the_minimum():
    start = Structures.from_ase(bulk("Cu", a=3.75, cubic=True) * (2, 2, 2))
    job = MinimumJob(n_frames=9, displacement=(0.01, 0.05), strain=(0.005, 0.03))
    frames = job.run(start, EMT(), seed=1).structures
    cells = frames.cell.numpy()
    rest = cells[0] / 2.0
    np.testing.assert_allclose(rest, 3.59 * np.eye(3), atol=0.005)  # EMT's, not the start's
    for k in range(9):
        strain = cells[k] @ np.linalg.inv(cells[0]) - np.eye(3)
        np.testing.assert_allclose(strain, strain.T, atol=1e-9)
        moved = frames[k].positions.numpy() @ np.linalg.inv(cells[k])
        away = (moved - start.positions.numpy() / 7.5) @ cells[0]
        if k % 2:
            assert 0.0 < np.abs(strain).max() <= 0.005 + 0.025 * k / 8
            assert np.abs(away).max() < 1e-6  # atoms follow the cell
        else:
            assert np.abs(strain).max() < 1e-12
            assert away.std() == pytest.approx(0.01 + 0.04 * k / 8, rel=0.25)
    again = job.run(start, EMT(), seed=1).structures
    assert frames.fingerprints() == again.fingerprints()
    water = Structures.from_ase(molecule("H2O"))
    few = replace(job, n_frames=3).run(water, EMT(), seed=1).structures
    assert bool((few.cell == water.cell.repeat(3, 1, 1)).all())
    with pytest.raises(ConfigError, match="needs a calculator"):
        job.run(start, None, seed=1)
    with pytest.raises(ConfigError, match="strain must be"):
        MinimumJob(n_frames=1, strain=(0.03, 0.01))


# -- duplicates and splits -----------------------------------------------------------------------


def test_fingerprints_ignore_what_does_not_matter():
    start = rattle(copper(), 0.1, make_generator(0))
    turn, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))
    turn = torch.from_numpy(turn)
    same = [
        replace(start, positions=start.positions + 0.3),
        replace(start, positions=start.positions @ turn, cell=start.cell @ turn),
        replace(start, positions=start.positions[[2, 0, 3, 1]]),
        start.repeat((2, 1, 1)),
    ]
    reference = distance_fingerprints(start)
    for other in same:
        assert torch.allclose(distance_fingerprints(other), reference, atol=1e-6)
    moved = rattle(start, 0.05, make_generator(1))
    assert float((distance_fingerprints(moved) - reference).square().mean().sqrt()) > 5e-3


def test_fingerprints_of_two_species_and_of_one_atom():
    pair = Structures.from_ase(ase.Atoms("HCl", positions=[[0, 0, 0], [1.3, 0, 0]]))
    single = Structures.from_ase(ase.Atoms("H"))
    both = Structures.concatenate([pair, single])
    prints = distance_fingerprints(both)
    assert prints.shape == (2, 4 * 48)
    assert bool(torch.isfinite(prints).all())
    assert drop_duplicates(both).tolist() == [0, 1]


def test_duplicates_are_dropped_and_neighbors_in_time_are_not():
    job = MDJob(temperature=300.0, n_frames=6, stride=20.0, equilibration=40.0)
    frames = job.run(copper(32), EMT(), seed=0)
    nearly = rattle(frames.structures[2], 1e-5, make_generator(0))
    batch = Structures.concatenate([frames.structures, nearly, frames.structures[4]])
    assert drop_duplicates(batch).tolist() == list(range(6))
    energy = torch.cat([frames.energy, frames.energy[[2, 4]] + torch.tensor([1.0, 0.0])])
    assert drop_duplicates(batch, energy).tolist() == list(range(7))


def test_farthest_points_spread():
    points = torch.tensor([[0.0], [0.1], [5.0], [10.0], [9.9]], dtype=torch.float64)
    assert farthest_points(points, 2, chosen=[0]).tolist() == [3, 2]
    assert sorted(farthest_points(points, 5).tolist()) == [0, 1, 2, 3, 4]
    with pytest.raises(ConfigError, match="cannot choose 6 frames of 5"):
        farthest_points(points, 6)


def fake_frames(n_md: int, n_independent: int) -> SampledFrames:
    one = copper()
    frames = SampledFrames.independent(Structures.concatenate([one] * (2 * n_md + n_independent)))
    nan = torch.full((n_independent,), torch.nan, dtype=torch.float64)
    time = torch.arange(n_md, dtype=torch.float64)
    job = torch.tensor([0] * n_md + [1] * n_md + [2] * n_independent)
    ramp = torch.linspace(300.0, 1500.0, n_md, dtype=torch.float64)
    return replace(
        frames,
        time=torch.cat([time, time, nan]),
        job=job,
        temperature=torch.cat([ramp, ramp * 0 + 300.0, nan]),
    )


def test_blocks_keep_held_out_frames_away_in_time():
    frames = fake_frames(80, 40)
    fractions = {"train": 0.7, "validation": 0.15, "test": 0.15}
    split = split_in_blocks(frames, fractions, seed=3, gap=2)
    used = torch.cat(list(split.values()))
    assert len(set(used.tolist())) == len(used)
    assert len(split["train"]) == pytest.approx(0.7 * 200, abs=8)
    gaps = []
    for a, b in (("train", "validation"), ("train", "test"), ("validation", "test")):
        for job in (0, 1):
            x, y = (split[k][frames.job[split[k]] == job] for k in (a, b))
            gaps.append((x[:, None] - y).abs().flatten())
    assert len(torch.cat(gaps)) > 0
    assert int(torch.cat(gaps).min()) > 2
    for job in (0, 1, 2):
        assert int((frames.job[split["test"]] == job).sum()) > 0
    again = split_in_blocks(frames, fractions, seed=3, gap=2)
    assert all(torch.equal(split[k], again[k]) for k in split)
    with pytest.raises(ConfigError, match="sum to one"):
        split_in_blocks(frames, {"train": 0.5}, seed=0)


@pytest.mark.parametrize(("n_runs", "n_frames"), [(1, 16), (2, 8), (4, 5)])
def test_short_runs_still_leave_frames_to_hold_out(n_runs, n_frames):
    n = n_runs * n_frames
    frames = replace(
        SampledFrames.independent(Structures.concatenate([copper()] * n)),
        time=torch.arange(n_frames, dtype=torch.float64).repeat(n_runs),
        job=torch.arange(n_runs).repeat_interleave(n_frames),
    )
    fractions = {"train": 0.5, "validation": 0.2, "test": 0.3}
    for seed in range(10):
        split = split_in_blocks(frames, fractions, seed=seed, block=4, gap=1)
        assert min(len(systems) for systems in split.values()) >= 2


def test_even_in_temperature():
    frames = fake_frames(80, 0)  # one ramp, and as many frames at 300 K
    chosen = even_in_temperature(frames, 40, n_bins=8)
    hottest = frames.temperature[chosen]
    assert len(set(chosen.tolist())) == 40
    assert int((hottest < 450).sum()) == 5
    assert int((hottest >= 1350).sum()) == 5
