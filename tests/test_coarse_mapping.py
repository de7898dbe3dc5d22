"""Mapping of trajectories to beads: exact mean forces, MDAnalysis, refusals, resuming."""

import sys
import tracemalloc
import warnings
from dataclasses import replace
from pathlib import Path

import ase
import ase.io
import numpy as np
import pytest
from typer.testing import CliRunner

from data import data_path
from potstill.cli import app
from potstill.coarse import (
    MappingSettings,
    Residue,
    TrajectoryFile,
    map_trajectory,
    open_trajectory,
    optimal_force_map,
)
from potstill.coarse.beads import find_beads
from potstill.coarse.topology import topology_of
from potstill.coarse.trajectory import Part, Snapshot, Trajectory
from potstill.config import read_yaml
from potstill.errors import (
    ConfigError,
    DataError,
    MissingLabelError,
    OptionalDependencyError,
    StoreError,
)
from potstill.readers import Units
from potstill.store import LabeledStore
from potstill.units import force_factor

KT = 0.03


def trajectory_of(topology, positions, forces, cell=None):
    """A trajectory in memory: positions and forces (F, N, 3), one cell or none."""
    periodic = np.full(3, cell is not None)
    box = np.zeros((3, 3)) if cell is None else cell

    def snapshot(k: int) -> Snapshot:
        return Snapshot(f"memory:{k}", positions[k], forces[k], box, periodic)

    n_frames, n_atoms = positions.shape[:2]
    part = Part("memory", n_frames, n_atoms, lambda k: map(snapshot, range(k, n_frames)))
    return Trajectory(topology, (part,))


def beads_of(store_path, n_beads):
    """Positions and forces (F, n_beads, 3) in a store."""
    store = LabeledStore.open(store_path)
    positions = store.structures().positions.numpy().reshape(-1, n_beads, 3)
    return positions, store.labels("reference")["forces"].numpy().reshape(-1, n_beads, 3)


# -- exactly known mean forces --------------------------------------------------------------------

#: Stiffness (eV/Å²) of two chains of four atoms: springs inside, weaker ones between, and to the
#: origin, all Gaussian, so that the free energy of any linear mapping is known.
SPRINGS = [(0, 1, 2.0), (1, 2, 20.0), (2, 3, 3.0), (0, 2, 1.0)]
MASSES = {"A": 12.0, "B": 1.0, "C": 14.0, "D": 3.0}
CHAINS = topology_of([Residue(name="CHN", atoms=("A", "B", "C", "D"), count=2)], "chains")


def stiffness() -> np.ndarray:
    springs = [(i + 4 * m, j + 4 * m, k) for m in (0, 1) for i, j, k in SPRINGS]
    springs += [(0, 5, 0.4), (3, 6, 0.7)]
    matrix = 0.05 * np.eye(8)
    for i, j, k in springs:
        matrix[[i, j], [i, j]] += k
        matrix[[i, j], [j, i]] -= k
    return matrix


CHAIN_BEADS = {
    "two": {
        "head": {"residue": "CHN", "atoms": ["A", "B"]},
        "tail": {"residue": "CHN", "atoms": ["C", "D"]},
    },
    "one": {"chain": {"residue": "CHN"}},
    "excluding": {"head": {"atoms": ["A", "B"]}, "end": {"atoms": ["D"]}},
}


@pytest.mark.parametrize("force_map", ["sum", "optimal"])
@pytest.mark.parametrize("center", ["mass", "geometry"])
@pytest.mark.parametrize("beads", CHAIN_BEADS)
def test_mapped_forces_are_minus_the_gradient_of_the_free_energy(
    beads, center, force_map, tmp_path
):
    rng = np.random.default_rng(5)
    matrix, n = stiffness(), 2_000
    covariance = np.linalg.inv(matrix)
    settings = MappingSettings(
        beads=CHAIN_BEADS[beads],
        exclude=[{"atoms": ["C"]}] if beads == "excluding" else (),
        center=center,
        force_map=force_map,
    )
    topology = CHAINS.with_masses(MASSES)
    weights = find_beads(topology, settings).center_map.toarray()
    coarse = np.linalg.inv(weights @ covariance @ weights.T)  # of the free energy, exactly
    # Atoms at fixed beads: the conditional distribution of a Gaussian.
    fixed = rng.normal(0, 0.05, (len(weights), 3))
    gain = covariance @ weights.T @ coarse
    root = np.linalg.cholesky(KT * covariance)
    free = np.einsum("ij,fjx->fix", root, rng.normal(size=(n, 8, 3)))
    positions = free + gain @ (fixed - weights @ free)
    path = tmp_path / "beads.zarr"
    report = map_trajectory(trajectory_of(topology, positions, -matrix @ positions), settings, path)
    found, forces = beads_of(path, len(weights))
    assert np.abs(found - fixed).max() < 1e-9
    error = forces.std(0) / np.sqrt(n)
    assert (np.abs(forces.mean(0) + coarse @ fixed) < 4.5 * error + 1e-9).all()
    for bead in report.beads.values():
        assert bead["rms_optimal"] <= bead["rms_sum"] * (1 + 1e-12)
    if beads == "two":  # the boundary cuts a stiff bond
        assert report.beads["head"]["rms_optimal"] < 0.6 * report.beads["head"]["rms_sum"]
    if force_map == "sum" and beads != "excluding":
        total = (-matrix @ positions).sum(1)
        assert np.abs(forces.sum(1) - total).max() < 1e-9
        assert report.net_force["beads"] == pytest.approx(report.net_force["atoms"])


