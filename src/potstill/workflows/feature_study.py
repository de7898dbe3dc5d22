"""Studies of feature distillation: pairs of models x strategies x seeds from one config, resumable.

Every model of the study is first trained alone, once for each seed; so trained it is the control of
the pairs in which it is the student, and the teacher of those in which it is the teacher. Then each
strategy of each pair is trained: the same run with one more line in the loss. All cells are folders
of their own, so that a study continues where it was interrupted.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from ase.calculators.calculator import BaseCalculator
from pydantic import Field, model_validator

from potstill.checkpoint import load_potential
from potstill.distill.feature_terms import KINDS
from potstill.distill.taps import CHOSEN_PAIRS, TapPair, resolve_taps
from potstill.errors import ConfigError, suggest
from potstill.evaluate.errors import S2EFErrors, average_estimates, evaluate_s2ef
from potstill.evaluate.learning import read_learning_curves
from potstill.metrics import S2EF_METRICS, Estimate
from potstill.models import Potential, TapSpec, build_model
from potstill.report.feature_study import FeatureRow, write_feature_report
from potstill.species import SpeciesTable
from potstill.teachers import Teacher
from potstill.train import TrainingSet, TrainSettings, train
from potstill.train.settings import ModelSettings
from potstill.workflows.base import (
    Settings,
    TeacherSettings,
    potential_info,
    read_json,
    write_json,
)
from potstill.workflows.cells import (
    StudyProgress,
    finished_cells,
    result_file,
    run_cells,
    write_results,
)
from potstill.workflows.data import DataSettings, FileData, load_parts
from potstill.workflows.feature_measures import (
    ComparedCell,
    FeatureMeasureSettings,
    measure_features,
)
from potstill.workflows.training import merged

#: The source of everything that a student learns from its teacher.
TEACHER = "teacher"

#: What a test set with forces only is judged by.
_FORCE_METRICS = ("free_forces_mae", "free_forces_cosine")


class StudyModel(Settings):
    """A model of the study.

    Parameters
    ----------
    kind, hyperparameters
        As of `ModelSettings`: the study trains it.
    checkpoint : TeacherSettings, optional
        A trained teacher from elsewhere, instead.
    train : dict
        Settings of its own, nested as in `common`.
    """

    kind: str = ""
    hyperparameters: dict[str, Any] = Field(default_factory=dict)
    checkpoint: TeacherSettings | None = None
    train: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_origin(self) -> StudyModel:
        if bool(self.kind) == (self.checkpoint is not None):
            raise ValueError("give either 'kind' or 'checkpoint'")
        return self

    @cached_property
    def taps(self) -> Mapping[str, TapSpec]:
        """Its features by name; the model or teacher is made once to ask it."""
        if self.checkpoint is not None:
            return self.checkpoint.make().taps
        return build_model(self.kind, SpeciesTable.from_symbols(["H"]), self.hyperparameters).taps


class Grid(Settings):
    """Runs of one pair that differ in options of one line: taps, losses, transformations, weights.

    Parameters
    ----------
    line : dict
        The line of the loss.
    over : dict of str to tuple
        Values of its options; every combination is a run. `all` stands for all taps that fit.
    seeds : tuple of int, optional
        Those of the study by default.
    """

    line: dict[str, Any]
    over: dict[str, tuple[Any, ...] | Literal["all"]]
    seeds: tuple[int, ...] | None = None

    def lines(self, name: str, taps: Mapping[str, Sequence[str]]) -> dict[str, dict[str, Any]]:
        """Line of the loss by name of the run; `taps` are what `all` stands for, by option."""
        values = {k: taps[k] if v == "all" else v for k, v in self.over.items()}
        found = {}
        for combination in itertools.product(*values.values()):
            options = dict(zip(values, combination, strict=True))
            words = ",".join(f"{key}={value}" for key, value in options.items())
            found[f"{name}[{words}]"] = self.line | options
        return found


class StudyPair(Settings):
    """A teacher and a student.

    Parameters
    ----------
    teacher, student : str
        Names of models.
    strategies : dict of str to dict
        Lines of the loss by name, without `source`.
    grids : dict of str to Grid
        Ablations by name.
    """

    teacher: str
    student: str
    strategies: dict[str, dict[str, Any]] = Field(default_factory=dict)
    grids: dict[str, Grid] = Field(default_factory=dict)


class HeldOutSet(Settings):
    """A held-out set.

    Parameters
    ----------
    file : FileData
        Structures with labels.
    forces_only : bool
        Judge forces alone, where energies cannot be known.
    """

    file: FileData
    forces_only: bool = False


class FeatureStudyConfig(Settings):
    """A whole study.

    Parameters
    ----------
    kind : {"features"}
        Tells it from a study of sizes.
    name, title : str
        Short name, and one line for the report.
    data : DataSettings
        Training and validation set.
    tests : dict of str to HeldOutSet
        What the tables show, per set and averaged.
    models : dict of str to StudyModel
        By name.
    pairs : dict of str to StudyPair
        By name.
    seeds : tuple of int
        Every cell is trained once for each.
    common : TrainSettings
        Everything else, shared by all runs; model and seed are filled in.
    features : {"stored", "online"}
        Whether a teacher's features are computed once for a run and kept, or for every batch.
    measure : FeatureMeasureSettings
        Throughput and similarity of features.
    """

    kind: Literal["features"]
    name: str
    title: str
    data: DataSettings
    tests: dict[str, HeldOutSet]
    models: dict[str, StudyModel]
    pairs: dict[str, StudyPair]
    seeds: tuple[int, ...] = (0, 1, 2)
    common: TrainSettings = Field(default_factory=TrainSettings)
    features: Literal["stored", "online"] = "stored"
    measure: FeatureMeasureSettings = Field(default_factory=FeatureMeasureSettings)

    @model_validator(mode="after")
    def _check(self) -> FeatureStudyConfig:
        for name, pair in self.pairs.items():
            for model in (pair.teacher, pair.student):
                if model not in self.models:
                    raise ValueError(
                        f"the pair '{name}' names a model '{model}' that there is not"
                        f"{suggest(model, self.models)}"
                    )
            if self.models[pair.student].checkpoint is not None:
                raise ValueError(f"the student of '{name}' is trained: give it a 'kind'")
        for cell in self.cells():
            if self.models[cell.model].checkpoint is None:
                self.settings_of(cell)
        return self

    def cells(self) -> list[FeatureCell]:
        """All runs: models alone, then strategies, then grids."""
        runs: list[FeatureCell] = []
        for name, pair in self.pairs.items():
            lines = [(label, line, self.seeds) for label, line in pair.strategies.items()]
            for key, grid in pair.grids.items():
                seeds = self.seeds if grid.seeds is None else grid.seeds
                taps = self._fitting_taps(pair, grid)
                lines += [(label, line, seeds) for label, line in grid.lines(key, taps).items()]
            runs += [
                FeatureCell(pair.student, name, label, line, seed)
                for label, line, seeds in lines
                for seed in seeds
            ]
        # Seed by seed, grids last: a study that is cut short still says something.
        runs.sort(key=lambda cell: ("[" in cell.run, cell.seed))
        used = {model for pair in self.pairs.values() for model in (pair.teacher, pair.student)}
        alone = [
            FeatureCell(name, None, "alone", {}, seed)
            for seed in sorted({*self.seeds, *(cell.seed for cell in runs)})
            for name, model in self.models.items()
            if name in used and model.checkpoint is None
        ]
        return alone + runs

    @property
    def foreign(self) -> list[str]:
        """Teachers that the study does not train."""
        used = {pair.teacher for pair in self.pairs.values()}
        return [name for name in self.models if name in used and self.models[name].checkpoint]

    def _fitting_taps(self, pair: StudyPair, grid: Grid) -> dict[str, list[str]]:
        """The taps that `all` stands for in a grid."""
        asked = [option for option, values in grid.over.items() if values == "all"]
        kinds = KINDS.get(str(grid.line.get("distill")))
        if asked and (kinds is None or not set(asked) <= {"student_tap", "teacher_tap"}):
            raise ValueError(
                f"'all' stands for the taps of one strategy on features, not for {', '.join(asked)}"
            )
        found = {}
        for option in asked:
            assert kinds is not None
            student = option == "student_tap"
            taps = self.models[pair.student if student else pair.teacher].taps
            fitting = (kinds.student,) if student else kinds.teacher
            found[option] = [k for k, t in taps.items() if t.kind in fitting and k != CHOSEN_PAIRS]
        return found

    def settings_of(self, cell: FeatureCell) -> TrainSettings:
        """The settings of one run."""
        model = self.models[cell.model]
        settings = merged(self.common.model_dump(), model.train)
        settings["model"] = ModelSettings(kind=model.kind, hyperparameters=model.hyperparameters)
        settings["seed"] = cell.seed
        if cell.line:
            own = [t for t in settings["loss"] if t.get("source", "reference") != TEACHER]
            settings["loss"] = [*own, {**cell.line, "source": TEACHER}]
        return TrainSettings.model_validate(settings)


@dataclass(frozen=True)
class FeatureCell:
    """One training run of a study.

    Parameters
    ----------
    model : str
        What is trained.
    pair : str or None
        The pair that it belongs to; None where a model is trained alone.
    run : str
        Strategy, or the run of a grid.
    line : dict
        The line of the loss.
    seed : int
        Of the weights and the order of configurations.
    """

    model: str
    pair: str | None
    run: str
    line: Mapping[str, Any]
    seed: int

    @property
    def name(self) -> str:
        """Folder name."""
        place = self.model if self.pair is None else f"{self.pair}.{self.run}"
        return f"{place}-{self.seed}"


def run_feature_study(
    config: FeatureStudyConfig,
    folder: str | Path,
    *,
    workers: int = 1,
    on_progress: Callable[[StudyProgress], None] | None = None,
) -> None:
    """Train every cell of a study that is not finished yet.

    Parameters
    ----------
    config : FeatureStudyConfig
        What to train.
    folder : path
        One subfolder per cell; a finished cell has `cell.json`.
    workers : int
        Processes; each uses one thread when there are several.
    on_progress : callable, optional
        Called after every cell.

    Raises
    ------
    ConfigError
        If the folder holds runs of other settings.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for cell in config.cells():
        _check_cell(config, folder, cell)
    run_cells(
        config.cells(),
        partial(run_feature_cell, config, folder),
        is_finished=lambda cell: result_file(folder, cell).is_file(),
        is_ready=lambda cell: _is_ready(config, folder, cell),
        cost=lambda cell: 1.0,
        workers=workers,
        on_progress=on_progress,
    )


