"""Models with direct forces: what they give, and what refuses them."""

import json

import numpy as np
import pytest
import torch
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.io import read, write
from typer.testing import CliRunner

from potstill.calculators import PotstillCalculator
from potstill.checkpoint import load_potential, save_potential
from potstill.cli import app
from potstill.errors import ConfigError, ModelError
from potstill.evaluate.nve import run_nve
from potstill.models import ZBL, PaiNN, SpeciesOffsets, SumPotential
from potstill.sample import MDJob
from potstill.sample.md import run_md
from potstill.species import SpeciesTable
from potstill.structures import Structures
from potstill.teachers.potential import PotentialTeacher
from potstill.testing import contract_structures

COPPER = SpeciesTable.from_symbols(["Cu"])


def direct(table=COPPER):
    torch.manual_seed(5)
    return PaiNN(table, 8, 2, num_rbf=6, cutoff=3.5, direct_forces=True).double()


def student():
    return SumPotential({"offsets": SpeciesOffsets(COPPER, [-3.5]), "network": direct()})


def cell():
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.1, seed=2)
    return atoms


def test_forces_are_the_models_own_and_not_the_gradient():
    model = direct()
    structures = contract_structures(model)
    found = model.predict(structures)
    positions = structures.positions.clone().requires_grad_(True)
    moved = Structures(**(vars(structures) | {"positions": positions}))
    energy = model.predict(moved, properties=["energy"], create_graph=True)["energy"]
    (gradient,) = torch.autograd.grad(energy.sum(), positions)
    size = found["forces"].abs().max()
    assert size > 1e-3
    assert (found["forces"] + gradient).abs().max() > 0.1 * size


def test_a_sum_takes_offsets_but_no_potential_with_forces_from_its_energy():
    structures = contract_structures(direct())
    alone, together = direct().predict(structures), student().predict(structures)
    torch.testing.assert_close(together["forces"], alone["forces"])
    shift = -3.5 * structures.n_atoms_per_system
    torch.testing.assert_close(together["energy"], alone["energy"] + shift)
    with pytest.raises(ModelError, match="'network' predicts forces directly"):
        SumPotential({"prior": ZBL(COPPER, 1.0, 2.0), "network": direct()})


def test_a_checkpoint_knows_that_forces_are_direct(tmp_path):
    save_potential(tmp_path / "student.pt", student(), {})
    loaded, _ = load_potential(tmp_path / "student.pt")
    assert loaded.direct_forces
    assert not PotstillCalculator(loaded).conservative


def test_the_calculator_gives_forces_and_no_stress():
    atoms = cell()
    atoms.calc = PotstillCalculator(student())
    expected = student().predict(Structures.from_ase(atoms))
    np.testing.assert_allclose(atoms.get_forces(), expected["forces"], atol=1e-12)
    assert "stress" not in atoms.calc.implemented_properties
    assert "stress" in PotstillCalculator.implemented_properties
    with pytest.raises(Exception, match="stress"):
        atoms.get_stress()


def test_a_teacher_with_direct_forces_says_so_and_labels_no_stress():
    teacher = PotentialTeacher(direct())
    assert not teacher.info.conservative
    assert "stress" not in teacher.properties
    assert not teacher.ase_calculator().conservative


def test_constant_energy_is_refused_unless_forced():
    calculator = PotstillCalculator(student())
    with pytest.raises(ConfigError, match="direct forces do not conserve"):
        run_nve(cell(), calculator, temperature=50.0, duration=0.01)
    settings = {"duration": 0.02, "thermalization": 0.0, "sample_every": 5}
    run = run_nve(cell(), calculator, temperature=50.0, force_nonconservative=True, **settings)
    assert len(run.time) > 1
    start = Structures.from_ase(cell())
    job = {"temperature": 50.0, "n_frames": 1, "seed": 0, "stride": 4.0, "equilibration": 0.0}
    with pytest.raises(ConfigError, match="direct forces do not conserve"):
        run_md(start, calculator, thermostat_time=None, **job)
    assert len(run_md(start, calculator, thermostat_time=50.0, **job)) == 1
    assert len(run_md(start, EMT(), thermostat_time=None, **job)) == 1


def test_plans_of_before_keep_their_fingerprints():
    job = MDJob(temperature=300.0, n_frames=1)
    assert "force_nonconservative" not in json.dumps(job.to_json())
    forced = MDJob(temperature=300.0, n_frames=1, force_nonconservative=True)
    assert forced.to_json()["force_nonconservative"]


def test_md_refuses_before_it_makes_a_folder(tmp_path):
    save_potential(tmp_path / "student.pt", student(), {})
    write(tmp_path / "Cu.xyz", cell())
    (tmp_path / "md.yaml").write_text("equilibration: 0.01\n")
    out = tmp_path / "md"
    args = ["md", tmp_path / "student.pt", tmp_path / "Cu.xyz", "--config", tmp_path / "md.yaml"]
    args += ["--out", out, "--duration", 0.02, "--stride", 10, "--temperature", 50]

    def call(*more):
        return CliRunner().invoke(app, [str(a) for a in (*args, *more)])

    refused = call("--ensemble", "nve")
    assert refused.exit_code == 2
    assert "force_nonconservative" in " ".join(refused.output.split())
    assert "no stress" in " ".join(call("--ensemble", "npt").output.split())
    assert not out.exists()
    assert call("--ensemble", "nve", "--force-nonconservative").exit_code == 0
    assert len(read(out / "trajectory.extxyz", ":")) == 2
