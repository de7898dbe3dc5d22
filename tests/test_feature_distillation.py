"""Distillation of internal features: every strategy learns, and nothing of it stays behind."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

from potstill.checkpoint import load_potential, read_payload, save_potential
from potstill.cli import app
from potstill.config import TrainConfig, load_config, validate
from potstill.distill import AuxiliaryTerm, FeatureTerm, LossTerm, Schedule, expand
from potstill.distill.aggregate import edges_to_nodes, match_pairs
from potstill.distill.auxiliary import AuxiliaryHead
from potstill.distill.strategies import PRESETS, STRATEGIES
from potstill.distill.terms import Batch
from potstill.errors import ConfigError, MissingLabelError, ModelError, StoreError, TeacherError
from potstill.features import Feature, pairs_within
from potstill.label import label_features
from potstill.models import HIPNN
from potstill.neighbors import build_neighbor_list
from potstill.store import LabeledStore
from potstill.structures import Properties, Structures
from potstill.teachers import PotentialTeacher, make_teacher
from potstill.teachers.base import TeacherInfo
from potstill.train import TrainingSet, TrainSettings, train
from potstill.train.devices import default_fabric
from potstill.train.force_gradient import ForceGradient, NetworkPasses
from potstill.train.loop import initial_student
from potstill.train.objective import BatchLoss
from potstill.train.settings import ForceGradientSettings, ModelSettings, OptimizerSettings
from potstill.train.signals import FeatureSources, bind_terms
from potstill.workflows.data import DataSettings, load_parts
from potstill.workflows.training import train_from_config
from tapped import Choosing, Tapped
from test_train import (
    SMALL,
    assert_same_weights,
    emt_set,
    records_of,
    run_on_two_ranks,
    without_times,
)

REFERENCE = ({"property": "energy"}, {"property": "forces", "weight": 10.0})
STUDENT = ModelSettings(kind="tapped:Tapped", hyperparameters={"width": 5, "seed": 1})


@pytest.fixture(scope="module")
def bare() -> TrainingSet:
    return emt_set(4)


@pytest.fixture(scope="module")
def teacher(bare: TrainingSet) -> PotentialTeacher:
    potential = Tapped(bare.structures.species_table, width=7, seed=5).double().eval()
    return PotentialTeacher(potential, TeacherInfo("big", "f00"))


@pytest.fixture(scope="module")
def data(bare: TrainingSet, teacher: PotentialTeacher) -> TrainingSet:
    """With the teacher's energies, forces and atomic energies."""
    labels, _ = teacher.label(bare.structures, ["energy", "forces", "atomic_energies"])
    return replace(bare, labels={**bare.labels, "big": labels})


def settings(*lines: object, **changes: object) -> TrainSettings:
    defaults: dict = {
        "model": STUDENT,
        "loss": [*REFERENCE, *lines],
        "epochs": 3,
        "batch_size": 2,
        "precision": "float64",
        "optimizer": OptimizerSettings(learning_rate=1e-2),
        "regularization": {"l2": 0.0, "hierarchicality": 0.0},
        "early_stopping": None,
    }
    return TrainSettings(**{**defaults, **changes})


def line(strategy: str, **options: object) -> dict:
    return {"distill": strategy, "source": "big", **options}


def terms_of(run: TrainSettings) -> list[str]:
    return [term.name for term in run.loss if term.source == "big"]


# -- every strategy learns -------------------------------------------------------------------------

LINES = {
    "vanilla1": line("vanilla1", weight=30.0),
    "vanilla2": line("vanilla2", weight=10.0),
    "n2n": line("n2n", weight=100.0),
    "e2n": line("e2n", weight=100.0),
    "v2v": line("v2v", weight=100.0),
    "v2v of pairs": line("v2v", weight=1e5, teacher_tap="pair"),
    "e2e": line("e2e", weight=100.0),
    "n2n+v2v": line("n2n+v2v", weight={"n2n": 10.0, "v2v": 100.0}),
    "n2n mlp mae": line("n2n", student_transform="mlp", error="mae", weight=100.0),
    "n2n joined": line("n2n", student_tap="message+update", teacher_tap="message", weight=100.0),
    "n2n by path": line("n2n", teacher_tap="embedding", weight=100.0),
    "n2n lsp": line("n2n", error="lsp", student_transform="identity", weight=1e4),
    "e2n gsp": line("e2n", error="gsp", student_transform="identity", weight=1e4),
    "n2n fork": line("n2n", error="fork", weight=100.0),
    "v2v cka": line("v2v", error="cka", student_transform="identity", weight=1e3),
}


@pytest.mark.parametrize("name", list(LINES))
def test_the_loss_of_each_strategy_falls_and_the_teacher_stays(
    data: TrainingSet, teacher: PotentialTeacher, tmp_path: Path, name: str
) -> None:
    before = {k: v.clone() for k, v in teacher.potential.state_dict().items()}
    run = settings(LINES[name], epochs=8)
    train(run, data, data, tmp_path / "run", teachers={"big": teacher})
    first, *_, last = (record["train"] for record in records_of(tmp_path / "run"))
    assert terms_of(run)
    for term in terms_of(run):
        assert last[term] < 0.9 * first[term], term
    for key, value in teacher.potential.state_dict().items():
        assert torch.equal(value, before[key])
    assert all(p.grad is None for p in teacher.potential.parameters())


#: Layers of the student before each tap; those after it get nothing.
BEFORE = {
    "n2n": {"embedding", "radial", "message", "vector", "update"},
    "e2n": {"embedding", "radial", "message", "vector", "update"},
    "v2v": {"embedding", "radial", "vector"},
    "e2e": {"embedding", "radial"},
}


