"""Potentials as metatomic models. Needs the extra `metatomic`."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from potstill.calculators import PotstillCalculator
from potstill.checkpoint import save_potential
from potstill.cli import app
from potstill.deploy import deploy
from potstill.errors import ModelError, OptionalDependencyError
from potstill.models import ANI, HIPNN, SNAP, ZBL, PaiNN, SchNet, SpeciesOffsets
from potstill.models import SumPotential as Sum
from potstill.species import Species, SpeciesTable
from potstill.workflows import export as workflow
from students import assert_close, crystal, in_ase, student

metatensor = pytest.importorskip("metatensor.torch", reason="needs the extra 'metatomic'")
metatomic = pytest.importorskip("metatomic.torch", reason="needs the extra 'metatomic'")
metatomic_ase = pytest.importorskip("metatomic_ase", reason="needs the extra 'metatomic'")

TABLE = SpeciesTable.from_symbols(["Al", "Cu"])
SMOOTH = {"invariants": "smooth", "n_channels": 4, "n_triples": 2, "l_max": 3}
ANI_SIZES = {
    **{"radial_cutoff": 3.6, "angular_cutoff": 3.2, "hidden_widths": [6]},
    **{"eta_r": 3.0, "shifts_r": [1.2, 2.4], "eta_a": 2.0, "zeta": 6.0},
    **{"shifts_a": [1.5, 2.5], "shifts_z": [0.4, 1.6, 2.7]},
}


def with_prior(network):
    offsets = SpeciesOffsets(TABLE, [-3.0, -4.0])
    prior = ZBL(TABLE, 1.0, 2.8, "lammps")
    return Sum({"offsets": offsets, "prior": prior, "network": network})


POTENTIALS = {
    "norms": lambda: student("Al", "Cu", cusp_reg=0.01),
    "smooth": lambda: student("Al", "Cu", **SMOOTH, n_interaction_layers=2),
    "network alone": lambda: student("Al", "Cu", **SMOOTH)["network"],
    "schnet": lambda: with_prior(SchNet(TABLE, 6, 5, 2, 7, 3.6).double()),
    "painn": lambda: with_prior(PaiNN(TABLE, 6, 2, 5, 3.6).double()),
    "ani": lambda: with_prior(ANI(TABLE, **ANI_SIZES).double()),
}


def calculator_of(potential, tmp_path, **options):
    file = deploy(potential, "metatomic", tmp_path, "m")[0]
    return metatomic_ase.MetatomicCalculator(str(file), check_consistency=True, **options)


@pytest.mark.parametrize("name", POTENTIALS)
def test_energies_forces_and_stress_are_those_of_ase(name, tmp_path):
    torch.manual_seed(0)
    potential = POTENTIALS[name]()
    calculator = calculator_of(potential, tmp_path)
    for atoms in (crystal("Al", "Cu"), crystal("Cu", "Al", seed=1) * (2, 1, 1)):
        expected = in_ase(potential, atoms)
        atoms.calc = calculator
        found = {"energies": atoms.get_potential_energies(), "forces": atoms.get_forces()}
        assert_close(found | {"stress": atoms.get_stress(voigt=False)}, expected)


def test_energies_of_float32_networks_lose_nothing_to_offsets(tmp_path):
    potential, atoms = student("Al", "Cu", dtype=torch.float32), crystal("Al", "Cu")
    potential["offsets"].offsets.mul_(1e5)
    calculator = calculator_of(potential, tmp_path)
    expected = in_ase(potential, atoms)
    atoms.calc = calculator
    found = {"energies": atoms.get_potential_energies(), "forces": atoms.get_forces()}
    assert_close(found | {"stress": atoms.get_stress(voigt=False)}, expected, 1e-5)


def test_batches_of_systems_and_selected_atoms(tmp_path):
    """Open, empty of pairs, or periodic together; as in domains, only own atoms count."""
    potential = student("Al", "Cu", **SMOOTH)
    cluster, far = crystal("Al", "Cu")[:6], crystal("Al", "Cu")[:2]
    cluster.pbc = far.pbc = False
    far.positions[1] += 30.0
    frames = [crystal("Al", "Cu"), far, cluster]
    expected = [in_ase(potential, frames[0])["energies"]]
    for atoms in frames[1:]:
        copy = atoms.copy()
        copy.calc = PotstillCalculator(potential)
        expected.append(copy.get_potential_energies())
    calculator = calculator_of(potential, tmp_path)
    outputs = {"energy": metatomic.ModelOutput(unit="eV", sample_kind="atom")}
    found = calculator.run_model(frames, outputs)["energy"].block().values[:, 0]
    np.testing.assert_allclose(found.detach(), np.concatenate(expected), rtol=0, atol=1e-11)
    outputs = {"energy": metatomic.ModelOutput(unit="eV", sample_kind="system")}
    chosen = torch.tensor([[0, 3], [2, 1], [2, 2]], dtype=torch.int32)
    labels = metatensor.Labels(["system", "atom"], chosen)
    sums = calculator.run_model(frames, outputs, labels)["energy"].block()
    wanted = [expected[0][3], 0.0, expected[2][1] + expected[2][2]]
    np.testing.assert_allclose(sums.values[:, 0].detach(), wanted, rtol=0, atol=1e-11)


def test_the_file_says_what_it_is(tmp_path):
    potential = student("Al", "Cu", **SMOOTH, n_interaction_layers=2)
    info = {"teacher": {"name": "CHGNet", "license": "BSD-3-Clause"}}
    file = deploy(potential, "metatomic", tmp_path, "student", info)[0]
    assert file.name == "student-metatomic.pt"
    model = metatomic.load_atomistic_model(str(file))
    capabilities, metadata = model.capabilities(), model.metadata()
    assert capabilities.atomic_types == [13, 29]
    assert capabilities.interaction_range == pytest.approx(9.0)
    assert capabilities.length_unit == "angstrom"
    assert capabilities.outputs["energy"].unit == "eV"
    assert (capabilities.dtype, capabilities.supported_devices) == ("float64", ["cpu"])
    (pairs,) = model.requested_neighbor_lists()
    assert (pairs.cutoff, pairs.full_list) == (4.5, True)
    assert metadata.extra["license"] == "BSD-3-Clause"
    assert metadata.extra["teacher"] == "CHGNet"
    assert metadata.references["architecture"] == ["https://doi.org/10.1063/1.5011181"]


def test_the_file_needs_no_potstill(tmp_path):
    potential, atoms = student("Al", "Cu"), crystal("Al", "Cu")
    atoms.write(tmp_path / "cell.traj")
    deploy(potential, "metatomic", tmp_path, "m")
    code = """