@pytest.fixture
def rigid():
    """A dumbbell of fixed length 1 and a spring to a third atom, at fixed beads {a}, {b, c}.

    With beads R apart the bond's direction n has the density exp(kappa R.n): the free energy is
    k (R² + 1) / (2 w²) - kT ln(sinh(kappa R) / (kappa R)), w the weight of c in its bead.
    """
    rng, copies, frames = np.random.default_rng(2), 100, 300
    n, k, w, distance = copies * frames, 0.04, 0.75, 0.9
    kappa = k / (w * w * KT)
    x = kappa * distance
    cosine = np.log(np.exp(-x) + rng.uniform(size=n) * (np.exp(x) - np.exp(-x))) / x
    angle, sine = rng.uniform(0, 2 * np.pi, n), np.sqrt(1 - cosine**2)
    bond = np.stack([sine * np.cos(angle), sine * np.sin(angle), cosine], axis=1)
    origin = np.array([0.3, -0.2, 0.5])
    bead = origin + np.array([0, 0, distance])
    a = np.broadcast_to(origin, (n, 3))
    b = a + bond
    c = (bead - (1 - w) * b) / w
    spring = -k * (c - b)
    residue = Residue(name="RIG", atoms=("a", "b", "c"), count=copies)
    topology = topology_of([residue], "rigid")
    trajectory = trajectory_of(
        topology.with_masses({"a": 1.0, "b": 1.0, "c": 3.0}),
        np.stack([a, b, c], axis=1).reshape(frames, -1, 3),
        np.stack([0 * spring, -spring, spring], axis=1).reshape(frames, -1, 3),
    )
    mean = -(k * distance / w**2 - KT * (kappa / np.tanh(x) - 1 / distance))
    return trajectory, mean


def test_a_map_that_heeds_constraints_gives_the_mean_force(rigid, tmp_path):
    trajectory, mean = rigid
    beads = {"first": {"atoms": ["a"]}, "rest": {"atoms": ["b", "c"]}}
    report = map_trajectory(trajectory, MappingSettings(beads=beads), tmp_path / "s.zarr")
    forces = beads_of(tmp_path / "s.zarr", 200)[1].reshape(-1, 2, 3)
    error = forces.std(0) / np.sqrt(len(forces))
    assert abs(mean) > 20 * error.max()
    assert np.abs(forces.mean(0)[1] - [0, 0, mean]).max() < 4 * error.max()
    assert np.abs(forces.mean(0)[0] + [0, 0, mean]).max() < 4 * error.max()
    (molecule,) = report.molecules
    assert molecule["constrained"] == [[0, 1]]
    assert molecule["cut"] == 1
    assert report.beads["rest"]["rms_sum"] is None  # the sum would be zero here


def test_a_plain_sum_that_cuts_a_constraint_is_refused(rigid, tmp_path):
    trajectory, _ = rigid
    beads = {"first": {"atoms": ["a"]}, "rest": {"atoms": ["b", "c"]}}
    settings = MappingSettings(beads=beads, force_map="sum")
    with pytest.raises(DataError, match=r"a of residue RIG 0 .* constrained.*force_map: optimal"):
        map_trajectory(trajectory, settings, tmp_path / "s.zarr")
    alone = {"first": {"atoms": ["a"]}, "second": {"atoms": ["b"]}}
    settings = MappingSettings(beads=alone, exclude={"atoms": ["c"]})
    with pytest.raises(DataError, match=r"RIG: no linear force map .* into one bead"):
        map_trajectory(trajectory, settings, tmp_path / "s.zarr")
    assert list(tmp_path.iterdir()) == []


