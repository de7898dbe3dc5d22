"""`potstill train`: one training run, or several stages that hand their best network on."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator

from potstill.checkpoint import load_potential
from potstill.errors import ConfigError, DataError, PotstillError
from potstill.evaluate.cka import (
    CKATracker,
    cka_history_drawing,
    compared_taps,
    read_cka_history,
)
from potstill.evaluate.errors import evaluate_errors
from potstill.metrics import metric_of
from potstill.models import Potential, build_model
from potstill.ragged import draw
from potstill.report.plots import write_figure
from potstill.report.tables import number
from potstill.teachers import Teacher
from potstill.train import TrainingSet, TrainResult, TrainSettings, train
from potstill.train.loop import EpochCallback
from potstill.train.mixing import within_steps
from potstill.train.signals import is_stored
from potstill.workflows.base import (
    Display,
    Settings,
    TeacherSettings,
    claim_folder,
    merged,
    potential_info,
    seconds_in_words,
    write_json,
)
from potstill.workflows.data import DataSettings, load_parts


class CKASettings(Settings):
    """Compare the student's features with another model's while it is trained.

    Parameters
    ----------
    teacher : str
        Checkpoint of the model to compare with: the teacher, a control, any that potstill trained.
    every : int
        Epochs between comparisons; the first epoch is always compared.
    n_structures : int
        Number of structures to draw from the validation set, with the seed of the training.
    student_taps, teacher_taps : tuple of str, optional
        Taps to compare; all feature taps by default.
    """

    teacher: str
    every: int = Field(default=1, ge=1)
    n_structures: int = Field(default=50, ge=1)
    student_taps: tuple[str, ...] | None = None
    teacher_taps: tuple[str, ...] | None = None


class StageConfig(Settings):
    """One stage of a training: what differs from the config's own sections.

    Parameters
    ----------
    name : str
        Name of its folder in the run folder.
    data : DataSettings, optional
        Its own data.
    train : dict
        Settings that replace those of the section `train`, nested alike.
    """

    name: str = Field(pattern=r"^[\w.-]+$")
    data: DataSettings | None = None
    train: dict[str, Any] = Field(default_factory=dict)


class TrainConfig(Settings):
    """Settings of `potstill train`.

    Parameters
    ----------
    out : str
        The run folder.
    data : DataSettings, optional
        Training, validation and test sets; stages may bring their own.
    train : TrainSettings
        Model, loss, optimizer and so on.
    stages : tuple of StageConfig
        Train in stages, for example on structures labeled by a teacher, then on reference
        data; each starts from the best network of the one before.
    initial : str, optional
        Start from this checkpoint.
    teachers : dict of str to TeacherSettings
        Teachers by source that compute during training: their internal features, where the loss
        distills some that the data do not contain, and labels of displaced structures (`augment`).
    cka : CKASettings, optional
        Record the similarity (CKA) of the features of the student and another model.
    """

    out: str
    data: DataSettings | None = None
    train: TrainSettings = Field(default_factory=TrainSettings)
    stages: tuple[StageConfig, ...] = ()
    initial: str | None = None
    teachers: dict[str, TeacherSettings] = Field(default_factory=dict)
    cka: CKASettings | None = None

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError("two stages have the same name")
        if self.data is None and (not self.stages or any(s.data is None for s in self.stages)):
            raise ValueError("there is no 'data' section")
        for stage in self.stages:
            self.settings_of(stage)
        return self

    def settings_of(self, stage: StageConfig) -> TrainSettings:
        """The section `train` with a stage's changes."""
        return TrainSettings.model_validate(merged(self.train.model_dump(), stage.train))


