"""CKA between features, its gain, its course during training, and linear probes."""

from __future__ import annotations

import json
import signal
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch

from data import rattled_copper
from potstill.checkpoint import save_potential
from potstill.config import CKAConfig, TrainConfig, validate
from potstill.errors import ConfigError, DataError, ModelError
from potstill.evaluate.cka import (
    CKAAccumulator,
    CKAMatrix,
    CKATracker,
    cka_matrix,
    linear_probes,
    node_features,
    read_cka_history,
    ridge_r2,
    similarity_gain,
    snapshot_potential,
)
from potstill.models import HIPNN, SumPotential
from potstill.models.base import LocalOutput, Potential, TapSpec
from potstill.neighbors import build_neighbor_list
from potstill.readers import read
from potstill.species import SpeciesTable
from potstill.structures import Properties, Structures
from potstill.train import TrainingSet, TrainSettings, train
from potstill.workflows.base import Display, Task
from potstill.workflows.cka import compare_features
from potstill.workflows.data import load_parts
from potstill.workflows.training import cka_trackers, train_from_config
from test_gemnet_oc import CAPS
from test_gemnet_oc import small as gemnet_oc
from test_train import assert_same_weights


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def by_gram_matrices(x: np.ndarray, y: np.ndarray) -> float:
    """CKA from the n x n Gram matrices of Kornblith et al., Eqs. 3 and 4."""
    n = len(x)
    center = np.eye(n) - np.full((n, n), 1.0 / n)
    k, m = center @ x @ x.T @ center, center @ y @ y.T @ center
    return float((k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum()))


# -- the measure ---------------------------------------------------------------------------------


def linear_cka(x, y) -> float:
    metric = CKAAccumulator(["x"], ["y"])
    metric.update({"x": x}, {"y": y})
    return metric.matrix()["x", "y"]


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
    with pytest.raises(ModelError, match="'few' of geometry has 3 pairs"):
        node_features(geometry, structures, ["few"])


def test_models_that_choose_among_the_pairs_are_compared_like_others():
    """GemNet-OC with caps: features of the pairs it has chosen, which fewer atoms share."""
    frames = rattled_copper(4, 0.2)
    for atoms in frames:
        atoms.symbols[:2] = "Mg"
        atoms.symbols[2:] = "O"
    structures = Structures.from_ase(frames)
    model = gemnet_oc(**CAPS, num_blocks=1, direct_forces=True)
    matrix = cka_matrix(model, model, structures)
    assert set(matrix.first) == set(model.taps) - {"edges"}
    assert "interaction_1.edge" in matrix.first
    np.testing.assert_allclose(matrix.values.diagonal(), 1.0, rtol=1e-9)
    small_batches = cka_matrix(model, model, structures, max_atoms=4)
    np.testing.assert_allclose(matrix.values, small_batches.values, rtol=1e-8)
    # By hand: which pairs the rows belong to stands in the tap `edges`.
    neighbors = build_neighbor_list(structures, model.cutoff)
    taps = ["edges", "final.edge"]
    tapped = model.predict(structures, neighbors, ["atomic_energies"], taps=taps).features
    rows = tapped["edges"].shape[0]
    assert 0 < rows < neighbors.n_pairs
    expected = torch.zeros(structures.n_atoms, tapped["final.edge"].shape[1]).double()
    for pair, row in zip(tapped["edges"][:, 0].tolist(), tapped["final.edge"], strict=True):
        expected[int(neighbors.center[pair])] += row
    found = node_features(model, structures, ["final.edge"])["final.edge"]
    torch.testing.assert_close(found, expected)
    energy, forces = noise(4), noise(structures.n_atoms, 3)
    labels = Properties({"energy": energy, "forces": forces})
    scores = linear_probes(model, structures, labels)
    assert [s.tap for s in scores] == list(matrix.first)
    with pytest.raises(ModelError, match="'edges' numbers pairs and holds no features"):
        cka_matrix(model, model, structures, second_taps=["edges"])


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
    with pytest.raises(DataError, match="was not recorded"):
        read_cka_history(run)
    with pytest.raises(ConfigError, match="at least one epoch, not 0"):
        CKATracker(run, hipnn(1), structures, every=0)


@pytest.fixture
def config_of(run, tmp_path):
    """Makes configs of trainings on the run's data, by the name of their folder."""

    def make(name: str, cka: dict | None, **changes) -> TrainConfig:
        train = {
            "model": {"kind": "hipnn", "hyperparameters": hipnn(0).hyperparameters()},
            "epochs": 3,
            "batch_size": 4,
            "core": "torch",
            "early_stopping": None,
        }
        files = [{"path": str(run / "data.extxyz")}]
        data = {
            "files": files,
            "split": {"fractions": {"train": 0.5, "validation": 0.4, "test": 0.1}},
        }
        out = str(tmp_path / name)
        return validate(
            {"out": out, "data": data, "train": train, "cka": cka} | changes, TrainConfig
        )

    return make