@pytest.mark.parametrize("strategy", list(BEFORE))
@pytest.mark.parametrize("error", ["mse", "cka"])
def test_the_gradient_reaches_the_layers_before_the_tap(
    data: TrainingSet, teacher: PotentialTeacher, strategy: str, error: str
) -> None:
    run = settings(loss=[line(strategy, error=error)])
    network = Tapped(data.structures.species_table, width=5, seed=1).double()
    parts = gradients(run, network, data, teacher)[1]
    assert set(parts) == {f"{strategy}:big", "loss"}
    reached = {
        name.split(".")[0]
        for name, p in network.named_parameters()
        if p.grad is not None and float(p.grad.abs().max()) > 0.0
    }
    assert reached == BEFORE[strategy]
    assert all(p.grad is None for p in teacher.potential.parameters())


def gradients(
    run: TrainSettings,
    network: Tapped | HIPNN,
    data: TrainingSet,
    teacher: PotentialTeacher,
    weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, float]]:
    """The gradient of the loss over student and heads, flat, and the loss' parts."""
    fabric = default_fabric()
    sources = FeatureSources(data, {"big": teacher})
    terms = bind_terms(run, network, sources)
    method = ForceGradient(run.force_gradient, network, features=True)
    data = data.with_neighbors(network.cutoff + method.margin)
    batch = sources.complete(data.batch(torch.arange(len(data)), weights))
    objective = BatchLoss(terms, 1, batch, fabric)
    passes = fabric.setup_module(NetworkPasses(network))
    found = method(passes, batch, objective.wanted, objective)
    parameters = [*network.parameters(), *terms.parameters()]
    for parameter in parameters:
        parameter.grad = None
    found.backward(fabric, passes)
    flat = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    parts = {name: float(value) for name, value in found.parts.items()}
    return torch.cat([g.double().flatten() for g in flat]), parts


@pytest.mark.parametrize(
    "lines",
    [
        [line("n2n"), line("v2v", error="mae")],
        [line("e2n", error="lsp"), line("n2n", error="gsp")],
        [line("n2n", error="cka"), line("v2v", error="fork")],
        [line("e2e"), {"learn": "charges"}, {"learn": "dipole"}],
        [line("e2e", error="cka")],
    ],
)
def test_the_weights_of_a_batch_count_in_terms_on_features(
    data: TrainingSet, teacher: PotentialTeacher, lines: list[dict]
) -> None:
    """What weighs nothing has no part in the loss and its gradient; equal weights do nothing."""
    molecules = replace(data.structures, pbc=torch.zeros_like(data.structures.pbc))
    charges = molecules.positions[:, 0].sin()
    own = Properties({**data.labels["reference"].values, "charges": charges})
    own.values["dipole"] = torch.arange(12.0, dtype=torch.float64).reshape(4, 3)
    data = replace(data, structures=molecules, labels={**data.labels, "reference": own})
    run = settings(*lines)
    table = data.structures.species_table

    def found(part: TrainingSet, *weights: float) -> tuple[torch.Tensor, dict[str, float]]:
        network = Tapped(table, width=5, seed=1).double()
        given = torch.tensor(weights, dtype=torch.float64) if weights else None
        return gradients(run, network, part, teacher, given)

    some = found(data.select(torch.tensor([0, 2, 3])))
    weighed = found(data, 1.0, 0.0, 1.0, 1.0)
    torch.testing.assert_close(weighed[0], some[0])
    assert weighed[1] == pytest.approx(some[1])
    whole, equal = found(data), found(data, 1.0, 1.0, 1.0, 1.0)
    torch.testing.assert_close(equal[0], whole[0])
    assert equal[1] == pytest.approx(whole[1])
    assert weighed[1]["loss"] != pytest.approx(whole[1]["loss"], rel=1e-4)


@pytest.mark.parametrize("forces", [True, False])
def test_gradients_of_all_methods_agree(
    data: TrainingSet, teacher: PotentialTeacher, forces: bool
) -> None:
    data = data.select(torch.tensor([0, 1]))
    shape = {**SMALL.hyperparameters, "n_interaction_layers": 2}
    torch.manual_seed(3)
    network = HIPNN(data.structures.species_table, **shape).double()
    lines = [line("n2n", weight=3.0), line("e2n", error="lsp", student_tap="interaction_0")]
    lines += [{"property": "energy"}]
    lines += [{"property": "forces", "weight": 5.0}, {"property": "stress"}] if forces else []
    results = {}
    for method in ("backpropagation", "central_difference", "forward_over_reverse", "auto"):
        run = settings(loss=lines, force_gradient=ForceGradientSettings(method=method))
        results[method] = gradients(run, network, data, teacher)
    exact, parts = results.pop("backpropagation")
    for flat, others in results.values():
        assert float((flat - exact).norm() / exact.norm()) < 1e-7
        assert others == pytest.approx(parts, rel=1e-10)


@pytest.mark.parametrize("student_kind", [Tapped, Choosing])
@pytest.mark.parametrize("teacher_kind", [Tapped, Choosing])
def test_pairs_of_different_graphs_meet_by_identity(
    data: TrainingSet, student_kind: type[Tapped], teacher_kind: type[Tapped]
) -> None:
    """Student and teacher with equal weights agree on the pairs that both have."""
    table = data.structures.species_table
    network = student_kind(table, width=5, seed=1).double()
    twin = PotentialTeacher(teacher_kind(table, width=5, seed=1).double().eval())
    run = settings(loss=[line("e2e", student_transform="identity")])
    assert gradients(run, network, data, twin)[1]["e2e:big"] < 1e-25
    other = PotentialTeacher(teacher_kind(table, width=5, seed=2).double().eval())
    found = gradients(run, network, data, other)[1]["e2e:big"]
    # By hand: the pairs that count, of both models.
    pairs = build_neighbor_list(data.structures, 3.5)
    factor = 0.8 if Choosing in (student_kind, teacher_kind) else 1.0
    pairs, _ = pairs_within(data.structures, pairs, factor * 3.5)
    features = [
        Tapped(table, width=5, seed=seed)
        .double()
        .predict(data.structures, replace(pairs, cutoff=3.5), [], taps=["pair"])
        .features["pair"]
        for seed in (1, 2)
    ]
    assert found == pytest.approx(float((features[0] - features[1]).square().mean()))