def train_from_config(config: TrainConfig, display: Display | None = None) -> TrainResult:
    """Train as a config says, or continue; returns the result of the last stage.

    The run folder gets `config.yaml` and the files of `potstill.train.train`, in one subfolder per
    stage if there are stages, and `test.json` with the errors on the test set, if there is one.
    With the section `cka` each of these folders gets `cka.jsonl` and the figure `cka_history`.
    """
    display = display or Display()
    folder = Path(config.out)
    stages = config.stages or (StageConfig(name="."),)
    data = [
        load_parts(stage.data or config.data, config.settings_of(stage).feature_terms)  # type: ignore[arg-type]
        for stage in stages
    ]
    teachers: dict[str, Teacher] = {}
    initial = None if config.initial is None else load_potential(config.initial)[0]
    trackers = cka_trackers(config, [parts for parts, _ in data], initial)
    claim_folder(folder, config)
    for stage, (parts, sources), tracker in zip(stages, data, trackers, strict=True):
        settings = config.settings_of(stage)
        place = folder / stage.name
        for name in _online(settings, parts["train"]):
            # A teacher's package is imported only if it must be.
            if name in config.teachers and name not in teachers:
                teachers[name] = config.teachers[name].make()
        sources = {name: t.info.to_json() for name, t in teachers.items()} | sources
        result = train_with_progress(
            settings,
            parts["train"],
            parts["validation"],
            place,
            display,
            title=f"training {stage.name}" if config.stages else "training",
            info=potential_info(parts["train"].structures, teacher=_teacher(settings, sources)),
            initial=initial,
            teachers=teachers,
            on_epoch=tracker,
        )
        if tracker is not None:
            _draw_cka(place)
        if result.status == "interrupted":
            return result
        initial, info = load_potential(result.best)
        found = {"validation": info["training"]["validation"]}
        if "test" in parts:
            found["test"] = write_test_errors(initial, parts["test"], settings, place)
        title = f"{stage.name}: errors" if config.stages else "errors"
        show_errors(display, f"{title} of the best potential, epoch {result.best_epoch}", found)
    return result


#: Quantities whose MAE and RMSE are in the table at the end.
_HEADLINES = ("energy_per_atom", "free_forces", "forces", "stress")


def show_errors(display: Display, title: str, found: Mapping[str, Mapping[str, float]]) -> None:
    """Show errors of a potential by set, against the source of the score."""
    rows = []
    for metric in (metric_of(f"{name}_{kind}") for name in _HEADLINES for kind in ("mae", "rmse")):
        values = [metrics.get(metric.key, math.nan) for metrics in found.values()]
        if any(math.isfinite(value) for value in values):
            shown = (number(metric.scale * value) for value in values)
            rows.append([metric.name, metric.unit, *shown])
    display.table(title, ("error", "unit", *found), rows)


def cka_trackers(
    config: TrainConfig, stages: Sequence[Mapping[str, TrainingSet]], initial: Potential | None
) -> list[CKATracker | None]:
    """What records CKA in each stage; nothing without the section `cka`.

    `stages` are the parts of each stage's data, one entry if there are no stages; the first starts
    from `initial`, and later ones keep its network. What cannot be compared is a ConfigError before
    the first epoch.
    """
    asked = config.cka
    if asked is None:
        return [None] * len(stages)
    order = config.stages or (StageConfig(name="."),)
    if initial is None:
        model = config.settings_of(order[0]).model
        with torch.random.fork_rng(devices=[]):
            table = stages[0]["train"].structures.species_table
            initial = build_model(model.kind, table, model.hyperparameters)
    with _blaming("cka.student_taps"):
        compared_taps(initial, asked.student_taps)
    with _blaming("cka.teacher"):
        teacher = load_potential(asked.teacher)[0]
    with _blaming("cka.teacher_taps"):
        compared_taps(teacher, asked.teacher_taps)
    teacher.to("cuda" if torch.cuda.is_available() else "cpu")
    found: list[CKATracker | None] = []
    for stage, parts in zip(order, stages, strict=True):
        structures = parts["validation"].structures
        drawn = draw(len(structures), asked.n_structures, config.settings_of(stage).seed)
        with _blaming("cka.teacher"):
            tracker = CKATracker(
                Path(config.out) / stage.name,
                teacher,
                structures.select(drawn),
                every=asked.every,
                student_taps=asked.student_taps,
                teacher_taps=asked.teacher_taps,
            )
        found.append(tracker)
    return found


