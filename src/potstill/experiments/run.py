"""Training the runs of an experiment, several at a time, each once; and what a run leaves."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from pathlib import Path
from typing import Any, Self

import torch
from ase.calculators.calculator import BaseCalculator
from pydantic import ValidationError
from torch import Tensor

from potstill.checkpoint import load_potential, potential_fingerprint
from potstill.display import Display, seconds_in_words
from potstill.distill.taps import TapPair, resolve_taps
from potstill.errors import ConfigError, DataError
from potstill.evaluate.base import Result
from potstill.evaluate.errors import (
    S2EFErrors,
    average_estimates,
    compare,
    evaluate_s2ef,
    predict_all,
)
from potstill.evaluate.tools import machine_description
from potstill.experiments.exploration import FORCES_STD, summary
from potstill.experiments.scheduler import Progress, run_jobs
from potstill.experiments.spec import (
    TEACHER,
    Committee,
    Errors,
    Experiment,
    GivenTeacher,
    Run,
    StoredTeacher,
    Variant,
)
from potstill.files import write_atomically
from potstill.metrics import S2EF_METRICS, Estimate
from potstill.models import MeanPotential, Potential
from potstill.properties import LEARNABLE
from potstill.store import LabeledStore
from potstill.structures import Properties, Structures
from potstill.teachers import Teacher, teacher_from_potential
from potstill.teachers.base import fingerprint_of
from potstill.teachers.potential import PotentialTeacher, describe_potential
from potstill.train import TrainingSet, TrainSettings, train
from potstill.train.state import versions
from potstill.workflows.base import potential_info, read_json, write_json
from potstill.workflows.data import load_parts

#: What a test set with forces only is judged by.
_FORCE_METRICS = ("free_forces_mae", "free_forces_cosine")


@dataclass(frozen=True)
class RunRecord(Result):
    """What a finished run leaves: `run.json` in its folder, one entry of `results.json`.

    Parameters
    ----------
    variant, strategy, group : str
        As of `Variant`.
    seed, n_parameters, epochs, best_epoch, threads : int
        Of the training.
    seconds, processor_seconds, teacher_seconds : float
        Of the training on the clock; of this process, less than all where it was resumed; of
        the process while data were read and the teacher was asked.
    metrics : dict
        By set (`train`, `validation`, `test` where it was split off, `test:NAME`), with the keys of
        `potstill.metrics`.
    tests : S2EFErrors, optional
        OC20's metrics by test set and averaged.
    taps : dict of str to TapPair
        Which taps learn from which, by term of the loss.
    explored : dict
        By run whose dynamics gave more to learn: `frames` that it visited, those `used`, and why
        runs `failed`.
    """

    variant: str
    strategy: str
    group: str
    seed: int
    n_parameters: int
    epochs: int
    best_epoch: int
    seconds: float
    processor_seconds: float | None
    teacher_seconds: float | None
    threads: int
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    tests: S2EFErrors | None = None
    taps: dict[str, TapPair] = field(default_factory=dict)
    explored: dict[str, Any] = field(default_factory=dict)

    @property
    def distilled(self) -> TapPair | None:
        """The first taps that learn from a teacher's."""
        return next((pair for pair in self.taps.values() if pair.teacher), None)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of `to_json`; also reads `cell.json`, as earlier versions wrote it."""
        data = data if "variant" in data else _upgraded(data)
        taps = {term: TapPair.from_json(pair).to_json() for term, pair in data["taps"].items()}
        return super().from_json({**data, "taps": taps})


def _upgraded(cell: Mapping[str, Any]) -> dict[str, Any]:
    """A record of earlier versions, of a study of sizes or of features."""
    same = ("seed", "n_parameters", "epochs", "best_epoch", "seconds", "threads")
    found = {key: cell[key] for key in same} | {"metrics": {}, "tests": None, "taps": {}}
    found |= {
        "processor_seconds": cell.get("processor_seconds"),
        "teacher_seconds": cell.get("teacher_processor_seconds"),
    }
    if "strategy" in cell:
        strategy, size = cell["strategy"], cell["size"]
        own = {"variant": f"{strategy}-{size}", "strategy": strategy, "group": size}
        return found | own | {"metrics": cell["metrics"]}
    alone = cell["pair"] is None
    own = {
        "variant": cell["model"] if alone else f"{cell['pair']}.{cell['run']}",
        "strategy": cell["model"] if alone else cell["run"],
        "group": "" if alone else cell["pair"],
        "tests": cell["tests"],
        "taps": cell["taps"],
    }
    return found | own


# -- what is there ---------------------------------------------------------------------------------


def best_of(folder: Path, run: Run) -> Path:
    """The potential that a finished run leaves."""
    return folder / run.name / "best.pt"


def _record_file(folder: Path, run: Run) -> Path | None:
    """Where the record of a finished run is; earlier versions wrote `cell.json`."""
    files = (folder / run.name / name for name in ("run.json", "cell.json"))
    return next((file for file in files if file.is_file()), None)


def finished_runs(experiment: Experiment, folder: Path) -> dict[Run, RunRecord]:
    """Records of the finished runs.

    Raises
    ------
    ConfigError
        If there are none.
    """
    found = {run: _record_file(folder, run) for run in experiment.runs()}
    records = {run: RunRecord.from_json(read_json(file)) for run, file in found.items() if file}
    if not records:
        raise ConfigError(f"{folder} holds no finished run of the study '{experiment.name}'")
    return records


def is_finished(folder: Path, run: Run) -> bool:
    """Whether a run is done."""
    return _record_file(folder, run) is not None


def claim(experiment: Experiment, folder: Path) -> None:
    """Write `study.json` into the folder, or check that the folder belongs to the experiment.

    Variants and seeds may be added to a study that runs already.

    Raises
    ------
    ConfigError
        If it holds a study of other data, or a finished run of other settings: it would pass for
        one of these.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file, config = folder / "study.json", experiment.config
    before: Mapping[str, Variant] = {}
    if config is not None and file.is_file():
        try:  # through the class, so that settings newer than the study take their defaults
            stored: Any = type(config).model_validate(read_json(file))
        except ValidationError:
            raise ConfigError(
                f"{folder} holds a study of another kind: choose another folder"
            ) from None
        if stored.data != config.data:  # type: ignore[attr-defined]
            raise ConfigError(f"{folder} holds a study with other data: choose another folder")
        before = stored.experiment.by_name
    for run in experiment.runs():
        if is_finished(folder, run):
            settings = read_json(folder / run.name / "settings.json")["settings"]
            same = TrainSettings.model_validate(settings) == run.settings
            was = before.get(run.variant.name, run.variant)
            if not same or was.learns_from != run.variant.learns_from:
                raise ConfigError(
                    f"{folder / run.name} holds a run with other settings: choose another folder, "
                    "or remove it"
                )
    if config is not None:
        write_json(file, config.model_dump(mode="json"))


