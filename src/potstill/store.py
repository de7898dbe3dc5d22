"""The labelled store: structures, reference labels and teachers' labels side by side, on disk.

A store is a folder: a Zarr group (format 3) with the arrays, and `commit.json`, the only record of
what counts. A write first puts rows behind the committed ones and then replaces the record in one
atomic step. A process killed at any point leaves the old record or the new one: rows beyond the
record are ignored, and overwritten by the next write. Chunk files, too, are replaced atomically,
so that rewriting a partly filled chunk cannot harm the rows that are already committed.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import zarr
from torch import Tensor

from potstill.errors import DataError, StoreError, suggest
from potstill.features import Feature
from potstill.files import write_atomically
from potstill.properties import PROPERTIES, property_spec
from potstill.species import SpeciesTable, merge_species_tables
from potstill.structures import NEUTRAL, NeighborList, Properties, Structures, offsets_from_counts

FORMAT = "potstill labelled store"
FORMAT_VERSION = 1

#: The label set that `append` fills.
REFERENCE = "reference"

_COMMIT = "commit.json"
_CHUNK_BYTES = 1 << 18  # of one chunk file before compression
_SOURCE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")

#: Optional fields of structures, with the type in the store.
_OPTIONAL = {
    "velocities": np.dtype("f8"),
    "fixed": np.dtype("?"),
    "tags": np.dtype("i8"),
    "charge": np.dtype("f8"),
    "spin_multiplicity": np.dtype("f8"),
}
_PER_ATOM = ("velocities", "fixed", "tags")
_TEXTS = ("group", "frame_id")


class LabelledStore:
    """Structures with any number of named label sets; made by `create` or `open`.

    Several processes may read while one writes. Writers lock the folder for the length of one
    call and see what others have committed before.
    """

    def __init__(self, path: Path, *, writable: bool) -> None:
        self.path = path
        self._writable = writable
        self._state = _read_commit(path)
        self._group = zarr.open_group(store=str(path), mode="r+" if writable else "r")
        self._arrays: dict[str, zarr.Array] = {}

    @classmethod
    def create(
        cls,
        path: str | Path,
        species_table: SpeciesTable | None = None,
        info: Mapping[str, Any] | None = None,
    ) -> LabelledStore:
        """Make an empty store and open it for writing.

        Parameters
        ----------
        path : path
            Must not exist.
        species_table : SpeciesTable, optional
            The species that may occur; without it the store takes what it is given.
        info : mapping, optional
            JSON-able facts about the reference data: licence, citation, level_of_theory, versions,
            seed.

        Raises
        ------
        StoreError
            If something is at `path` already, or `info` cannot be written as JSON.
        """
        path = Path(path)
        if path.exists():
            raise StoreError(f"{path} exists already: open it, or choose another name")
        state = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "info": _plain(info or {}, "info"),
            "species": [] if species_table is None else species_table.to_json(),
            "species_are_fixed": species_table is not None,
            "n_systems": 0,
            "n_atoms": 0,
            "digest": "",
            "text_bytes": dict.fromkeys(_TEXTS, 0),
            "columns": [],
            "sources": {REFERENCE: _new_source({})},
        }
        new = path.parent / f".{path.name}.{os.getpid()}.new"
        try:
            zarr.create_group(store=str(new), zarr_format=3, overwrite=True)
            _write_commit(new, state)
            os.replace(new, path)
        except OSError as error:
            raise StoreError(f"{path} cannot be created: {error}") from error
        return cls(path, writable=True)

    @classmethod
    def open(cls, path: str | Path, mode: Literal["r", "a"] = "r") -> LabelledStore:
        """Open a store to read ("r") or to read and add ("a").

        Raises
        ------
        StoreError
            If there is no store at `path`, or a newer version of potstill wrote it.
        """
        if mode not in ("r", "a"):
            raise StoreError(f"a store is opened with mode 'r' or 'a', not '{mode}'")
        store = cls(Path(path), writable=mode == "a")
        if mode == "a":
            with _lock(store.path):  # only writers, who hold the lock, make such files
                for litter in store.path.rglob("*.partial"):
                    litter.unlink()
        return store

    # -- what is there -------------------------------------------------------------------------

    @property
    def n_systems(self) -> int:
        """Number of systems."""
        return self._state["n_systems"]

    @property
    def n_atoms(self) -> int:
        """Number of atoms in all systems."""
        return self._state["n_atoms"]

    @property
    def info(self) -> dict[str, Any]:
        """What `create` was told."""
        return copy.deepcopy(self._state["info"])

    @property
    def species_table(self) -> SpeciesTable:
        """Species of the structures; elements sorted unless the table was given to `create`."""
        table = SpeciesTable.from_json(self._state["species"])
        return table if self._state["species_are_fixed"] else merge_species_tables([table])

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the label sets: "reference" if any frame has such a label, then teachers."""
        sources = self._state["sources"]
        return tuple(name for name in sources if name != REFERENCE or sources[name]["properties"])

    def source_info(self, source: str) -> dict[str, Any]:
        """Return fingerprint, licence, citation, level of theory, versions and units of a set."""
        state = self._source(source)
        units = {name: PROPERTIES[name].unit for name in state["properties"]}
        info = self._state["info"] if source == REFERENCE else state["info"]
        result = {"fingerprint": state["digest"], **copy.deepcopy(info), "units": units}
        return result

    def n_labelled(self, source: str) -> int:
        """Frames that a label set has gone through, failed ones included."""
        return self._source(source)["n_labelled"]

    def failures(self, source: str) -> list[dict[str, Any]]:
        """Frames without labels: dicts of `system`, `frame_id` and `reason`."""
        return copy.deepcopy(self._source(source)["failures"])

    def fingerprint(self) -> str:
        """Hash of all structures and labels; the same however the store came about."""
        state = self._state
        sources = {
            name: [source["info"].get("fingerprint"), source["digest"]]
            for name, source in state["sources"].items()
        }
        features = {
            name: [own["info"]["fingerprint"], {t: tap["digest"] for t, tap in own["taps"].items()}]
            for name, own in state.get("features", {}).items()
        }
        content = [state["digest"], sources, features] if features else [state["digest"], sources]
        text = json.dumps(content, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()

    def structures(self, start: int = 0, stop: int | None = None) -> Structures:
        """Read the systems start..stop-1, all by default."""
        start, stop = self._range(start, stop)
        counts = torch.from_numpy(self._read("structures/n_atoms", start, stop))
        first, last = self._atom_range(start, stop)
        fields: dict[str, Any] = {}
        for name in _OPTIONAL:
            column = f"structures/{name}"
            if column in self._state["columns"]:
                rows = (first, last) if name in _PER_ATOM else (start, stop)
                fields[name] = torch.from_numpy(self._read(column, *rows))
        for name in _TEXTS:
            if self._state["text_bytes"][name]:
                fields[name] = self._read_texts(name, start, stop)
        structures = Structures(
            positions=torch.from_numpy(self._read("structures/positions", first, last)),
            species=torch.from_numpy(self._read("structures/species", first, last)).long(),
            system_index=torch.repeat_interleave(torch.arange(stop - start), counts),
            cell=torch.from_numpy(self._read("structures/cell", start, stop)),
            pbc=torch.from_numpy(self._read("structures/pbc", start, stop)),
            species_table=SpeciesTable.from_json(self._state["species"]),
            **fields,
        )
        return structures.with_species_table(self.species_table)

    def labels(self, source: str, start: int = 0, stop: int | None = None) -> Properties:
        """Read the labels of the systems start..stop-1; NaN and not present where absent.

        Parameters
        ----------
        source : str
            "reference" or a teacher's name.
        start, stop : int, optional
            All systems by default.
        """
        state = self._source(source)
        start, stop = self._range(start, stop)
        done = min(max(state["n_labelled"], start), stop)
        values: dict[str, Tensor] = {}
        present: dict[str, Tensor] = {}
        weights: dict[str, Tensor] = {}
        for name in state["properties"]:
            per_atom = property_spec(name).level == "atom"
            rows = self._atom_range(start, stop) if per_atom else (start, stop)
            full = self._atom_range(start, done)[1] if per_atom else done
            base = f"labels/{source}"
            for result, kind, limit, end in (
                (values, "values", full, rows),
                (present, "present", done, (start, stop)),
                (weights, "weights", full, rows),
            ):
                if f"{base}/{kind}/{name}" in self._state["columns"]:
                    array = self._read(f"{base}/{kind}/{name}", *end, committed=limit)
                    result[name] = torch.from_numpy(array)
        return Properties(values, present, weights)

    def verify(self) -> None:
        """Read everything and compare it with the hashes in the record.

        Raises
        ------
        StoreError
            If structures or labels differ from what was written.
        """
        structures = self.structures()
        if _chain("", _structure_digests(structures)) != self._state["digest"]:
            raise StoreError(f"{self.path}: the structures are not those that were written")
        for source, state in self._state["sources"].items():
            done = list(range(state["n_labelled"]))
            labels = self.labels(source).select(done, structures)
            digests = _label_digests(labels, structures.select(done))
            if _chain("", digests) != state["digest"]:
                raise StoreError(f"{self.path}: the labels '{source}' are not those written")
        for source, own in self._state.get("features", {}).items():
            for tap, state in own["taps"].items():
                done = list(range(state["n_done"]))
                feature = self.features(source, tap).select(done, structures)
                digests = _feature_digests(feature, structures.select(done))
                if _chain("", digests) != state["digest"]:
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
        structures : Structures
            The batch.
        reference : Properties, optional
            Labels of this batch.
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
        _check_rows(reference, structures)
        with self._writing() as state:
            if skip_existing:
                known = set(self._fingerprints(0, state["n_systems"]))
                prints = structures.fingerprints()
                keep = [s for s, print_ in enumerate(prints) if print_ not in known]
                reference = reference.select(keep, structures)
                structures = structures.select(keep)
            if structures.n_systems:
                self._put_structures(state, structures)
                start = state["n_systems"]
                state["n_systems"] += structures.n_systems
                state["n_atoms"] += structures.n_atoms
                self._put_labels(state, REFERENCE, start, reference, structures)
        return structures.n_systems

    def begin_labels(self, source: str, info: Mapping[str, Any]) -> None:
        """Open a label set, a new one or one to go on with.

        Parameters
        ----------
        source : str
            The teacher's name: letters, digits and `._+-`.
        info : mapping
            JSON-able; must hold the teacher's `fingerprint`, and should hold licence, citation,
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
        if not info.get("fingerprint"):
            raise StoreError(f"the label set '{source}' needs the teacher's fingerprint")
        plain = _plain(info, source)
        with self._writing() as state:
            known = state["sources"].setdefault(source, _new_source(plain))["info"]
            featured = state.get("features", {}).get(source, {"info": plain})["info"]
            if not known["fingerprint"] == plain["fingerprint"] == featured["fingerprint"]:
                raise StoreError(
                    f"{self.path} holds labels '{source}' of a different teacher (fingerprint "
                    f"{known['fingerprint']}, not {plain['fingerprint']}): choose another name"
                )
            if known.get("properties") != plain.get("properties"):
                raise StoreError(
                    f"{self.path}: the labels '{source}' were begun with the properties "
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
            Position in the store of the first of `structures`.
        properties : Properties
            Labels of these structures.
        structures : Structures
            The same systems as in the store at this place.
        failed : iterable of mapping
            Frames without labels: `system` (counted within `structures`) and `reason`.

        Raises
        ------
        StoreError
            If frames before `start` are not labelled yet, or the structures are not the store's.
        DataError
            If the labels do not fit the structures or are not finite.
        """
        failures = {int(entry["system"]): str(entry["reason"]) for entry in failed}
        structures = structures.to("cpu")
        properties = _without(properties.to("cpu"), structures, list(failures))
        _check_rows(properties, structures)
        with self._writing() as state:
            done = self._source(source)["n_labelled"]
            stop = start + structures.n_systems
            if not 0 <= start <= done:
                raise StoreError(f"'{source}': frame {done} comes next, not frame {start}")
            if stop > state["n_systems"] or structures.fingerprints() != self._fingerprints(
                start, stop
            ):
                raise StoreError(
                    f"'{source}': the structures are not frames {start} to {stop - 1} of "
                    f"{self.path}"
                )
            fresh = list(range(done - start, structures.n_systems))
            if not fresh:
                return
            part = structures.select(fresh)
            self._put_labels(state, source, done, properties.select(fresh, structures), part)
            state["sources"][source]["failures"] += [
                {"system": start + s, "frame_id": structures.name_of(s), "reason": failures[s]}
                for s in sorted(failures)
                if start + s >= done
            ]

    # -- features ------------------------------------------------------------------------------

    @property
    def feature_sources(self) -> tuple[str, ...]:
        """Names of the teachers with stored features."""
        return tuple(self._state.get("features", {}))

    def taps(self, source: str) -> dict[str, dict[str, Any]]:
        """What is known of the stored taps of a teacher, by name.

        Each has `kind`, `width`, `recipe` (of the graph, for features of pairs), `default` (whether
        it is the teacher's own choice), `n_done` (frames gone through) and `failures`.
        """
        own = self._state.get("features", {}).get(source)
        return {} if own is None else copy.deepcopy(own["taps"])

    def feature_info(self, source: str) -> dict[str, Any]:
        """Fingerprint, licence, citation and so on of the teacher of stored features."""
        return copy.deepcopy(self._state["features"][source]["info"])

    def features(self, source: str, tap: str, start: int = 0, stop: int | None = None) -> Feature:
        """Read a feature of the systems start..stop-1, all by default.

        Systems that the teacher has not gone through, or failed on, are not present; features of
        atoms are NaN there.
        """
        own = self._tap(source, tap)
        start, stop = self._range(start, stop)
        done = min(max(own["n_done"], start), stop)
        base = f"features/{source}/{tap}"
        present = torch.from_numpy(self._read(f"{base}/present", start, stop, committed=done))
        if own["kind"] != "edge_scalar":
            first, last = self._atom_range(start, stop)
            full = self._atom_range(start, done)[1]
            values = torch.from_numpy(self._read(f"{base}/values", first, last, committed=full))
            return Feature(own["kind"], values, present=present)
        counts = self._read(f"{base}/n_pairs", 0, stop, committed=done).astype("i8")
        first, last = int(counts[:start].sum()), int(counts.sum())
        values, center, neighbor, shifts = (
            torch.from_numpy(self._read(f"{base}/{name}", first, last))
            for name in ("values", "center", "neighbor", "shifts")
        )
        per_system = torch.from_numpy(counts[start:])
        sizes = torch.from_numpy(self._read("structures/n_atoms", start, stop))
        before = torch.repeat_interleave(offsets_from_counts(sizes)[:-1], per_system)
        graph = NeighborList(
            center.long() + before,
            neighbor.long() + before,
            shifts.long(),
            per_system,
            own["cutoff"],
        )
        return Feature("edge_scalar", values, graph, own["recipe"], present)

    def begin_features(self, source: str, tap: str, info: Mapping[str, Any]) -> int:
        """Open a tap of a teacher, a new one or one to go on with.

        Parameters
        ----------
        source : str
            The teacher's name, as of `begin_labels`.
        tap : str
            Name of the feature: letters, digits and `._-`.
        info : mapping
            As of `begin_labels`; `default` says whether this is the teacher's own choice.

        Returns
        -------
        int
            Frames that are done.

        Raises
        ------
        StoreError
            If the name is taken by a teacher with another fingerprint.
        """
        for name in (source, tap):
            if not _SOURCE_NAME.fullmatch(name) or "+" in tap:
                raise StoreError(f"'{name}' cannot name features: use letters, digits and ._-")
        if not info.get("fingerprint"):
            raise StoreError(f"the features of '{source}' need the teacher's fingerprint")
        plain = _plain(info, source)
        default = bool(plain.pop("default", False))
        with self._writing() as state:
            own = state.setdefault("features", {}).setdefault(source, {"info": plain, "taps": {}})
            labels = state["sources"].get(source, {"info": plain})["info"]
            for known in (own["info"], labels):
                if known["fingerprint"] != plain["fingerprint"]:
                    raise StoreError(
                        f"{self.path} holds '{source}' of a different teacher (fingerprint "
                        f"{known['fingerprint']}, not {plain['fingerprint']}): choose another name"
                    )
            new = {"n_done": 0, "n_rows": 0, "digest": "", "failures": [], "default": default}
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
        """Add the rows of a feature for the frames that come next.

        Parameters
        ----------
        source, tap : str
            Opened by `begin_features`.
        start : int
            Position in the store of the first of `structures`; must be the next one.
        feature : Feature
            Of these structures; systems that failed are not present.
        structures : Structures
            The same systems as in the store at this place.
        failed : iterable of mapping
            `system` (counted within `structures`) and `reason`.

        Raises
        ------
        StoreError
            If the frames are not the next ones or not those of the store, the tap has another kind,
            width or graph than before, or features of pairs do not say how their graph was made.
        DataError
            If a value is not finite.
        """
        structures, feature = structures.to("cpu"), feature.to("cpu")
        facts = _feature_facts(feature, f"the tap '{tap}' of '{source}'")
        _check_finite(feature, structures)
        with self._writing() as state:
            own = state["features"][source]["taps"][tap]
            stop = start + structures.n_systems
            if start != own["n_done"] or structures.fingerprints() != self._fingerprints(
                start, stop
            ):
                raise StoreError(
                    f"'{tap}' of '{source}': the structures are not frames {own['n_done']} and "
                    f"later of {self.path}"
                )
            for name, value in facts.items():
                if own.setdefault(name, value) != value:
                    raise StoreError(
                        f"'{tap}' of '{source}' has {name} {own[name]!r} in {self.path}, and now "
                        f"{value!r}: a tap cannot change between frames"
                    )
            base, rows = f"features/{source}/{tap}", int(own["n_rows"])
            present = feature.presence(structures.n_systems).numpy()
            self._write(state, f"{base}/present", start, present, False)
            self._write(state, f"{base}/values", rows, feature.values.detach().numpy(), np.nan)
            if feature.graph is not None:
                graph = feature.graph
                before = structures.atom_offsets[structures.system_index[graph.center]]
                columns = {
                    "center": (graph.center - before).numpy().astype("i4"),
                    "neighbor": (graph.neighbor - before).numpy().astype("i4"),
                    "shifts": graph.shifts.numpy().astype("i4"),
                }
                for name, column in columns.items():
                    self._write(state, f"{base}/{name}", rows, column, 0)
                counts = graph.n_pairs_per_system.numpy().astype("i4")
                self._write(state, f"{base}/n_pairs", start, counts, 0)
            own["n_done"], own["n_rows"] = stop, rows + feature.values.shape[0]
            own["digest"] = _chain(own["digest"], _feature_digests(feature, structures))
            own["failures"] += [
                {
                    "system": start + int(entry["system"]),
                    "frame_id": structures.name_of(int(entry["system"])),
                    "reason": str(entry["reason"]),
                }
                for entry in failed
            ]

    def _tap(self, source: str, tap: str) -> dict[str, Any]:
        known = self._state.get("features", {})
        if source not in known:
            raise StoreError(
                f"{self.path} has no features of '{source}'{suggest(source, known)}: make them "
                "with `potstill label --taps`"
            )
        taps = {name: own for name, own in known[source]["taps"].items() if "kind" in own}
        if tap not in taps:
            raise StoreError(
                f"{self.path} has no features '{tap}' of '{source}'{suggest(tap, taps)}"
            )
        return taps[tap]

    # -- rows ----------------------------------------------------------------------------------

    def _put_structures(self, state: dict[str, Any], structures: Structures) -> None:
        table = SpeciesTable.from_json(state["species"])
        if not state["species_are_fixed"]:
            # New species go to the end, so that indices on disk keep their meaning.
            new = [e for e in structures.species_table.entries if e.name not in table.names]
            table = SpeciesTable((*table.entries, *new))
            state["species"] = table.to_json()
        _check_species(table, structures)
        structures = structures.with_species_table(table)
        frame, atom = state["n_systems"], state["n_atoms"]
        columns: list[tuple[str, int, np.ndarray, Any]] = [
            ("positions", atom, structures.positions.numpy(), np.nan),
            ("species", atom, structures.species.numpy().astype("i4"), 0),
            ("n_atoms", frame, structures.n_atoms_per_system.numpy(), 0),
            ("cell", frame, structures.cell.numpy(), np.nan),
            ("pbc", frame, structures.pbc.numpy(), False),
            ("fingerprint", frame, _to_u8(structures.fingerprints()), 0),
        ]
        for name, dtype in _OPTIONAL.items():
            value = getattr(structures, name)
            if value is not None:
                start = atom if name in _PER_ATOM else frame
                columns.append((name, start, value.numpy().astype(dtype), NEUTRAL[name]))
        for name, start, values, fill in columns:
            self._write(state, f"structures/{name}", start, values, fill)
        for name in _TEXTS:
            texts = getattr(structures, name)
            if texts is not None:
                encoded = [text.encode() for text in texts]
                raw = np.frombuffer(b"".join(encoded), dtype="u1")
                lengths = np.array([len(text) for text in encoded], dtype="i4")
                self._write(state, f"structures/{name}_length", frame, lengths, 0)
                self._write(state, f"structures/{name}_bytes", state["text_bytes"][name], raw, 0)
                state["text_bytes"][name] += len(raw)
        state["digest"] = _chain(state["digest"], _structure_digests(structures))

    def _put_labels(
        self,
        state: dict[str, Any],
        source: str,
        start: int,
        properties: Properties,
        structures: Structures,
    ) -> None:
        """Write rows of a label set; `state` already counts the structures."""
        own = state["sources"][source]
        counts = self._read("structures/n_atoms", 0, start)
        first_atom = int(counts.sum())
        for name in properties.names:
            spec = property_spec(name)
            row = first_atom if spec.level == "atom" else start
            value = properties[name].detach().double().numpy()
            mask = properties.presence(name, structures.n_systems).numpy()
            self._write(state, f"labels/{source}/values/{name}", row, value, np.nan)
            self._write(state, f"labels/{source}/present/{name}", start, mask, False)
            column = f"labels/{source}/weights/{name}"
            if name in properties.weights:
                weight = properties.row_weights(name, structures).double().numpy()
                self._write(state, column, row, weight, 1.0)
        own["properties"] = list(dict.fromkeys([*own["properties"], *properties.names]))
        own["n_labelled"] = start + structures.n_systems
        own["digest"] = _chain(own["digest"], _label_digests(properties, structures))

    def _write(
        self, state: dict[str, Any], name: str, start: int, values: np.ndarray, fill: Any
    ) -> None:
        """Put rows at `start` and end the array there; rows before a first write are `fill`."""
        shape = (start + len(values), *values.shape[1:])
        array = self._array(name) if name in state["columns"] else None
        if array is None:
            row_bytes = values.dtype.itemsize * int(np.prod(values.shape[1:]))
            array = self._group.create_array(
                name,
                shape=shape,
                dtype=values.dtype,
                chunks=(_CHUNK_BYTES // row_bytes, *values.shape[1:]),
                fill_value=fill,
                overwrite=True,  # what a killed process left does not count
            )
            self._arrays[name] = array
            state["columns"].append(name)
        elif array.shape != shape:
            array.resize(shape)
        if len(values):
            array[start : start + len(values)] = values

    def _read(self, name: str, start: int, stop: int, committed: int | None = None) -> np.ndarray:
        """Rows start..stop-1; `fill` where the array ends earlier or rows are not committed."""
        if name not in self._state["columns"]:
            if stop > start:
                raise StoreError(f"{self.path} has no column '{name}'")
            shapes = {"positions": (0, 3), "cell": (0, 3, 3), "pbc": (0, 3)}
            kind = {"pbc": "?", "n_atoms": "i8", "species": "i4"}
            short = name.rsplit("/", 1)[-1]
            return np.zeros(shapes.get(short, (0,)), dtype=kind.get(short, "f8"))
        array = self._array(name)
        end = min(stop, array.shape[0], stop if committed is None else committed)
        rows = np.full((stop - start, *array.shape[1:]), array.fill_value, dtype=array.dtype)
        if end > start:
            rows[: end - start] = array[start:end]
        return rows

    def _read_texts(self, name: str, start: int, stop: int) -> tuple[str, ...]:
        lengths = self._read(f"structures/{name}_length", 0, stop)
        ends = np.concatenate([[0], np.cumsum(lengths)])
        raw = self._read(f"structures/{name}_bytes", int(ends[start]), int(ends[-1])).tobytes()
        ends = ends[start:] - ends[start]
        return tuple(raw[a:b].decode() for a, b in itertools.pairwise(ends))

    def _array(self, name: str) -> zarr.Array:
        if name not in self._arrays:
            array = self._group[name]
            assert isinstance(array, zarr.Array)
            self._arrays[name] = array
        return self._arrays[name]

    def _fingerprints(self, start: int, stop: int) -> list[str]:
        if stop <= start:
            return []
        return [f"{x:016x}" for x in self._read("structures/fingerprint", start, stop).tolist()]

    def _atom_range(self, start: int, stop: int) -> tuple[int, int]:
        counts = torch.from_numpy(self._read("structures/n_atoms", 0, stop))
        offsets = offsets_from_counts(counts)
        return int(offsets[start]), int(offsets[stop])

    def _range(self, start: int, stop: int | None) -> tuple[int, int]:
        stop = self.n_systems if stop is None else stop
        if not 0 <= start <= stop <= self.n_systems:
            raise StoreError(f"{self.path} has frames 0..{self.n_systems}, not {start}..{stop}")
        return start, stop

    def _source(self, source: str) -> dict[str, Any]:
        if source not in self._state["sources"]:
            hint = suggest(source, self._state["sources"])
            raise StoreError(f"{self.path} has no labels '{source}'{hint}")
        return self._state["sources"][source]

    @contextlib.contextmanager
    def _writing(self) -> Iterator[dict[str, Any]]:
        """Lock, see what others committed, hand out a copy of the record and commit it."""
        if not self._writable:
            raise StoreError(f"{self.path} was opened for reading: open it with mode 'a'")
        with _lock(self.path):
            state = _read_commit(self.path)
            if state != self._state:
                self._state = state
                self._arrays.clear()
            draft = copy.deepcopy(state)
            try:
                yield draft
            except BaseException:
                self._arrays.clear()
                raise
            if draft != state:
                _write_commit(self.path, draft)
                self._state = draft


# -- the record -----------------------------------------------------------------------------------


def _new_source(info: Mapping[str, Any]) -> dict[str, Any]:
    return {"info": dict(info), "properties": [], "n_labelled": 0, "digest": "", "failures": []}


def _read_commit(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise StoreError(f"there is no store at {path}")
    try:
        state = json.loads((path / _COMMIT).read_text(encoding="utf-8"))
        is_store = state["format"] == FORMAT
        version = int(state["version"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path} is not a labelled store of potstill") from error
    if not is_store:
        raise StoreError(f"{path} is not a labelled store of potstill")
    if version > FORMAT_VERSION:
        raise StoreError(
            f"{path} has format version {version}, and this potstill knows {FORMAT_VERSION}: "
            f"update potstill"
        )
    return state


def _write_commit(path: Path, state: Mapping[str, Any]) -> None:
    write_atomically(path / _COMMIT, json.dumps(state, indent=1))


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Keep other writers out; the system lifts the lock when a process dies."""
    try:
        import fcntl
    except ImportError:  # not on Windows: there, writing from one process is up to the user
        yield
        return
    with open(path / ".lock", "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _plain(info: Mapping[str, Any], what: str) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(dict(info), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise StoreError(f"the facts about '{what}' cannot be written as JSON: {error}") from error


# -- checks and hashes ----------------------------------------------------------------------------


def _check_species(table: SpeciesTable, structures: Structures) -> None:
    for entry in structures.species_table.entries:
        if entry.name in table.names and table.entries[table.index(entry.name)] != entry:
            raise DataError(
                f"the species '{entry.name}' has another mass or atomic number in the store"
            )


def _check_rows(properties: Properties, structures: Structures) -> None:
    for name in properties.names:
        level = property_spec(name).level
        rows = structures.n_atoms if level == "atom" else structures.n_systems
        value = properties[name]
        if value.shape[0] != rows:
            raise DataError(f"'{name}' has {value.shape[0]} rows for {rows} {level}s")
        mask = properties.presence(name, structures.n_systems)
        there = mask if level == "system" else mask[structures.system_index]
        finite = value.reshape(rows, -1).isfinite().all(1)
        if bool((there & ~finite).any()):
            row = int((there & ~finite).nonzero()[0])
            system = row if level == "system" else int(structures.system_index[row])
            raise DataError(f"{structures.name_of(system)}: '{name}' is not finite")


def _without(properties: Properties, structures: Structures, systems: Sequence[int]) -> Properties:
    """Mark all properties of some systems as absent, values NaN."""
    if not systems:
        return properties
    gone = torch.zeros(structures.n_systems, dtype=torch.bool)
    gone[list(systems)] = True
    values, present = {}, {}
    for name in properties.names:
        rows = gone if property_spec(name).level == "system" else gone[structures.system_index]
        values[name] = properties[name].clone()
        values[name][rows] = torch.nan
        present[name] = properties.presence(name, structures.n_systems) & ~gone
    return replace(properties, values=values, present=present)


def _to_u8(fingerprints: Sequence[str]) -> np.ndarray:
    return np.array([int(text, 16) for text in fingerprints], dtype="u8")


def _structure_digests(structures: Structures) -> Iterator[bytes]:
    """One hash per system, the same whatever the order of the species table.

    Optional fields with neutral values do not count: a store adds them when other frames need it.
    """
    offsets = structures.atom_offsets.tolist()
    prints = structures.fingerprints()
    for s in range(structures.n_systems):
        digest = hashlib.blake2b(prints[s].encode(), digest_size=16)
        for name in _TEXTS:
            texts = getattr(structures, name)
            digest.update(f"{name}={texts[s] if texts is not None else ''}\n".encode())
        for name, dtype in _OPTIONAL.items():
            value = getattr(structures, name)
            if value is None:
                continue
            rows = slice(offsets[s], offsets[s + 1]) if name in _PER_ATOM else slice(s, s + 1)
            array = value[rows].numpy().astype(dtype)
            if not np.array_equal(array, np.full_like(array, NEUTRAL[name]), dtype.kind == "f"):
                digest.update(name.encode() + array.tobytes())
        yield digest.digest()


def _label_digests(properties: Properties, structures: Structures) -> Iterator[bytes]:
    """One hash per system of the labels that it has, and of weights other than one."""
    offsets = structures.atom_offsets.tolist()
    columns = [
        (
            name,
            property_spec(name).level == "atom",
            properties[name].detach().double().numpy(),
            properties.presence(name, structures.n_systems).tolist(),
            properties.row_weights(name, structures).double().numpy(),
        )
        for name in sorted(properties.names)
    ]
    for s in range(structures.n_systems):
        digest = hashlib.blake2b(digest_size=16)
        for name, per_atom, values, present, weights in columns:
            rows = slice(offsets[s], offsets[s + 1]) if per_atom else slice(s, s + 1)
            if present[s]:
                digest.update(name.encode() + values[rows].tobytes())
            if (weights[rows] != 1).any():
                digest.update(b"weight " + name.encode() + weights[rows].tobytes())
        yield digest.digest()


def _feature_facts(feature: Feature, what: str) -> dict[str, Any]:
    """What stays the same for all frames of a tap."""
    facts: dict[str, Any] = {"kind": feature.kind, "width": feature.width}
    facts["dtype"] = str(feature.values.dtype).removeprefix("torch.")
    if feature.graph is not None:
        if not feature.recipe:
            raise StoreError(
                f"{what} lives on pairs and does not say how they were chosen: it cannot be "
                "stored; compute it online, by naming the teacher under 'teachers'"
            )
        facts |= {"recipe": feature.recipe, "cutoff": feature.graph.cutoff}
    return facts


def _check_finite(feature: Feature, structures: Structures) -> None:
    present = feature.presence(structures.n_systems)
    atom = torch.arange(structures.n_atoms) if feature.graph is None else feature.graph.center
    system = structures.system_index[atom]
    bad = ~feature.values.reshape(len(atom), -1).isfinite().all(dim=1) & present[system]
    if bool(bad.any()):
        raise DataError(f"{structures.name_of(int(system[bad][0]))}: a feature is not finite")


def _feature_digests(feature: Feature, structures: Structures) -> Iterator[bytes]:
    """One hash per system that has the feature."""
    present = feature.presence(structures.n_systems).tolist()
    for s in range(structures.n_systems):
        digest = hashlib.blake2b(digest_size=16)
        if present[s]:
            part = feature.select([s], structures)
            digest.update(part.values.detach().contiguous().numpy().tobytes())
            if part.graph is not None:
                for column in (part.graph.center, part.graph.neighbor, part.graph.shifts):
                    digest.update(column.contiguous().numpy().tobytes())
        yield digest.digest()


def _chain(start: str, digests: Iterable[bytes]) -> str:
    """Hash of all frames so far, so that the record stays short and chunking does not matter."""
    state = start
    for digest in digests:
        state = hashlib.blake2b(state.encode() + digest, digest_size=16).hexdigest()
    return state
