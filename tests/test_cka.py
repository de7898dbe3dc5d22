"""CKA between features, its gain, its course during training, and linear probes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch

from data import rattled_copper
from potstill.checkpoint import save_potential
from potstill.config import CKAConfig
from potstill.errors import ConfigError, DataError, ModelError
from potstill.evaluate.cka import (
    CKAAccumulator,
    CKAMatrix,
    CKATracker,
    cka_matrix,
    linear_cka,
    linear_probes,
    node_features,
    read_cka_history,
    ridge_r2,
    similarity_gain,
    snapshot_potential,
)
from potstill.models import HIPNN, SumPotential
from potstill.models.base import LocalOutput, Potential, TapSpec
from potstill.readers import read
from potstill.structures import Properties, SpeciesTable, Structures
from potstill.train import TrainingSet, TrainSettings, train
from potstill.workflows.cka import compare_features


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def by_gram_matrices(x: np.ndarray, y: np.ndarray) -> float:
    """CKA from the n x n Gram matrices of Kornblith et al., Eqs. 3 and 4."""
    n = len(x)
    center = np.eye(n) - np.full((n, n), 1.0 / n)
    k, m = center @ x @ x.T @ center, center @ y @ y.T @ center
    return float((k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum()))


# -- the measure ---------------------------------------------------------------------------------


def test_cka_is_that_of_gram_matrices():
    x = noise(40, 5) + 3.0
    y = noise(40, 7, seed=1) + x[:, :1] * 2.0
    expected = by_gram_matrices(x.numpy(), y.numpy())
    assert 0.1 < expected < 0.9
    assert linear_cka(x, y) == pytest.approx(expected, rel=1e-12)


def test_cka_ignores_rotations_scales_and_shifts():
    x = noise(30, 4)
    rotation = torch.linalg.qr(noise(4, 4, seed=2)).Q
    assert linear_cka(x, 3.0 * x @ rotation + 100.0) == pytest.approx(1.0, abs=1e-12)
    assert linear_cka(x, x * torch.tensor([10.0, 1.0, 1.0, 1.0])) < 0.95  # not any linear map


def test_batches_make_no_difference_even_far_from_zero():
    x, y = noise(60, 3) + 1e4, noise(60, 2, seed=1) - 1e4
    y[:, 0] += x[:, 0]
    whole = linear_cka(x, y)
    metric = CKAAccumulator(["x"], ["y"])
    for part in torch.arange(60).split(7):
        metric.update({"x": x[part]}, {"y": y[part]})
    assert metric.matrix()["x", "y"] == pytest.approx(whole, rel=1e-9)
    assert whole == pytest.approx(by_gram_matrices(x.numpy(), y.numpy()), rel=1e-6)


def test_features_that_do_not_vary_have_no_cka():
    metric = CKAAccumulator(["x", "constant"], ["x"])
    metric.update({"x": noise(9, 2), "constant": torch.ones(9, 3)}, {"x": noise(9, 2)})
    values = metric.matrix().values
    assert values[0, 0] == pytest.approx(1.0)
    assert np.isnan(values[1, 0])
    with pytest.raises(DataError, match="different numbers of atoms"):
        metric.update({"x": noise(9, 2), "constant": torch.ones(9, 3)}, {"x": noise(8, 2)})
    with pytest.raises(DataError, match="no atoms"):
        CKAAccumulator(["x"], ["x"]).matrix()


# -- models --------------------------------------------------------------------------------------


class Geometry(Potential):
    """A model whose features are plain geometry, of every kind."""

    kind = "geometry"

    @property
    def taps(self):
        return {
            "count": TapSpec("node_scalar", 1),
            "pull": TapSpec("node_vector", 2),
            "distance": TapSpec("edge_scalar", 2),
            "few": TapSpec("edge_scalar", 1),
        }

    def hyperparameters(self):
        return {}

    def forward(self, species, edges, r_ij, n_local, taps=()):
        distance = torch.linalg.vector_norm(r_ij, dim=1, keepdim=True)
        weight = torch.exp(-distance)
        pull = r_ij.new_zeros(n_local, 3, 2)
        pair = torch.cat([weight, weight**2], dim=1)
        pull = pull.index_add(0, edges.center, r_ij.unsqueeze(2) * pair.unsqueeze(1))
        count = r_ij.new_zeros(n_local, 1).index_add(0, edges.center, weight)
        found = {"count": count, "pull": pull, "distance": pair, "few": weight[:3]}
        return LocalOutput(count[:, 0], {name: found[name] for name in taps})


@pytest.fixture
def geometry() -> Geometry:
    return Geometry(SpeciesTable.from_symbols(["Cu"]), 4.0)


def hipnn(seed: int, n_features: int = 6) -> HIPNN:
    torch.manual_seed(seed)
    shape = {"n_features": n_features, "n_sensitivities": 6, "n_atom_layers": 1}
    radii = {"dist_soft_min": 1.5, "dist_soft_max": 3.5, "dist_hard_max": 4.0}
    table = SpeciesTable.from_symbols(["Cu"])
    return HIPNN(table, n_interaction_layers=2, **shape, **radii).double()


def test_features_come_to_atoms(geometry):
    structures = Structures.from_ase(rattled_copper(2, 0.1))
    found = node_features(geometry, structures, ["count", "pull", "distance"])
    assert found["pull"].shape == (structures.n_atoms, 6)
    # A pair's feature summed over the pairs of a center is what the model sums by itself (Eq. 5).
    torch.testing.assert_close(found["distance"][:, :1], found["count"])
    with pytest.raises(ModelError, match="'few' has 3 pairs"):
        node_features(geometry, structures, ["few"])


def test_vectors_are_compared_whichever_way_the_structures_are_turned(geometry):
    structures = Structures.from_ase(rattled_copper(3, 0.2))
    other = hipnn(0)
    turn = torch.linalg.qr(noise(3, 3, seed=3)).Q
    turned = replace(structures, positions=structures.positions @ turn, cell=structures.cell @ turn)
    taps = {"first_taps": ["pull", "count"], "second_taps": ["block_1"]}
    first, second = (cka_matrix(geometry, other, s, **taps) for s in (structures, turned))
    np.testing.assert_allclose(first.values, second.values, rtol=1e-9)


def test_matrices_of_models_and_their_gain():
    structures = Structures.from_ase(rattled_copper(4, 0.2))
    student, teacher = hipnn(0), hipnn(1, n_features=9)
    matrix = cka_matrix(student, teacher, structures)
    assert matrix.first == tuple(student.taps)
    assert matrix.values.shape == (5, 5)
    again = cka_matrix(student, teacher, structures, max_atoms=4)
    np.testing.assert_allclose(matrix.values, again.values, rtol=1e-9)
    x = node_features(student, structures)["block_0"]
    y = node_features(teacher, structures)["interaction_1"]
    expected = by_gram_matrices(x.numpy(), y.numpy())
    assert matrix["block_0", "interaction_1"] == pytest.approx(expected, rel=1e-9)
    own = cka_matrix(student, student, structures)
    np.testing.assert_allclose(own.values.diagonal(), 1.0, rtol=1e-9)
    np.testing.assert_allclose(own.values, own.values.T, rtol=1e-9)
    gain = similarity_gain(matrix, cka_matrix(hipnn(1, 9), teacher, structures))
    assert gain["block_1", "block_1"] == pytest.approx(1.0 - matrix["block_1", "block_1"])
    stored = CKAMatrix.from_json(json.loads(json.dumps(gain.to_json())))
    np.testing.assert_array_equal(stored.values, gain.values)
    with pytest.raises(DataError, match="same taps on the same atoms"):
        similarity_gain(matrix, cka_matrix(student, teacher, structures.select([0])))
    with pytest.raises(ModelError, match="no feature tap 'block_9'"):
        cka_matrix(student, teacher, structures, first_taps=["block_9"])


# -- during training -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A short training in which CKA with a teacher is recorded."""
    folder = tmp_path_factory.mktemp("cka")
    ase.io.write(folder / "data.extxyz", rattled_copper(12, 0.15))
    structures, labels = read(folder / "data.extxyz", require=("energy", "forces"))
    data = TrainingSet(structures, {"reference": labels})
    settings = TrainSettings(
        model={"kind": "hipnn", "hyperparameters": hipnn(0).hyperparameters()},
        epochs=4,
        batch_size=4,
        precision="float64",
        core="torch",
        optimizer={"learning_rate": 1e-2},
    )
    teacher = hipnn(1)
    save_potential(folder / "teacher.pt", teacher, {})
    tracker = CKATracker(folder / "run", teacher, structures.select([0, 1]), every=2)
    steps = []

    def note(record):
        steps.append(record["steps"])
        tracker(record)

    train(settings, data, data.select(torch.tensor([0, 1])), folder / "run", on_epoch=note)
    assert steps == [3, 6, 9, 12]
    return folder


