"""`potstill cka`: similarity of the features of a student and its teacher, and linear probes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from potstill.checkpoint import load_potential
from potstill.errors import DataError
from potstill.evaluate.base import as_json
from potstill.evaluate.cka import (
    CKAMatrix,
    ProbeScore,
    cka_history_drawing,
    cka_matrix,
    linear_probes,
    read_cka_history,
    similarity_gain,
)
from potstill.models import Potential
from potstill.ragged import draw
from potstill.report.heatmaps import Heatmap, write_heatmaps
from potstill.report.plots import write_figure
from potstill.structures import Properties, Structures
from potstill.workflows.base import Display, Settings, claim_folder, write_json
from potstill.workflows.data import FileData, load_store


class CKAConfig(Settings):
    """Settings of `potstill cka`.

    Parameters
    ----------
    student, teacher : str
        Checkpoint.
    data : str
        Label store, or a file with structures.
    source : str
        Label set of the store, for the probes.
    out : str
        Folder for the results.
    before : str, optional
        Checkpoint of the student without distillation (its control, or before training); gains
        are relative to it.
    marked : (str, str), optional
        Distilled taps of student and teacher, framed in the figures.
    run : str, optional
        Run folder with CKA recorded during training.
    student_taps, teacher_taps : tuple of str, optional
        Taps to compare; all feature taps by default.
    n_structures : int
        Number of structures to draw.
    probes : bool
        Fit linear probes; needs energies and forces.
    seed : int
        Seed of the draw and of the probes' split.
    """

    student: str
    teacher: str
    data: str
    out: str
    source: str = "reference"
    before: str | None = None
    marked: tuple[str, str] | None = None
    run: str | None = None
    student_taps: tuple[str, ...] | None = None
    teacher_taps: tuple[str, ...] | None = None
    n_structures: int = Field(default=200, ge=1)
    probes: bool = True
    seed: int = 0


@dataclass(frozen=True)
class CKAReport:
    """CKA of student and teacher (`after`), before distillation, the gain, and each with itself.

    `probes` are of "student", "teacher" and, where there is one, "before".
    """

    after: CKAMatrix
    student: CKAMatrix
    teacher: CKAMatrix
    before: CKAMatrix | None
    gain: CKAMatrix | None
    probes: dict[str, list[ProbeScore]]

    def rows(self) -> list[list[str]]:
        """For each tap of the student: the teacher's tap that is most alike, gain and probes."""
        scores = {score.tap: score for score in self.probes.get("student", [])}
        rows = []
        for i, tap in enumerate(self.after.first):
            values = np.nan_to_num(self.after.values[i], nan=-1.0)
            j = int(values.argmax())
            gain = f"{self.gain.values[i, j]:+.3f}" if self.gain is not None else ""
            row = [tap, self.after.second[j], f"{self.after.values[i, j]:.3f}", gain]
            score = scores.get(tap)
            if score is not None:
                row += [f"{score.energy_r2:.3f}", f"{score.forces_r2:.3f}", score.forces_target]
            rows.append([*row, "", "", ""][:7])
        return rows

    #: Titles of the columns of `rows`.
    COLUMNS = ("tap", "most alike", "CKA", "gain", "energy R²", "forces R²", "forces")

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values."""
        stored = {
            "student_teacher": self.after,
            "student_student": self.student,
            "teacher_teacher": self.teacher,
            "before_teacher": self.before,
            "gain": self.gain,
            "probes": self.probes,
        }
        return {name: as_json(value) for name, value in stored.items() if value is not None}


def compare_features(config: CKAConfig, display: Display | None = None) -> CKAReport:
    """Compare, and write `cka.json` and figures.

    Raises
    ------
    ModelError
        If a model has no taps, or not those.
    DataError
        If probes are asked for and labels are absent.
    """
    display = display or Display()
    folder = Path(config.out)
    models = {name: load_potential(getattr(config, name))[0] for name in ("student", "teacher")}
    if config.before is not None:
        models["before"] = load_potential(config.before)[0]
    structures, labels = _drawn(config)
    claim_folder(folder, config)
    own = config.student_taps
    taps = {"student": own, "before": own, "teacher": config.teacher_taps}

    def compare(first: str, second: str) -> CKAMatrix:
        display.say(f"comparing {first} and {second} on {len(structures)} structures")
        pair, own, its = (models[first], models[second]), taps[first], taps[second]
        return cka_matrix(*pair, structures, first_taps=own, second_taps=its)

    after = compare("student", "teacher")
    before = compare("before", "teacher") if "before" in models else None
    report = CKAReport(
        after=after,
        student=compare("student", "student"),
        teacher=compare("teacher", "teacher"),
        before=before,
        gain=None if before is None else similarity_gain(before, after),
        probes={
            name: _probes(config, model, structures, labels, taps[name])
            for name, model in models.items()
            if config.probes
        },
    )
    write_json(folder / "cka.json", report.to_json())
    _draw(config, report, folder)
    return report


def _drawn(config: CKAConfig) -> tuple[Structures, Properties]:
    """A random part of the data, the same for the same seed."""
    if Path(config.data).is_dir() and (Path(config.data) / "commit.json").is_file():
        data, _ = load_store(config.data, [config.source] if config.probes else None)
        structures, labels = data.structures, data.labels.get(config.source, Properties({}))
    else:
        structures, labels = FileData(path=config.data, allow_partial=True).read()
    drawn = draw(len(structures), config.n_structures, config.seed)
    return structures.select(drawn), labels.select(structures.rows(drawn))


def _probes(
    config: CKAConfig,
    model: Potential,
    structures: Structures,
    labels: Properties,
    taps: tuple[str, ...] | None,
) -> list[ProbeScore]:
    try:
        return linear_probes(model, structures, labels, taps=taps, seed=config.seed)
    except DataError as error:
        raise DataError(f"{config.data}: {error}; or switch probes off") from None


def _draw(config: CKAConfig, report: CKAReport, folder: Path) -> None:
    def field(title: str, matrix: CKAMatrix, **look: Any) -> Heatmap:
        return Heatmap(title, matrix.first, matrix.second, matrix.values, **look)

    maps = [field("after", report.after, marked=config.marked)]
    if report.before is not None and report.gain is not None:
        gain = field("similarity gain", report.gain, signed=True, marked=config.marked)
        maps = [field("before", report.before, marked=config.marked), *maps, gain]
    caption = f"Linear CKA over {report.after.n_atoms} atoms."
    write_heatmaps(folder, "cka", "Similarity of student and teacher", caption, maps)
    own = [
        field("student", report.student, column_label="student"),
        field("teacher", report.teacher, row_label="teacher"),
    ]
    write_heatmaps(folder, "cka_within", "Similarity within each model", caption, own)
    if config.run is not None:
        write_figure(folder, cka_history_drawing(read_cka_history(config.run)))
