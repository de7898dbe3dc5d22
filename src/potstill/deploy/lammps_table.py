"""Pair potentials for LAMMPS' own `pair_style table`."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import torch

from potstill.errors import ModelError
from potstill.files import write_atomically
from potstill.lammps_library import LammpsPotential
from potstill.models import PairPotential, Potential, summands

#: Rows per interval of the spline, and points of LAMMPS' own tables, evenly spaced in r².
_ROWS, _POINTS = 20, 20000


def write_lammps_table(
    potential: Potential, folder: Path, stem: str, info: Mapping[str, Any]
) -> list[Path]:
    """Write `.table`, with a section per pair of species, and `.in`, the commands that use it.

    Parameters
    ----------
    potential : Potential
        A pair potential.
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
    parts = list(summands(potential))
    if len(parts) != 1 or not isinstance(parts[0], PairPotential):
        kinds = ", ".join(part.kind for part in parts)
        raise ModelError(f"LAMMPS' pair style table runs pair potentials alone, not {kinds}")
    pair = deepcopy(parts[0]).double()
    n = _ROWS * pair.n_knots
    r = torch.arange(1, n, dtype=torch.float64) * (pair.spacing / _ROWS)
    energies, forces = pair.table(r)
    lines = ["# pair potentials of potstill: r (Å), energy (eV), force (eV/Å)"]
    for name, *columns in zip(pair.pairs, energies.tolist(), forces.tolist(), strict=True):
        # The last row is the cutoff, where both are zero.
        rows = [*zip(r.tolist(), *columns, strict=True), (pair.cutoff, 0.0, 0.0)]
        lines += ["", name, f"N {n} R {rows[0][0]!r} {pair.cutoff!r}", ""]
        lines += [f"{k} {x:.12g} {e:.14g} {f:.14g}" for k, (x, e, f) in enumerate(rows, 1)]
    table, own = pair.species_table, lammps_table(pair, f"{stem}.table")
    commands = [
        "# pair potentials of potstill",
        f"# types: {', '.join(f'{k} {name}' for k, name in enumerate(table.names, 1))}",
        "units metal",
        *own.commands,
        *[f"mass {k} {entry.mass!r}" for k, entry in enumerate(table.entries, 1)],
    ]
    files = [folder / f"{stem}.table", folder / f"{stem}.in"]
    for file, text in zip(files, (lines, commands), strict=True):
        write_atomically(file, "\n".join(text) + "\n")
    return files


def lammps_table(pair: PairPotential, file: str | Path) -> LammpsPotential:
    """What tells LAMMPS to use the file that was written of a pair potential."""
    types = range(1, len(pair.species_table) + 1)
    both = zip(combinations_with_replacement(types, 2), pair.pairs, strict=True)
    return LammpsPotential(
        pair_style=f"table spline {_POINTS}",
        pair_coeff=tuple(f'{i} {j} "{file}" {name}' for (i, j), name in both),
        elements=tuple(pair.species_table.names),
    )
