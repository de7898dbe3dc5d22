"""Priors of beads: their fit by Boltzmann inversion, and the same repulsion wherever it runs."""

import itertools
from pathlib import Path

import ase
import numpy as np
import pytest
import torch
from ase.build import bulk

from potstill import core
from potstill.calculators import PotstillCalculator
from potstill.checkpoint import load_potential, save_potential
from potstill.coarse.prior import fit_bonds, fit_prior, fit_repulsion
from potstill.core.model_file import ModelFile
from potstill.deploy import deploy
from potstill.deploy.lammps import why_not_native
from potstill.errors import ConfigError, DataError, ModelError
from potstill.evaluate import lammps_md
from potstill.models import (
    HIPNN,
    ZBL,
    Bonds,
    PairRepulsion,
    SpeciesOffsets,
    SumPotential,
    summands,
)
from potstill.models.engines import NativeParts
from potstill.neighbors import build_neighbor_list
from potstill.sample import MDJob, run_md
from potstill.species import Species, SpeciesTable
from potstill.structures import Properties, Structures
from potstill.train import TrainSettings, train
from potstill.train.data import TrainingSet
from potstill.units import BOLTZMANN
from potstill.workflows.lammps_check import check_parity
from potstill.workflows.parity import random_structures

ALA2 = Path(__file__).parents[1] / ".." / "shared" / "data" / "cg-ala2" / "ala2_5bead.npz"
A, B = Species("A", 60.0), Species("B", 35.0)
TABLE = SpeciesTable((A, B))
#: A's and B's repulsions reach differently far, and A-B is none.
STRENGTH, RADIUS = [[0.3, 0.0], [0.0, 0.1]], [[4.5, 0.0], [0.0, 3.6]]
#: Of all kinds: with equal and with different ends, and between equal beads.
BONDS = Bonds(
    TABLE,
    [(("A", "B"), 2.5, 3.0, 3.2, 3.8), (("B", "B"), 2.2, 1.0, 3.0, 4.2)],
    [(("A", "B", "A"), -0.2, 0.4), (("A", "B", "B"), 0.3, 0.2)],
)
native = pytest.mark.skipif(not core.available(), reason="needs the native core")


def frames_of(positions: np.ndarray, species: list[Species], edge: float = 0.0) -> Structures:
    """Frames of positions (S, n, 3), periodic with an edge in Å."""
    table = SpeciesTable(tuple(dict.fromkeys(species)))
    n, count = len(positions), len(species)
    return Structures(
        positions=torch.from_numpy(positions.reshape(-1, 3)),
        species=torch.tensor([table.index(bead.name) for bead in species]).repeat(n),
        system_index=torch.arange(n).repeat_interleave(count),
        cell=edge * torch.eye(3, dtype=torch.float64).repeat(n, 1, 1),
        pbc=torch.full((n, 3), edge > 0.0),
        species_table=table,
    )


def whole(dtype: torch.dtype = torch.float64, **parts) -> SumPotential:
    torch.manual_seed(0)
    network = HIPNN(TABLE, 6, 5, 2.0, 5.5, 6.0, 1, l_max=1).to(dtype)
    offsets = SpeciesOffsets(TABLE, [-0.3, 0.2])
    repulsion = PairRepulsion(TABLE, STRENGTH, RADIUS)
    return SumPotential({"offsets": offsets, "prior": repulsion, "network": network, **parts})


# -- one repulsion in all engines --------------------------------------------------------------


def dense() -> ase.Atoms:
    """Beads so close that all terms act, angles many at a bead."""
    return random_structures(whole(), density=2.2)["vibrating crystal"]


@native
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("parts", [{}, {"bonds": BONDS}])
def test_kernels_have_the_energies_of_torch(dtype, parts):
    potential = whole(dtype, **parts)
    for atoms in (*random_structures(potential).values(), dense()):
        values = {}
        for kernels in ("native", "torch"):
            moving = atoms.copy()
            moving.calc = PotstillCalculator(potential, core=kernels)
            values[kernels] = [
                moving.get_potential_energies(), moving.get_forces(), moving.get_stress()
            ]  # fmt: skip
        scale = max(1.0, np.abs(values["torch"][1]).max())
        for one, other in zip(*values.values(), strict=True):
            tolerance = 1e-11 if dtype == torch.float64 else 1e-5
            np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * scale)
        repulsion = potential["prior"].predict(Structures.from_ase(atoms, table=TABLE))
        assert repulsion["energy"] > 0.01