# -- the optimal map as an optimization -----------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_no_feasible_map_has_less_variance_than_the_optimal_one(seed):
    rng = np.random.default_rng(seed)
    bead_of = np.array([0, 0, 0, 1, 1, 1, 1, -1, 2, 2])
    k = len(bead_of)
    root = rng.normal(size=(k, k))
    moments = root @ root.T
    plain = (bead_of == np.arange(3)[:, None]).astype(float)
    weights = plain * rng.uniform(0.2, 1, k)
    weights /= weights.sum(1, keepdims=True)
    constrained = np.array([(0, 1), (3, 4), (4, 5)])
    best = optimal_force_map(moments, weights, constrained, plain)
    assert np.abs(best @ weights.T - np.eye(3)).max() < 1e-10
    for i, j in constrained:
        assert np.array_equal(best[:, i], best[:, j])

    def variance(force_map):
        return np.einsum("bi,ij,bj->b", force_map, moments, force_map)

    assert (variance(best) <= variance(plain)).all()
    for _ in range(20):  # feasible neighbors: projected random steps
        step = rng.normal(size=best.shape)
        step[:, [0, 1]] = step[:, [0, 1]].mean(1, keepdims=True)
        step[:, 3:6] = step[:, 3:6].mean(1, keepdims=True)
        other = optimal_force_map(np.eye(k) * 1e-9, weights, constrained, best + 0.1 * step, 1e9)
        assert np.abs(other @ weights.T - np.eye(3)).max() < 1e-8
        assert (variance(best) <= variance(other) + 1e-9).all()
    pulled = [optimal_force_map(moments, weights, constrained, plain, r) for r in (0.1, 1.0, 1e9)]
    assert np.abs(pulled[2] - plain).max() < 1e-6
    rising = [variance(m).sum() for m in (best, *pulled)]
    assert rising == sorted(rising)
    assert (variance(pulled[0]) <= variance(plain)).all()


# -- periodic boundaries, chunks, resuming --------------------------------------------------------


SKEWED = np.array([[9.0, 0, 0], [2.0, 8.5, 0], [-1.5, 1.0, 9.5]])


def solvent(n_frames=30, bonds=True, cell=SKEWED):
    """Molecules X-Y-Y of 30 copies in a cell, whole, some across the boundary."""
    rng = np.random.default_rng(0)
    topology = topology_of([Residue(name="XYY", atoms=("X", "Y", "Y"), count=30)], "solvent")
    topology = topology.with_masses({"X": 16.0, "Y": 1.5})
    if bonds:
        first = 3 * np.arange(30)
        pairs = [np.stack([first, first + k], axis=1) for k in (1, 2)]
        topology = replace(topology, bonds=np.concatenate(pairs))
    centers = rng.uniform(0, 1, (n_frames, 30, 1, 3)) @ cell
    atoms = centers + rng.normal(0, 0.5, (n_frames, 30, 3, 3))
    forces = rng.normal(size=(n_frames, 90, 3))
    return topology, atoms.reshape(n_frames, 90, 3), forces, cell


XYY = MappingSettings(beads={"W": {"residue": "XYY"}})


@pytest.mark.parametrize("bonds", [True, False])
def test_wrapping_changes_nothing_but_lattice_vectors(bonds, tmp_path):
    topology, positions, forces, cell = solvent(bonds=bonds)
    rng = np.random.default_rng(1)
    wrapped = positions + rng.integers(-2, 3, positions.shape) @ cell
    for name, x in (("whole", positions), ("wrapped", wrapped)):
        map_trajectory(trajectory_of(topology, x, forces, cell), XYY, tmp_path / name)
    whole, wrapped_beads = beads_of(tmp_path / "whole", 30), beads_of(tmp_path / "wrapped", 30)
    center = (positions.reshape(-1, 30, 3, 3) * [[16.0], [1.5], [1.5]]).sum(2) / 19.0
    assert np.abs(whole[0] - center).max() < 1e-10
    shifts = (wrapped_beads[0] - whole[0]) @ np.linalg.inv(cell)
    assert np.abs(shifts - np.round(shifts)).max() < 1e-10
    assert np.abs(wrapped_beads[1] - whole[1]).max() < 1e-9


def test_a_bead_of_half_the_cell_is_refused(tmp_path):
    topology, positions, forces, cell = solvent(n_frames=12)
    trajectory = trajectory_of(topology, positions, forces, cell * 0.3)
    with pytest.raises(DataError, match=r"memory:0: bead \d+ \('W'\) is larger than half"):
        map_trajectory(trajectory, XYY, tmp_path / "s")


