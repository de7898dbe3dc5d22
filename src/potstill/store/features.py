"""Rows of a teacher's internal features in a store."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from potstill.errors import DataError, StoreError
from potstill.features import Feature
from potstill.ragged import offsets_from_counts
from potstill.store.record import Columns, Record, atom_offsets, chain
from potstill.structures import NeighborList, Structures


def put_feature(
    columns: Columns,
    record: Record,
    base: str,
    own: Record,
    feature: Feature,
    structures: Structures,
) -> None:
    """Write the rows of a feature behind those that are done; `own` is the entry of its tap."""
    start, row = own["n_done"], record["columns"].get(f"{base}/values", 0)
    present = feature.presence(structures.n_systems).numpy()
    columns.write(record, f"{base}/present", start, present, False)
    columns.write(record, f"{base}/values", row, feature.values.detach().numpy(), np.nan)
    if feature.graph is not None:
        graph = feature.graph
        before = structures.atom_offsets[structures.system_index[graph.center]]
        pairs = {
            "center": graph.center - before,
            "neighbor": graph.neighbor - before,
            "shifts": graph.shifts,
        }
        for name, column in pairs.items():
            columns.write(record, f"{base}/{name}", row, column.numpy().astype("i4"))
        ends = row + graph.n_pairs_per_system.cumsum(0).numpy()
        columns.write(record, f"{base}/pair_end", start, ends)
    own["n_done"] = start + structures.n_systems
    own["digest"] = chain(own["digest"], feature_digests(feature, structures))


def get_feature(
    columns: Columns, record: Record, base: str, own: Record, start: int, stop: int
) -> Feature:
    """Read a feature of the systems start..stop-1."""
    present = torch.from_numpy(columns.read(record, f"{base}/present", start, stop))
    atoms = atom_offsets(columns, record, start, stop)
    if own["kind"] != "edge_scalar":
        rows = int(atoms[0]), int(atoms[-1])
        values = torch.from_numpy(columns.read(record, f"{base}/values", *rows))
        return Feature(own["kind"], values, present=present)
    pairs = columns.offsets(record, f"{base}/pair_end", start, stop)
    values, center, neighbor, shifts = (
        torch.from_numpy(columns.read(record, f"{base}/{name}", int(pairs[0]), int(pairs[-1])))
        for name in ("values", "center", "neighbor", "shifts")
    )
    counts = torch.from_numpy(np.diff(pairs))
    before = torch.repeat_interleave(torch.from_numpy(atoms[:-1] - atoms[0]), counts)
    graph = NeighborList(
        center.long() + before, neighbor.long() + before, shifts.long(), counts, own["cutoff"]
    )
    return Feature("edge_scalar", values, graph, own["recipe"], present)


def feature_facts(feature: Feature, what: str) -> dict[str, Any]:
    """What stays the same for all frames of a tap."""
    facts: dict[str, Any] = {"kind": feature.kind, "width": feature.width}
    facts["dtype"] = str(feature.values.dtype).removeprefix("torch.")
    if feature.graph is not None:
        if not feature.recipe:
            raise StoreError(
                f"{what} is on pairs and does not say how they were selected: it cannot be "
                "stored; compute it online, by naming the teacher under 'teachers'"
            )
        facts |= {"recipe": feature.recipe, "cutoff": feature.graph.cutoff}
    return facts


def check_finite(feature: Feature, structures: Structures) -> None:
    """Refuse a feature that is not finite where it is present."""
    present = feature.presence(structures.n_systems)
    atom = torch.arange(structures.n_atoms) if feature.graph is None else feature.graph.center
    system = structures.system_index[atom]
    bad = ~feature.values.reshape(len(atom), -1).isfinite().all(dim=1) & present[system]
    if bool(bad.any()):
        raise DataError(f"{structures.name_of(int(system[bad][0]))}: a feature is not finite")


def feature_digests(feature: Feature, structures: Structures) -> Iterator[bytes]:
    """One hash per system that has the feature."""
    present = feature.presence(structures.n_systems).tolist()
    columns = [feature.values.detach().contiguous()]
    offsets = structures.atom_offsets
    if feature.graph is not None:
        graph = feature.graph
        before = offsets[structures.system_index[graph.center]]
        columns += [graph.center - before, graph.neighbor - before, graph.shifts.contiguous()]
        offsets = offsets_from_counts(graph.n_pairs_per_system)
    arrays, ends = [column.numpy() for column in columns], offsets.tolist()
    for s in range(structures.n_systems):
        digest = hashlib.blake2b(digest_size=16)
        if present[s]:
            for array in arrays:
                digest.update(array[ends[s] : ends[s + 1]].tobytes())
        yield digest.digest()
