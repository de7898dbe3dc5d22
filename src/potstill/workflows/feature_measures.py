"""What a study of feature distillation measures once its cells are trained.

Throughput, which is taken one model after the other, and the similarity of features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from potstill.checkpoint import load_potential
from potstill.distill.taps import CHOSEN_PAIRS
from potstill.evaluate.cka import cka_matrix, linear_probes
from potstill.evaluate.speed import inference_throughput
from potstill.models import Potential
from potstill.structures import Structures
from potstill.train import TrainingSet
from potstill.workflows.base import Settings, read_json, write_json


class FeatureMeasureSettings(Settings):
    """What is measured.

    Parameters
    ----------
    max_atoms : int
        Atoms per batch of the timed predictions.
    rounds : int
        Turns of each model; the median counts.
    n_structures : int
        Of the validation set, for similarities and probes.
    probes : bool
        Score every tap by linear probes.
    """

    max_atoms: int = Field(default=1024, ge=1)
    rounds: int = Field(default=5, ge=1)
    n_structures: int = Field(default=40, ge=4)
    probes: bool = True


@dataclass(frozen=True)
class ComparedCell:
    """A distilled student beside its control and its teacher.

    Parameters
    ----------
    name : str
        Of the run.
    student, control, teacher : Path
        Files of the potentials.
    taps : (str, str), optional
        Taps of student and teacher that were distilled.
    """

    name: str
    student: Path
    control: Path
    teacher: Path
    taps: tuple[str, str] | None = None


def measure_features(
    settings: FeatureMeasureSettings,
    models: Mapping[str, Path],
    compared: Sequence[ComparedCell],
    data: TrainingSet,
    folder: Path,
    *,
    on_model: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measure; what has been measured before is read from `folder`.

    Parameters
    ----------
    settings : FeatureMeasureSettings
        What to measure.
    models : mapping
        Name of a model to its file, trained alone.
    compared : sequence of ComparedCell
        Distilled students.
    data : TrainingSet
        Held-out structures with reference labels.
    folder : Path
        Where measures are kept.
    on_model : callable, optional
        Called with the name of what is measured next.

    Returns
    -------
    dict
        `throughput` by model, `cka` by cell (student with teacher `after` and `before`), `probes`
        by model and cell.
    """
    folder.mkdir(parents=True, exist_ok=True)
    structures = data.structures
    rows = torch.linspace(0, len(structures) - 1, min(settings.n_structures, len(structures)))
    some = data.select(rows.long())

    def cached(name: str, measure: Callable[[], Any]) -> Any:
        file = folder / f"{name}.json"
        if not file.is_file():
            if on_model is not None:
                on_model(name)
            write_json(file, measure())
        return read_json(file)

    # All models are timed in one go, so that they can be compared: another set is timed anew.
    timed = f"throughput-{'-'.join(sorted(models))}"
    found: dict[str, Any] = {
        "throughput": cached(timed, partial(_throughput, settings, models, structures)),
        "cka": {
            cell.name: cached(f"cka-{cell.name}", partial(_similarity, cell, some.structures))
            for cell in compared
        },
        "probes": {},
    }
    if settings.probes:
        files = {**models, **{cell.name: cell.student for cell in compared}}
        found["probes"] = {
            name: cached(f"probes-{name}", partial(_probes, file, some))
            for name, file in files.items()
        }
    return found


def _throughput(
    settings: FeatureMeasureSettings, models: Mapping[str, Path], structures: Structures
) -> dict[str, Any]:
    potentials = {name: _load(file) for name, file in models.items()}
    table = inference_throughput(
        potentials, structures, max_atoms=settings.max_atoms, rounds=settings.rounds
    )
    return {
        name: row.to_json() | {"n_parameters": potentials[name].n_parameters}
        for name, row in table.items()
    }


def _similarity(cell: ComparedCell, structures: Structures) -> dict[str, Any]:
    """CKA between the taps of the kinds that were distilled; scalars of atoms by default."""
    teacher = _load(cell.teacher)
    student_tap, teacher_tap = cell.taps or (None, None)
    found = {}
    for when, file in (("after", cell.student), ("before", cell.control)):
        student = _load(file)
        found[when] = cka_matrix(
            student,
            teacher,
            structures,
            first_taps=_alike(student, student_tap),
            second_taps=_alike(teacher, teacher_tap),
        ).to_json()
    return found


def _alike(potential: Potential, tap: str | None) -> list[str]:
    """The taps of a potential of the same kind as one of them; a module's path is no tap."""
    own = None if tap is None else potential.taps.get(tap.partition("+")[0])
    kind = "node_scalar" if own is None else own.kind
    return [k for k, spec in potential.taps.items() if spec.kind == kind and k != CHOSEN_PAIRS]


def _probes(file: Path, data: TrainingSet) -> list[dict[str, Any]]:
    scores = linear_probes(_load(file), data.structures, data.labels["reference"])
    return [score.to_json() for score in scores]


def _load(file: Path) -> Potential:
    return load_potential(file)[0].eval()
