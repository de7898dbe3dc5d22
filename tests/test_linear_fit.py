"""Linear least squares: what made the labels is found again; ranks, weights and gaps are honest."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from ase.build import bulk
from ase.io import write
from typer.testing import CliRunner

from potstill.calculators import PotstillCalculator
from potstill.checkpoint import load_potential
from potstill.cli.app import app
from potstill.errors import ConfigError, DataError, MissingLabelError
from potstill.models import SNAP, ZBL, SumPotential
from potstill.species import SpeciesTable
from potstill.structures import Properties, Structures
from potstill.testing import contract_structures
from potstill.train.linear import fit_linear

TABLE = SpeciesTable.from_symbols(["Al", "Ta"])
NAMES = ["energy", "forces", "stress"]
ONE = {"energy": 1.0, "forces": 1.0, "stress": 1.0}


def make(**changes):
    torch.manual_seed(1)
    settings = dict(twojmax=4, rcutfac=4.0, radii=[0.5, 0.45], weights=[1.0, 0.8])
    return SNAP(TABLE, **(settings | changes)).double()


def data(model, n_seeds=3):
    structures = Structures.concatenate(
        [contract_structures(model, seed) for seed in range(n_seeds)]
    )
    names = tuple(f"group {s % 2}" for s in range(structures.n_systems))
    return replace(structures, group=names)


@pytest.mark.parametrize("changes", [{}, dict(twojmax=2, quadratic=True)])
def test_coefficients_that_made_the_labels_are_found(changes):
    truth, model = make(**changes), make(**changes)
    structures = data(truth)
    baseline = ZBL(TABLE, 1.0, 3.0)
    labels = truth.predict(structures, properties=NAMES).properties
    repulsion = baseline.predict(structures, properties=NAMES)
    labels = Properties({n: labels[n] + repulsion[n] for n in NAMES}, labels.present)
    with torch.no_grad():
        model.coefficients.zero_()
    fit = fit_linear(model, structures, labels, weights=ONE, baseline=baseline, batch_atoms=20)
    assert fit.rank == fit.n_coefficients == truth.coefficients.numel()
    periodic = int(structures.pbc.all(dim=1).sum())  # others have no stress
    assert fit.n_rows == structures.n_systems + 3 * structures.n_atoms + 6 * periodic
    scale = float(truth.coefficients.detach().abs().max())
    assert float((model.coefficients - truth.coefficients).detach().abs().max()) < 1e-7 * scale
    assert fit.weighted_rmse < 1e-9
    assert torch.equal(fit.coefficients, model.coefficients.detach())


def test_each_property_alone_is_explained():
    truth = make(twojmax=3)
    structures = data(truth)
    labels = truth.predict(structures, properties=NAMES).properties
    for name in NAMES:
        model = make(twojmax=3)
        fit = fit_linear(model, structures, labels, weights={name: 2.0})
        found = model.predict(structures, properties=[name])[name]
        there = labels.presence(name, structures.n_systems)
        rows = there[structures.system_index] if name == "forces" else there
        torch.testing.assert_close(found[rows], labels[name][rows], rtol=1e-7, atol=1e-7)
        # Constants shift energies alone: forces and stress leave those of both species open.
        assert fit.rank <= fit.n_coefficients - (0 if name == "energy" else 2)


def test_batches_do_not_matter_and_the_solution_is_the_least_squares_one():
    structures = data(make())
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(structures.n_systems, generator=generator, dtype=torch.float64)
    forces = torch.randn(structures.n_atoms, 3, generator=generator, dtype=torch.float64)
    labels = Properties({"energy": noise, "forces": forces})
    weights = {"energy": {"group 0": 3.0, "group 1": 0.5}, "forces": 0.2}

    def loss(model):
        got = model.predict(structures)
        weight = torch.tensor([3.0, 0.5] * 6, dtype=torch.float64)
        energy = weight * (got["energy"] - noise) / structures.n_atoms_per_system
        rows = energy.square().sum() + (0.2 * (got["forces"] - forces)).square().sum()
        return float(rows)

    fits = []
    for batch_atoms in (1, 1000):
        model = make()
        fit = fit_linear(model, structures, labels, weights=weights, batch_atoms=batch_atoms)
        fits.append(fit.coefficients)
        best = loss(model)
        assert best == pytest.approx(fit.weighted_rmse**2 * fit.n_rows, rel=1e-9)
        for _ in range(4):
            step = torch.randn(model.coefficients.shape, generator=generator).double()
            with torch.no_grad():
                model.coefficients.add_(1e-4 * step)
            assert loss(model) > best
            with torch.no_grad():
                model.coefficients.copy_(fit.coefficients)
    torch.testing.assert_close(*fits, rtol=1e-7, atol=1e-8)


def test_rank_is_reported_and_ridge_shrinks():
    model = make()
    structures = data(model).select([0, 1])
    labels = model.predict(structures, properties=["energy"]).properties
    fit = fit_linear(model, structures, labels, weights={"energy": 1.0})
    assert fit.rank == 2 == fit.n_rows
    found = model.predict(structures, properties=["energy"])["energy"]
    torch.testing.assert_close(found, labels["energy"])
    free = float(fit.coefficients[:, 1:].norm())
    shrunk = fit_linear(model, structures, labels, weights={"energy": 1.0}, ridge=100.0)
    assert float(shrunk.coefficients[:, 1:].norm()) < 0.9 * free


def test_absent_labels_and_zero_weights_give_no_rows():
    truth, model = make(twojmax=2), make(twojmax=2)
    structures = data(truth)
    labels = truth.predict(structures, properties=["energy", "forces"]).properties
    n = structures.n_systems
    wrong = labels["energy"].clone()
    wrong[: n // 2] = np.nan
    labels = Properties(
        {"energy": wrong, "forces": labels["forces"]},
        {"energy": torch.arange(n) >= n // 2},
    )
    weights = {"energy": 1.0, "forces": (torch.arange(n) != 0).double()}
    fit = fit_linear(model, structures, labels, weights=weights)
    atoms = structures.n_atoms - int(structures.n_atoms_per_system[0])
    assert fit.n_rows == n // 2 + 3 * atoms
    torch.testing.assert_close(fit.coefficients, truth.coefficients.detach())


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ({"force": 1.0}, ConfigError, "did you mean 'forces'"),
        ({"stress": 1.0}, MissingLabelError, "no such labels"),
        ({"energy": {"group 0": 1.0}}, ConfigError, "no entry for group 'group 1'"),
        ({"energy": 0.0}, DataError, "nothing to fit"),
        ({}, DataError, "nothing to fit"),
    ],
)
def test_what_cannot_be_fitted_is_refused(weights, error, message):
    model = make(twojmax=1)
    structures = data(model, 1)
    labels = model.predict(structures, properties=["energy"]).properties
    with pytest.raises(error, match=message):
        fit_linear(model, structures, labels, weights=weights)


# -- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def aluminium(tmp_path_factory):
    """A file with crystals that a SNAP potential over a repulsion has labeled, and both."""
    folder = tmp_path_factory.mktemp("fit")
    table = SpeciesTable.from_symbols(["Al"])
    torch.manual_seed(2)
    truth = SNAP(table, twojmax=4, rcutfac=4.0).double()
    usual = ZBL.for_species(table)
    prior = ZBL(table, usual.inner, usual.cutoff, "lammps").double()
    frames = []
    for k in range(10):
        atoms = bulk("Al", cubic=True, a=3.9 + 0.02 * k)
        atoms.rattle(0.1, rng=np.random.default_rng(k))
        atoms.info["config_type"] = "cold" if k % 2 else "hot"
        atoms.calc = PotstillCalculator(SumPotential({"prior": prior, "network": truth}))
        atoms.get_forces(), atoms.get_stress()
        frames.append(atoms)
    write(folder / "train.xyz", frames)
    return folder, truth


def run_fit(folder, **changes):
    settings = {
        "data": {"files": [str(folder / "train.xyz")]},
        "model": {"twojmax": 4, "rcutfac": 4.0},
    }
    (folder / "fit.yaml").write_text(json.dumps(settings | changes))
    command = ["fit", str(folder / "fit.yaml"), "--out", str(folder / "run")]
    shutil.rmtree(folder / "run", ignore_errors=True)
    return CliRunner().invoke(app, command)


def test_the_command_finds_the_potential_and_writes_it_for_lammps(aluminium):
    folder, truth = aluminium
    result = run_fit(folder, weights={"energy": {"hot": 10, "cold": 5}, "forces": 1, "stress": 10})
    assert result.exit_code == 0, result.output
    assert "15 of 15 coefficients" in result.output
    potential, info = load_potential(folder / "run" / "best.pt")
    scale = float(truth.coefficients.detach().abs().max())
    assert torch.allclose(potential["network"].coefficients, truth.coefficients, atol=1e-5 * scale)
    assert info["trained_on"]["elements"] == ["Al"]
    errors = json.loads((folder / "run" / "errors.json").read_text())
    assert set(errors) == {"train", "validation", "test"}
    for part in errors.values():
        assert part["channels"]["student-reference"]["forces_rmse"] < 1e-5 * scale
        assert set(part["groups"]) <= {"hot", "cold"}
    again = SNAP.from_lammps(folder / "run" / "best.snapcoeff", folder / "run" / "best.snapparam")
    assert torch.equal(again.coefficients, potential["network"].coefficients)
    commands = (folder / "run" / "best.in").read_text().splitlines()
    prior = potential["prior"]
    assert f"pair_style hybrid/overlay zbl {prior.inner} {prior.cutoff} snap" in commands
    assert "pair_coeff * * snap best.snapcoeff best.snapparam Al" in commands
    assert "pair_coeff 1 1 zbl 13 13" in commands


def test_mistakes_of_the_command_are_one_sentence(aluminium):
    folder, _ = aluminium
    for changes, message in [
        ({"source": "chgnet"}, "no labels of 'chgnet'"),
        ({"weights": {"charges": 1.0}}, "weights are for energy, forces, stress: 'charges'"),
        ({"weights": {"forces": {"hot": 1.0}}}, "no entry for group 'cold'"),
        ({"model": {"twojmx": 4}}, "twojmax"),
    ]:
        result = run_fit(folder, **changes)
        assert result.exit_code == 2
        assert message in " ".join(result.output.split())
