"""Dynamics that come apart or fuse are found by their neighbors, with and without a cell."""

from __future__ import annotations

import ase
import numpy as np
import pytest
from ase.build import bulk, fcc111, molecule
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms

from potstill.errors import DivergenceError
from potstill.evaluate.base import Findings
from potstill.evaluate.nve import NVE, run_nve
from potstill.sample import MDJob, SamplingPlan, run_plan
from potstill.sample.md import run_md
from potstill.soundness import Connectivity, closest_pairs, degrees_of_freedom, fused
from potstill.structures import Structures


class Bond(Calculator):
    """One spring between the first two atoms."""

    implemented_properties = ("energy", "forces")

    def __init__(self, length: float, constant: float) -> None:
        super().__init__()
        self.length, self.constant = length, constant

    def calculate(self, atoms=None, properties=None, system_changes=all_changes) -> None:
        super().calculate(atoms, properties, system_changes)
        arm = self.atoms.positions[1] - self.atoms.positions[0]
        distance = float(np.linalg.norm(arm))
        pull = self.constant * (distance - self.length) * arm / distance
        forces = np.zeros_like(self.atoms.positions)
        forces[0], forces[1] = pull, -pull
        energy = 0.5 * self.constant * (distance - self.length) ** 2
        self.results = {"energy": energy, "forces": forces}


def symptom(start: ase.Atoms, later: ase.Atoms) -> str:
    return Connectivity.of(Structures.from_ase(start)).symptom(Structures.from_ase(later))


@pytest.mark.parametrize("cell", [None, [30.0, 30.0, 30.0]])
def test_a_molecule_comes_apart_with_and_without_a_cell(cell):
    water = molecule("H2O")
    if cell is not None:
        water.set_cell(cell)
        water.pbc = True
    stretched, torn = water.copy(), water.copy()
    stretched.set_distance(0, 1, 1.5, fix=0)
    torn.set_distance(0, 1, 3.0, fix=0)
    assert symptom(water, stretched) == ""
    assert "2 fragments, 1 at the start; 1 of 3 atoms" in symptom(water, torn)


def test_molecules_of_a_gas_may_drift_apart():
    pair = molecule("H2O")
    other = molecule("H2O")
    other.translate([2.9, 0.0, 0.0])
    pair += other
    apart = pair.copy()
    apart.positions[3:] += [20.0, 0.0, 0.0]
    assert symptom(pair, apart) == ""
    argon = ase.Atoms("Ar2", positions=[[0, 0, 0], [3.8, 0, 0]])
    assert symptom(argon, ase.Atoms("Ar2", positions=[[0, 0, 0], [30.0, 0, 0]])) == ""


def test_crystals_and_slabs_stay_whole_where_they_are():
    hot = bulk("Cu", cubic=True) * (2, 2, 2)
    later = hot.copy()
    later.rattle(0.25, seed=0)
    assert symptom(hot, later) == ""
    slab = fcc111("Al", (2, 2, 3), vacuum=8.0)
    gone = slab.copy()
    gone.positions[-1, 2] += 6.5
    assert "2 fragments" in symptom(slab, gone)


def test_fused_atoms_are_named():
    water = molecule("H2O")
    close = water.copy()
    close.set_distance(0, 1, 0.4, fix=0)
    assert symptom(water, close) == "atoms fused: O and H at 0.40 Å"
    met = closest_pairs(Structures.from_ase(close))
    assert fused(met, {"H-O": 0.9}).startswith("atoms fused: a H-O pair came to 0.40 Å")
    assert fused(met, {"H-O": 0.5}) == ""
    assert fused(met, None) == ""


def carbon_monoxide() -> ase.Atoms:
    return ase.Atoms("CO", positions=[[0.0, 0.0, 0.0], [0.0, 0.0, 1.13]])