def run_feature_cell(
    config: FeatureStudyConfig, folder: Path, cell: FeatureCell, threads: int
) -> None:
    """Train and test one cell."""
    torch.set_num_threads(threads)
    settings = config.settings_of(cell)
    parts, _ = load_parts(config.data)
    training, teachers = parts["train"], {}
    started = time.process_time()
    if cell.pair is not None:
        teacher = _teacher(config, folder, cell)
        training = _with_teacher(training, settings, teacher, config.features)
        # Stored features need no teacher; with one, training asks it about the validation set, too.
        if config.features == "online" or settings.augment is not None:
            teachers = {TEACHER: teacher}
    asked = time.process_time() - started
    result = train(
        settings,
        training,
        parts["validation"],
        folder / cell.name,
        info=potential_info(training.structures),
        teachers=teachers,
    )
    if result.status == "interrupted":
        raise KeyboardInterrupt
    potential, _ = load_potential(result.best)
    errors = held_out_errors(config, potential)
    record = {
        "model": cell.model,
        "pair": cell.pair,
        "run": cell.run,
        "line": dict(cell.line),
        "seed": cell.seed,
        "n_parameters": potential.n_parameters,
        "epochs": result.epochs,
        "best_epoch": result.best_epoch,
        "seconds": result.seconds,
        "teacher_processor_seconds": asked,
        "threads": threads,
        "taps": read_json(folder / cell.name / "settings.json").get("features", {}),
        "tests": errors.to_json(),
    }
    write_json(result_file(folder, cell), record)


