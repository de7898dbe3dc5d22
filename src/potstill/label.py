"""Running a teacher over the structures of a store."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from potstill.errors import TeacherError
from potstill.features import Feature
from potstill.store import LabelledStore
from potstill.teachers.base import Teacher


@dataclass(frozen=True)
class LabelReport:
    """What labelling a store came to.

    Parameters
    ----------
    n_labelled : int
        Frames that have labels now, also from earlier runs.
    n_failed : int
        Frames that the teacher could not label.
    failures : list of dict
        `system`, `frame_id` and `reason` of each of them.
    seconds : float
        Time that this run took.
    n_new : int
        Frames that this run went through.
    """

    n_labelled: int
    n_failed: int
    failures: list[dict[str, Any]]
    seconds: float
    n_new: int


def label_store(
    store: LabelledStore,
    teacher: Teacher,
    properties: Sequence[str],
    *,
    chunk: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> LabelReport:
    """Label all frames of a store with a teacher, going on where an earlier run stopped.

    Parameters
    ----------
    store : LabelledStore
        Opened for writing. Labels go into the set named after the teacher.
    teacher : Teacher
        Who labels.
    properties : sequence of str
        What to ask for; each must be among `teacher.properties`.
    chunk : int
        Frames per write: at most so many are lost when the process is killed.
    progress : callable, optional
        Called with (frames done, frames in all), before the first chunk and after each.

    Returns
    -------
    LabelReport
        Counts, failures and time.

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
        raise TeacherError("labelling needs at least one property to ask the teacher for")
    if chunk < 1:
        raise TeacherError(f"a chunk must have at least one frame, not {chunk}")
    teacher.require(names)
    source = teacher.info.name
    store.begin_labels(source, {**asdict(teacher.info), "properties": sorted(names)})
    total, first = store.n_systems, store.n_labelled(source)
    if progress is not None:
        progress(first, total)
    for start in range(first, total, chunk):
        stop = min(start + chunk, total)
        structures = store.structures(start, stop)
        labels, failures = teacher.label(structures, names)
        store.write_labels(source, start, labels, structures, [asdict(f) for f in failures])
        if progress is not None:
            progress(stop, total)
    failed = store.failures(source)
    done = store.n_labelled(source)
    return LabelReport(
        n_labelled=done - len(failed),
        n_failed=len(failed),
        failures=failed,
        seconds=time.perf_counter() - start_time,
        n_new=max(total - first, 0),
    )


def label_features(
    store: LabelledStore,
    teacher: Teacher,
    taps: Sequence[str],
    *,
    chunk: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> LabelReport:
    """Store a teacher's internal features of all frames, going on where an earlier run stopped.

    Parameters
    ----------
    store, teacher, chunk, progress
        As of `label_store`.
    taps : sequence of str
        Names of the features, as of `Teacher.compute_features`; `default` is the teacher's choice.

    Returns
    -------
    LabelReport
        Counts, failures and time.

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
    failed = store.taps(source)[names[0]]["failures"]
    return LabelReport(
        n_labelled=total - len(failed),
        n_failed=len(failed),
        failures=failed,
        seconds=time.perf_counter() - start_time,
        n_new=max(total - first, 0),
    )


def _default_tap(teacher: Teacher) -> str:
    if teacher.default_tap is None:
        raise TeacherError(f"the teacher '{teacher.name}' has no feature tap to take by default")
    return teacher.default_tap
