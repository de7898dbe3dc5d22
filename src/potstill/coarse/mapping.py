"""Mapping a trajectory to beads, frame by frame, into a labeled store."""

from __future__ import annotations

import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import sparse

from potstill.coarse.beads import Beads, find_beads
from potstill.coarse.forcemap import MoleculeStatistics, cut_bonds, optimal_force_map
from potstill.coarse.settings import MappingSettings
from potstill.coarse.trajectory import Snapshot, Trajectory
from potstill.errors import DataError, StoreError
from potstill.store import LabeledStore
from potstill.store.record import plain_json
from potstill.structures import Properties, Structures
from potstill.units import AMU_PER_A3_IN_G_PER_CM3

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class MappingReport:
    """Outcome of a mapping; all of it is also in the store, as `info["mapping"]`.

    Parameters
    ----------
    path : Path
        The store.
    n_frames : int
    beads : dict of str to dict
        Per kind: `count` in a frame, `mass` in amu, and the root mean square of a component of
        the mapped force in eV/Å: `rms_sum`, None where constraints forbid the plain sum, and
        `rms_optimal`, None where beads are taken as they are.
    molecules : list of dict
        Per kind of molecule: `name`, `count`, names of its `atoms` and `beads`, the beads of each
        copy (`members`), `bonds` between its beads, `constrained` pairs of atoms and how many of
        these beads `cut`, `samples` (copies in all frames), and `coefficients` of the optimal force
        map, a row per bead.
    net_force : dict of str to float
        Root mean square of a component of the total force in a frame in eV/Å: of all `atoms` of
        the trajectory, and of all `beads` by the plain sum.
    density : float or None
        g/cm³ of the beads, where frames are periodic along all axes.
    """

    path: Path
    n_frames: int
    beads: dict[str, dict[str, Any]]
    molecules: list[dict[str, Any]]
    net_force: dict[str, float]
    density: float | None