def test_topology_of_another_order_is_refused(tmp_path):
    topology, positions, forces, cell = solvent(n_frames=12)
    shuffled = positions[:, np.random.default_rng(0).permutation(90)]
    with pytest.raises(DataError, match="Å long: solvent and the trajectory do not belong"):
        map_trajectory(trajectory_of(topology, 3 * shuffled, forces, 3 * cell), XYY, tmp_path / "s")


def test_chunks_and_interruptions_change_nothing(tmp_path):
    topology, positions, forces, cell = solvent()
    trajectory = trajectory_of(topology, positions, forces, cell)
    prints = []
    for chunk in (1, 7, None):
        out = tmp_path / f"chunk{chunk}"
        map_trajectory(
            trajectory, XYY, out, chunk=chunk, info={"temperature": 300.0, "box": (1, 2)}
        )
        prints.append(LabeledStore.open(out).fingerprint())

    def interrupt(what, done, total):
        if (what, done) == ("mapping", 20):
            raise KeyboardInterrupt

    out = tmp_path / "resumed"
    with pytest.raises(KeyboardInterrupt):
        map_trajectory(trajectory, XYY, out, chunk=8, progress=interrupt)
    assert not out.exists()
    done = []
    map_trajectory(trajectory, XYY, out, chunk=8, progress=lambda *step: done.append(step))
    assert [n for what, n, _ in done if what == "mapping"] == list(range(17, 31))
    prints.append(LabeledStore.open(out).fingerprint())
    assert len(set(prints)) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"chunk1", "chunk7", "chunkNone", out.name}
    store = LabeledStore.open(tmp_path / "chunk7")
    store.verify()
    assert store.info["temperature"] == 300.0
    assert store.structures().frame_id[3] == "memory:3"
    (species,) = store.species_table.entries
    assert (species.name, species.mass, species.atomic_number) == ("W", 19.0, None)


def test_an_earlier_result_is_never_overwritten(tmp_path):
    topology, positions, forces, cell = solvent()
    trajectory, out = trajectory_of(topology, positions, forces, cell), tmp_path / "s"
    report = map_trajectory(trajectory, XYY, out)
    before = (out / "commit.json").read_bytes()
    steps = []
    again = map_trajectory(trajectory, XYY, out, progress=lambda *step: steps.append(step))
    assert (again, steps) == (report, [])
    other = XYY.model_copy(update={"force_map": "sum"})
    with pytest.raises(StoreError, match="holds something else than this mapping"):
        map_trajectory(trajectory, other, out)
    assert (out / "commit.json").read_bytes() == before


def test_too_few_frames_do_not_tell_constraints(tmp_path):
    positions = np.random.default_rng(0).normal(size=(2, 8, 3))
    trajectory = trajectory_of(CHAINS.with_masses(MASSES), positions, positions)
    settings = MappingSettings(beads=CHAIN_BEADS["one"])
    with pytest.raises(DataError, match="4 configurations of CHN are too few"):
        map_trajectory(trajectory, settings, tmp_path / "s")
    free = settings.model_copy(update={"constraint_tolerance": 0.0})
    assert map_trajectory(trajectory, free, tmp_path / "s").n_frames == 2


# -- refusals -------------------------------------------------------------------------------------

PAIR = topology_of(
    [Residue(name="CHN", atoms=("A", "B", "C", "D")), Residue(name="ION", atoms=("A",))], "pair"
).with_masses({"A": 12.0, "B": 1.0, "C": 14.0})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"x": {"residue": "CHM"}}, "bead 'x': no residue is called 'CHM'; did you mean 'CHN'"),
        ({"x": {"residue": "CHN", "atoms": ["A", "b"]}}, "residue CHN 0 has no atom called 'b'"),
        ({"x": {"atoms": ["E"]}}, "bead 'x': residue CHN 0 has no atom called 'E'"),
        ({"x": {"residue": "CHN"}}, r"A of residue ION 1 \(atom 4\) is in no bead: add it to one"),
        ({"x": {"residue": "CHN"}, "y": {"atoms": ["C"]}}, "C .* is in two beads, 'x' and 'y'"),
        ({"x": {"residue": "CHN"}, "y": {"residue": "ION"}}, "the masses of D are not known from"),
        ({"x": [{"atoms": ["A", "B"]}, {"atoms": ["C"]}]}, "D of residue CHN 0 .* in no bead"),
    ],
)
def test_mappings_that_do_not_fit_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        find_beads(PAIR, MappingSettings(beads=settings))