# -- what a student's file holds -------------------------------------------------------------------


def test_a_distilled_student_is_saved_like_its_control(
    data: TrainingSet, teacher: PotentialTeacher, tmp_path: Path
) -> None:
    files, starts = {}, {}
    for name, lines in {"student": [LINES["n2n+v2v"]], "control": []}.items():
        run = settings(*lines, epochs=1, optimizer=OptimizerSettings(learning_rate=1e-300))
        result = train(run, data, data, tmp_path / name, teachers={"big": teacher})
        potential, _ = load_potential(result.best)
        starts[name] = potential.state_dict()
        save_potential(tmp_path / f"{name}.pt", potential, {})
        files[name] = (tmp_path / f"{name}.pt").stat().st_size
        assert all(not module._forward_hooks for module in potential.modules())
    assert files["student"] == files["control"]
    assert list(starts["student"]) == list(starts["control"])
    # They start from the same weights: transformations draw from random numbers of their own.
    for key, value in starts["control"].items():
        torch.testing.assert_close(starts["student"][key], value, rtol=0, atol=1e-12)


#: Small ones of the real models, and the lines with the largest heads that their taps allow.
REAL: dict[str, tuple[dict, list[dict]]] = {
    "painn": (
        {"hidden_channels": 6, "num_layers": 2, "num_rbf": 4, "cutoff": 3.5},
        [line("n2n", student_transform="mlp"), line("v2v")],
    ),
    "schnet": (
        {"hidden_channels": 6, "num_filters": 5, "num_interactions": 2, "cutoff": 3.5},
        [line("n2n", student_transform="mlp"), line("e2e", student_transform="mlp")],
    ),
    "hipnn": (
        {**SMALL.hyperparameters, "n_interaction_layers": 2},
        [line("n2n", student_tap="block_0+block_1", student_transform="mlp"), line("e2n")],
    ),
    "gemnet_oc": (
        {
            **{f"cutoff{part}": 3.5 for part in ("", "_qint", "_aeaint", "_aint")},
            **{f"max_neighbors{part}": 6 for part in ("", "_qint", "_aeaint", "_aint")},
            **{"num_blocks": 1, "num_spherical": 3, "num_radial": 6},
            **{"emb_size_atom": 6, "emb_size_edge": 8, "direct_forces": True},
        },
        [line("n2n", student_transform="mlp"), line("e2e", student_transform="mlp")],
    ),
}