# -- the runs --------------------------------------------------------------------------------------


def run_experiment(
    experiment: Experiment,
    folder: str | Path,
    *,
    workers: int = 1,
    on_progress: Callable[[Progress[Run]], None] | None = None,
) -> None:
    """Train every run of an experiment that is not finished yet, in a subfolder of its own.

    A finished run has `run.json`. With several `workers`, each is a process with one thread.
    `on_progress` is called after every run.

    Raises
    ------
    ConfigError
        If the folder holds other data or runs of other settings.
    """
    folder = Path(folder)
    claim(experiment, folder)
    run_jobs(
        experiment.runs(),
        partial(train_run, experiment, folder),
        is_finished=partial(is_finished, folder),
        is_ready=lambda run: _is_ready(experiment, folder, run),
        cost=lambda run: _cost(run.settings),
        workers=workers,
        threads=1 if workers > 1 else torch.get_num_threads(),
        on_progress=on_progress,
    )


def train_with_progress(
    experiment: Experiment, folder: str | Path, display: Display, *, workers: int = 1
) -> None:
    """`run_experiment` with a progress bar."""

    def show(progress: Progress[Run]) -> None:
        left = seconds_in_words(progress.seconds_left)
        task.update(progress.done, note=f"{progress.job}, about {left} left")

    with display.task(experiment.title, len(experiment.runs())) as task:
        run_experiment(experiment, folder, workers=workers, on_progress=show)


def train_run(experiment: Experiment, folder: Path, run: Run, threads: int) -> None:
    """Train and test one run."""
    torch.set_num_threads(threads)
    started = time.process_time()
    parts, teachers = _training_data(experiment, folder, run)
    training, validation = parts["train"], parts["validation"]
    asked = time.process_time() - started
    result = train(
        run.settings,
        training,
        validation,
        folder / run.name,
        info=potential_info(training.structures),
        teachers=teachers,
    )
    processor = time.process_time() - started - asked
    if result.status == "interrupted":
        raise KeyboardInterrupt
    potential, _ = load_potential(result.best)
    metrics, tests = {}, None
    if experiment.errors is Errors.S2EF:
        tests = held_out_errors(experiment, potential)
    else:
        source = experiment.data.source
        sets = {name: (part.structures, part.labels[source]) for name, part in parts.items()}
        sets |= {f"test:{k}": test.read(source) for k, test in experiment.data.tests.items()}
        metrics = {name: property_errors(potential, *data) for name, data in sets.items()}
    taps = read_json(folder / run.name / "settings.json").get("features", {})
    record = RunRecord(
        variant=run.variant.name,
        strategy=run.variant.strategy,
        group=run.variant.group,
        seed=run.seed,
        n_parameters=potential.n_parameters,
        epochs=result.epochs,
        best_epoch=result.best_epoch,
        seconds=result.seconds,
        processor_seconds=processor,
        teacher_seconds=asked,
        threads=threads,
        metrics=metrics,
        tests=tests,
        taps={term: TapPair.from_json(pair) for term, pair in taps.items()},
        explored=read_json(folder / run.name / "explored.json", {}),
    )
    write_json(folder / run.name / "run.json", record.to_json())