def test_wrong_exclusions_masses_and_names_are_refused():
    settings = {"beads": {"x": {"residue": "CHN"}}, "exclude": {"atoms": ["A"]}}
    with pytest.raises(ConfigError, match=r"A of residue CHN 0 .* excluded, but it is in a bead"):
        find_beads(PAIR, MappingSettings(**settings))
    with pytest.raises(ConfigError, match="no atom is called 'a'"):
        PAIR.with_masses({"a": 1.0})
    names = MappingSettings(beads={"x": [{"residue": "CHN"}, {"residue": "ION"}]})
    whole = PAIR.with_masses({"D": 2.0})
    with pytest.raises(ConfigError, match=r"'x' have masses of 29\.000 and 12\.000 amu"):
        _ = find_beads(whole, names).species_table
    for wrong in ({}, {"beads": {"x": {"residue": "CHN"}}, "mapped": True}):
        with pytest.raises(ValueError, match="either 'beads' or 'mapped'"):
            MappingSettings(**wrong)


# -- files ----------------------------------------------------------------------------------------


def test_archives_of_beads_are_taken_as_they_are(tmp_path):
    rng = np.random.default_rng(0)
    x, f = rng.normal(size=(2, 6, 3, 3)).astype(np.float32)
    np.savez(tmp_path / "a.npz", coords=x, forces=f, beads=np.array(["P", "Q", "P"]))
    file = TrajectoryFile(str(tmp_path / "a.npz"), index="1::2")
    trajectory = open_trajectory([file, file], masses={"P": 10.0, "Q": 20.0})
    assert len(trajectory) == 6
    report = map_trajectory(trajectory, MappingSettings(mapped=True), tmp_path / "s")
    positions, forces = beads_of(tmp_path / "s", 3)
    assert np.array_equal(positions[:3], x[1::2].astype(float))
    assert np.allclose(forces[3:], f[1::2] * force_factor("kcal/mol/A"), rtol=1e-14)
    assert report.beads["P"]["count"] == 2
    assert report.beads["P"]["rms_optimal"] is None
    structures = LabeledStore.open(tmp_path / "s").structures()
    assert not structures.pbc.any()
    assert structures.masses[:3].tolist() == [10.0, 20.0, 10.0]
    with pytest.raises(ConfigError, match="masses of P, Q are not known"):
        map_trajectory(open_trajectory([file]), MappingSettings(mapped=True), tmp_path / "t")
    np.savez(tmp_path / "b.npz", coords=x, beads=np.array(["P", "Q", "P"]))
    with pytest.raises(MissingLabelError, match="has no forces"):
        open_trajectory([TrajectoryFile(str(tmp_path / "b.npz"))])
    with pytest.raises(DataError, match="has 3 atoms and residues has 2"):
        open_trajectory([file], residues=[Residue(name="X", atoms=("P", "Q"))])
    with pytest.raises(DataError, match="no frames at the index '9:'"):
        open_trajectory([replace(file, index="9:")])


@pytest.mark.parametrize("name", ["t.xyz", "t.xyz.gz", "t.npz", "packed.npz"])
def test_one_frame_is_in_memory_at_a_time(tmp_path, name):
    n_frames, n_atoms = 240, 300
    rng = np.random.default_rng(0)
    x, f = rng.normal(size=(2, n_frames, n_atoms, 3))
    if name.endswith("npz"):
        save = np.savez_compressed if name == "packed.npz" else np.savez
        save(tmp_path / name, coords=x, forces=f, z=np.full(n_atoms, 18))
    else:
        frames = [ase.Atoms(f"Ar{n_atoms}", at) for at in x]
        for atoms, own in zip(frames, f, strict=True):
            atoms.arrays["forces"] = own
        ase.io.write(tmp_path / name, frames, format="extxyz")
    units = Units(energy="eV", length="Angstrom")
    trajectory = open_trajectory([TrajectoryFile(str(tmp_path / name), units=units, index="4::2")])
    assert len(trajectory) == 118
    tracemalloc.start()
    for k, frame in enumerate(trajectory.snapshots(start=5)):
        assert np.abs(frame.positions - x[14 + 2 * k]).max() < 1e-7
        assert np.abs(frame.forces - f[14 + 2 * k]).max() < 1e-7
        assert frame.frame_id == f"{name}:{14 + 2 * k}"
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert k == 112
    assert peak < 0.5 * (x.nbytes + f.nbytes)


def test_frames_of_other_atoms_are_refused_where_they_come(tmp_path):
    frames = [ase.Atoms(symbols, np.eye(3)) for symbols in ("OH2", "OH2", "H2O")]
    for atoms in frames:
        atoms.arrays["forces"] = np.zeros((3, 3))
    ase.io.write(tmp_path / "w.xyz", frames)
    trajectory = open_trajectory([TrajectoryFile(str(tmp_path / "w.xyz"))])
    with pytest.raises(DataError, match=r"w.xyz:2 does not hold the same atoms"):
        list(trajectory.snapshots())