@native
def test_the_repulsion_alone_and_what_does_not_fit():
    potential = whole()
    prior = potential["prior"].native_parts().prior
    atoms = random_structures(potential)["hot crystal"]
    structures = Structures.from_ase(atoms, table=TABLE)
    neighbors = build_neighbor_list(structures, 5.0)
    packed = core.compact_neighbors(neighbors, len(atoms))
    place = (structures.species, packed, structures.positions, structures.cell[0])
    found = core.hipnn_md(None, *place, prior=prior)
    twin = potential["prior"].predict(structures, neighbors, ("forces", "atomic_energies"))
    torch.testing.assert_close(found.energies, twin["atomic_energies"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.forces, twin["forces"], rtol=1e-12, atol=1e-11)
    small = core.RepulsionParameters(prior.strength[:1, :1], prior.radius[:1, :1])
    with pytest.raises(ModelError, match="the repulsion is of 1 species, not of 2"):
        core.hipnn_md(None, *place, prior=small)
    assert NativeParts(prior=prior).merged(NativeParts(prior=prior)) is None
    bonds = BONDS.native_parts().bonds
    atoms = dense()
    structures = Structures.from_ase(atoms, table=TABLE)
    neighbors = build_neighbor_list(structures, 5.0)
    packed = core.compact_neighbors(neighbors, len(atoms))
    found = core.hipnn_md(
        None, structures.species, packed, structures.positions, structures.cell[0], bonds=bonds,
        virial=True,
    )  # fmt: skip
    twin = BONDS.predict(structures, neighbors, ("forces", "atomic_energies", "stress"))
    assert float(twin["forces"].abs().max()) > 0.1
    torch.testing.assert_close(found.energies, twin["atomic_energies"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.forces, twin["forces"], rtol=1e-12, atol=1e-11)
    stress = found.virial / structures.volume[0]
    torch.testing.assert_close(stress, twin["stress"][0], rtol=1e-10, atol=1e-12)


@native
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_file_has_the_priors(dtype, tmp_path):
    potential = whole(dtype, bonds=BONDS)
    path, _ = deploy(potential, "lammps", tmp_path, "m")
    file = ModelFile(path)
    assert b'"format_version":"2"' in path.read_bytes()  # which earlier readers refuse
    assert file.species == ("A", "B")
    assert file.cutoff == 6.0
    structures = Structures.from_ase(dense(), table=TABLE)
    pairs = core.build_compact_neighbors(structures, 6.0)
    place = (structures.positions, structures.cell[0])
    found = file.evaluate(structures.species, pairs, *place, dtype=torch.float64)
    expected = potential.double().predict(structures, properties=("forces", "atomic_energies"))
    torch.testing.assert_close(found.energies, expected["atomic_energies"], rtol=0, atol=1e-10)
    torch.testing.assert_close(found.forces, expected["forces"], rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_lammps_has_the_repulsion(dtype, run_of):
    potential = whole(dtype)
    parity = check_parity(potential, run_of(potential), random_structures(potential), steps=20)
    assert len(parity.rows) >= 6


def test_lammps_has_bonds_and_angles(run_of):
    potential = whole(bonds=BONDS)
    run = run_of(potential)
    assert run.model.suffix == ".potstill"
    structures = random_structures(potential) | {"dense": dense()}
    assert check_parity(potential, run, structures, ranks=(1, 2), steps=10).rows


def test_two_sets_of_bonds_are_no_single_native_call():
    assert why_not_native(whole(bonds=BONDS)) is None
    assert "bonds" in why_not_native(whole(bonds=BONDS, more=BONDS))


def test_priors_are_stored(tmp_path):
    potential = whole(bonds=BONDS)
    save_potential(tmp_path / "m.pt", potential, {})
    again, _ = load_potential(tmp_path / "m.pt")
    atoms = random_structures(potential)["hot crystal"]
    structures = Structures.from_ase(atoms, table=TABLE)
    assert again.predict(structures)["energy"].equal(potential.predict(structures)["energy"])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: PairRepulsion(TABLE, [[1.0, 2.0], [3.0, 1.0]], RADIUS), "symmetric 2 x 2"),
        (lambda: PairRepulsion(TABLE, [[-1.0, 0.0], [0.0, 1.0]], RADIUS), "negative"),
        (lambda: PairRepulsion(TABLE, STRENGTH, [[0.0, 0.0], [0.0, 0.0]]), "one pair"),
        (lambda: ZBL(TABLE, 1.0, 2.0), "ZBL needs atomic numbers"),
        (lambda: Bonds(TABLE, [(("A", "C"), 2.0, 1.0, 3.0, 4.0)]), "no species C for the bond A-C"),
        (lambda: Bonds(TABLE, [(("A", "B"), 2.0, 1.0, 1.9, 4.0)]), "length < inner < outer"),
        (lambda: Bonds(TABLE, [(("A", "B"), 2.0, 1.0, 3.0, 4.0)] * 2), "two bonds A-B"),
        (
            lambda: Bonds(TABLE, [(("A", "B"), 2.0, 1.0, 3.0, 4.0)], [(("A", "A", "B"), 0.1, 1.0)]),
            "the angle A-A-B has no bond A-A",
        ),
    ],
)
def test_priors_that_mean_nothing_are_refused(make, words):
    with pytest.raises(ModelError, match=words):
        make()


