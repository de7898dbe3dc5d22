"""The protocol of terms: a kind from outside, what a step may read, and when weights stay put."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from potstill.checkpoint import read_payload
from potstill.config import validate
from potstill.distill.taps import TapPair
from potstill.distill.terms import Batch, CustomLine, TeacherTaps, Term, Terms
from potstill.errors import ConfigError, DivergenceError
from potstill.models import Potential
from potstill.structures import Properties
from potstill.train import TrainingSet, TrainSettings, train
from potstill.train.devices import default_fabric
from potstill.train.force_gradient import predict_values
from potstill.train.initialize import initial_student
from potstill.train.objective import BatchLoss
from potstill.train.signals import bind_terms
from potstill.train.state import Trainee
from test_train import assert_same_weights, emt_set, records_of, settings, weights


class NetForce(CustomLine):
    """Penalizes the mean over atoms of |F|² beyond `floor`: it needs no label at all."""

    floor: float = 0.0

    @property
    def name(self) -> str:
        return f"net_force:{self.floor:g}"

    def bind(self, student: Potential, teachers: TeacherTaps) -> NetForceTerm:
        return NetForceTerm(self)


class NetForceTerm(Term):
    needs = ("forces",)

    def __init__(self, line: NetForce) -> None:
        self.line, self.name, self.floor = line, line.name, line.floor

    def sums(self, values: Mapping[str, Tensor], batch: Batch) -> Tensor:
        excess = (values["forces"].square().sum(dim=1) - self.floor).clamp(min=0.0)
        return torch.stack([excess.sum(), excess.new_tensor(float(len(excess)))])

    def value(self, sums: Tensor) -> Tensor:
        return sums[0] / sums[1]


CUSTOM = {"term": "test_terms:NetForce", "weight": 2.0, "floor": 1e-6}


@pytest.mark.parametrize("method", ["backpropagation", "auto"])
def test_a_kind_of_term_from_another_package_is_trained_on_logged_and_validated(
    tmp_path: Path, method: str
) -> None:
    """It enters by its place in a config: no file of potstill knows it."""
    data = emt_set(3)
    plain = {"property": "energy"}
    how = {"force_gradient": {"method": method}, "batch_size": 3}
    run = settings(loss=[plain, CUSTOM], epochs=3, **how)
    assert TrainSettings.model_validate_json(run.model_dump_json()) == run
    train(run, data, data, tmp_path / "run")
    records = records_of(tmp_path / "run")
    start, residual = initial_student(run, data)
    forces = start["network"].double().predict(residual.structures)["forces"]
    expected = (forces.square().sum(dim=1) - 1e-6).clamp(min=0.0).mean()
    assert records[0]["train"]["net_force:1e-06"] == pytest.approx(float(expected), rel=1e-9)
    assert expected > 0.0
    assert records[0]["weights"]["net_force:1e-06"] == 2.0
    # Validation of one epoch sees the weights that the next one starts from, on the same data.
    after, then = records[0]["validation"], records[1]["train"]
    assert after["net_force:1e-06"] == pytest.approx(then["net_force:1e-06"], rel=1e-9)
    control = settings(loss=[plain], epochs=3, **how)
    train(control, data, data, tmp_path / "control")
    one, other = weights(tmp_path / "run/best.pt"), weights(tmp_path / "control/best.pt")
    assert any(not torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"term": "test_terms:Nothing"}, "there is no term 'test_terms:Nothing'"),
        ({"term": "test_terms:NetForceTerm"}, "is not a subclass of"),
        ({**CUSTOM, "flor": 1.0}, "'loss"),
    ],
)
def test_a_custom_line_that_is_wrong_is_told(line: dict, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        validate({"loss": [line]}, TrainSettings)
    assert words in str(error.value)


def test_a_regularizer_that_the_model_lacks_is_told(tmp_path: Path) -> None:
    run = settings(regularization={"hierarchicalty": 0.1})
    with pytest.raises(ConfigError, match="hipnn has no regularizer 'hierarchicalty'; did you"):
        train(run, emt_set(2), emt_set(2), tmp_path)


def test_pairs_of_taps_are_read_back_from_both_forms() -> None:
    pair = TapPair(("block_0", "block_1"), ("mlp",))
    assert TapPair.from_json(json.loads(json.dumps(pair.to_json()))) == pair
    assert TapPair.from_json("block_0+block_1 <- mlp") == pair
    assert str(pair) == "block_0+block_1 <- mlp"
    assert TapPair.from_json("block_0") == TapPair(("block_0",), ())


# -- a step ----------------------------------------------------------------------------------------


class NothingIsRead(TorchDispatchMode):
    """Refuses operations that give a tensor's value to Python, for which a GPU would wait."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        assert func not in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.is_nonzero.default,
        ), func
        return func(*args, **(kwargs or {}))


