"""Pair potentials: SciPy's splines and LAMMPS' tables as oracles, walls where no data are."""

import ase
import numpy as np
import pytest
import torch
from scipy.interpolate import BSpline
from typer.testing import CliRunner

from lammps_engine import run_lammps
from potstill.checkpoint import load_potential, save_potential
from potstill.cli.app import app
from potstill.deploy import deploy
from potstill.errors import ConfigError, ModelError
from potstill.models import HIPNN, PairPotential, PairRepulsion
from potstill.species import Species, SpeciesTable
from potstill.store import LabeledStore
from potstill.structures import Properties, Structures
from potstill.train import fit_linear
from potstill.workflows.fitting import FitConfig, fit

TABLE = SpeciesTable.from_symbols(["Mg", "O"])
BEADS = SpeciesTable((Species("ion", 35.45), Species("urea-like", 60.06)))


def soft(table=TABLE, cutoff=8.0, spacing=0.25):
    """Repulsive wells of different depths, as coefficients: in the space of the spline."""
    model = PairPotential(table, cutoff, spacing).double()
    x = (torch.arange(model.n_knots, dtype=torch.float64) - 1.0) * model.spacing
    fade = (1.0 - x / cutoff).clamp(min=0.0) ** 3
    rows = [
        fade * (height * torch.exp(-((x / 2.6) ** 2)) - depth * torch.exp(-((x - 4.0) ** 2)))
        for height, depth in ((3.0, 0.05), (2.0, 0.12), (4.0, 0.02))
    ]
    with torch.no_grad():
        model.coefficients.copy_(torch.stack(rows))
    return model


def test_the_spline_is_that_of_scipy():
    model = soft()
    h, n = model.spacing, model.n_knots
    r = torch.linspace(0.01, 7.99, 400, dtype=torch.float64)
    energies, forces = model.table(r)
    for row, u, f in zip(model.coefficients.detach(), energies, forces, strict=True):
        knots = h * np.arange(-3, n + 4)
        spline = BSpline(knots, np.append(row.numpy(), [0.0] * 3), 3)
        np.testing.assert_allclose(u, spline(r.numpy()), atol=1e-12)
        np.testing.assert_allclose(-f, spline.derivative()(r.numpy()), atol=1e-12)
    dimer = Structures.from_ase(ase.Atoms("MgO", [[0, 0, 0], [0, 0, 3.3]]))
    expected, force = model.table(torch.tensor([3.3], dtype=torch.float64))
    found = model.predict(dimer)
    assert float(found["energy"]) == pytest.approx(float(expected[1]), abs=1e-14)
    assert float(found["forces"][1, 2]) == pytest.approx(float(force[1]), abs=1e-14)


def test_a_cutoff_between_knots_is_kept():
    model = PairPotential(TABLE, cutoff=5.0, spacing=0.3)
    assert model.n_knots == 17
    assert model.n_knots * model.spacing == pytest.approx(5.0)
    with pytest.raises(ModelError, match="at least four knots"):
        PairPotential(TABLE, cutoff=1.0, spacing=0.5)


def test_unknown_distances_become_a_smooth_wall():
    model = soft(BEADS)
    before = model.coefficients.detach().clone()
    model.continue_inward({"ion-ion": 2.4, "urea-like-ion": 2.75})
    r = torch.linspace(0.001, 7.9, 4000, dtype=torch.float64)
    energies, forces = model.table(r)
    old = soft(BEADS).table(r)[0]
    for row, start in ((0, 2.5), (1, 2.75)):
        known = r >= start
        assert torch.equal(energies[row, known], old[row, known])
        inside = forces[row, ~known]
        assert float(inside.min()) >= 0.1
        assert float(inside.max()) <= 20.0 + 1e-9
        assert bool((inside.diff() <= 1e-9).all())  # it never falls toward shorter distances
        # Smooth at the start: no step of the force or of its slope beyond the spline's own.
        assert float(forces[row].diff(n=2).abs().max()) < 1e-3
    assert torch.equal(model.coefficients[2], before[2])


def test_an_attraction_at_the_start_is_walled_all_the_same():
    model = soft()
    model.continue_inward({"Mg-O": 4.25})  # beyond the minimum, where the force is negative
    _, forces = model.table(torch.linspace(0.01, 3.5, 50, dtype=torch.float64))
    assert float(forces[1].min()) >= 0.1
    for start, message in (({"Mg-X": 2.0}, "no pair 'Mg-X'"), ({"Mg-O": 7.9}, "from 7.9 Å")):
        with pytest.raises(ModelError, match=message):
            model.continue_inward(start)