import sys
sys.modules["potstill"] = None
import ase.io, metatomic_ase
atoms = ase.io.read("cell.traj")
atoms.calc = metatomic_ase.MetatomicCalculator("m-metatomic.pt")
print(repr(float(atoms.get_potential_energy())))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    expected = in_ase(potential, atoms)["energies"].sum()
    assert float(done.stdout) == pytest.approx(expected, abs=1e-10)


REFUSED = {
    "snap": (lambda: SNAP(TABLE, 4, 3.6, radii=[0.5, 0.4], weights=[1.0, 0.7]), "TorchScript"),
    "capped": (lambda: PaiNN(TABLE, 6, 2, 5, 3.6, max_neighbors=6), "TorchScript"),
    "direct": (lambda: PaiNN(TABLE, 6, 1, 5, 3.6, direct_forces=True), "differentiate the energy"),
    "beads": (lambda: HIPNN(SpeciesTable((Species("W", 72.0),))), "beads have none"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_written_is_refused(name, tmp_path):
    make, words = REFUSED[name]
    with pytest.raises(ModelError, match=words):
        deploy(make(), "metatomic", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_without_metatomic_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "metatomic.torch", None)
    with pytest.raises(OptionalDependencyError, match=r"potstill\[metatomic\]"):
        deploy(student("Al"), "metatomic", tmp_path)


def test_export_compares_it_with_the_checkpoint(tmp_path, monkeypatch):
    save_potential(tmp_path / "best.pt", student("Al", "Cu", dtype=torch.float32), {})
    command = ["export", str(tmp_path / "best.pt"), str(tmp_path / "out"), "--to", "metatomic"]
    result = CliRunner().invoke(app, command, env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    assert "metatomic beside the checkpoint in ASE" in result.output
    assert (tmp_path / "out" / "best-metatomic.pt").exists()

    def spoiled(potential, target, folder, stem, info):
        return deploy(student("Al", "Cu", l_max=1), target, folder, stem, info)

    monkeypatch.setattr(workflow, "deploy", spoiled)
    command[2] = str(tmp_path / "none")
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert not (tmp_path / "none").exists()