def one_step(
    data: TrainingSet, run: TrainSettings
) -> tuple[Trainee, Terms, Batch, dict[str, Tensor]]:
    fabric = default_fabric()
    student, residual = initial_student(run, data)
    terms = bind_terms(run, student["network"])
    trainee = Trainee.create(student, terms, run, fabric, steps_per_epoch=1)
    reach = student["network"].cutoff
    batch = residual.with_neighbors(reach).batch(torch.arange(len(data)))
    wanted = BatchLoss(terms, 1, batch, fabric).wanted
    values = predict_values(
        student["network"], batch.structures, batch.neighbors, wanted, create_graph=True
    )
    return trainee, terms, batch, values


LINES = (
    {"property": "energy", "per_atom": True},
    {"property": "forces", "weight": 10.0, "free_atoms": True, "error": "l2mae"},
    {"property": "stress", "error": "huber"},
    {"property": "atomic_energies", "source": "teacher"},
)


def test_loss_and_step_read_nothing_back_from_the_device() -> None:
    data = emt_set(3)
    run = settings(loss=LINES, optimizer={"ema_decay": 0.9})
    trainee, terms, batch, values = one_step(data, run)
    before = {k: v.clone() for k, v in trainee.student.state_dict().items()}
    with NothingIsRead():
        batch = batch.to("cpu")
        found = BatchLoss(terms, 1, batch, default_fabric())(values)
        (found.data + found.penalty).backward()
        trainee.take_step(found.parts)
    assert any(not torch.equal(before[k], v) for k, v in trainee.student.state_dict().items())
    assert [step for step, _ in trainee.read_pending()] == [1]
    assert set(trainee.sums) == {*(t.name for t in terms.all), "loss"}


def test_what_is_left_out_is_looked_up_in_the_memory_of_the_cpu() -> None:
    """Masks on the device are not looked at: finding their true entries would wait for it."""
    data = emt_set(3)
    forces = data.labels["reference"]["forces"].clone()
    forces[:4] = torch.nan
    present = {"forces": torch.tensor([False, True, True])}
    own = Properties({**data.labels["reference"].values, "forces": forces}, present)
    data = replace(data, labels={**data.labels, "reference": own})
    run = settings(loss=LINES)
    _, terms, batch, values = one_step(data, run)
    expected = BatchLoss(terms, 1, batch, default_fabric())(values).parts
    useless = Properties(
        batch.labels["reference"].values, {"forces": torch.zeros(3, dtype=torch.bool)}
    )
    labels = {**batch.labels, "reference": useless}
    there = replace(batch, labels=labels, host=batch)
    found = BatchLoss(terms, 1, there, default_fabric())(values).parts
    assert found == expected


@pytest.mark.parametrize("name", ["adam", "adamw", "amsgrad_adamw"])
def test_a_step_with_an_infinite_loss_leaves_the_weights_alone(name: str) -> None:
    run = settings(loss=LINES, optimizer={"name": name, "weight_decay": 0.1})
    trainee, terms, batch, values = one_step(emt_set(3), run)
    found = BatchLoss(terms, 1, batch, default_fabric())(values)
    (found.data + found.penalty).backward()
    before = {k: v.clone() for k, v in trainee.student.state_dict().items()}
    trainee.take_step({**found.parts, "loss": torch.tensor(torch.inf).double()})
    for key, value in trainee.student.state_dict().items():
        assert torch.equal(value, before[key]), key
    trainee.take_step(found.parts)
    assert any(not torch.equal(before[k], v) for k, v in trainee.student.state_dict().items())


def test_a_run_that_diverges_leaves_the_last_good_weights(tmp_path: Path) -> None:
    """The folder is as it was after the last epoch without an infinite loss, and so are files."""
    data = emt_set(8)
    blows_up = {"epochs": [1, 3], "values": [1.0, 1e308]}
    lines = [{"property": "energy"}, {"property": "forces", "weight": blows_up, "error": "mse"}]
    run = settings(loss=lines, epochs=6, batch_size=2, energy={"zero": "none"})
    forces = data.labels["reference"]["forces"] * 1e3
    own = Properties({**data.labels["reference"].values, "forces": forces})
    data = replace(data, labels={**data.labels, "reference": own})
    with pytest.raises(DivergenceError, match=r"in epoch 3, step 1 \(energy:reference = .*loss = "):
        train(run, data, data, tmp_path / "run")
    short = run.model_copy(update={"epochs": 2})
    train(short, data, data, tmp_path / "short")
    assert_same_weights(tmp_path / "run/best.pt", tmp_path / "short/best.pt")
    first, second = (read_payload(tmp_path / f / "last.pt")["state"] for f in ("run", "short"))
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert len(records_of(tmp_path / "run")) == 2