@contextmanager
def _blaming(key: str) -> Iterator[None]:
    """Name the setting that an error belongs to."""
    try:
        yield
    except PotstillError as error:
        raise ConfigError(f"'{key}': {error}") from None


def _draw_cka(place: Path) -> None:
    """Draw what was recorded, in one process alone if there are several."""
    if int(os.environ.get("RANK", 0)) == 0:
        with contextlib.suppress(DataError):  # interrupted before the first comparison
            write_figure(place, cka_history_drawing(read_cka_history(place)))


def train_with_progress(
    settings: TrainSettings,
    training: TrainingSet,
    validation: TrainingSet,
    folder: Path,
    display: Display,
    *,
    title: str,
    info: Mapping[str, Any] | None = None,
    initial: Potential | None = None,
    teachers: Mapping[str, Teacher] | None = None,
    on_epoch: EpochCallback | None = None,
) -> TrainResult:
    """`potstill.train.train` with a display; `on_epoch` is called after that has been updated."""
    settings = within_steps(settings, training)
    rows = [[source, name, str(n)] for source, name, n in training.summary()]
    if not (folder / "settings.json").is_file():
        display.table(f"{title}: labels", ("source", "property", "structures"), rows)
    with display.task(title, settings.epochs) as task:

        def after_epoch(record: dict[str, Any]) -> None:
            task.update(record["epoch"], note=_note(record))
            if on_epoch is not None:
                on_epoch(record)

        result = train(
            settings,
            training,
            validation,
            folder,
            info=info,
            initial=initial,
            teachers=teachers,
            on_epoch=after_epoch,
            say=display.say,
        )
    if result.status == "stopped early":
        display.say(
            f"{title} stopped early after {result.epochs} epochs; epoch {result.best_epoch} was "
            f"the best ({seconds_in_words(result.seconds)})"
        )
    return result


def write_test_errors(
    potential: Potential, data: TrainingSet, settings: TrainSettings, folder: Path
) -> dict[str, float]:
    """Write errors on a test set against every source of the loss; return those of the score's."""
    sources = dict.fromkeys([settings.score.source, *(t.source for t in settings.label_terms)])
    reports = {
        source: evaluate_errors(
            potential,
            data.structures,
            {"reference" if source == "reference" else "teacher": data.labels[source]},
        )
        for source in sources
        if source in data.labels
    }
    write_json(folder / "test.json", {name: found.to_json() for name, found in reports.items()})
    channels = reports[settings.score.source].channels if settings.score.source in reports else {}
    return next(iter(channels.values()), {})


def _note(record: Mapping[str, Any]) -> str:
    """Force and energy error of an epoch in a few words."""
    metrics = record["validation"]
    forces, energy = (metrics.get(k, math.nan) for k in ("forces_rmse", "energy_per_atom_rmse"))
    words = [f"forces {forces:.3f} eV/Å"] if math.isfinite(forces) else []
    words += [f"energy {1000.0 * energy:.1f} meV/atom"] if math.isfinite(energy) else []
    return ", ".join(words)


def _online(settings: TrainSettings, training: TrainingSet) -> list[str]:
    """Names of the teachers that compute during the training."""
    if settings.augment is not None:  # the only one then
        return [settings.augment.source]
    return [term.source for term in settings.feature_terms if not is_stored(term, training)]


def _teacher(settings: TrainSettings, sources: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What is known of the teacher whose labels the loss uses; one goes into the file."""
    names = [t.source for t in settings.loss if t.source != "reference" and t.ever_active]
    names += [] if settings.augment is None else [settings.augment.source]
    unique = list(dict.fromkeys(names))
    if len(unique) > 1:
        return {"name": " + ".join(unique), "all": {name: sources.get(name) for name in unique}}
    return {"name": unique[0], **sources.get(unique[0], {})} if unique else None