class Operations(TorchDispatchMode):
    """Lists what torch is asked for, with the shapes of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.listed: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        shapes = [tuple(a.shape) for a in args if isinstance(a, torch.Tensor)]
        self.listed.append(f"{func} {shapes}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", list(REAL))
def test_a_file_holds_and_does_what_its_controls_does(
    data: TrainingSet, teacher: PotentialTeacher, tmp_path: Path, kind: str
) -> None:
    data = data.select(torch.tensor([0, 1]))
    hyperparameters, lines = REAL[kind]
    found = {}
    for name, extra in {"student": lines, "control": []}.items():
        model = ModelSettings(kind=kind, hyperparameters=hyperparameters)
        run = settings(*extra, model=model, epochs=2, optimizer=OptimizerSettings(), core="torch")
        best = train(run, data, data, tmp_path / name, teachers={"big": teacher}).best
        assert ("heads" in read_payload(best.with_name("last.pt"))) == bool(extra)
        payload = read_payload(best)
        header = json.loads(payload["header"])
        state = payload["state"]
        potential, info = load_potential(best)
        assert set(info) == set(header["info"])
        with Operations() as seen:
            potential.predict(data.structures)
        found[name] = {
            "keys": (set(payload), set(header), set(info), set(info["settings"])),
            "tensors": {key: (value.shape, value.dtype) for key, value in state.items()},
            "described": {key: header[key] for key in header if key != "info"},
            "operations": seen.listed,
        }
        found[f"{name}'s weights"] = state
    assert found["student"] == found["control"]
    assert len(found["student"]["operations"]) > 20
    weights = found["student's weights"].items()
    assert any(not torch.equal(value, found["control's weights"][key]) for key, value in weights)


def test_interrupted_runs_end_with_the_same_weights(
    data: TrainingSet, teacher: PotentialTeacher, tmp_path: Path
) -> None:
    run = settings(
        line("n2n", share=0.3),
        line("v2v", share=0.1, error="mae"),
        epochs=4,
        optimizer=OptimizerSettings(ema_decay=0.9, clip_norm=1e3),
    )
    teachers = {"big": teacher}
    whole = train(run, data, data, tmp_path / "whole", teachers=teachers)

    def interrupt(record: dict) -> None:
        if record["epoch"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    folder = tmp_path / "parts"
    first = train(run, data, data, folder, teachers=teachers, on_epoch=interrupt)
    assert first.status == "interrupted"
    again = train(run, data, data, folder, teachers=teachers)
    assert again.status == "finished"
    assert_same_weights(whole.best, again.best)
    assert without_times(tmp_path / "whole") == without_times(folder)


def test_a_share_of_the_initial_loss(
    data: TrainingSet, teacher: PotentialTeacher, tmp_path: Path
) -> None:
    run = settings(
        line("n2n", share=0.3),
        line("v2v", share=0.1),
        epochs=1,
        optimizer=OptimizerSettings(learning_rate=1e-300),
    )
    train(run, data, data, tmp_path, teachers={"big": teacher})
    (record,) = records_of(tmp_path)
    parts = {name: record["weights"][name] * record["train"][name] for name in record["weights"]}
    total = record["train"]["loss"]
    assert sum(parts.values()) == pytest.approx(total)
    assert parts["n2n:big"] / total == pytest.approx(0.3)
    assert parts["v2v:big"] / total == pytest.approx(0.1)


@pytest.mark.slow
def test_two_ranks_equal_one_rank_with_the_whole_batch(
    data: TrainingSet, teacher: PotentialTeacher, tmp_path: Path
) -> None:
    # an odd number of frames: in the last step one rank has nothing
    script = "import test_feature_distillation as t\nt.train_for_ranks(sys.argv[2])\n"
    run_on_two_ranks(script, tmp_path)
    train_for_ranks(tmp_path / "one")
    for run in ("backpropagation", "central_difference"):
        files = (tmp_path / ranks / run / "best.pt" for ranks in ("one", "two"))
        first, second = (load_potential(file)[0].state_dict() for file in files)
        for name, value in first.items():
            torch.testing.assert_close(second[name], value, rtol=1e-7, atol=1e-9)
        logged = [records_of(tmp_path / ranks / run)[-1]["validation"] for ranks in ("one", "two")]
        assert logged[0] == pytest.approx(logged[1], rel=1e-6)
        assert "n2n:big" in logged[0]


def train_for_ranks(folder: str | Path) -> None:
    """Runs with terms of all shapes of sums, on three frames in batches of two."""
    frames = emt_set(3)
    potential = Tapped(frames.structures.species_table, width=7, seed=5).double().eval()
    run = settings(
        line("n2n", error="cka"),
        line("v2v", share=0.2, weight=Schedule(epochs=(1, 2), values=(1.0, 0.0))),
        line("e2n", error="lsp", student_tap="message"),
    )
    teachers = {"big": PotentialTeacher(potential, TeacherInfo("big", "f00"))}
    train(run, frames, frames, Path(folder) / "backpropagation", teachers=teachers)
    run = settings(
        line("n2n"),
        line("e2n", error="gsp", student_tap="interaction_0"),
        model=SMALL,
        force_gradient=ForceGradientSettings(method="central_difference"),
    )
    train(run, frames, frames, Path(folder) / "central_difference", teachers=teachers)


# -- stored features -------------------------------------------------------------------------------


@pytest.fixture
def store(data: TrainingSet, tmp_path: Path) -> LabeledStore:
    store = LabeledStore.create(tmp_path / "labels.zarr")
    store.append(data.structures, data.labels["reference"])
    return store


def stored_features(store: LabeledStore) -> dict[str, dict[str, Feature]]:
    return {"big": {tap: store.features("big", tap) for tap in store.taps("big")}}


def test_stored_and_online_features_give_the_same_numbers(
    data: TrainingSet, teacher: PotentialTeacher, store: LabeledStore, tmp_path: Path
) -> None:
    label_features(store, teacher, ["pair", "message.vector", "default"], chunk=3)
    with_features = replace(data, features=stored_features(store))
    run = settings(*(line(name, weight=10.0) for name in ("n2n", "e2n", "v2v", "e2e")))
    stored = train(run, with_features, data, tmp_path / "stored")
    online = train(run, data, data, tmp_path / "online", teachers={"big": teacher})
    first, second = (load_potential(result.best)[0].state_dict() for result in (stored, online))
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-8, atol=1e-10)
    one, other = (records_of(tmp_path / name)[-1]["train"] for name in ("stored", "online"))
    assert one == pytest.approx(other, rel=1e-8)


def test_storing_features_goes_on_where_it_was_killed(
    data: TrainingSet, teacher: PotentialTeacher, store: LabeledStore
) -> None:
    class Killed(BaseException):
        pass

    def kill(done: int, total: int) -> None:
        if done == 2:
            raise Killed

    with pytest.raises(Killed):
        label_features(store, teacher, ["pair"], chunk=1, progress=kill)
    assert store.taps("big")["pair"]["n_done"] == 2
    assert store.features("big", "pair").presence(4).tolist() == [True, True, False, False]
    report = label_features(store, teacher, ["update", "pair"], chunk=3)
    assert (report.n_labeled, report.n_failed) == (4, 0)
    again = LabeledStore.open(store.path)
    again.verify()
    expected, _ = teacher.features(data.structures, ["update", "pair"])
    for tap, feature in expected.items():
        got = again.features("big", tap)
        torch.testing.assert_close(got.values, feature.values, rtol=1e-12, atol=1e-14)
        part = again.features("big", tap, 1, 3)
        some = feature.select(data.structures.rows([1, 2]))
        torch.testing.assert_close(part.values, some.values, rtol=1e-12, atol=1e-14)
        if feature.graph is not None and got.graph is not None:
            for name in ("center", "neighbor", "shifts", "n_pairs_per_system"):
                assert torch.equal(getattr(got.graph, name), getattr(feature.graph, name))
            assert part.graph is not None
            assert some.graph is not None
            assert torch.equal(part.graph.neighbor, some.graph.neighbor)
    assert again.taps("big")["update"]["default"]


def test_a_store_changes_its_fingerprint_with_features(
    teacher: PotentialTeacher, store: LabeledStore
) -> None:
    before = store.fingerprint()
    label_features(store, teacher, ["update"])
    assert store.fingerprint() != before


def test_frames_without_features_are_left_out(data: TrainingSet, teacher: PotentialTeacher) -> None:
    """The loss is that of the frames that have them."""
    features, _ = teacher.features(data.structures, ["update", "pair"])
    holes = {}
    for tap, feature in features.items():
        parts = [data.structures.select([s]) for s in range(4)]
        pieces = [feature.select(data.structures.rows([s])) for s in range(4)]
        pieces[1] = pieces[1].absent(parts[1])
        holes[tap] = Feature.concatenate(pieces, parts)
    for error in ("mse", "lsp", "gsp", "cka"):
        run = settings(loss=[line("n2n", error=error), line("e2n", error=error)])
        found = []
        for part, own in (
            (data, holes),
            (data.select(torch.tensor([0, 2, 3])), None),
        ):
            given = part if own is None else replace(part, features={"big": own})
            network = Tapped(data.structures.species_table, width=5, seed=1).double()
            found.append(gradients(run, network, given, teacher))
        torch.testing.assert_close(found[0][0], found[1][0])
        assert found[0][1] == pytest.approx(found[1][1])


class Failing(PotentialTeacher):
    """Fails on frames of eight atoms."""

    def compute_features(self, structures, taps):  # type: ignore[no-untyped-def]
        if bool((structures.n_atoms_per_system == 8).any()):
            raise RuntimeError("too large")
        return super().compute_features(structures, taps)


def test_frames_that_a_teacher_fails_on_are_listed(
    data: TrainingSet, teacher: PotentialTeacher, store: LabeledStore, tmp_path: Path
) -> None:
    failing = Failing(teacher.potential, teacher.info)
    report = label_features(store, failing, ["update", "pair"], chunk=2)
    assert report.n_failed == 2
    assert {f["system"] for f in report.failures} == {1, 3}
    assert report.failures[0]["reason"] == "too large"
    feature = store.features("big", "pair")
    assert feature.presence(4).tolist() == [True, False, True, False]
    store.verify()
    result = train(settings(LINES["n2n"]), data, data, tmp_path / "r", teachers={"big": failing})
    assert result.status == "finished"


def test_a_teacher_that_fails_on_the_first_frames_is_refused_in_words(
    teacher: PotentialTeacher, store: LabeledStore
) -> None:
    class Dead(PotentialTeacher):
        def compute_features(self, structures, taps):  # type: ignore[no-untyped-def]
            raise RuntimeError("out of order")

    dead = Dead(teacher.potential, teacher.info)
    with pytest.raises(TeacherError, match="features of none of the structures: out of order"):
        label_features(store, dead, ["update"], chunk=2)


# -- the validation set ----------------------------------------------------------------------------

AT_REST = {"epochs": 1, "batch_size": 4, "optimizer": OptimizerSettings(learning_rate=1e-300)}


@pytest.mark.parametrize("model", [STUDENT, SMALL])
def test_terms_on_features_are_evaluated_on_the_validation_set(
    data: TrainingSet, teacher: PotentialTeacher, tmp_path: Path, model: ModelSettings
) -> None:
    """On the training set, in one batch and at rest, they are what the training shows."""
    lines = [line("n2n"), line("e2n", error="lsp", student_transform="identity")]
    lines += [line("v2v", error="cka"), line("e2e")] if model is STUDENT else []
    run = settings(*lines, model=model, **AT_REST)
    train(run, data, data, tmp_path / "online", teachers={"big": teacher})
    (record,) = records_of(tmp_path / "online")
    names = terms_of(run)
    assert len(names) == len(lines)
    for name in names:
        assert record["validation"][name] == pytest.approx(record["train"][name], rel=1e-9)
        assert record["train"][name] > 1e-6
    # Stored features give the same, and without any only the labels are compared, as of a control.
    features, _ = teacher.features(data.structures, ["pair", "message.vector", "update"])
    with_features = replace(data, features={"big": features})
    for name, held_out in (("stored", with_features), ("none", data)):
        train(run, with_features, held_out, tmp_path / name)
    stored, none = (records_of(tmp_path / name)[0]["validation"] for name in ("stored", "none"))
    assert stored == pytest.approx(record["validation"], rel=1e-9)
    assert set(stored) - set(none) == set(names)
    train(settings(model=model, **AT_REST), data, data, tmp_path / "control")
    assert none == records_of(tmp_path / "control")[0]["validation"]


def test_a_teacher_computes_features_of_atoms_of_the_validation_set_once(
    data: TrainingSet, teacher: PotentialTeacher, tmp_path: Path
) -> None:
    asked: list[tuple[int, tuple[str, ...]]] = []

    class Counting(PotentialTeacher):
        def compute_features(self, structures, taps):  # type: ignore[no-untyped-def]
            asked.append((structures.n_systems, tuple(taps)))
            return super().compute_features(structures, taps)

    held_out = data.select(torch.tensor([0, 1, 2]))
    for lines, expected in ((["n2n"], [("update",)]), (["n2n", "e2e"], [("update",), ("pair",)])):
        asked.clear()
        run = settings(*(line(name) for name in lines), epochs=3)
        folder = tmp_path / str(len(lines))
        train(run, data, held_out, folder, teachers={"big": Counting(teacher.potential)})
        of_validation = [taps for n, taps in asked if n == 3]
        assert of_validation == expected[:1] + 3 * expected[1:]
        assert all(set(terms_of(run)) <= set(r["validation"]) for r in records_of(folder))


def test_what_is_read_off_features_is_evaluated_where_there_are_labels(tmp_path: Path) -> None:
    data = molecules()
    run = settings({"learn": "charges"}, {"learn": "dipole", "error": "mae"}, **AT_REST)
    train(run, data, data, tmp_path / "run")
    (record,) = records_of(tmp_path / "run")
    for name in ("charges:reference", "dipole:reference"):
        assert record["validation"][name] == pytest.approx(record["train"][name], rel=1e-9)
    reference = data.labels["reference"]
    values = {k: v for k, v in reference.values.items() if k != "dipole"}
    fewer = replace(data, labels={"reference": Properties(values)})
    train(run, data, fewer, tmp_path / "fewer")
    (record,) = records_of(tmp_path / "fewer")
    assert "charges:reference" in record["validation"]
    assert "dipole:reference" not in record["validation"]


def test_parts_of_a_store_keep_their_features(
    teacher: PotentialTeacher, store: LabeledStore
) -> None:
    label_features(store, teacher, ["update"])
    split = {"fractions": {"train": 0.5, "validation": 0.25, "test": 0.25}}
    config = DataSettings(store=str(store.path), sources=("reference",), split=split)
    parts, _ = load_parts(config, [FeatureTerm(distill="n2n", source="big")])
    for name in ("train", "validation"):
        expected, _ = teacher.features(parts[name].structures, ["update"])
        found = parts[name].features["big"]["update"]
        torch.testing.assert_close(found.values, expected["update"].values)
    assert not parts["test"].features


# -- one line per strategy -------------------------------------------------------------------------


def test_strategies_expand_into_terms() -> None:
    energy = LossTerm(property="energy", error="mae", weight=2.0)
    forces = LossTerm(property="forces", weight=Schedule(epochs=(1, 5), values=(100.0, 10.0)))
    run = TrainSettings(
        loss=[
            energy,
            forces,
            {"distill": "vanilla1+vanilla2", "source": "t", "weight": 0.5},
            {"distill": "n2n+v2v", "source": "t", "weight": "preset:gemnet-oc-to-painn.n2n.coll"},
        ]
    )
    own, more, teacher_energy, teacher_forces, atomic, n2n, v2v = run.loss
    assert (own, more) == (energy, forces)
    assert teacher_energy == energy.model_copy(update={"source": "t", "weight": 1.0})
    assert teacher_forces == LossTerm(
        property="forces", source="t", weight=Schedule(epochs=(1, 5), values=(50.0, 5.0))
    )
    assert atomic == LossTerm(property="atomic_energies", source="t", weight=0.5, error="mae")
    assert n2n == FeatureTerm(distill="n2n", source="t", weight=1000.0)
    assert v2v == FeatureTerm(distill="v2v", source="t", weight=1000.0)
    # What is written to a run folder is read back as the same settings.
    assert TrainSettings.model_validate_json(run.model_dump_json()) == run


def test_presets_are_those_of_the_tables() -> None:
    by_strategy = [line("n2n+v2v", weight="preset:painn-to-painn-small")]
    assert [term["weight"] for term in expand(by_strategy)] == [100.0, 1000.0]
    assert sum(len(by_data) for table in PRESETS.values() for by_data in table.values()) == 29
    for table in PRESETS.values():
        assert set(table) <= set(STRATEGIES)
    e2n = PRESETS["gemnet-oc-to-painn"]["e2n"]
    assert (e2n["oc20"], e2n["oc20-table6"], e2n["coll"]) == (1000.0, 10.0, 10.0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"distill": "n2m"}, "unknown strategy 'n2m'; did you mean"),
        ({"distill": "n2n+e2"}, "unknown strategy 'e2'"),
        ({"source": "reference"}, "features come from a teacher"),
        ({"distill": "v2v", "student_transform": "mlp"}, "would break equivariance"),
        ({"distill": "e2e", "error": "gsp"}, "e2e takes mse, mae or cka"),
        ({"weight": 3.0, "share": 0.3}, "either a weight or a share"),
        ({"share": 1.5}, "less than 1"),
        ({"weight": "preset:schnet-to-painn"}, "no preset 'schnet-to-painn'; did you mean"),
        ({"weight": "preset:painn-to-schnet.v2v"}, "has no 'v2v'"),
        ({"weight": "preset:painn-to-schnet.n2n.oc22"}, "no weight for 'oc22'"),
        ({"weight": "much"}, "a number, a schedule or preset:"),
        ({"distill": "n2n+v2v", "weight": {"n2n": 1.0}}, "lacks 'v2v' of"),
        ({"tap": "update"}, "unknown key 'tap' in 'loss[2]'"),
    ],
)
def test_a_wrong_line_is_told_in_a_sentence(changes: dict, words: str) -> None:
    lines = [*REFERENCE, {**line("n2n"), **changes}]
    with pytest.raises(ConfigError) as error:
        validate({"loss": lines}, TrainSettings)
    assert words in str(error.value)


def test_vanilla_needs_terms_to_repeat() -> None:
    with pytest.raises(ValueError, match="lacks one of them"):
        TrainSettings(loss=[{"property": "energy"}, line("vanilla1")])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"student_tap": "updat"}, "the student .tapped. has no feature tap 'updat'; did you mean"),
        ({"teacher_tap": "updat"}, "no feature tap or submodule 'updat'"),
        ({"student_tap": "pair"}, "kind node_scalar, but 'pair' is of the kind edge_scalar"),
        ({"teacher_tap": "pair"}, "kind node_scalar, but 'pair' is of the kind edge_scalar"),
        ({"teacher_tap": "pair+update"}, "is of the kind edge_scalar and node_scalar"),
        ({"teacher_tap": "output", "student_transform": "identity"}, "5 channels .* teacher's 1"),
        ({"student_transform": "identity"}, "5 channels and the teacher's 7"),
    ],
)
def test_taps_that_do_not_fit_are_refused_before_the_first_step(
    data: TrainingSet, teacher: PotentialTeacher, tmp_path: Path, changes: dict, words: str
) -> None:
    with pytest.raises((ConfigError, ModelError), match=words):
        train(
            settings(line("n2n", **changes)),
            data,
            data,
            tmp_path / "run",
            teachers={"big": teacher},
        )
    assert not (tmp_path / "run").exists()


def test_absent_features_and_teachers_are_told(
    data: TrainingSet, teacher: PotentialTeacher, tmp_path: Path
) -> None:
    with pytest.raises(MissingLabelError, match="hold no features of it: store them with"):
        train(settings(LINES["n2n"]), data, data, tmp_path / "run")
    features, _ = teacher.features(data.structures, ["pair"])
    some = replace(data, features={"big": features})
    with pytest.raises(MissingLabelError, match=r"distills update of 'big' .* hold pair of it"):
        train(settings(line("n2n", teacher_tap="update")), some, data, tmp_path / "run")
    hipnn = settings(LINES["v2v"], model=SMALL)
    with pytest.raises(ConfigError, match=r"student \(hipnn\) has no tap of the kind node_vector"):
        train(hipnn, data, data, tmp_path / "run", teachers={"big": teacher})
    assert not (tmp_path / "run").exists()


def test_features_of_pairs_without_a_recipe_are_for_the_moment_only(
    data: TrainingSet, teacher: PotentialTeacher, store: LabeledStore
) -> None:
    class Silent(PotentialTeacher):
        def compute_features(self, structures, taps):  # type: ignore[no-untyped-def]
            found = super().compute_features(structures, taps)
            return {tap: replace(feature, recipe="") for tap, feature in found.items()}

    silent = Silent(teacher.potential, teacher.info)
    with pytest.raises(StoreError, match="compute it online"):
        label_features(store, silent, ["pair"])
    assert gradients(
        settings(loss=[LINES["e2n"]]),
        Tapped(data.structures.species_table, width=5).double(),
        data,
        silent,
    )[1]


def test_another_teacher_cannot_add_features_under_the_same_name(
    data: TrainingSet, teacher: PotentialTeacher, store: LabeledStore
) -> None:
    label_features(store, teacher, ["update"])
    other = PotentialTeacher(teacher.potential, TeacherInfo("big", "another"))
    with pytest.raises(StoreError, match="different teacher"):
        label_features(store, other, ["pair"])
    with pytest.raises(StoreError, match="different teacher"):
        store.begin_labels("big", {"fingerprint": "another"})


# -- other properties, read off the features -------------------------------------------------------


def molecules() -> TrainingSet:
    """Water and its fragments with charges that depend on the distances, and their dipoles."""
    frames, charges, dipoles = [], [], []
    for k, name in enumerate(("H2O", "H2O", "OH", "H2O")):
        atoms = molecule(name)
        atoms.rattle(0.1, seed=k)
        atoms.calc = SinglePointCalculator(atoms, energy=-1.0, forces=0.1 * atoms.positions)
        distance = atoms.get_all_distances() + 1e3 * np.eye(len(atoms))
        q = np.where(atoms.numbers == 8, -0.4, 0.2) / distance.min(axis=1)
        q -= q.mean()
        frames.append(atoms)
        charges.append(q)
        dipoles.append(q @ atoms.positions)
    values = {"charges": np.concatenate(charges), "dipole": np.array(dipoles)}
    values["energy"] = np.array([a.get_potential_energy() for a in frames])
    values["forces"] = np.concatenate([a.get_forces() for a in frames])
    labels = Properties({name: torch.from_numpy(value) for name, value in values.items()})
    return TrainingSet(Structures.from_ase(frames), {"reference": labels})


@pytest.mark.parametrize("learn", ["charges", "dipole"])
def test_other_properties_are_learnt_from_the_features(learn: str, tmp_path: Path) -> None:
    data = molecules()
    run = settings({"learn": learn, "weight": 100.0, "transform": "mlp"}, epochs=40)
    result = train(run, data, data, tmp_path / "run")
    first, *_, last = (record["train"] for record in records_of(tmp_path / "run"))
    assert last[f"{learn}:reference"] < 0.3 * first[f"{learn}:reference"]
    control = train(settings(epochs=1), data, data, tmp_path / "control")
    kept, plain = (load_potential(r.best)[0].state_dict() for r in (result, control))
    assert list(kept) == list(plain)
    network = Tapped(data.structures.species_table, width=5, seed=1).double()
    only = settings(loss=[{"learn": learn, "student_tap": "message"}])
    parts = gradients(only, network, data, PotentialTeacher(network))[1]
    assert set(parts) == {f"{learn}:reference", "loss"}
    reached = {n.split(".")[0] for n, p in network.named_parameters() if p.grad is not None}
    assert reached == {"embedding", "radial", "message"}


def test_dipoles_are_those_of_the_charges() -> None:
    """A head that gives the right charges gives the right dipoles; ions and crystals stay out."""
    data = molecules()
    network = Tapped(data.structures.species_table, width=5).double()
    head = AuxiliaryHead(AuxiliaryTerm(learn="dipole"), network)
    labels = data.labels["reference"]
    head.readout = torch.nn.Linear(1, 1).double()
    torch.nn.init.constant_(head.readout.weight, 1.0)
    torch.nn.init.constant_(head.readout.bias, 0.7)  # a shift of all charges is taken off
    student = {"update": labels["charges"].unsqueeze(1)}
    pairs = build_neighbor_list(data.structures, 3.5)
    batch = Batch(data.structures, pairs, {"reference": labels})
    right = head.sums(student, batch).detach()
    assert float(head.value(right)) < 1e-20
    assert float(right[1]) == 12.0
    ions = replace(data.structures, charge=torch.tensor([0.0, 1.0, 0.0, 0.0]).double())
    crystals = replace(ions, pbc=torch.tensor([[False] * 3, [False] * 3, [True] * 3, [False] * 3]))
    assert float(head.sums(student, replace(batch, structures=crystals)).detach()[1]) == 6.0


def test_an_absent_property_is_told(data: TrainingSet, tmp_path: Path) -> None:
    with pytest.raises(MissingLabelError, match="needs 'charges' from 'reference', which holds"):
        train(settings({"learn": "charges"}), data, data, tmp_path / "run")
    with pytest.raises(ConfigError, match="unknown key 'property'"):
        validate({"loss": [{"learn": "charges", "property": "energy"}]}, TrainSettings)


# -- starting from a teacher's layers --------------------------------------------------------------


def test_layers_start_from_a_teacher(data: TrainingSet, tmp_path: Path) -> None:
    table = data.structures.species_table
    shape = {**SMALL.hyperparameters, "n_features": 9}
    wide = HIPNN(table, **shape)
    save_potential(tmp_path / "wide.pt", wide, {})
    weights = {"checkpoint": str(tmp_path / "wide.pt"), "names": ["blocks.*"]}

    def start(**changes: object) -> HIPNN:
        model = {**SMALL.model_dump(), "initialize": {**weights, **changes}}
        network = initial_student(settings(model=model), data)[0]["network"]
        assert isinstance(network, HIPNN)
        return network

    narrow = dict(start(first_channels=True).named_parameters())
    fresh = initial_student(settings(model=SMALL), data)[0]["network"]
    for name, value in fresh.named_parameters():
        theirs = dict(wide.named_parameters())[name].double()
        part = theirs[tuple(slice(n) for n in value.shape)]
        assert torch.equal(narrow[name], part if name.startswith("blocks.") else value), name
    with pytest.raises(ConfigError, match=r"\(6, 6\) in the student and \(9, 9\).*first_channels"):
        start(names=["blocks.*.res_layer.weight"])
    with pytest.raises(ConfigError, match="no parameter in common with the student"):
        start(names=["interactions.*"])


# -- a foreign teacher, from one config ------------------------------------------------------------

CHGNET_CONFIG = Path(__file__).parents[1] / "studies" / "feature_distillation" / "chgnet_n2n.yaml"


def test_chgnet_is_distilled_into_hipnn_from_one_config(tmp_path: Path) -> None:
    pytest.importorskip("chgnet", reason="the package chgnet is not installed")
    frames = []
    for seed in range(5):
        atoms = bulk("Si", cubic=True)
        atoms.rattle(0.1, seed=seed)
        energy = 0.1 * seed - 40.0
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=0.1 * atoms.positions)
        frames.append(atoms)
    write(tmp_path / "si.extxyz", frames)
    changes = {
        "data": {
            "files": [{"path": str(tmp_path / "si.extxyz")}],
            "split": {"fractions": {"train": 0.8, "validation": 0.2}},
        },
        "train": {"epochs": 4, "learning_rate": {"factor": 0.99}},
    }
    results = {}
    for name in ("online", "stored"):
        if name == "stored":
            store = tmp_path / "labels.zarr"
            call = ["label", str(store), str(tmp_path / "si.extxyz"), "--teacher", "chgnet"]
            done = CliRunner().invoke(app, [*call, "--properties", "none", "--taps", "default"])
            assert done.exit_code == 0, done.output
            assert "5 structures labeled" in done.output
            assert LabeledStore.open(store).taps("chgnet")["mlp.layers.6"]["width"] == 64
            changes["data"] = {"store": str(store), "split": changes["data"]["split"]}
            changes["data"]["files"] = []
        overrides = {**changes, "out": str(tmp_path / name)}
        config = load_config(CHGNET_CONFIG, TrainConfig, overrides)
        result = train_from_config(config)
        results[name] = [record["train"]["n2n:chgnet"] for record in records_of(tmp_path / name)]
        potential, info = load_potential(result.best)
        assert potential["network"].kind == "hipnn"
        assert info["teacher"]["name"] == "chgnet"
        assert info["teacher"]["license"].startswith("Modified BSD")
        kept = json.loads((tmp_path / name / "settings.json").read_text())
        assert kept["features"] == {
            "n2n:chgnet": {"student": ["block_0"], "teacher": ["mlp.layers.6"]}
        }
    assert results["online"][-1] < 0.8 * results["online"][0]
    assert results["stored"] == pytest.approx(results["online"], rel=1e-3)


def test_chgnet_bonds_are_pairs_of_the_structure() -> None:
    pytest.importorskip("chgnet", reason="the package chgnet is not installed")
    structures = Structures.from_ase([bulk("Si", cubic=True), bulk("NaCl", "rocksalt", a=5.6)])
    structures = replace(structures, positions=structures.positions + 4.0)
    features, failures = make_teacher("chgnet").features(structures, ["bond_conv_layers.2"])
    feature = features["bond_conv_layers.2"]
    assert not failures
    assert feature.graph is not None
    pairs = build_neighbor_list(structures, 6.0)
    mine, _ = match_pairs(feature.graph, pairs)
    assert len(mine) == feature.graph.n_pairs == pairs.n_pairs
    # Sums over the bonds of atoms that symmetry makes equal are equal.
    nodes = edges_to_nodes(feature, structures)
    torch.testing.assert_close(nodes[:8], nodes[:1].expand(8, -1), rtol=1e-4, atol=1e-4)
    assert float((nodes[0] - nodes[8]).abs().max()) > 1e-2