# -- Boltzmann inversion -----------------------------------------------------------------------

TEMPERATURE = 400.0
THERMAL = BOLTZMANN * TEMPERATURE


def pairs_by_boltzmann(n: int, strength: float, radius: float) -> np.ndarray:
    """Distances of n pairs in a sphere of 8 Å that repel one another."""
    generator = np.random.default_rng(0)
    found: list[float] = []
    while len(found) < n:
        r = 8.0 * generator.random(n) ** (1.0 / 3.0)
        energy = strength * np.maximum((radius / r) ** 4 - 1.0, 0.0) ** 3
        found += r[generator.random(n) < np.exp(-energy / THERMAL)].tolist()
    return np.array(found[:n])


def test_inversion_finds_the_repulsion_that_made_the_pairs():
    """Below its end the fit is the true one less the energy there, where h is a tenth."""
    true = PairRepulsion(SpeciesTable((A,)), [[2.0]], [[4.5]])
    r = pairs_by_boltzmann(60_000, 2.0, 4.5)
    positions = np.zeros((len(r), 2, 3))
    positions[:, 1, 0] = r
    frames = frames_of(positions, [A, A])
    found = fit_repulsion(frames, TEMPERATURE)

    def energy(model: PairRepulsion, distance: float) -> float:
        pair = frames_of(np.array([[[0.0, 0, 0], [distance, 0, 0]]]), [A, A])
        return float(model.predict(pair)["energy"]) / THERMAL

    end = float(found.radius)
    assert energy(true, end) == pytest.approx(np.log(10.0), abs=0.4)
    for distance in (r.min(), 0.5 * (r.min() + end)):
        expected = energy(true, distance) - energy(true, end)
        assert energy(found, distance) == pytest.approx(expected, abs=1.5)
    # Beads do not fuse: the wall is tens of k_B T high soon below the closest pair, then endless.
    assert energy(found, 0.9 * r.min()) > 20.0
    assert energy(found, 0.5 * r.min()) > 1000.0


def test_few_pairs_make_a_wall_as_well():
    positions = np.array([[[0.0, 0, 0], [5.0, 0, 0]], [[0.0, 0, 0], [5.2, 0, 0]]])
    found = fit_repulsion(frames_of(positions, [A, B]), TEMPERATURE)
    assert found.radius[0, 1] == pytest.approx(5.0, abs=0.05)
    assert found.radius[0, 0] == found.radius[1, 1] == 0.0  # never met
    near = frames_of(np.array([[[0.0, 0, 0], [4.5, 0, 0]]]), [A, B])
    assert float(found.predict(near)["energy"]) >= 19.9 * THERMAL
    with pytest.raises(DataError, match="no two beads come within 10 Å"):
        fit_repulsion(frames_of(30.0 * positions, [A, B]), TEMPERATURE)
    with pytest.raises(ConfigError, match="positive temperature"):
        fit_repulsion(near, 0.0)


