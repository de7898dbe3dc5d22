"""The labeled store: structures, reference labels and teachers' labels side by side, on disk.

A store is a folder: a Zarr group (format 3) with the arrays, and `commit.json`, the only record of
what counts (`store.record`). Reading some frames and adding some cost the same whatever the number
of frames in the store.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import zarr

from potstill.errors import StoreError, suggest
from potstill.features import Feature
from potstill.properties import PROPERTIES
from potstill.species import SpeciesTable
from potstill.store.features import (
    check_finite,
    feature_digests,
    feature_facts,
    get_feature,
    put_feature,
)
from potstill.store.labels import (
    check_rows,
    get_labels,
    label_digests,
    new_source,
    put_labels,
    without,
)
from potstill.store.record import (
    Columns,
    Record,
    chain,
    lock,
    new_record,
    plain_json,
    read_record,
    remove_litter,
    upgrade,
    write_record,
)
from potstill.store.structures import (
    get_fingerprints,
    get_structures,
    put_structures,
    species_table,
    structure_digests,
)
from potstill.structures import Properties, Structures

#: The label set that `append` fills.
REFERENCE = "reference"

_SOURCE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


class LabeledStore:
    """Structures with any number of named label sets; made by `create` or `open`.

    Several processes may read while one writes. Writers lock the folder for the length of one
    call and see what others have committed before.
    """

    def __init__(self, path: Path, *, writable: bool) -> None:
        self.path = path
        self._writable = writable
        record = read_record(path)
        self._columns = Columns(path, writable=writable)
        self._known: set[str] = set()  # fingerprints of the first structures, never fewer
        self._n_known = 0
        with lock(path) if writable else contextlib.nullcontext():
            if writable:  # only writers, who hold the lock, leave litter
                remove_litter(path)
                record = read_record(path)
            self._record = upgrade(self._columns, record, writable=writable)

    @classmethod
    def create(
        cls,
        path: str | Path,
        species_table: SpeciesTable | None = None,
        info: Mapping[str, Any] | None = None,
    ) -> LabeledStore:
        """Make an empty store and open it for writing.

        Parameters
        ----------
        path : path
            Must not exist.
        species_table : SpeciesTable, optional
            The species that may occur; without it the store takes what it is given.
        info : mapping, optional
            JSON-able facts about the reference data: license, citation, level_of_theory, versions,
            seed.

        Raises
        ------
        StoreError
            If something is at `path` already, or `info` cannot be written as JSON.
        """
        path = Path(path)
        if path.exists():
            raise StoreError(f"{path} exists already: open it, or choose another name")
        species = [] if species_table is None else species_table.to_json()
        record = new_record(info or {}, species, fixed=species_table is not None)
        record["sources"][REFERENCE] = new_source({})
        new = path.parent / f".{path.name}.{os.getpid()}.new"
        try:
            zarr.create_group(store=str(new), zarr_format=3, overwrite=True)
            write_record(new, record)
            os.replace(new, path)
        except OSError as error:
            raise StoreError(f"{path} cannot be created: {error}") from error
        return cls(path, writable=True)

    @classmethod
    def open(cls, path: str | Path, mode: Literal["r", "a"] = "r") -> LabeledStore:
        """Open a store to read ("r") or to read and add ("a").

        Raises
        ------
        StoreError
            If there is no store at `path`, or a newer version of potstill wrote it.
        """
        if mode not in ("r", "a"):
            raise StoreError(f"a store is opened with mode 'r' or 'a', not '{mode}'")
        return cls(Path(path), writable=mode == "a")

    # -- what is there -------------------------------------------------------------------------

    @property
    def n_systems(self) -> int:
        """Number of systems."""
        return self._record["n_systems"]

    @property
    def n_atoms(self) -> int:
        """Number of atoms in all systems."""
        return self._record["n_atoms"]

    @property
    def info(self) -> dict[str, Any]:
        """Facts given to `create`."""
        return copy.deepcopy(self._record["info"])

    @property
    def species_table(self) -> SpeciesTable:
        """Species of the structures; elements sorted unless the table was given to `create`."""
        return species_table(self._record)

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the label sets: "reference" if any frame has such a label, then teachers."""
        sources = self._record["sources"]
        return tuple(name for name in sources if name != REFERENCE or sources[name]["properties"])

    def source_info(self, source: str) -> dict[str, Any]:
        """Return fingerprint, license, citation, level of theory, versions and units of a set."""
        state = self._source(source)
        units = {name: PROPERTIES[name].unit for name in state["properties"]}
        info = self._record["info"] if source == REFERENCE else state["info"]
        return {"fingerprint": state["digest"], **copy.deepcopy(info), "units": units}

    def n_labeled(self, source: str) -> int:
        """Frames processed for a label set, including failed ones."""
        return self._source(source)["n_done"]

    def failures(self, source: str, tap: str | None = None) -> list[dict[str, Any]]:
        """Frames without labels, or without a feature: `system`, `frame_id`, `reason` of each."""
        if tap is not None:
            self._tap(source, tap)
            return self._columns.read_failures(self._record, f"features/{source}/{tap}")
        self._source(source)
        return self._columns.read_failures(self._record, f"labels/{source}")

    def fingerprint(self) -> str:
        """Hash of all structures and labels; independent of how the store was built."""
        state = self._record
        sources = {
            name: [source["info"].get("fingerprint"), source["digest"]]
            for name, source in state["sources"].items()
        }
        features = {
            name: [own["info"]["fingerprint"], {t: tap["digest"] for t, tap in own["taps"].items()}]
            for name, own in state["features"].items()
        }
        content = [state["digest"], sources, features] if features else [state["digest"], sources]
        text = json.dumps(content, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()

    def structures(self, start: int = 0, stop: int | None = None) -> Structures:
        """Read the systems start..stop-1, all by default."""
        start, stop = self._range(start, stop)
        return get_structures(self._columns, self._record, start, stop)

    def labels(self, source: str, start: int = 0, stop: int | None = None) -> Properties:
        """Read the labels of the systems start..stop-1, all by default; NaN where absent."""
        self._source(source)
        start, stop = self._range(start, stop)
        return get_labels(self._columns, self._record, source, start, stop)

    def verify(self) -> None:
        """Read everything and compare it with the hashes in the record.

        Raises
        ------
        StoreError
            If structures or labels differ from what was written.
        """
        if chain("", structure_digests(self.structures())) != self._record["digest"]:
            raise StoreError(f"{self.path}: the structures are not those that were written")
        for source, state in self._record["sources"].items():
            done = state["n_done"]
            digests = label_digests(self.labels(source, 0, done), self.structures(0, done))
            if chain("", digests) != state["digest"]:
                raise StoreError(f"{self.path}: the labels '{source}' are not those written")
        for source, own in self._record["features"].items():
            for tap, state in own["taps"].items():
                done = state["n_done"]
                feature = self.features(source, tap, 0, done)
                digests = feature_digests(feature, self.structures(0, done))
                if chain("", digests) != state["digest"]:
                    raise StoreError(
                        f"{self.path}: the features '{tap}' of '{source}' are not those written"
                    )

    # -- adding --------------------------------------------------------------------------------

    def append(
        self,
        structures: Structures,
        reference: Properties | None = None,
        *,
        skip_existing: bool = False,
    ) -> int:
        """Add structures and, where there are any, their reference labels; all or nothing.

        Parameters
        ----------
        skip_existing : bool
            Leave out structures that the store has already, so that an interrupted run can
            simply append everything again.

        Returns
        -------
        int
            Number of systems added.

        Raises
        ------
        StoreError
            If the store was opened for reading.
        DataError
            If a species is not in the store's fixed table, or labels do not fit the structures.
        """
        structures = structures.to("cpu")
        reference = Properties({}) if reference is None else reference.to("cpu")
        check_rows(reference, structures)
        with self._writing() as record:
            if skip_existing:
                known = self._known_fingerprints()
                prints = structures.fingerprints()
                keep = [s for s, print_ in enumerate(prints) if print_ not in known]
                reference = reference.select(structures.rows(keep))
                structures = structures.select(keep)
            if structures.n_systems:
                start = record["n_systems"]
                put_structures(self._columns, record, structures)
                put_labels(self._columns, record, REFERENCE, start, reference, structures)
        return structures.n_systems

    def begin_labels(self, source: str, info: Mapping[str, Any]) -> None:
        """Open a label set, a new one or one to be continued.

        Parameters
        ----------
        source : str
            The teacher's name: letters, digits and `._+-`.
        info : mapping
            JSON-able; must hold the teacher's `fingerprint`, and should hold license, citation,
            level_of_theory, versions and seed. If `properties` is given, it is part of identity.

        Raises
        ------
        StoreError
            If the name is taken by a teacher with another fingerprint, or by a run with other
            properties.
        """
        if source == REFERENCE:
            raise StoreError("'reference' is the name of the reference labels, not of a teacher")
        if not _SOURCE_NAME.fullmatch(source):
            raise StoreError(f"'{source}' cannot name a label set: use letters, digits and ._+-")
        plain = plain_json(info, source)
        with self._writing() as record:
            self._check_teacher(record, source, plain)
            known = record["sources"].setdefault(source, new_source(plain))["info"]
            if known.get("properties") != plain.get("properties"):
                raise StoreError(
                    f"{self.path}: the labels '{source}' were started with the properties "
                    f"{known.get('properties')}, not {plain.get('properties')}: choose another name"
                )

    def write_labels(
        self,
        source: str,
        start: int,
        properties: Properties,
        structures: Structures,
        failed: Iterable[Mapping[str, Any]] = (),
    ) -> None:
        """Add the labels of the systems from `start` on; frames that are done are left alone.

        Parameters
        ----------
        source : str
            A label set opened by `begin_labels`.
        start : int
            Position in the store of the first of `structures`, which are the same as there.
        failed : iterable of mapping
            Frames without labels: `system` (counted within `structures`) and `reason`.

        Raises
        ------
        StoreError
            If frames before `start` are not labeled yet, or the structures are not the store's.
        DataError
            If the labels do not fit the structures or are not finite.
        """
        failed, structures = list(failed), structures.to("cpu")
        gone = [int(entry["system"]) for entry in failed]
        properties = without(properties.to("cpu"), structures, gone)
        check_rows(properties, structures)
        with self._writing() as record:
            done, n = self._source(source)["n_done"], structures.n_systems
            if not 0 <= start <= done:
                raise StoreError(f"'{source}': frame {done} comes next, not frame {start}")
            self._check_place(f"'{source}'", start, structures)
            if start + n <= done:
                return
            fresh = list(range(done - start, n))
            part = structures.select(fresh) if start < done else structures
            if start < done:
                properties = properties.select(structures.rows(fresh))
            put_labels(self._columns, record, source, done, properties, part)
            own, entries = record["sources"][source], _failures(start, structures, failed, done)
            self._columns.write_failures(record, f"labels/{source}", own, entries)

    # -- features ------------------------------------------------------------------------------

    def taps(self, source: str) -> dict[str, dict[str, Any]]:
        """What is known of the stored taps of a teacher, by name.

        Each has `kind`, `width`, `recipe` (of the graph, for features of pairs), `default` (whether
        it is the teacher's own choice), `n_done` (frames gone through) and `n_failed`.
        """
        return copy.deepcopy(self._record["features"].get(source, {"taps": {}})["taps"])

    def feature_info(self, source: str) -> dict[str, Any]:
        """Fingerprint, license, citation and so on of the teacher of stored features."""
        return copy.deepcopy(self._record["features"][source]["info"])

    def features(self, source: str, tap: str, start: int = 0, stop: int | None = None) -> Feature:
        """Read a feature of the systems start..stop-1, all by default.

        Systems that the teacher has not gone through, or failed on, are not present; features of
        atoms are NaN there.
        """
        own = self._tap(source, tap)
        start, stop = self._range(start, stop)
        base = f"features/{source}/{tap}"
        return get_feature(self._columns, self._record, base, own, start, stop)

    def begin_features(self, source: str, tap: str, info: Mapping[str, Any]) -> int:
        """Open a tap of a teacher, a new one or one to be continued; returns the frames done.

        `tap` is a name of letters, digits and `._-`; `info` is as of `begin_labels`, and its
        `default` says whether this is the teacher's own choice.

        Raises
        ------
        StoreError
            If the name is taken by a teacher with another fingerprint.
        """
        for name in (source, tap):
            if not _SOURCE_NAME.fullmatch(name) or "+" in tap:
                raise StoreError(f"'{name}' cannot name features: use letters, digits and ._-")
        plain = plain_json(info, source)
        default = bool(plain.pop("default", False))
        with self._writing() as record:
            self._check_teacher(record, source, plain)
            own = record["features"].setdefault(source, {"info": plain, "taps": {}})
            new = {"n_done": 0, "n_failed": 0, "digest": "", "default": default}
            return own["taps"].setdefault(tap, new)["n_done"]

    def write_features(
        self,
        source: str,
        tap: str,
        start: int,
        feature: Feature,
        structures: Structures,
        failed: Iterable[Mapping[str, Any]] = (),
    ) -> None:
        """Add the rows of a feature for the frames that come next; `failed` as of `write_labels`.

        The first of `structures` is frame `start` of the store, the next one without the feature.
        Systems that failed are not present in `feature`.

        Raises
        ------
        StoreError
            If the frames are not the next ones or not those of the store, the tap has another kind,
            width or graph than before, or features of pairs do not say how their graph was made.
        DataError
            If a value is not finite.
        """
        structures, feature = structures.to("cpu"), feature.to("cpu")
        facts = feature_facts(feature, f"the tap '{tap}' of '{source}'")
        check_finite(feature, structures)
        with self._writing() as record:
            own, what = record["features"][source]["taps"][tap], f"'{tap}' of '{source}'"
            if start != own["n_done"]:
                raise StoreError(f"{what}: frame {own['n_done']} comes next, not frame {start}")
            self._check_place(what, start, structures)
            for name, value in facts.items():
                if own.setdefault(name, value) != value:
                    raise StoreError(
                        f"{what} has {name} {own[name]!r} in {self.path}, but now {value!r}: a tap "
                        "cannot change between frames"
                    )
            base = f"features/{source}/{tap}"
            put_feature(self._columns, record, base, own, feature, structures)
            self._columns.write_failures(record, base, own, _failures(start, structures, failed))

    def _tap(self, source: str, tap: str) -> dict[str, Any]:
        known = self._record["features"]
        if source not in known:
            raise StoreError(
                f"{self.path} has no features of '{source}'{suggest(source, known)}: compute them "
                f"with `potstill label --taps`"
            )
        taps = {name: own for name, own in known[source]["taps"].items() if "kind" in own}
        if tap not in taps:
            raise StoreError(
                f"{self.path} has no features '{tap}' of '{source}'{suggest(tap, taps)}"
            )
        return taps[tap]

    # -- helpers -------------------------------------------------------------------------------

    def _check_teacher(self, record: Record, source: str, info: Mapping[str, Any]) -> None:
        """Refuse a name under which another teacher has labels or features."""
        if not info.get("fingerprint"):
            raise StoreError(f"labels of '{source}' need the teacher's fingerprint")
        for kind in ("sources", "features"):
            known = record[kind].get(source, {"info": info})["info"].get("fingerprint")
            if known != info["fingerprint"]:
                raise StoreError(
                    f"{self.path} holds '{source}' of a different teacher (fingerprint {known}, "
                    f"not {info['fingerprint']}): choose another name"
                )

    def _check_place(self, what: str, start: int, structures: Structures) -> None:
        """Refuse structures that are not those of the store from `start` on."""
        stop = start + structures.n_systems
        if stop > self.n_systems or structures.fingerprints() != get_fingerprints(
            self._columns, self._record, start, stop
        ):
            raise StoreError(
                f"{what}: the structures are not frames {start} to {stop - 1} of {self.path}"
            )

    def _known_fingerprints(self) -> set[str]:
        """Fingerprints of all structures; only those that are new since the last call are read."""
        new = get_fingerprints(self._columns, self._record, self._n_known, self.n_systems)
        self._known.update(new)
        self._n_known = self.n_systems
        return self._known

    def _range(self, start: int, stop: int | None) -> tuple[int, int]:
        stop = self.n_systems if stop is None else stop
        if not 0 <= start <= stop <= self.n_systems:
            raise StoreError(f"{self.path} has frames 0..{self.n_systems}, not {start}..{stop}")
        return start, stop

    def _source(self, source: str) -> Record:
        """Entry of a label set, as committed."""
        if source not in self._record["sources"]:
            hint = suggest(source, self._record["sources"])
            raise StoreError(f"{self.path} has no labels '{source}'{hint}")
        return self._record["sources"][source]

    @contextlib.contextmanager
    def _writing(self) -> Iterator[Record]:
        """Lock, see what others committed, hand out a copy of the record and commit it."""
        if not self._writable:
            raise StoreError(f"{self.path} was opened for reading: open it with mode 'a'")
        with lock(self.path):
            record = read_record(self.path)
            if record != self._record:
                self._record = record
                self._columns.forget()
            draft = copy.deepcopy(record)
            try:
                yield draft
            except BaseException:
                self._columns.forget()
                raise
            if draft != record:
                write_record(self.path, draft)
                self._record = draft


def _failures(
    start: int, structures: Structures, failed: Iterable[Mapping[str, Any]], first: int = 0
) -> list[dict[str, Any]]:
    """Entries of failed systems, which are counted within `structures`, from frame `first` on."""
    reasons = {int(entry["system"]): str(entry["reason"]) for entry in failed}
    return [
        {"system": start + s, "frame_id": structures.name_of(s), "reason": reasons[s]}
        for s in sorted(reasons)
        if start + s >= first
    ]