def held_out_errors(
    config: FeatureStudyConfig, potential: Potential | BaseCalculator
) -> S2EFErrors:
    """Errors per test set and averaged; a metric is averaged over the sets that have it."""
    splits = {}
    for name, test in config.tests.items():
        structures, labels = test.file.read()
        found = evaluate_s2ef(potential, {name: (structures, labels)}).splits[name]
        kept = _FORCE_METRICS if test.forces_only else tuple(S2EF_METRICS)
        splits[name] = {key: found[key] for key in kept}
    average: dict[str, Estimate] = {}
    for key in S2EF_METRICS:
        having = [{key: split[key]} for split in splits.values() if key in split]
        if having:
            average |= average_estimates(having)
    return S2EFErrors(splits, average)


def report_feature_study(
    config: FeatureStudyConfig,
    folder: str | Path,
    *,
    command: str = "",
    on_model: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measure what has been trained so far and write tables, figures and the report page.

    Parameters
    ----------
    config : FeatureStudyConfig
        The study.
    folder : path
        As given to `run_feature_study`; gets `report.html`, `report/` and `results.json`.
    command : str
        What was typed, for the record.
    on_model : callable, optional
        Called with the name of each model before it is measured.

    Returns
    -------
    dict
        What `results.json` holds: one record per trained cell, measures, config, versions and
        machine.
    """
    folder = Path(folder)
    records = finished_cells(config, folder)
    finished = [cell for cell in config.cells() if cell.name in records]
    measured = _measures(config, folder, finished, on_model)
    rows = [_row(config, folder, cell, records[cell.name]) for cell in finished]
    rows += [_teacher_row(config, folder, name) for name in config.foreign]
    result, about = write_results(config, folder, command, records, measures=measured)
    write_feature_report(rows, measured, folder, title=config.title, about=about)
    return result


# -- parts -----------------------------------------------------------------------------------------


def _check_cell(config: FeatureStudyConfig, folder: Path, cell: FeatureCell) -> None:
    """Refuse a finished run of other settings: it would pass for one of these."""
    file = folder / cell.name / "settings.json"
    if result_file(folder, cell).is_file():
        stored = TrainSettings.model_validate(read_json(file)["settings"])
        if stored != config.settings_of(cell):
            raise ConfigError(
                f"{folder / cell.name} holds a run with other settings: choose another folder, or "
                "remove it"
            )


def _teacher_cell(config: FeatureStudyConfig, cell: FeatureCell) -> FeatureCell | None:
    """The run that made a cell's teacher; None where it came from elsewhere."""
    assert cell.pair is not None
    name = config.pairs[cell.pair].teacher
    if config.models[name].checkpoint is not None:
        return None
    return FeatureCell(name, None, "alone", {}, cell.seed)


def _teacher_file(config: FeatureStudyConfig, folder: Path, cell: FeatureCell) -> Path:
    """A cell's teacher; teachers that are no potential of potstill's have no such file."""
    assert cell.pair is not None
    own = _teacher_cell(config, cell)
    if own is not None:
        return folder / own.name / "best.pt"
    spec = config.models[config.pairs[cell.pair].teacher].checkpoint
    assert spec is not None
    return Path(spec.spec)


def _is_ready(config: FeatureStudyConfig, folder: Path, cell: FeatureCell) -> bool:
    teacher = None if cell.pair is None else _teacher_cell(config, cell)
    return teacher is None or result_file(folder, teacher).is_file()


def _teacher(config: FeatureStudyConfig, folder: Path, cell: FeatureCell) -> Teacher:
    assert cell.pair is not None
    spec = config.models[config.pairs[cell.pair].teacher].checkpoint
    own = _teacher_cell(config, cell)
    if own is not None:
        spec = TeacherSettings(spec=str(folder / own.name / "best.pt"))
    assert spec is not None
    return spec.make()


def _with_teacher(
    training: TrainingSet, settings: TrainSettings, teacher: Teacher, features: str
) -> TrainingSet:
    """The training set with what a run's loss asks of the teacher."""
    labels = dict(training.labels)
    asked = [term.property for term in settings.label_terms if term.source == TEACHER]
    if asked:
        labels[TEACHER], failures = teacher.label(training.structures, asked)
        if failures:
            raise ConfigError(f"the teacher could not label {len(failures)} structures")
    training = replace(training, labels=labels)
    if features == "online" or not settings.feature_terms:
        return training
    taps: dict[str, None] = {}
    for term in settings.feature_terms:
        names, _ = resolve_taps(
            term.teacher_tap,
            teacher.taps,
            teacher.default_tap,
            term.kinds.teacher,
            owner="the teacher",
            term=term.name,
        )
        taps |= dict.fromkeys(names)
    found, _ = teacher.features(training.structures, list(taps))
    return replace(training, features={TEACHER: found})


def _measures(
    config: FeatureStudyConfig,
    folder: Path,
    finished: Sequence[FeatureCell],
    on_model: Callable[[str], None] | None,
) -> dict[str, Any]:
    """Throughput of the models and similarity of features, of the first seed."""
    seed = config.seeds[0]
    alone = {
        c.model: folder / c.name / "best.pt" for c in finished if c.pair is None and c.seed == seed
    }
    first = [c for c in finished if c.pair is not None and c.seed == seed]
    compared = []
    for cell in first:
        assert cell.pair is not None
        student, teacher = config.pairs[cell.pair].student, _teacher_file(config, folder, cell)
        if teacher.is_file() and student in alone:
            own = folder / cell.name / "best.pt"
            taps = _taps(read_json(result_file(folder, cell)))
            compared.append(ComparedCell(cell.name, own, alone[student], teacher, taps))
    parts, _ = load_parts(config.data)
    return measure_features(
        config.measure, alone, compared, parts["validation"], folder / "measures", on_model=on_model
    )


def _teacher_row(config: FeatureStudyConfig, folder: Path, name: str) -> FeatureRow:
    """Errors of a teacher that the study has not trained."""
    file = folder / "measures" / f"teacher-{name}.json"
    if not file.is_file():
        spec = config.models[name].checkpoint
        assert spec is not None
        write_json(file, held_out_errors(config, spec.make().ase_calculator()).to_json())
    errors = S2EFErrors.from_json(read_json(file))
    return FeatureRow(name, name, None, None, "alone", -1, 0, errors.splits, errors.average)


def _taps(record: Mapping[str, Any]) -> tuple[str, str] | None:
    """Taps of student and teacher of a run's first term on features."""
    for pair in map(TapPair.from_json, record["taps"].values()):
        if pair.teacher:
            return "+".join(pair.student), "+".join(pair.teacher)
    return None


def _row(
    config: FeatureStudyConfig, folder: Path, cell: FeatureCell, record: Mapping[str, Any]
) -> FeatureRow:
    errors = S2EFErrors.from_json(record["tests"])
    return FeatureRow(
        name=cell.name,
        model=cell.model,
        teacher=None if cell.pair is None else config.pairs[cell.pair].teacher,
        pair=cell.pair,
        run=cell.run,
        seed=cell.seed,
        n_parameters=record["n_parameters"],
        splits=errors.splits,
        average=errors.average,
        taps=_taps(record),
        curve=read_learning_curves(folder / cell.name),
    )