def test_cka_during_training_is_that_of_the_snapshots(run):
    history = read_cka_history(run / "run")
    assert list(history) == [1, 3]
    assert abs(history[3].values - history[1].values)[np.isfinite(history[1].values)].max() > 1e-6
    student = snapshot_potential(run / "run")
    assert isinstance(student, SumPotential)
    structures = read(run / "data.extxyz")[0]
    now = cka_matrix(student, hipnn(1), structures.select([0, 1]))
    assert now.first == history[3].first
    with pytest.raises(DataError, match="was not compared"):
        read_cka_history(run)
    with pytest.raises(ConfigError, match="at least one, not 0"):
        CKATracker(run, hipnn(1), structures, every=0)


def test_the_command_writes_matrices_gains_probes_and_figures(run, tmp_path):
    structures = read(run / "data.extxyz")[0]
    before = SumPotential({"network": hipnn(5)})
    save_potential(tmp_path / "before.pt", before, {})
    config = CKAConfig(
        student=str(run / "run" / "best.pt"),
        teacher=str(run / "teacher.pt"),
        before=str(tmp_path / "before.pt"),
        data=str(run / "data.extxyz"),
        run=str(run / "run"),
        marked=("block_1", "block_1"),
        out=str(tmp_path / "out"),
        n_structures=8,
    )
    report = compare_features(config)
    stored = json.loads((tmp_path / "out" / "cka.json").read_text())
    matrices = {name: CKAMatrix.from_json(m) for name, m in stored.items() if name != "probes"}
    assert set(matrices) == {
        *("student_teacher", "before_teacher", "gain", "student_student", "teacher_teacher")
    }
    difference = matrices["student_teacher"].values - matrices["before_teacher"].values
    np.testing.assert_allclose(matrices["gain"].values, difference)
    assert matrices["gain"].n_atoms == 8 * int(structures.n_atoms_per_system[0])
    assert [p["tap"] for p in stored["probes"]["student"]] == list(report.after.first)
    assert len(report.rows()) == len(report.after.first)
    for name in ("cka", "cka_within", "cka_history"):
        assert (tmp_path / "out" / f"{name}.svg").stat().st_size > 0
        assert (tmp_path / "out" / f"{name}.csv").is_file()
    unlabelled = tmp_path / "plain.xyz"
    ase.io.write(unlabelled, structures.to_ase(), format="extxyz")
    changes = {"data": str(unlabelled), "out": str(tmp_path / "other")}
    with pytest.raises(DataError, match="or switch probes off"):
        compare_features(config.model_copy(update=changes))


