"""Pair potentials: SciPy's splines and LAMMPS' tables as oracles, walls where no data are."""

import ase
import numpy as np
import pytest
import torch
from scipy.interpolate import BSpline

from lammps_engine import run_lammps
from potstill.checkpoint import load_potential, save_potential
from potstill.deploy import deploy
from potstill.errors import ModelError
from potstill.models import HIPNN, PairPotential
from potstill.species import Species, SpeciesTable
from potstill.structures import Structures

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
    np.testing.assert_allclose(ours["forces"], found["forces"], atol=1e-9)
    np.testing.assert_allclose(ours["stress"][0], found["stress"], atol=1e-8)


def test_only_pair_potentials_become_tables(tmp_path):
    with pytest.raises(ModelError, match="runs pair potentials alone, not hipnn"):
        deploy(HIPNN(TABLE), "lammps-table", tmp_path)


def test_checkpoints_of_beads(tmp_path):
    save_potential(tmp_path / "pair.pt", soft(BEADS), {})
    again, _ = load_potential(tmp_path / "pair.pt")
    assert torch.equal(again.coefficients, soft(BEADS).coefficients)
    assert again.species_table == BEADS