def test_extended_xyz_is_mapped(tmp_path):
    rng, frames = np.random.default_rng(3), []
    for _ in range(8):
        atoms = ase.Atoms("OH2OH2", rng.normal(0, 0.5, (6, 3)), cell=[20, 20, 20], pbc=True)
        atoms.positions[3:] += 8.0
        atoms.arrays["forces"] = rng.normal(size=(6, 3))
        frames.append(atoms)
    ase.io.write(tmp_path / "w.xyz", frames)
    water = [Residue(name="SOL", atoms=("OW", "HW", "HW"), count=2)]
    trajectory = open_trajectory([TrajectoryFile(str(tmp_path / "w.xyz"))], residues=water)
    beads = MappingSettings(beads={"water": {"residue": "SOL"}}, force_map="sum")
    report = map_trajectory(trajectory, beads, tmp_path / "s")
    positions, forces = beads_of(tmp_path / "s", 2)
    whole = [[a[:3].get_center_of_mass(), a[3:].get_center_of_mass()] for a in frames]
    assert np.abs(positions - whole).max() < 1e-6
    assert np.abs(forces[:, 1] - [a.arrays["forces"][3:].sum(0) for a in frames]).max() < 1e-6
    assert report.density == pytest.approx(2 * 18.015 * 1.66054 / 8000, rel=1e-4)


@pytest.fixture
def universe(tmp_path):
    """Files of a liquid with bonds: LAMMPS data, TRR and dump with the same frames."""
    package = pytest.importorskip("MDAnalysis", reason="needs the extra 'coarse'")
    lengths = np.array([9.0, 8.5, 9.5])
    topology, positions, forces, _ = solvent(n_frames=12, cell=np.diag(lengths))
    positions %= lengths  # molecules are torn
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        u = package.Universe.empty(
            90, 30, atom_resindex=topology.residues, trajectory=True, forces=True
        )
        u.dimensions = [*lengths, 90, 90, 90]
        with package.Writer(str(tmp_path / "l.trr"), 90) as writer:
            for x, f in zip(positions, forces, strict=True):
                u.atoms.positions, u.atoms.forces = x, f
                writer.write(u.atoms)
    lines = ["liquid", "", "90 atoms", "60 bonds", "2 atom types", "1 bond types"]
    lines += [f"0 {a} {x}lo {x}hi" for a, x in zip(lengths, "xyz", strict=True)]
    lines += ["", "Masses", "", "1 16.0", "2 1.5", "", "Atoms # full", ""]
    for i, x in enumerate(positions[0]):
        place = " ".join(f"{v:.5f}" for v in x)
        lines.append(f"{i + 1} {i // 3 + 1} {1 + (i % 3 > 0)} 0.0 {place}")
    lines += ["", "Bonds", ""]
    lines += [f"{k + 1} 1 {i + 1} {j + 1}" for k, (i, j) in enumerate(topology.bonds)]
    (tmp_path / "l.data").write_text("\n".join(lines) + "\n")
    with open(tmp_path / "l.lammpsdump", "w", encoding="utf-8") as dump:
        for k, (x, f) in enumerate(zip(positions, forces, strict=True)):
            dump.write(f"ITEM: TIMESTEP\n{k}\nITEM: NUMBER OF ATOMS\n90\n")
            dump.write("ITEM: BOX BOUNDS pp pp pp\n" + "".join(f"0 {a}\n" for a in lengths))
            dump.write("ITEM: ATOMS id type x y z fx fy fz\n")
            for i in np.random.default_rng(k).permutation(90):
                numbers = " ".join(f"{v:.6f}" for v in (*x[i], *f[i]))
                dump.write(f"{i + 1} {1 + (i % 3 > 0)} {numbers}\n")
    return package, tmp_path, positions, forces


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["trr", "lammpsdump"])
def test_agreement_with_mdanalysis(universe, kind):
    package, folder, _, forces = universe
    units = Units() if kind == "trr" else Units(energy="kJ/mol")
    file = TrajectoryFile(str(folder / f"l.{kind}"), units=units, index="2:")
    trajectory = open_trajectory([file], topology=str(folder / "l.data"))
    u = package.Universe(str(folder / "l.data"), str(folder / f"l.{kind}"))
    factor = force_factor("kJ/mol/Angstrom")
    beads = {"W": {"select": "type 1 or bonded type 1"}}
    for center in ("mass", "geometry"):
        settings = MappingSettings(beads=beads, center=center, force_map="sum")
        map_trajectory(trajectory, settings, folder / center)
        positions, mapped = beads_of(folder / center, 30)
        for k, step in enumerate(u.trajectory[2:]):
            method = u.atoms.center_of_mass if center == "mass" else u.atoms.center_of_geometry
            expected = method(compound="residues", unwrap=True)
            shift = (positions[k] - expected) / step.dimensions[:3]
            assert np.abs(shift - np.round(shift)).max() < 1e-6
            total = u.atoms.accumulate("forces", compound="residues")
            assert np.abs(mapped[k] - total * factor).max() < 1e-6
            assert np.abs(mapped[k].sum(0) - forces[k + 2].sum(0) * factor).max() < 1e-6