def molecules(n_frames: int, n_molecules: int = 8, edge: float = 24.0) -> Structures:
    """Bent A-B-A molecules on a lattice, with Gaussian lengths and cosines, in any orientation."""
    generator = np.random.default_rng(1)
    sites = bulk("X", "sc", a=edge / 2, cubic=True).repeat(2).positions
    frames = []
    for _ in range(n_frames):
        beads = []
        for site in sites[:n_molecules]:
            basis, _ = np.linalg.qr(generator.standard_normal((3, 3)))
            lengths = 2.8 + 0.08 * generator.standard_normal(2)
            cosine = -0.3 + 0.1 * generator.standard_normal()
            second = cosine * basis[0] + np.sqrt(1.0 - cosine**2) * basis[1]
            beads += [site + lengths[0] * basis[0], site, site + lengths[1] * second]
        frames.append(beads)
    return frames_of(np.array(frames), [A, B, A] * n_molecules, edge)


def test_bonds_and_angles_have_the_means_and_variances_of_the_data():
    frames = molecules(300)
    found = fit_bonds(frames, TEMPERATURE, [("A", "B")], [("A", "B", "A")])
    (bond,), (angle,) = found.bonds, found.angles
    assert bond.length == pytest.approx(2.8, abs=0.01)
    assert bond.stiffness == pytest.approx(THERMAL / 0.08**2, rel=0.06)
    assert angle.cosine == pytest.approx(-0.3, abs=0.01)
    assert angle.stiffness == pytest.approx(THERMAL / 0.1**2, rel=0.1)
    # Of 4800 bonds and 2400 angles, with half a k_B T each.
    mean = float(found.predict(frames)["energy"].sum()) / THERMAL
    assert mean == pytest.approx(0.5 * (4800 + 2400), rel=0.06)
    prior = fit_prior(frames, TEMPERATURE, bonds=[("A", "B")], angles=[("A", "B", "A")])
    repulsion = next(part for part in summands(prior) if isinstance(part, PairRepulsion))
    assert repulsion.radius[0, 1] == 0.0 < repulsion.radius[0, 0]


def test_bonds_that_distances_do_not_tell_are_refused():
    frames = molecules(20, edge=11.0)
    with pytest.raises(DataError, match=r"bonds A-B cannot be told .* the longest is"):
        fit_bonds(frames, TEMPERATURE, [("A", "B")], [("A", "B", "A")])
    with pytest.raises(ConfigError, match="no bead C among A, B"):
        fit_bonds(frames, TEMPERATURE, [("A", "C")])
    with pytest.raises(ConfigError, match="angles are between bonds"):
        fit_prior(frames, TEMPERATURE, angles=[("A", "B", "A")])
    lone = frames_of(np.array([[[0.0, 0, 0], [2.8, 0, 0]]]), [A, B])
    with pytest.raises(DataError, match="has fewer than 2 beads A"):
        fit_bonds(lone, TEMPERATURE, [("A", "B")], [("A", "B", "A")])


def test_molecules_hold_in_dynamics():
    """The prior alone keeps lengths and angles of its molecules at the temperature it is from."""
    frames = molecules(200)
    prior = fit_prior(frames, TEMPERATURE, bonds=[("A", "B")], angles=[("A", "B", "A")])
    start = frames[0]
    ran = run_md(
        start, PotstillCalculator(prior), temperature=TEMPERATURE, n_frames=20, seed=0,
        timestep=8.0, stride=240.0, equilibration=960.0, thermostat_time=80.0,
    )  # fmt: skip
    again = fit_bonds(ran.structures, TEMPERATURE, [("A", "B")], [("A", "B", "A")])
    (bond,), (angle,) = again.bonds, again.angles
    assert bond.length == pytest.approx(2.8, abs=0.02)
    assert bond.stiffness == pytest.approx(THERMAL / 0.08**2, rel=0.25)
    assert angle.cosine == pytest.approx(-0.3, abs=0.04)
    assert angle.stiffness == pytest.approx(THERMAL / 0.1**2, rel=0.3)


def test_lammps_moves_molecules(lammps, plugin, monkeypatch, tmp_path):
    """By PyTorch inside LAMMPS: without a network there is no native call."""
    monkeypatch.setattr(lammps_md, "build_plugin", lambda _: plugin)
    frames = molecules(100)
    prior = fit_prior(frames, TEMPERATURE, bonds=[("A", "B")], angles=[("A", "B", "A")])
    save_potential(tmp_path / "prior.pt", prior, {})
    engine = lammps_md.lammps_engine(str(tmp_path / "prior.pt"), {}, tmp_path / "model")
    job = MDJob(
        temperature=TEMPERATURE, n_frames=10, timestep=8.0, stride=160.0, equilibration=480.0,
        thermostat_time=80.0,
    )  # fmt: skip
    ran = lammps_md.run_in_lammps(job, frames[0], engine, seed=0, folder=tmp_path / "run")
    (bond,) = fit_bonds(ran.structures, TEMPERATURE, [("A", "B")], [("A", "B", "A")]).bonds
    assert bond.length == pytest.approx(2.8, abs=0.05)
    assert bond.stiffness == pytest.approx(THERMAL / 0.08**2, rel=0.5)