# -- probes --------------------------------------------------------------------------------------


def test_ridge_scores():
    x = noise(120, 5)
    test = torch.arange(120) >= 80
    y = x @ noise(5, seed=1) + 4.0
    assert ridge_r2(x, y, test) == pytest.approx(1.0, abs=1e-6)
    assert ridge_r2(x, noise(120, seed=2), test) < 0.2
    assert ridge_r2(x, y, test, intercept=False) < 0.9
    # More features than examples: the ridge, chosen without the held-out part, keeps it useful.
    wide = torch.cat([x, noise(120, 200, seed=3)], dim=1)
    assert 0.1 < ridge_r2(wide, y + 0.1 * noise(120, seed=4), test) < 0.999


def test_probes_find_what_a_feature_holds(geometry):
    """Labels made of the features: energy of the summed scalar, forces of the vectors."""
    structures = Structures.from_ase(rattled_copper(30, 0.2))
    features = node_features(geometry, structures, ["count", "pull"])
    energy = torch.zeros(30, dtype=torch.float64)
    energy.index_add_(0, structures.system_index, features["count"][:, 0])
    forces = features["pull"].reshape(-1, 3, 2) @ torch.tensor([1.0, -0.5]).double()
    labels = Properties({"energy": energy + 100.0, "forces": forces})
    scores = {s.tap: s for s in linear_probes(geometry, structures, labels, taps=["count", "pull"])}
    assert scores["count"].energy_r2 == pytest.approx(1.0, abs=1e-6)
    assert scores["count"].forces_target == "length"
    assert scores["pull"].forces_r2 == pytest.approx(1.0, abs=1e-6)
    assert scores["pull"].forces_target == "vector"
    assert scores["pull"].energy_r2 < 0.5
    assert (scores["pull"].n_train, scores["pull"].n_test) == (21, 9)
    # Fixed atoms are left out of forces.
    spoiled = forces.clone()
    spoiled[::2] = 1e3
    fixed = torch.zeros(structures.n_atoms, dtype=torch.bool)
    fixed[::2] = True
    held = replace(structures, fixed=fixed)
    labels = Properties({"energy": energy, "forces": spoiled})
    (score,) = linear_probes(geometry, held, labels, taps=["pull"])
    assert score.forces_r2 == pytest.approx(1.0, abs=1e-6)
    few, few_labels = held.select([0, 1]), labels.select([0, 1], held)
    with pytest.raises(DataError, match="at least four structures"):
        linear_probes(geometry, few, few_labels)
