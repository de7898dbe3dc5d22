"""The four pairs of models of Ekström Kelvinius et al., with the strategies that apply to each."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from potstill.checkpoint import load_potential
from potstill.models import Potential, build_model
from potstill.species import SpeciesTable
from potstill.teachers import PotentialTeacher
from potstill.teachers.base import TeacherInfo
from potstill.train import TrainingSet, TrainSettings, train
from potstill.train.settings import EnergySettings, ModelSettings, OptimizerSettings
from test_train import emt_set

#: Hardly there: an untrained teacher contradicts it.
REFERENCE = ({"property": "energy", "weight": 0.001}, {"property": "forces", "weight": 0.01})


def schnet(width: int) -> ModelSettings:
    shape = {"hidden_channels": width, "num_filters": width, "num_interactions": 2}
    return ModelSettings(
        kind="schnet", hyperparameters=shape | {"num_gaussians": 12, "cutoff": 4.0}
    )


def painn(width: int) -> ModelSettings:
    shape = {"hidden_channels": width, "num_layers": 2, "num_rbf": 12, "cutoff": 4.0}
    return ModelSettings(kind="painn", hyperparameters=shape | {"direct_forces": True})


def gemnet(width: int, n_blocks: int) -> ModelSettings:
    sizes = {name: width for name in ("emb_size_atom", "emb_size_edge")}
    shape = {
        "num_spherical": 3,
        "num_radial": 6,
        "num_blocks": n_blocks,
        "emb_size_trip_in": 4,
        "emb_size_trip_out": 4,
        "emb_size_quad_in": 4,
        "emb_size_quad_out": 4,
        "emb_size_aint_in": 4,
        "emb_size_aint_out": 4,
        "emb_size_rbf": 4,
        "emb_size_cbf": 4,
        "emb_size_sbf": 4,
        "cutoff": 4.0,
        "cutoff_qint": 3.0,
        "cutoff_aeaint": 4.0,
        "cutoff_aint": 4.0,
    }
    return ModelSettings(kind="gemnet_oc", hyperparameters=sizes | shape)


PAIRS = {
    "painn to painn-small": (painn(12), painn(6)),
    "painn to schnet": (painn(12), schnet(8)),
    "gemnet-oc to painn": (gemnet(12, 2), painn(6)),
    "gemnet-oc to gemnet-oc-small": (gemnet(12, 2), gemnet(6, 1)),
}
EVERYWHERE = ("vanilla1", "vanilla2", "n2n")
CASES = [
    *((pair, strategy) for pair in PAIRS for strategy in EVERYWHERE),
    ("painn to painn-small", "v2v"),
    ("painn to painn-small", "n2n+v2v"),
    ("gemnet-oc to painn", "e2n"),
    ("gemnet-oc to painn", "v2v"),
    ("gemnet-oc to gemnet-oc-small", "e2e"),
]


def make(model: ModelSettings, table: SpeciesTable) -> Potential:
    torch.manual_seed(2)
    return build_model(model.kind, table, model.hyperparameters)


@pytest.fixture(scope="module")
def bare() -> TrainingSet:
    return emt_set(4)


@pytest.mark.parametrize(("pair", "strategy"), CASES)
def test_students_learn_from_their_teachers_features(
    bare: TrainingSet, tmp_path: Path, pair: str, strategy: str
) -> None:
    big, small = PAIRS[pair]
    potential = make(big, bare.structures.species_table).eval()
    teacher = PotentialTeacher(potential, TeacherInfo("big", "f00"))
    labels, _ = teacher.label(bare.structures, ["energy", "forces", "atomic_energies"])
    data = replace(bare, labels={**bare.labels, "big": labels})
    taps = {"teacher_tap": "interaction_1.edge"} if "gemnet" in pair and strategy == "v2v" else {}
    if strategy == "e2n":
        taps = {"teacher_tap": "interaction_1.edge"}
    if strategy == "e2e":
        taps = {"teacher_tap": "interaction_2.edge", "student_tap": "interaction_1.edge"}
    weight: object = {"n2n+v2v": {"n2n": 1.0, "v2v": 1e5}, "v2v": 1e4}.get(strategy, 1e3)
    run = TrainSettings(
        model=small,
        loss=[*REFERENCE, {"distill": strategy, "source": "big", "weight": weight, **taps}],
        energy=EnergySettings(zero="none"),  # an untrained teacher's energies are near zero
        epochs=24 if "v2v" in strategy else 10,
        batch_size=2,
        optimizer=OptimizerSettings(learning_rate=1e-2),
        early_stopping=None,
    )
    result = train(run, data, data, tmp_path / "run", teachers={"big": teacher})
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    first, *_, last = (json.loads(text)["train"] for text in lines)
    terms = [term.name for term in run.loss if term.source == "big"]
    assert terms
    for term in terms:
        assert last[term] < 0.95 * first[term], term
    student, _ = load_potential(result.best)
    control = make(small, bare.structures.species_table)
    assert set(student["network"].state_dict()) == set(control.state_dict())  # type: ignore[index]