@pytest.mark.filterwarnings("ignore")
def test_faults_of_files_of_mdanalysis_are_told(universe, monkeypatch):
    package, folder = universe[:2]
    data, settings = str(folder / "l.data"), MappingSettings(beads={"W": {"atoms": ["1", "2"]}})

    def attempt(name, **options):
        trajectory = open_trajectory([TrajectoryFile(str(folder / name))], **options)
        return map_trajectory(trajectory, settings, folder / "s")

    with pytest.raises(ConfigError, match="does not say its unit of energy"):
        attempt("l.lammpsdump", topology=data)
    with pytest.raises(ConfigError, match="give a 'topology' or 'residues'"):
        attempt("l.trr")
    with pytest.raises(DataError, match=r"l\.trr has 90 atoms and residues has 3"):
        attempt("l.trr", residues=[Residue(name="XYY", atoms=("1", "2", "2"))])
    u = package.Universe(data)
    u.atoms.write(str(folder / "l.xtc"))
    with pytest.raises(MissingLabelError, match=r"l\.xtc, frame 0 has no forces, .*nstfout"):
        attempt("l.xtc", topology=data)
    (folder / "l.nonsense").write_text("nothing")
    with pytest.raises(DataError, match=r"l\.nonsense cannot be read by MDAnalysis"):
        attempt("l.nonsense", topology=data)
    with pytest.raises(DataError, match="as a topology"):
        attempt("l.trr", topology=str(folder / "l.nonsense"))
    with pytest.raises(DataError, match="does not exist"):
        attempt("absent.trr", topology=data)
    select = MappingSettings(beads={"W": {"select": "typo 3"}})
    topology = open_trajectory([TrajectoryFile(str(folder / "l.trr"))], topology=data).topology
    with pytest.raises(ConfigError, match="'typo 3' is not a selection of MDAnalysis"):
        find_beads(topology, select)
    with pytest.raises(ConfigError, match="bead 'W' selects no atoms"):
        find_beads(topology, MappingSettings(beads={"W": {"select": "type 7"}}))
    # Masses are never guessed from names.
    gro = folder / "l.gro"
    u.add_TopologyAttr("names", ["CS", "HS", "NA"] * 30)
    u.add_TopologyAttr("resnames", ["XYY"] * 30)
    u.atoms.write(str(gro))
    with pytest.raises(ConfigError, match=r"the masses of CS, HS, NA are not known from .*l\.gro"):
        find_beads(
            open_trajectory([TrajectoryFile(str(folder / "l.trr"))], topology=str(gro)).topology,
            XYY,
        )
    monkeypatch.setitem(sys.modules, "MDAnalysis", None)
    with pytest.raises(OptionalDependencyError, match=r"potstill\[coarse\]"):
        attempt("l.trr", topology=data)


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return result.output


