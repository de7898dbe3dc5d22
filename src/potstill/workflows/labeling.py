"""`potstill label`: a teacher over a store, in the teacher's own environment if need be."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from potstill.errors import ConfigError, TeacherError
from potstill.files import write_atomically
from potstill.label import LabelReport, label_features, label_store
from potstill.properties import LEARNABLE
from potstill.store import LabeledStore
from potstill.structures import Structures
from potstill.teachers import Teacher, check_derivatives
from potstill.workflows.base import Display, Settings, TeacherSettings
from potstill.workflows.data import FileData

#: Frames among which the smallest is taken to compare derivatives on.
_CHECKED_FRAMES = 256


class LabelConfig(Settings):
    """Settings of `potstill label`.

    Parameters
    ----------
    store : str
        Label store; created from `files` if it does not exist.
    files : tuple of FileData
        Structures (and reference labels, if any) to add first; those already in the store are
        skipped.
    teacher : TeacherSettings
        Teacher that labels the structures.
    properties : tuple of str, optional
        Properties to compute; by default all that the teacher gives and a student can learn. An
        empty list stores features only.
    taps : tuple of str
        Internal features to store as well, by name; `default` is the last one before the output.
    chunk : int
        Frames per call of the teacher.
    """

    store: str
    files: tuple[FileData, ...] = ()
    teacher: TeacherSettings
    properties: tuple[str, ...] | None = None
    taps: tuple[str, ...] = ()
    chunk: int = Field(default=8, ge=1)


def label(config: LabelConfig, display: Display | None = None) -> LabelReport:
    """Add structures to a store if given, and label all of it with a teacher.

    Called again after an interruption, it resumes where it stopped.
    """
    display = display or Display()
    store = _open_store(config)
    teacher = config.teacher.make()
    properties = config.properties
    if properties is None:
        properties = learnable(teacher, store.structures(0, 1))
    if not properties and not config.taps:
        raise ConfigError("there is nothing to label: name properties, taps or both")
    report = None
    if properties:
        report = label_with_progress(store, teacher, properties, display, chunk=config.chunk)
    if config.taps:
        with display.task(f"features of {teacher.name}", store.n_systems) as task:
            features = label_features(
                store, teacher, config.taps, chunk=config.chunk, progress=task.update
            )
        taps = ", ".join(config.taps)
        display.say(f"features {taps} of {features.n_labeled} structures are stored")
        report = report or features
    assert report is not None
    return report


def learnable(teacher: Teacher, example: Structures) -> tuple[str, ...]:
    """Properties that a teacher gives and a student can learn, stress only for full periodicity."""
    periodic = bool(example.pbc.all())
    return tuple(
        name for name in LEARNABLE if name in teacher.properties and (name != "stress" or periodic)
    )


def label_with_progress(
    store: LabeledStore,
    teacher: Teacher,
    properties: tuple[str, ...],
    display: Display,
    *,
    chunk: int = 8,
    title: str = "",
    check: bool = True,
) -> LabelReport:
    """`label_store` with a display; frames that failed are listed in a file beside the store.

    With `check`, a teacher that has not labeled any frame of the store yet is compared with
    differences of its energy first (`check_derivatives`).

    Raises
    ------
    TeacherError
        If the teacher's forces or stress contradict its energy, or it fails on every frame.
    """
    new = teacher.name not in store.sources or not store.n_labeled(teacher.name)
    if check and new and store.n_systems:
        sample = store.structures(0, min(store.n_systems, _CHECKED_FRAMES))
        with display.task(f"comparing derivatives of {teacher.name}"):
            check_derivatives(teacher, sample, properties)
    with display.task(title or f"labeling with {teacher.name}", store.n_systems) as task:
        report = label_store(store, teacher, properties, chunk=chunk, progress=task.update)
    _tell_failures(store, teacher, report, display)
    return report


def _tell_failures(
    store: LabeledStore, teacher: Teacher, report: LabelReport, display: Display
) -> None:
    """List the frames that failed; raise if there are no others."""
    path = store.path.with_name(f"{store.path.name}.{teacher.name}.failed.tsv")
    if not report.n_failed:
        path.unlink(missing_ok=True)
        return
    rows = [f"{f['system']}\t{f['frame_id']}\t{f['reason']}\n" for f in report.failures]
    text = "system\tframe_id\treason\n" + "".join(rows)
    write_atomically(path, text)
    first = report.failures[0]
    where = first["frame_id"] or f"frame {first['system']}"
    told = (
        f"the teacher '{teacher.name}' failed on {report.n_failed} of {store.n_systems} "
        f"structures, first on {where} ({first['reason']}); {path} lists them"
    )
    if not report.n_labeled:
        raise TeacherError(told)
    display.say(told)


def _open_store(config: LabelConfig) -> LabeledStore:
    path = Path(config.store).absolute()
    known = path.exists()
    if not known and not config.files:
        raise ConfigError(f"{path}: no such store, and no files to create it from")
    if known:
        store = LabeledStore.open(path, "a")
    # Before a store is made: a bad file leaves nothing.
    parts = [file.read() for file in config.files]
    if not known:
        store = LabeledStore.create(path)
    for structures, labels in parts:
        store.append(structures, labels, skip_existing=known)
    return store
