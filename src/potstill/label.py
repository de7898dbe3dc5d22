"""Running a teacher over the structures of a store."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from potstill.errors import TeacherError
from potstill.features import Feature
from potstill.store import LabeledStore
from potstill.structures import Properties, Structures
from potstill.teachers.base import Failure, Teacher

#: Frames that are read from a store at once while it is labeled.
_READ_FRAMES = 256


@dataclass(frozen=True)
class LabelReport:
    """Outcome of labeling a store.

    Parameters
    ----------
    n_labeled, n_failed : int
        Frames that have labels now, also from earlier runs, and those that could not be labeled.
    failures : list of dict
        `system`, `frame_id` and `reason` of each of them.
    seconds, n_new : float, int
        Time that this run took, and frames that it went through.
    """

    n_labeled: int
    n_failed: int
    failures: list[dict[str, Any]]
    seconds: float
    n_new: int


def label_store(
    store: LabeledStore,
    teacher: Teacher,
    properties: Sequence[str],
    *,
    chunk: int = 8,
    commit_seconds: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
) -> LabelReport:
    """Label all frames of a store with a teacher, resuming where an earlier run stopped.

    Parameters
    ----------
    store : LabeledStore
        Opened for writing. Labels go into the set named after the teacher.
    properties : sequence of str
        What to ask for; each must be among `teacher.properties`.
    chunk : int
        Frames per call of the teacher.
    commit_seconds : float
        Labels are written when so much time has passed since the last write, so that a fast teacher
        need not wait for the disk: a run that is killed loses this and one chunk at most.
    progress : callable, optional
        Called with (frames done, frames in all), before the first chunk and after each.

    Raises
    ------
    TeacherError
        If the teacher cannot give a property, or its atomic energies do not sum to its energy.
    StoreError
        If the name is taken by another teacher, or the store cannot be written.
    """
    start_time = time.perf_counter()
    names = tuple(dict.fromkeys(properties))
    if not names:
        raise TeacherError("labeling needs at least one property")
    if chunk < 1:
        raise TeacherError(f"a chunk must have at least one frame, not {chunk}")
    teacher.require(names)
    source = teacher.info.name
    store.begin_labels(source, {**asdict(teacher.info), "properties": sorted(names)})
    total, first = store.n_systems, store.n_labeled(source)
    if progress is not None:
        progress(first, total)
    pending = _Pending(store, source, first, commit_seconds)
    try:
        for start, structures in _chunks(store, first, total, chunk):
            labels, failures = teacher.label(structures, names)
            pending.add(labels, structures, failures)
            if progress is not None:
                progress(start + len(structures), total)
    finally:
        pending.write()
    return _report(store.failures(source), store.n_labeled(source), first, total, start_time)


def _report(
    failed: list[dict[str, Any]], done: int, first: int, total: int, start_time: float
) -> LabelReport:
    """Outcome of a run from frame `first` on, when `done` frames have been processed."""
    seconds = time.perf_counter() - start_time
    return LabelReport(done - len(failed), len(failed), failed, seconds, max(total - first, 0))


def _chunks(
    store: LabeledStore, first: int, total: int, chunk: int
) -> Iterator[tuple[int, Structures]]:
    """Read the frames first..total-1, many at a time; yield chunks with where they start."""
    block = chunk * max(1, _READ_FRAMES // chunk)
    for begin in range(first, total, block):
        structures = store.structures(begin, min(begin + block, total))
        for k in range(0, len(structures), chunk):
            yield begin + k, structures.select(range(k, min(k + chunk, len(structures))))


class _Pending:
    """Labels that are not in the store yet, of the frames from `start` on."""

    def __init__(self, store: LabeledStore, source: str, start: int, seconds: float) -> None:
        self.store, self.source, self.start, self.seconds = store, source, start, seconds
        self.parts: list[tuple[Properties, Structures]] = []
        self.failed: list[dict[str, Any]] = []
        self.n = 0
        self.written = time.monotonic()

    def add(self, labels: Properties, structures: Structures, failures: Sequence[Failure]) -> None:
        """Take the labels of the next frames, and write all of them if a write is due."""
        self.parts.append((labels, structures))
        self.failed += [asdict(f) | {"system": self.n + f.system} for f in failures]
        self.n += len(structures)
        if time.monotonic() - self.written >= self.seconds:
            self.write()

    def write(self) -> None:
        """Put everything into the store."""
        if self.parts:
            labels, structures = zip(*self.parts, strict=True)
            batch = Structures.concatenate(structures)
            joined = Properties.concatenate(labels, structures)
            self.store.write_labels(self.source, self.start, joined, batch, self.failed)
        self.start, self.n, self.parts, self.failed = self.start + self.n, 0, [], []
        self.written = time.monotonic()


def label_features(
    store: LabeledStore,
    teacher: Teacher,
    taps: Sequence[str],
    *,
    chunk: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> LabelReport:
    """Store a teacher's internal features of all frames, resuming where an earlier run stopped.

    Taps are named as of `Teacher.compute_features`; `default` is the teacher's choice. All else is
    as of `label_store`.

    Raises
    ------
    TeacherError
        If the teacher has no such features.
    StoreError
        If the name is taken by another teacher, or features of pairs do not say how their graph was
        made.
    """
    start_time = time.perf_counter()
    names = list(dict.fromkeys(_default_tap(teacher) if tap == "default" else tap for tap in taps))
    if not names:
        raise TeacherError("storing features needs at least one tap")
    source, total = teacher.info.name, store.n_systems
    done = {
        tap: store.begin_features(
            source, tap, {**asdict(teacher.info), "default": tap == teacher.default_tap}
        )
        for tap in names
    }
    first = min(done.values())
    like: dict[str, Feature] = {}
    while (start := min(done.values())) < total:
        if progress is not None:
            progress(start, total)
        due = [tap for tap in names if done[tap] == start]
        # No further than where another tap begins, which then joins in.
        stop = min([start + chunk, total, *(n for n in done.values() if n > start)])
        structures = store.structures(start, stop)
        found, failures = teacher.features(structures, due, like)
        like |= found
        for tap in due:
            entries = [asdict(failure) for failure in failures]
            store.write_features(source, tap, start, found[tap], structures, entries)
            done[tap] = stop
    if progress is not None:
        progress(total, total)
    return _report(store.failures(source, names[0]), total, first, total, start_time)


def _default_tap(teacher: Teacher) -> str:
    if teacher.default_tap is None:
        raise TeacherError(f"the teacher '{teacher.name}' has no default feature tap")
    return teacher.default_tap