@pytest.mark.skipif(not ALA2.is_file(), reason="needs ../shared/data/cg-ala2")
def test_alanine_dipeptide_has_its_bonds_and_angles():
    with np.load(ALA2) as held:
        names, coords = held["beads"].tolist(), held["coords"][::20].astype(float)
    masses = dict(zip(names, (12.011, 14.007, 12.011, 12.011, 14.007), strict=True))
    frames = frames_of(coords, [Species(name, masses[name]) for name in names])
    bonds = list(itertools.pairwise(names))
    angles = list(zip(names, names[1:], names[2:], strict=False))
    prior = fit_prior(frames, 300.0, bonds=bonds, angles=angles)
    held = next(part for part in summands(prior) if isinstance(part, Bonds))
    # Peptide and CA bonds in Å, and N-CA-C near the tetrahedral angle.
    assert [bond.length for bond in held.bonds] == pytest.approx([1.34, 1.46, 1.53, 1.34], abs=0.03)
    assert np.degrees(np.arccos(held.angles[1].cosine)) == pytest.approx(111.0, abs=3.0)
    ran = run_md(
        frames[0], PotstillCalculator(prior), temperature=300.0, n_frames=20, seed=0,
        timestep=2.0, stride=80.0, equilibration=200.0, thermostat_time=50.0,
    )  # fmt: skip
    energies = prior.predict(ran.structures)["energy"]
    # Four bonds and three angles, half a k_B T each, and little of the repulsion of 1-4 pairs.
    assert float(energies.mean()) / (BOLTZMANN * 300.0) == pytest.approx(3.5, abs=1.5)


# -- training ----------------------------------------------------------------------------------


def test_a_network_learns_what_the_prior_leaves(tmp_path):
    frames = molecules(24)
    prior = fit_prior(frames, TEMPERATURE, bonds=[("A", "B")], angles=[("A", "B", "A")])
    save_potential(tmp_path / "prior.pt", prior, {})
    labels = prior.predict(frames, properties=("forces",))["forces"]
    data = TrainingSet(frames, {"reference": Properties({"forces": labels})})
    settings = TrainSettings.model_validate(
        {
            "model": {
                "kind": "hipnn",
                "hyperparameters": {
                    "n_features": 4,
                    "n_sensitivities": 4,
                    "n_atom_layers": 1,
                    "dist_soft_min": 2.0,
                    "dist_soft_max": 5.5,
                    "dist_hard_max": 6.0,
                },
            },
            "loss": [{"property": "forces", "weight": 1.0}],
            "score": {"weights": {"forces_rmse": 1.0}},
            "energy": {"prior": str(tmp_path / "prior.pt")},
            "epochs": 1,
            "precision": "float64",
        }
    )
    result = train(settings, data, data, tmp_path / "run")
    potential, _ = load_potential(result.best)
    kinds = {part.kind for part in summands(potential)}
    assert kinds == {"offsets", "repulsion", "bonds", "hipnn"}
    # The labels are the prior's own: nothing is left but what an untrained network adds.
    error = (potential.predict(frames, properties=("forces",))["forces"] - labels).square().mean()
    network = potential["network"].predict(frames, properties=("forces",))["forces"]
    assert float(error.sqrt()) == pytest.approx(float(network.square().mean().sqrt()), rel=1e-6)
    assert float(error) < 0.01 * float(labels.square().mean())
    means = potential.predict(frames, properties=("atomic_energies",))["atomic_energies"]
    for k in range(2):
        assert float(means[frames.species == k].mean()) == pytest.approx(0.0, abs=1e-9)
    other = SpeciesTable((B, A))
    with pytest.raises(ConfigError, match=r"is of A, B, and the data are of B, A"):
        train(settings, data.with_species_table(other), data, tmp_path / "other")
