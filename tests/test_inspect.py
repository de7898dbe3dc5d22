"""`potstill inspect` on what every command leaves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ase.build import bulk
from ase.io import write

from data import rattled_copper
from potstill.checkpoint import save_potential
from potstill.config import LabelConfig, SampleConfig
from potstill.errors import DataError
from potstill.evaluate.cka import CKAMatrix
from potstill.models import HIPNN
from potstill.species import SpeciesTable
from potstill.workflows.base import write_json
from potstill.workflows.dynamics import MdConfig, run_dynamics
from potstill.workflows.evaluation import EvaluateConfig, evaluate
from potstill.workflows.inspection import inspect
from potstill.workflows.labeling import label
from potstill.workflows.sampling import sample

EMT = {"spec": "ase.calculators.emt:EMT"}


def text(path: Path) -> str:
    return "\n".join(
        " | ".join(
            [card.title, *map(str, card.columns), *(str(c) for row in card.rows for c in row)]
        )
        for card in inspect(path)
    )


@pytest.fixture
def start(tmp_path) -> Path:
    write(tmp_path / "Cu.xyz", bulk("Cu", cubic=True))
    return tmp_path / "Cu.xyz"


def test_molecular_dynamics(start, tmp_path):
    settings = {"duration": 0.05, "stride": 10.0, "equilibration": 0.0, "timestep": 5.0}
    out = tmp_path / "md"
    run_dynamics(MdConfig(model=EMT, structure=str(start), out=str(out), **settings))
    found = text(out)
    assert "molecular dynamics" in found
    assert "temperature_K" in found
    assert "frames | 5" in found


def test_sampling(start, tmp_path):
    job = {"kind": "md", "temperature": 300.0, "n_frames": 2, "stride": 10.0, "equilibration": 0.0}
    out = tmp_path / "sample"
    config = {"start": str(start), "jobs": [job], "out": str(out), "teacher": EMT}
    sample(SampleConfig.model_validate(config))
    assert "sampled structures" in text(out)
    assert "structures | 2" in text(out)
    assert "finished jobs | 1 of 1" in text(out / "jobs")
    (out / "structures.extxyz").unlink()
    assert "run the same command to resume" in text(out)


def test_evaluation(start, tmp_path):
    out = tmp_path / "evaluation"
    config = {"models": {"student": EMT}, "structure": str(start), "tests": ["eos"]}
    evaluate(EvaluateConfig(**config, out=str(out)))
    assert "Lattice constant a (Å) | student | 3.5" in text(out)
    write_json(out / "elastic.json", {"student": {"error": "it broke"}})
    assert "Not done: elastic constants of student (it broke)." in text(out)


def training(folder: Path, *, done: bool) -> Path:
    """What a training leaves."""
    folder.mkdir(parents=True)
    loss = [{"weight": 1.0, "property": "energy", "source": "reference"}]
    write_json(folder / "settings.json", {"settings": {"model": {"kind": "hipnn"}, "loss": loss}})
    if done:
        write_json(folder / "result.json", {"status": "finished", "best_score": 0.25})
    return folder


def test_training_and_its_checkpoint(tmp_path):
    folder = training(tmp_path / "run", done=False)
    assert "not finished: run the same command to resume" in text(folder)
    write_json(folder / "result.json", {"status": "finished", "best_score": 0.25})
    radii = {"dist_soft_min": 1.5, "dist_soft_max": 3.5, "dist_hard_max": 4.0}
    shape = {"n_features": 4, "n_sensitivities": 4, "n_atom_layers": 1}
    model = HIPNN(SpeciesTable.from_symbols(["Cu"]), **shape, **radii)
    save_potential(folder / "best.pt", model, {"trained_on": {"n_frames": 7}})
    assert "best_score | 0.25" in text(folder)
    assert "n_frames | 7" in text(folder)
    assert "cutoff | 4 Å" in text(folder / "best.pt")


def test_training_in_stages_and_a_study_under_way(tmp_path):
    training(tmp_path / "study" / "first", done=True)
    training(tmp_path / "study" / "second", done=False)
    assert "first | finished | 0.25 | second | not finished | –" in text(tmp_path / "study")


@pytest.mark.parametrize("key", ["runs", "cells"])
def test_study(tmp_path, key):
    record = {"n_parameters": 99, "metrics": {"test:hot": {"forces_rmse": 0.125}}}
    results = {"study": "copper", "title": "Of copper", "date": "today", key: {"a-0": record}}
    write_json(tmp_path / "results.json", results)
    assert "study | copper" in text(tmp_path)
    assert "a-0 | 99 | 0.125" in text(tmp_path)


def test_distillation(tmp_path):
    write_json(tmp_path / "plan.json", {"counts": {"epochs": 7}})
    assert "epochs | 7" in text(tmp_path)
    write_json(tmp_path / "stages.json", {"sample": {"seconds": 12.0}})
    assert "sample | 12 s" in text(tmp_path)


def test_features_and_epsilon(tmp_path):
    matrix = CKAMatrix(("a",), ("b", "c"), np.array([[0.5, np.nan]]), 12)
    (tmp_path / "cka").mkdir()
    write_json(tmp_path / "cka" / "cka.json", {"student_teacher": matrix.to_json()})
    assert "(12 atoms) | student | b | c | a | 0.500 | nan" in text(tmp_path / "cka")
    (tmp_path / "epsilon").mkdir()
    write_json(tmp_path / "epsilon" / "epsilon.json", {"best": 0.01, "rows": []})
    assert "best | 0.01" in text(tmp_path / "epsilon")


def test_label_store_and_structures(tmp_path):
    write(tmp_path / "frames.xyz", rattled_copper(3, 0.1))
    assert "structures | 3" in text(tmp_path / "frames.xyz")
    store = tmp_path / "labels.zarr"
    config = {
        "store": str(store),
        "files": [{"path": str(tmp_path / "frames.xyz")}],
        "teacher": EMT,
    }
    label(LabelConfig.model_validate(config))
    assert "label store" in text(store)
    assert "labels of" in text(store)


def test_what_is_nothing_is_refused(tmp_path):
    with pytest.raises(DataError, match="neither a label store nor a run folder"):
        inspect(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        inspect(tmp_path / "nowhere")