def test_lammps_runs_the_table(tmp_path):
    model = soft()
    rng = np.random.default_rng(3)
    grid = np.stack(np.meshgrid(*[np.arange(4)] * 3), axis=-1).reshape(-1, 3)

    atoms = ase.Atoms(
        "MgO" * 32, 3.2 * grid + rng.normal(0.0, 0.3, (64, 3)), cell=[12.8] * 3, pbc=True
    )
    atoms.wrap()
    table, commands = deploy(model, "lammps-table", tmp_path, "soft")
    style = commands.read_text().replace("soft.table", str(table))
    style = "\n".join(line for line in style.splitlines() if not line.startswith("units"))
    found = run_lammps(atoms, list(TABLE.names), style)
    ours = model.predict(Structures.from_ase(atoms), properties=["energy", "forces", "stress"])
    assert sum(found["atomic_energies"]) == pytest.approx(float(ours["energy"]), abs=1e-8)
    np.testing.assert_allclose(ours["forces"], found["forces"], atol=1e-6)
    np.testing.assert_allclose(ours["stress"][0], found["stress"], atol=1e-8)


def test_only_pair_potentials_become_tables(tmp_path):
    with pytest.raises(ModelError, match="runs pair potentials alone, not hipnn"):
        deploy(HIPNN(TABLE), "lammps-table", tmp_path)


def test_checkpoints_of_beads(tmp_path):
    save_potential(tmp_path / "pair.pt", soft(BEADS), {})
    again, _ = load_potential(tmp_path / "pair.pt")
    assert torch.equal(again.coefficients, soft(BEADS).coefficients)
    assert again.species_table == BEADS


# -- force matching ------------------------------------------------------------------------------