def property_errors(
    potential: Potential, structures: Structures, labels: Properties
) -> dict[str, float]:
    """Metrics of a potential against labels, pooled over all structures."""
    names = [name for name in LEARNABLE if name in labels]
    return compare(predict_all(potential, structures, names), labels, structures)


def held_out_errors(experiment: Experiment, potential: Potential | BaseCalculator) -> S2EFErrors:
    """OC20's errors per test set and averaged; a metric is averaged over the sets that have it."""
    splits = {}
    for name, test in experiment.data.tests.items():
        found = evaluate_s2ef(potential, {name: test.read(experiment.data.source)}).splits[name]
        kept = _FORCE_METRICS if test.forces_only else tuple(S2EF_METRICS)
        splits[name] = {key: found[key] for key in kept}
    average: dict[str, Estimate] = {}
    for key in S2EF_METRICS:
        having = [{key: split[key]} for split in splits.values() if key in split]
        if having:
            average |= average_estimates(having)
    return S2EFErrors(splits, average)


def _is_ready(experiment: Experiment, folder: Path, run: Run) -> bool:
    """Whether what a student needs is there."""
    return all(is_finished(folder, other) for other in experiment.needed_by(run))


def _cost(settings: TrainSettings) -> float:
    """Relative cost of a run, for the projected time: of HIP-NN its pairs and dense layers."""
    size = settings.model.hyperparameters
    if "n_sensitivities" not in size:
        return float(settings.epochs)
    features, sensitivities = size.get("n_features", 32), size["n_sensitivities"]
    dense = 2 * size.get("n_atom_layers", 2) * features**2
    return float(200 * sensitivities + 8 * features * sensitivities + dense)


# -- data and teachers -----------------------------------------------------------------------------


def _training_data(
    experiment: Experiment, folder: Path, run: Run
) -> tuple[dict[str, TrainingSet], dict[str, Teacher]]:
    """Parts of the data with what the loss asks of the teacher, and online teachers."""
    settings, given = run.settings, run.variant.teacher
    data, teacher = experiment.data, None
    if run.variant.taught and not isinstance(given, StoredTeacher):
        teacher = _teacher(experiment, folder, run)
    terms = [term for term in settings.label_terms if term.source == TEACHER]
    asked = list(dict.fromkeys(name for term in terms for name in term.labels))

    def labels_of(structures: Structures, names: list[str]) -> Properties:
        assert teacher is not None
        return _labels_of(teacher, structures, names, run, folder)

    def with_labels(part: TrainingSet) -> TrainingSet:
        if not asked:
            return part
        if isinstance(given, StoredTeacher):
            own = LabeledStore.open(str(data.parts.store)).labels(given.source)
        else:
            own = labels_of(part.structures, asked)
        return replace(part, labels={**part.labels, TEACHER: own})

    parts, _ = load_parts(data.parts, complete=with_labels)
    training = parts["train"]
    if run.variant.bootstrap:
        drawn = torch.Generator().manual_seed(run.seed)
        training = training.select(torch.randint(len(training), (len(training),), generator=drawn))
    parts["train"] = training
    if run.variant.explored is not None:
        training = _with_explored(experiment, folder, run, training, labels_of, asked)
        parts["train"] = training
    if teacher is None:
        return parts, {}
    if data.features == "stored" and settings.feature_terms:
        features = _features(training, settings, teacher)
        parts["train"] = replace(training, features={TEACHER: features})
    # Stored features need no teacher; with one, training asks it about the validation set, too.
    online = data.features == "online" or settings.augment is not None
    return parts, {TEACHER: teacher} if online else {}