def map_trajectory(
    trajectory: Trajectory,
    settings: MappingSettings,
    out: str | Path,
    *,
    info: Mapping[str, Any] | None = None,
    chunk: int | None = None,
    progress: Progress | None = None,
) -> MappingReport:
    """Map all frames of a trajectory to beads and write them into a new store.

    The trajectory is gone through twice: for the statistics of forces and constraints, and to map
    it. One frame of atoms and `chunk` frames of beads are in memory. The store is built beside
    `out` and put in place when it is complete; a run that was interrupted goes on where it stopped.

    Parameters
    ----------
    out : path
        Store with the mapped forces as reference labels. One that this mapping has written is left
        as it is.
    info : mapping, optional
        JSON-able facts for the store: temperature, license, level_of_theory.
    chunk : int, optional
        Frames that are written at a time; by default about 100,000 beads.
    progress : callable, optional
        Called with (what is done, frames done, frames in all).

    Raises
    ------
    ConfigError
        If the mapping does not fit the topology.
    DataError
        If a frame is faulty, or the force map is not valid for the constraints found.
    StoreError
        If something else is at `out`.
    """
    out = Path(out)
    info = plain_json(info or {}, "info")
    identity = {
        "settings": settings.model_dump(mode="json"),
        "files": [part.where for part in trajectory.parts],
        "n_frames": len(trajectory),
    }
    if out.exists():
        return _finished(out, identity, info)
    progress = progress or (lambda what, done, total: None)
    beads = find_beads(trajectory.topology, settings)
    facts, force_map = _survey(trajectory, beads, settings, progress)
    partial = out.with_name(f".{out.name}.partial")
    store = _resumed(partial, beads, {**info, "mapping": {**identity, **facts}})
    chunk = chunk or max(1, 100_000 // len(beads.names))
    batch: list[Snapshot] = []
    for done, snapshot in enumerate(trajectory.snapshots(store.n_systems), store.n_systems + 1):
        batch.append(_mapped(snapshot, beads, force_map))
        if len(batch) == chunk or done == len(trajectory):
            _append(store, beads, batch)
            batch = []
        progress("mapping", done, len(trajectory))
    os.replace(partial, out)
    return _finished(out, identity, info)


def _finished(out: Path, identity: Mapping[str, Any], info: Mapping[str, Any]) -> MappingReport:
    """Report of a store that holds this mapping."""
    held = LabeledStore.open(out).info
    found = held.pop("mapping", {})
    if held != info or {name: found.get(name) for name in identity} != identity:
        raise StoreError(
            f"{out} exists and holds something else than this mapping: choose another 'out'"
        )
    names = ("n_frames", "beads", "molecules", "net_force", "density")
    return MappingReport(out, **{name: found[name] for name in names})


def _resumed(partial: Path, beads: Beads, info: Mapping[str, Any]) -> LabeledStore:
    """Store of an interrupted run of the same mapping, or a new one in its place."""
    if partial.exists():
        store = LabeledStore.open(partial, "a")
        if store.info == info:
            return store
        shutil.rmtree(partial)
    partial.parent.mkdir(parents=True, exist_ok=True)
    return LabeledStore.create(partial, beads.species_table, info)


# -- the first pass -------------------------------------------------------------------------------


def _survey(
    trajectory: Trajectory, beads: Beads, settings: MappingSettings, progress: Progress
) -> tuple[dict[str, Any], sparse.csr_array]:
    """What is known of a mapping before it is done, and its force map (n_beads, N)."""
    table = beads.species_table
    species = np.array([table.index(name) for name in beads.names])
    counts = np.bincount(species)
    kinds = [] if settings.mapped else [MoleculeStatistics(kind) for kind in beads.molecules]
    squares, net, density = np.zeros(len(table)), np.zeros(2), 0.0
    for k, snapshot in enumerate(trajectory.snapshots()):
        _check_finite(snapshot)
        if not k:
            where = snapshot.frame_id
            if not settings.mapped:  # bonds between beads may have any length
                beads.check_bonds(snapshot.positions, snapshot.cell, snapshot.pbc, where)
            beads.whole(snapshot.positions, snapshot.cell, snapshot.pbc, where)
        for kind in kinds:
            kind.add(snapshot.positions, snapshot.forces, snapshot.cell, snapshot.pbc)
        forces = beads.sum_map @ snapshot.forces
        squares += np.bincount(species, (forces**2).sum(1))
        net += (snapshot.forces.sum(0) ** 2).sum(), (forces.sum(0) ** 2).sum()
        volume = abs(np.linalg.det(snapshot.cell)) if snapshot.pbc.all() else np.inf
        density += float(beads.masses.sum()) / volume * AMU_PER_A3_IN_G_PER_CM3
        progress("statistics", k + 1, len(trajectory))
    n = len(trajectory)
    molecules, rms, force_map = _force_maps(beads, kinds, settings)
    cut = {name for molecule in molecules if molecule["cut"] for name in molecule["beads"]}
    facts = {
        "beads": {
            entry.name: {
                "count": int(counts[s]),
                "mass": entry.mass,
                "rms_sum": None
                if entry.name in cut
                else float(np.sqrt(squares[s] / (3 * n * counts[s]))),
                "rms_optimal": rms.get(entry.name),
            }
            for s, entry in enumerate(table.entries)
        },
        "molecules": molecules,
        "net_force": dict(zip(("atoms", "beads"), np.sqrt(net / (3 * n)).tolist(), strict=True)),
        "density": density / n or None,
    }
    return facts, beads.sum_map if force_map is None else force_map


def _force_maps(
    beads: Beads, kinds: list[MoleculeStatistics], settings: MappingSettings
) -> tuple[list[dict[str, Any]], dict[str, float], sparse.csr_array | None]:
    """Facts about the kinds of molecules, rms of the optimal forces by bead, and the map asked for.

    Without a map the plain sum is asked for.
    """
    facts, squares, blocks = [], defaultdict[str, list[float]](list), []
    for statistics in kinds:
        kind = statistics.kind
        bonds = statistics.constrained(settings.constraint_tolerance)
        cut = cut_bonds(kind, bonds)
        if len(cut) and settings.force_map == "sum":
            i, j = kind.atoms[0, cut[0]]
            raise DataError(
                f"the distance of {beads.topology.atom(i)} and {beads.topology.atom(j)} is "
                f"constrained, and the mapping cuts it: a plain sum of forces is not the bead's "
                f"mean force then; put both atoms into one bead, or use force_map: optimal"
            )
        plain = kind.sum_map
        try:
            optimal = optimal_force_map(
                statistics.moments, kind.weights, bonds, plain, settings.ridge
            )
        except DataError as error:
            raise DataError(
                f"{kind.name}: {error}; put the atoms of constrained bonds into one bead"
            ) from None
        variance = np.einsum("bi,ij,bj->b", optimal, statistics.moments, optimal)
        for name, value in zip(kind.bead_names, variance.tolist(), strict=True):
            squares[name] += [value] * len(kind.atoms)
        rows = np.broadcast_to(kind.beads[:, :, None], (*kind.beads.shape, len(optimal[0])))
        columns = np.broadcast_to(kind.atoms[:, None, :], rows.shape)
        blocks.append([np.broadcast_to(optimal, rows.shape).ravel(), rows.ravel(), columns.ravel()])
        names = beads.topology.names[kind.atoms[0]]
        facts.append(
            {
                "name": kind.name,
                "count": len(kind.atoms),
                "atoms": names.tolist(),
                "beads": list(kind.bead_names),
                "members": kind.beads.tolist(),
                "bonds": kind.bead_bonds,
                "constrained": bonds.tolist(),
                "cut": len(cut),
                "samples": statistics.n_samples,
                "coefficients": optimal.tolist(),
            }
        )
    rms = {name: float(np.sqrt(np.mean(values))) for name, values in squares.items()}
    if not kinds or settings.force_map == "sum":
        return facts, rms, None
    values, rows, columns = (np.concatenate(part) for part in zip(*blocks, strict=True))
    shape = (len(beads.names), len(beads.topology))
    return facts, rms, sparse.csr_array((values, (rows, columns)), shape)


def _check_finite(snapshot: Snapshot) -> None:
    for name in ("positions", "forces", "cell"):
        if not np.isfinite(getattr(snapshot, name)).all():
            raise DataError(f"{snapshot.frame_id}: {name} hold NaN or infinite numbers")


# -- the second pass ------------------------------------------------------------------------------


def _mapped(snapshot: Snapshot, beads: Beads, force_map: sparse.csr_array) -> Snapshot:
    """Positions and forces of the beads in a frame."""
    whole = beads.whole(snapshot.positions, snapshot.cell, snapshot.pbc, snapshot.frame_id)
    return replace(snapshot, positions=beads.center_map @ whole, forces=force_map @ snapshot.forces)


def _append(store: LabeledStore, beads: Beads, frames: list[Snapshot]) -> None:
    """Add frames of beads to a store, in one commit."""
    table, n, n_beads = beads.species_table, len(frames), len(beads.names)
    species = torch.tensor([table.index(name) for name in beads.names])
    structures = Structures(
        positions=torch.from_numpy(np.concatenate([f.positions for f in frames])),
        species=species.repeat(n),
        system_index=torch.repeat_interleave(torch.arange(n), n_beads),
        cell=torch.from_numpy(np.stack([f.cell for f in frames])),
        pbc=torch.from_numpy(np.stack([f.pbc for f in frames])),
        species_table=table,
        frame_id=tuple(f.frame_id for f in frames),
    )
    forces = torch.from_numpy(np.concatenate([f.forces for f in frames]))
    store.append(structures, Properties({"forces": forces}))