def liquid(n_frames=20, seed=0, table=BEADS):
    """Beads at random with a soft core: every distance from about 2 Å is there."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.arange(3)] * 3), axis=-1).reshape(-1, 3)
    frames = []
    for _ in range(n_frames):
        positions = 3.6 * grid + rng.uniform(-1.0, 1.0, (27, 3))
        frames.append(
            Structures(
                positions=torch.from_numpy(positions),
                species=torch.from_numpy(rng.permutation(27) % 2),
                system_index=torch.zeros(27, dtype=torch.int64),
                cell=10.8 * torch.eye(3, dtype=torch.float64)[None],
                pbc=torch.tensor([[True] * 3]),
                species_table=table,
            )
        )
    return Structures.concatenate(frames)


def forces_of(model, structures):
    return model.predict(structures, properties=["forces"])["forces"]


def seen(model, structures):
    """Which coefficients the data determine: all from the first interval with pairs on."""
    first = model.first_distances(structures, least=3)
    n = model.n_knots
    return torch.stack(
        [torch.arange(n) >= round(first[pair] / model.spacing) for pair in model.pairs]
    )


@pytest.mark.parametrize("names", [("forces",), ("energy", "forces", "stress")])
def test_noise_free_labels_give_the_coefficients_back(names):
    truth, model = soft(BEADS), PairPotential(BEADS, 8.0, 0.25).double()
    structures = liquid()
    labels = truth.predict(structures, properties=names).properties
    fit = fit_linear(model, structures, labels, weights=dict.fromkeys(names, 1.0), batch_atoms=90)
    known = seen(model, structures)
    assert int(known.sum()) > 60
    difference = (model.coefficients - truth.coefficients).detach()[known]
    assert float(difference.abs().max()) < 1e-9
    assert fit.weighted_rmse < 1e-10
    assert fit.coefficients.shape == model.coefficients.shape


def test_noise_is_averaged_and_leaves_no_bias():
    """Residuals of the forces over their standard errors are normal: mean 0, variance 1."""
    truth, structures, sigma = soft(BEADS), liquid(40), 0.3
    labels, r = forces_of(truth, structures), torch.arange(3.0, 7.0, 0.5, dtype=torch.float64)
    generator = torch.Generator().manual_seed(5)
    found = []
    for _ in range(30):
        noise = sigma * torch.randn(labels.shape, generator=generator, dtype=torch.float64)
        model = PairPotential(BEADS, 8.0, 0.5).double()
        fit_linear(model, structures, Properties({"forces": labels + noise}), weights={"forces": 1})
        found.append(model.table(r)[1])
    coarse = PairPotential(BEADS, 8.0, 0.5).double()  # what the wider knots can do at best
    fit_linear(coarse, structures, Properties({"forces": labels}), weights={"forces": 1})
    forces = torch.stack(found)
    error = forces.std(dim=0) / len(found) ** 0.5
    pulls = (forces.mean(dim=0) - coarse.table(r)[1]) / error
    assert float(pulls.square().mean()) < 2.0
    assert float(forces.std(dim=0).mean()) < 0.1 * sigma


def test_the_validation_set_chooses_the_penalty():
    truth, structures = soft(BEADS), liquid(8)
    labels = forces_of(truth, structures)
    noise = torch.randn(labels.shape, generator=torch.Generator().manual_seed(2)).double()
    noisy, unseen = Properties({"forces": labels + noise}), liquid(8, seed=9)
    validation = unseen, Properties({"forces": forces_of(truth, unseen)})
    ridges, errors = [0.0, 1e-4, 1e-2, 1.0, 1e6], {}
    for ridge in ridges:
        model = PairPotential(BEADS, 8.0, 0.25).double()
        fit = fit_linear(
            model, structures, noisy, weights={"forces": 1.0}, ridge=ridge, validation=validation
        )
        rest = forces_of(model, unseen) - validation[1]["forces"]
        errors[ridge] = float(rest.square().mean().sqrt())
        assert fit.validation_rmse == pytest.approx(errors[ridge], rel=1e-9)
    chosen = fit_linear(
        model, structures, noisy, weights={"forces": 1.0}, ridge=ridges, validation=validation
    )
    assert chosen.ridge == min(errors, key=errors.get)
    assert chosen.ridge in ridges[1:-1]
    with pytest.raises(ConfigError, match="need a validation set"):
        fit_linear(model, structures, noisy, weights={"forces": 1.0}, ridge=ridges)


def test_the_command_fits_beads_from_a_store(tmp_path):
    truth, structures = soft(BEADS), liquid(30)
    store = LabeledStore.create(tmp_path / "beads.zarr")
    store.append(structures, Properties({"forces": forces_of(truth, structures)}))
    config = tmp_path / "fit.yaml"
    config.write_text(
        f"data: {{store: {store.path}}}\n"
        "model: {kind: pair, cutoff: 8.0, spacing: 0.25}\n"
        "ridge: [1e-8, 1e-4]\n"
    )
    result = CliRunner().invoke(app, ["fit", str(config), "--out", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    assert "(ridge 1e-08)" in result.output
    assert "ion-urea-like" in (tmp_path / "run" / "best.table").read_text()
    potential, _ = load_potential(tmp_path / "run" / "best.pt")
    r = torch.linspace(3.5, 7.9, 50, dtype=torch.float64)
    found, expected = potential["network"].table(r)[1], truth.table(r)[1]
    np.testing.assert_allclose(found, expected, atol=1e-3)
    wrong = config.with_name("wrong.yaml")
    wrong.write_text(config.read_text().replace("spacing", "spacin"))
    result = CliRunner().invoke(app, ["fit", str(wrong), "--out", str(tmp_path / "other")])
    assert result.exit_code == 2
    assert "unknown key 'spacin' in 'model'; did you mean 'spacing'" in " ".join(
        result.output.split()
    )


def test_bonds_are_taken_off_first(tmp_path):
    """The repulsion of a stored prior is no part of the fit, and part of the saved potential."""
    truth, structures = soft(BEADS), liquid(30)
    prior = PairRepulsion(BEADS, [[0.5, 0.4], [0.4, 0.5]], [[3.5, 4.0], [4.0, 3.0]])
    save_potential(tmp_path / "prior.pt", prior, {})
    labels = forces_of(truth, structures) + forces_of(prior, structures)
    store = LabeledStore.create(tmp_path / "beads.zarr")
    store.append(structures, Properties({"forces": labels}))
    config = FitConfig.model_validate(
        {
            "out": str(tmp_path / "run"),
            "data": {"store": str(store.path)},
            "model": {"kind": "pair", "cutoff": 8.0, "spacing": 0.25},
            "prior": str(tmp_path / "prior.pt"),
        }
    )
    assert fit(config).weighted_rmse < 1e-9
    potential, _ = load_potential(tmp_path / "run" / "best.pt")
    assert set(potential.components) == {"prior", "network"}
    r = torch.linspace(3.5, 7.9, 50, dtype=torch.float64)
    np.testing.assert_allclose(potential["network"].table(r)[1], truth.table(r)[1], atol=1e-9)
    assert not (tmp_path / "run" / "best.in").exists()
