"""SNAP, with or without ZBL, for LAMMPS' own pair styles."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from potstill.errors import ModelError
from potstill.files import write_atomically
from potstill.models import SNAP, ZBL, Potential, SpeciesOffsets, SumPotential


def write_lammps_snap(
    potential: Potential, folder: Path, stem: str, info: Mapping[str, Any]
) -> list[Path]:
    """Write `.snapcoeff`, `.snapparam` and `.in`, the commands that use them.

    Per-species offsets become part of the constant coefficients, so that total energies are those
    of potstill.

    Parameters
    ----------
    potential : Potential
        A SNAP, or a sum of one with offsets and a ZBL prior that is switched as LAMMPS does it.
    folder : Path
        Where to.
    stem : str
        The files' names without endings.
    info : mapping
        Not written: these files have no place for it.

    Raises
    ------
    ModelError
        If it is anything else.
    """
    parts = dict(potential.components) if isinstance(potential, SumPotential) else {"": potential}
    by_kind = {type(part): part for part in parts.values()}
    snap, prior, offsets = by_kind.get(SNAP), by_kind.get(ZBL), by_kind.get(SpeciesOffsets)
    if snap is None or len(by_kind) != len(parts) or set(by_kind) - {SNAP, ZBL, SpeciesOffsets}:
        kinds = ", ".join(part.kind for part in parts.values())
        raise ModelError(f"LAMMPS' pair style snap runs SNAP, offsets and ZBL, not {kinds}")
    assert isinstance(snap, SNAP)
    assert prior is None or isinstance(prior, ZBL)
    commands = _commands(snap, prior, stem)  # may refuse: before anything is written
    files = [folder / f"{stem}{suffix}" for suffix in (".snapcoeff", ".snapparam", ".in")]
    _with_offsets(snap, offsets).to_lammps(files[0], files[1])
    write_atomically(files[2], commands)
    return files


def _with_offsets(snap: SNAP, offsets: Potential | None) -> SNAP:
    if offsets is None:
        return snap
    assert isinstance(offsets, SpeciesOffsets)
    whole = deepcopy(snap).double()
    with torch.no_grad():
        whole.coefficients[:, 0] += offsets.offsets.double()
    return whole


def _commands(snap: SNAP, prior: ZBL | None, stem: str) -> str:
    names = snap.species_table.names
    own = f"{stem}.snapcoeff {stem}.snapparam {' '.join(names)}"
    lines = ["pair_style snap", f"pair_coeff * * {own}"]
    if prior is not None:
        if prior.switching != "lammps":
            raise ModelError("LAMMPS' ZBL is switched differently: fit with the prior's 'lammps'")
        z = snap.species_table.atomic_numbers.tolist()
        lines = [
            f"pair_style hybrid/overlay zbl {prior.inner!r} {prior.cutoff!r} snap",
            f"pair_coeff * * snap {own}",
        ] + [
            f"pair_coeff {i + 1} {j + 1} zbl {z[i]} {z[j]}"
            for i in range(len(z))
            for j in range(i, len(z))
        ]
    types = ", ".join(f"{k} {name}" for k, name in enumerate(names, 1))
    head = ["# SNAP potential of potstill", f"# types: {types}", "units metal"]
    return "\n".join([*head, *lines]) + "\n"