def test_md_that_comes_apart_stops_and_keeps_the_sound_frames(tmp_path):
    # The spring wants 6 Å: with this friction it gets there without ever being hot.
    settings = {"temperature": 300.0, "n_frames": 60, "stride": 20.0, "equilibration": 0.0}
    plan = SamplingPlan(
        Structures.from_ase(carbon_monoxide()), [MDJob(**settings, timestep=1.0)], seed=0
    )
    with pytest.raises(DivergenceError, match="came apart: 2 fragments, 1 at the start"):
        run_plan(plan, Bond(6.0, 0.05), tmp_path)
    assert not list(tmp_path.glob("job_*.npz"))  # what came apart is not a finished job
    kept = plan.jobs[0].frames_so_far(plan.start, tmp_path / "job_000")
    assert kept is not None
    whole = Connectivity.of(plan.start)
    assert 1 <= len(kept) < 60
    assert all(whole.symptom(frame) == "" for frame in kept.structures)
    free = run_md(plan.start, Bond(6.0, 0.05), seed=0, allow_dissociation=True, **settings)
    assert len(free) == 60
    assert whole.symptom(free.structures[-1])


@pytest.mark.parametrize(
    ("length", "constant", "reason"),
    [(6.0, 0.01, "came apart: 2 fragments"), (0.2, 0.25, "atoms fused: C and O")],
)
def test_no_drift_is_stated_of_nve_that_is_unsound(length, constant, reason):
    # The spring conserves energy perfectly, which says nothing.
    calculator = Bond(length, constant)
    run = run_nve(
        carbon_monoxide(), calculator, temperature=300.0, duration=1.0, thermalization=0.0
    )
    assert reason in run.reason
    assert NVE.metrics(run) == {"nve_duration": run.duration}
    (verdict,) = NVE.verdicts(Findings({"nve": {"student": run}}))
    assert not verdict.met
    assert "broke down after" in verdict.text
    assert "below" not in verdict.text
    assert run_nve(
        carbon_monoxide(), Bond(1.13, 20.0), temperature=300.0, duration=0.2, thermalization=0.0
    ).stable


def test_thermalization_that_comes_apart_is_an_nve_run_that_broke_down():
    run = run_nve(carbon_monoxide(), Bond(6.0, 0.05), temperature=300.0, duration=0.1)
    assert not run.stable
    assert "came apart" in run.reason


def test_atoms_far_closer_than_in_training_have_fused():
    run = run_nve(
        carbon_monoxide(),
        Bond(1.13, 20.0),
        temperature=300.0,
        duration=0.2,
        thermalization=0.0,
        trained={"C-O": 2.0},
    )
    assert "the training data have none below 2.00 Å" in run.reason


def test_only_free_atoms_have_degrees_of_freedom():
    slab = fcc111("Cu", (2, 2, 3), vacuum=6.0)
    slab.set_constraint(FixAtoms(indices=[0, 1, 2, 3]))
    structures = Structures.from_ase([slab, bulk("Cu")])
    assert degrees_of_freedom(structures).tolist() == [24.0, 3.0]


def test_nve_of_a_slab_has_the_temperature_of_its_free_atoms():
    slab = fcc111("Cu", (2, 2, 3), vacuum=6.0)
    slab.set_constraint(FixAtoms(indices=[0, 1, 2, 3]))
    run = run_nve(slab, EMT(), temperature=400.0, duration=0.002, timestep=1.0,
                  thermalization=0.0, sample_every=1)  # fmt: skip
    # At the very start all energy is kinetic: 12 atoms would make it 267 K.
    assert run.mean_temperature == pytest.approx(400.0, rel=0.05)


def test_a_crystal_that_is_pulled_apart_is_not_sampled() -> None:
    start = Structures.from_ase(bulk("Cu", cubic=True) * (2, 2, 2))
    job = MDJob(n_frames=40, temperature=300.0, pressure=-40.0, stride=20.0, equilibration=0.0)
    with pytest.raises(DivergenceError, match=r"the volume changed by a factor of 1\.5"):
        job.run(start, EMT(), seed=0)