def _with_explored(
    experiment: Experiment,
    folder: Path,
    run: Run,
    training: TrainingSet,
    label: Callable[[Structures, list[str]], Properties],
    asked: list[str],
) -> TrainingSet:
    """The training set, and what dynamics of other runs visits, with the labels of a committee.

    `explored.json` in the folder of the run says what that was.
    """
    assert run.variant.explored is not None
    settings, start = run.variant.explored.settings, training.structures
    info = LabeledStore.open(str(experiment.data.parts.store)).info
    temperature = settings.temperature or info.get("temperature")
    if temperature is None:
        raise ConfigError("give 'exploration.temperature' in K: the beads' store has none")
    trained = float(start.longest_by_system(label(start, [FORCES_STD])[FORCES_STD]).max())
    visited: list[TrainingSet] = []
    found: dict[str, Any] = {}
    for other in experiment.explorers_of(run):
        file = best_of(folder, other)
        origin = fingerprint_of(
            potential_fingerprint(load_potential(file)[0]),
            start.fingerprints(),
            settings.model_dump(mode="json"),
        )
        place = folder / run.name / "explored" / f"{other.name}-{origin}"
        dynamics = settings.explore(file, start, float(temperature), run.seed, place)
        frames = dynamics.frames.structures
        labels = label(frames, list(dict.fromkeys((*asked, FORCES_STD))))
        known = settings.known(frames, labels[FORCES_STD], trained)
        rows = frames.rows(known)
        visited.append(TrainingSet(frames.select(rows), {TEACHER: labels.only(asked).select(rows)}))
        found[other.name] = summary(dynamics, known)
    write_json(folder / run.name / "explored.json", found)
    return training.with_synthetic(reduce(TrainingSet.with_synthetic, visited))


def _labels_of(
    teacher: Teacher, structures: Structures, names: list[str], run: Run, folder: Path
) -> Properties:
    """Labels of a teacher. Those of a committee are kept, for many students ask it the same."""
    stem = fingerprint_of(teacher.info.fingerprint, structures.fingerprints())
    files = {name: folder / "labels" / f"{stem}_{name}.pt" for name in names}
    is_kept = isinstance(run.variant.teacher, Committee)
    missing = [name for name in names if not (is_kept and files[name].is_file())]
    found: dict[str, Tensor] = {}
    if missing:
        labels, failures = teacher.label(structures, missing)
        if failures:
            raise ConfigError(f"the teacher could not label {len(failures)} structures")
        found = labels.values
    for name in missing if is_kept else ():
        write_atomically(files[name], partial(torch.save, found[name]))
    kept = {name: torch.load(files[name]) for name in names if name not in found}
    return Properties(found | kept)


def _teacher(experiment: Experiment, folder: Path, run: Run) -> Teacher:
    if isinstance(run.variant.teacher, GivenTeacher):
        return run.variant.teacher.model.make()
    files = {str(other.seed): best_of(folder, other) for other in experiment.teachers_of(run)}
    if len(files) == 1:
        return PotentialTeacher.from_checkpoint(*files.values())
    mean = MeanPotential({seed: load_potential(file)[0] for seed, file in files.items()})
    return teacher_from_potential(mean, describe_potential(mean, "committee", {}))


def _features(training: TrainingSet, settings: TrainSettings, teacher: Teacher) -> dict[str, Any]:
    """Features of the teacher by tap, as far as the loss asks for them."""
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
    return found


# -- results ---------------------------------------------------------------------------------------


def write_results(
    experiment: Experiment,
    folder: Path,
    command: str,
    records: Mapping[Run, RunRecord],
    **more: Any,
) -> tuple[dict[str, Any], dict[str, str]]:
    """Write `results.json`: records, config, versions and machine.

    Returns
    -------
    result : dict
        What was written.
    about : dict of str to str
        The same in a few words, for the report.
    """
    n_runs, config = len(experiment.runs()), experiment.config
    result = {
        "study": experiment.name,
        "title": experiment.title,
        "command": command,
        "date": datetime.date.today().isoformat(),
        "n_runs": n_runs,
        "n_finished": len(records),
        "versions": versions(),
        "machine": machine_description(),
        "config": None if config is None else json.loads(config.model_dump_json()),
        "runs": {run.name: record.to_json() for run, record in records.items()},
        **more,
    }
    write_json(folder / "results.json", result)
    about = {
        "study": experiment.name,
        "command": command,
        "date": result["date"],
        "runs": f"{len(records)} of {n_runs}",
        "seeds": ", ".join(str(seed) for seed in experiment.seeds),
        "versions": ", ".join(f"{k} {v}" for k, v in versions().items()),
    }
    return result, about


def read_results(file: str | Path) -> dict[str, RunRecord]:
    """Records by run of a `results.json`, also of earlier versions.

    Raises
    ------
    DataError
        If the file holds none.
    """
    data = read_json(Path(file))
    runs = data.get("runs", data.get("cells"))  # earlier versions wrote the second
    if not isinstance(runs, dict):
        raise DataError(f"{file}: no results of a study")
    return {name: RunRecord.from_json(record) for name, record in runs.items()}