def test_a_config_records_cka_and_changes_nothing_else(run, config_of, tmp_path):
    cka = {"teacher": str(run / "teacher.pt"), "every": 2, "student_taps": ["block_1"]}
    stages = {"stages": [{"name": "one"}, {"name": "two", "train": {"epochs": 1, "seed": 5}}]}
    result = train_from_config(config_of("with", cka, **stages))
    plain = train_from_config(config_of("without", None, **stages))
    assert_same_weights(result.best, plain.best)
    assert [list(read_cka_history(tmp_path / "with" / name)) for name in ("one", "two")] == [
        [1, 3],
        [1],
    ]
    assert list((tmp_path / "without").rglob("*cka*")) == []
    for name in ("one", "two"):
        assert (tmp_path / "with" / name / "cka_history.svg").stat().st_size > 0
    # The last epoch of stage one by hand: the validation set has fewer structures than are drawn.
    parts, _ = load_parts(config_of("x", cka).data)
    structures = parts["validation"].structures
    student = snapshot_potential(tmp_path / "with" / "one")
    expected = cka_matrix(student, hipnn(1), structures, first_taps=["block_1"])
    recorded = read_cka_history(tmp_path / "with" / "one")[3]
    assert recorded.first == ("block_1",)
    np.testing.assert_allclose(recorded.values, expected.values, rtol=1e-6)
    # Some of them, the same ones for a seed.
    few = config_of("few", cka | {"n_structures": 2})
    (tracker,) = cka_trackers(few, [parts], None)
    (again,) = cka_trackers(few, [parts], None)
    assert len(tracker.structures) == 2
    torch.testing.assert_close(tracker.structures.positions, again.structures.positions)


class Stopping(Display):
    """Interrupts the training after its second epoch."""

    @contextmanager
    def task(self, title, total=None):
        class Watch(Task):
            def update(self, done, total=None, note=""):
                if done == 2:
                    signal.raise_signal(signal.SIGTERM)

        yield Watch()


def test_a_resumed_run_continues_its_cka(run, config_of, tmp_path):
    cka = {"teacher": str(run / "teacher.pt")}
    train_from_config(config_of("whole", cka))
    parts = config_of("parts", cka)
    assert train_from_config(parts, Stopping()).status == "interrupted"
    first = read_cka_history(tmp_path / "parts")
    assert list(first) == [1, 2]
    assert (tmp_path / "parts" / "cka_history.csv").is_file()
    # What a killed run left: an epoch that will be done again, and half a line.
    lines = (tmp_path / "parts" / "cka.jsonl").read_text()
    wrong = json.loads(lines.splitlines()[0]) | {"epoch": 3}
    (tmp_path / "parts" / "cka.jsonl").write_text(f"{lines}{json.dumps(wrong)}\n{lines[:40]}")
    assert train_from_config(parts).status == "finished"
    whole, resumed = (read_cka_history(tmp_path / name) for name in ("whole", "parts"))
    assert list(whole) == list(resumed) == [1, 2, 3]
    for epoch, matrix in whole.items():
        np.testing.assert_allclose(resumed[epoch].values, matrix.values, rtol=1e-9)
    drawn = (tmp_path / "parts" / "cka_history.csv").read_text()
    assert drawn == (tmp_path / "whole" / "cka_history.csv").read_text()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"teacher": "nowhere.pt"}, "'cka.teacher': nowhere.pt: no such file"),
        ({"teacher_taps": ["blok_1"]}, "'cka.teacher_taps': hipnn has no feature tap 'blok_1'"),
        ({"student_taps": ["update_1"]}, "'cka.student_taps': hipnn has no feature tap"),
        ({"teacher": "gold.pt"}, "'cka.teacher': .* holds Cu, which is not among the species Au"),
    ],
)
def test_mistakes_in_the_section_are_told_before_the_first_epoch(
    run, config_of, tmp_path, monkeypatch, changes, words
):
    monkeypatch.chdir(tmp_path)
    gold = HIPNN(SpeciesTable.from_symbols(["Au"]), **hipnn(0).hyperparameters())
    save_potential(tmp_path / "gold.pt", gold, {})
    config = config_of("run", {"teacher": str(run / "teacher.pt")} | changes)
    with pytest.raises(ConfigError, match=words):
        train_from_config(config)
    assert not (tmp_path / "run").exists()


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
    few, few_labels = held.select([0, 1]), labels.select(held.rows([0, 1]))
    with pytest.raises(DataError, match="at least four structures"):
        linear_probes(geometry, few, few_labels)