def test_the_command_maps_and_words_mistakes(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    _, positions, forces, cell = solvent(bonds=False)
    np.savez(tmp_path / "t.npz", coords=positions, forces=forces, cell=cell)
    text = f"""
out: {tmp_path}/beads.zarr
trajectory: {{path: {tmp_path}/t.npz, units: {{energy: eV}}, index: "10:"}}
residues: [{{name: XYY, atoms: [X, Y, Y], count: 30}}]
masses: {{X: 16, Y: 1.5}}
beads:
  W: {{residue: XYY}}
temperature: 350
"""
    config = tmp_path / "map.yaml"
    config.write_text(text)
    output = run("coarse", "map", config)
    assert "20 frames of 30 beads" in output
    assert "30 x XYY: no constrained distances" in output
    assert LabeledStore.open(tmp_path / "beads.zarr").info["temperature"] == 350
    assert "ratio" in run("coarse", "map", config)  # shown again, not done again
    for wrong, words in (
        ("residue: XYY}", "residu: XYY}"),
        ("  W: {residue: XYY}", "  W: {residue: XYY}\n  W: {residue: XYY}"),
        ("units: {energy: eV}", "units: {energi: eV}"),
    ):
        config.write_text(text.replace(wrong, words))
        run("coarse", "map", config, code=2)


# -- reference data -------------------------------------------------------------------------------


@pytest.mark.data
@pytest.mark.filterwarnings("ignore")
def test_a_real_liquid_agrees_with_mdanalysis(tmp_path):
    package = pytest.importorskip("MDAnalysis", reason="needs the extra 'coarse'")
    folder = data_path("reline")
    topology, frames = str(folder / "reline_425K.tpr"), str(folder / "reline_425K.trr")
    trajectory = open_trajectory([TrajectoryFile(frames, index="100::100")], topology=topology)
    names = {"choline": "CHOL", "chloride": "Cl", "urea": "UREA"}
    beads = {name: {"residue": residue} for name, residue in names.items()}
    settings = MappingSettings(beads=beads, force_map="sum")
    report = map_trajectory(trajectory, settings, tmp_path / "s")
    positions, forces = beads_of(tmp_path / "s", 240)
    u = package.Universe(topology, frames)
    for k, step in enumerate(u.trajectory[100::100]):
        expected = u.atoms.center_of_mass(compound="residues", unwrap=True)
        shift = (positions[k] - expected) / step.dimensions[:3]
        assert np.abs(shift - np.round(shift)).max() < 1e-6
        total = u.atoms.accumulate("forces", compound="residues")
        assert np.abs(forces[k] - total * force_factor("kJ/mol/A")).max() < 1e-5
    published = {"choline": 0.367, "chloride": 0.262, "urea": 0.283}
    for name, rms in published.items():
        assert report.beads[name]["rms_sum"] == pytest.approx(rms, rel=0.05)
    hydrogens = {"CHOL": 14, "Cl": 0, "UREA": 4}
    assert {m["name"]: len(m["constrained"]) for m in report.molecules} == hydrogens


@pytest.mark.data
def test_both_maps_have_the_same_mean_force_in_a_real_liquid(tmp_path):
    pytest.importorskip("MDAnalysis", reason="needs the extra 'coarse'")
    folder = data_path("reline")
    study = Path(__file__).parents[1] / "studies/coarse_graining/reline_fine.yaml"
    beads = read_yaml(study)["map"]["beads"]
    trajectory = open_trajectory(
        [TrajectoryFile(str(folder / "reline_425K.trr"), index="100::20")],
        topology=str(folder / "reline_425K.tpr"),
    )
    along = {}
    for name in ("sum", "optimal"):
        settings = MappingSettings(beads=beads, force_map=name)
        report = map_trajectory(trajectory, settings, tmp_path / name)
        positions, forces = beads_of(tmp_path / name, 300)
        (choline,) = [m for m in report.molecules if m["name"] == "CHOL"]
        assert choline["bonds"] == [[0, 1]]
        first, second = np.array(choline["members"]).T
        bond = positions[:, second] - positions[:, first]
        length = np.linalg.norm(bond, axis=2)
        pull = (forces[:, second] - forces[:, first]) / 2
        along[name] = ((pull * bond).sum(2) / length).ravel()
    for bead in ("ammonium", "ethanol"):
        assert report.beads[bead]["rms_optimal"] ** 2 < 0.6 * report.beads[bead]["rms_sum"] ** 2
    difference = along["optimal"] - along["sum"]
    for part in np.array_split(np.argsort(length.ravel()), 6):
        error = difference[part].std() / np.sqrt(len(part))
        assert abs(difference[part].mean()) < 4 * error
    assert (
        np.ptp([along["sum"][p].mean() for p in np.array_split(np.argsort(length.ravel()), 6)]) > 1
    )


@pytest.mark.data
def test_alanine_dipeptide_is_taken_as_it_is(tmp_path):
    path = data_path("cg-ala2") / "ala2_5bead.npz"
    held = np.load(path)
    names = [str(name) for name in held["beads"]]
    masses = dict.fromkeys(names, 12.011) | {"N": 14.007, "N_NME": 14.007}
    trajectory = open_trajectory([TrajectoryFile(str(path), index=":50")], masses=masses)
    map_trajectory(trajectory, MappingSettings(mapped=True), tmp_path / "s")
    positions, forces = beads_of(tmp_path / "s", 5)
    assert np.array_equal(positions, held["coords"][:50].astype(float))
    assert np.allclose(forces, held["forces"][:50] * force_factor("kcal/mol/A"), rtol=1e-6)
