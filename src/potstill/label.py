"""Running a teacher over the structures of a store."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from potstill.errors import TeacherError
from potstill.features import Feature
from potstill.properties import property_spec
from potstill.store import LabelledStore
from potstill.structures import Properties, Structures
from potstill.teachers.base import Failure, Teacher

#: Atomic energies must add up to the energy within this, in eV/atom, or within the same fraction
#: of the energy per atom where that is larger than 1 eV.
SUM_TOLERANCE = 1e-6


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
        labels, failures = _drop_broken(labels, failures, structures)
        _check_sums(labels, structures, source)
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


def _drop_broken(
    labels: Properties, failures: Sequence[Failure], structures: Structures
) -> tuple[Properties, list[Failure]]:
    """Turn frames with labels that are not finite into failures, whatever the teacher says."""
    broken: dict[int, str] = {failure.system: failure.reason for failure in failures}
    for name in labels.names:
        value = labels[name]
        bad = ~value.reshape(value.shape[0], -1).isfinite().all(1)
        if property_spec(name).level == "atom":
            bad = torch.bincount(structures.system_index[bad], minlength=len(structures)) > 0
        bad &= labels.presence(name, len(structures))
        for system in bad.nonzero().flatten().tolist():
            broken.setdefault(system, f"{name} is not finite")
    return labels, [Failure(system, reason) for system, reason in sorted(broken.items())]


def _check_sums(labels: Properties, structures: Structures, source: str) -> None:
    """Refuse atomic energies that do not sum to the energy: training on both would contradict."""
    if "energy" not in labels or "atomic_energies" not in labels:
        return
    n = len(structures)
    there = labels.presence("energy", n) & labels.presence("atomic_energies", n)
    total = torch.zeros(n, dtype=torch.float64)
    total.index_add_(0, structures.system_index, labels["atomic_energies"].double())
    per_atom = structures.n_atoms_per_system.clamp(min=1)
    gap = (total - labels["energy"]).abs() / per_atom
    limit = SUM_TOLERANCE * (labels["energy"].abs() / per_atom).clamp(min=1.0)
    bad = there & ~(gap <= limit) & labels["energy"].isfinite()
    for system in bad.nonzero().flatten().tolist():
        raise TeacherError(
            f"the atomic energies of the teacher '{source}' do not sum to its energy in "
            f"{structures.name_of(system)}: they are off by {float(gap[system]):.3g} eV/atom"
        )
