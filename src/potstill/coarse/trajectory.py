"""Trajectories with forces, frame by frame, in Å and eV/Å."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import chemical_symbols

from potstill.coarse.settings import Residue
from potstill.coarse.topology import Topology, import_mdanalysis, read_topology, topology_of
from potstill.errors import ConfigError, DataError, MissingLabelError
from potstill.readers import FORMATS, KeyMap, Units, as_slice, count_extxyz, read, read_frames
from potstill.readers.base import frame_cells, pick_label
from potstill.readers.npz import open_archive, units_of
from potstill.species import SpeciesTable
from potstill.structures import Properties, Structures

_OWN = {".xyz": "extxyz", ".extxyz": "extxyz", ".npz": "npz"}
_PACKED = (".gz", ".bz2", ".xz")


@dataclass(frozen=True)
class TrajectoryFile:
    """One file of a trajectory; key map, units and index as in `potstill.readers.read`.

    `format` is one of `potstill.readers.FORMATS`, or else a format of MDAnalysis; told from the
    name if absent.
    """

    path: str
    format: str | None = None
    keys: KeyMap = field(default_factory=KeyMap)
    units: Units = field(default_factory=Units)
    index: str = ":"


@dataclass(frozen=True)
class Snapshot:
    """One frame: positions and forces (N, 3) in Å and eV/Å, cell (3, 3) in Å, pbc (3,)."""

    frame_id: str
    positions: np.ndarray
    forces: np.ndarray
    cell: np.ndarray
    pbc: np.ndarray


@dataclass(frozen=True)
class Part:
    """Frames of one file: `read` gives those from a number on, counted among those chosen.

    `names` and `masses` (amu) are what the file itself tells of its atoms.
    """

    where: str
    n_frames: int
    n_atoms: int
    read: Callable[[int], Iterator[Snapshot]]
    names: tuple[str, ...] | None = None
    masses: np.ndarray | None = None


@dataclass(frozen=True)
class Trajectory:
    """Frames of all files one after another, and what their atoms are."""

    topology: Topology
    parts: tuple[Part, ...]

    def __len__(self) -> int:
        return sum(part.n_frames for part in self.parts)

    def snapshots(self, start: int = 0) -> Iterator[Snapshot]:
        """Frames from `start` on; only one at a time is in memory if the format allows it."""
        for part in self.parts:
            if start < part.n_frames:
                yield from part.read(start)
            start = max(start - part.n_frames, 0)


def open_trajectory(
    files: Sequence[TrajectoryFile],
    *,
    topology: str | None = None,
    residues: Sequence[Residue] = (),
    masses: Mapping[str, float] | None = None,
) -> Trajectory:
    """Open a trajectory that is to be mapped.

    Files in a format of MDAnalysis, extended XYZ and NumPy archives are read frame by frame; what
    else potstill reads is held in memory.

    Parameters
    ----------
    topology : str, optional
        A file that MDAnalysis reads.
    residues : sequence of Residue
        Names of the atoms instead. With neither, the names are the file's own chemical symbols or
        names of beads, in one residue.
    masses : mapping, optional
        amu, by names of atoms, where the files do not tell them or others are wanted.

    Raises
    ------
    DataError
        If a file cannot be read or does not fit the topology.
    MissingLabelError
        If there are no forces.
    ConfigError
        If a unit is not known, or nothing tells what the atoms are.
    OptionalDependencyError
        If MDAnalysis is needed and not installed.
    """
    if topology is not None and residues:
        raise ConfigError("give either 'topology' or 'residues'")
    known = None if topology is None else read_topology(topology)
    parts = tuple(_open(file, None if known is None else len(known)) for file in files)
    first = parts[0]
    if known is None:
        if not residues:
            if first.names is None:
                raise ConfigError(
                    f"{first.where} does not tell what its atoms are called: give a 'topology' or "
                    f"'residues'"
                )
            residues = [Residue(name="", atoms=first.names)]
        known = topology_of(residues, "residues", first.masses)
    for part in parts:
        if part.n_atoms != len(known):
            raise DataError(
                f"{part.where} has {part.n_atoms} atoms and {known.where} has {len(known)}: "
                f"they do not belong together"
            )
    return Trajectory(known.with_masses(masses or {}), parts)


def _open(file: TrajectoryFile, n_atoms: int | None) -> Part:
    path = Path(file.path)
    if not path.exists():
        raise DataError(f"{path} does not exist")
    suffixes = [s.lower() for s in path.suffixes if s.lower() not in _PACKED]
    name = file.format or _OWN.get(suffixes[-1] if suffixes else "", "")
    chosen = as_slice(file.index)
    if name == "npz":
        part = _archive(path, file, chosen)
    elif name in FORMATS:
        part = _labeled(path, file, name)
    else:
        part = _streamed(path, file, chosen, n_atoms)
    if not part.n_frames:
        raise DataError(f"{path} has no frames at the index '{file.index}'")
    return part


def _streamed(path: Path, file: TrajectoryFile, chosen: slice, n_atoms: int | None) -> Part:
    """Frames by a reader of MDAnalysis."""
    package = import_mdanalysis()
    options: dict[str, Any] = {"format": file.format} if file.format else {}
    options |= {"n_atoms": n_atoms} if n_atoms else {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reader = package.coordinates.core.reader(str(path), **options)
            frames = range(reader.n_frames)[chosen]
            n_found = reader.n_atoms
    except Exception as error:  # its readers raise whatever they meet
        message = " ".join(str(error).split())
        raise DataError(f"{path} cannot be read by MDAnalysis: {message}") from error
    # MDAnalysis converts what it knows the units of: to Å and kJ/(mol Å).
    converted = (getattr(reader, "units", None) or {}).get("force") is not None
    own = Units("kJ/mol", "Angstrom", "kJ/mol/Angstrom", "eV/A^3", "tension")
    unstated = Units(None, "Angstrom", None, "eV/A^3", "tension")
    factors: dict[str, float] = {}

    def snapshot(k: int) -> Snapshot:
        where = f"{path}, frame {frames[k]}"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                step = reader[frames[k]]
        except Exception as error:
            raise DataError(f"{where} cannot be read: {error}") from error
        if not (step.has_positions and step.has_forces):
            lacking = "forces" if step.has_positions else "positions"
            raise MissingLabelError(
                f"{where} has no {lacking}, which mapping needs: write positions and forces at the "
                f"same steps (GROMACS: nstxout = nstfout; LAMMPS: dump ... x y z fx fy fz), or "
                f"choose frames that have both by 'index'"
            )
        if not factors:
            factors.update(file.units.over(own if converted else unstated).factors())
        cell = step.triclinic_dimensions
        periodic = cell is not None and bool(np.abs(np.linalg.det(cell)) > 0)
        return Snapshot(
            f"{path.name}:{frames[k]}",
            step.positions.astype(np.float64) * factors["length"],
            step.forces.astype(np.float64) * factors["forces"],
            cell.astype(np.float64) * factors["length"] if periodic else np.zeros((3, 3)),
            np.full(3, periodic),
        )

    return Part(
        str(path), len(frames), n_found, lambda start: map(snapshot, range(start, len(frames)))
    )


def _labeled(path: Path, file: TrajectoryFile, name: str) -> Part:
    """Frames by a reader of potstill, of extended XYZ one at a time."""
    options: dict[str, Any] = {"require": ("forces",), "min_distance": 0.0}
    options |= {"keys": file.keys, "units": file.units}
    if name == "extxyz":
        chosen = range(count_extxyz(path))[as_slice(file.index)]

        def pieces(start: int) -> Iterator[tuple[Structures, Properties]]:
            return read_frames(path, chosen=chosen[start:], **options)
    else:
        structures, labels = read(path, format=name, index=file.index, **options)
        chosen = range(len(structures))

        def pieces(start: int) -> Iterator[tuple[Structures, Properties]]:
            every = (structures.rows([k]) for k in chosen[start:])
            return ((structures.select(rows), labels.select(rows)) for rows in every)

    first = next(pieces(0), None)
    if first is None:
        return Part(str(path), 0, 0, lambda start: iter(()))
    names = _names(first[0])

    def snapshots(start: int) -> Iterator[Snapshot]:
        for frame, labels in pieces(start):
            if _names(frame) != names:
                raise DataError(
                    f"{path}: {frame.name_of(0)} does not hold the same atoms in the same order as "
                    f"the first frame"
                )
            arrays = (frame.positions, labels["forces"], frame.cell[0], frame.pbc[0])
            yield Snapshot(frame.name_of(0), *(array.numpy() for array in arrays))

    masses = first[0].masses.numpy()
    return Part(str(path), len(chosen), len(names), snapshots, names, masses)


def _names(frame: Structures) -> tuple[str, ...]:
    """Names of the atoms of one frame."""
    return tuple(frame.species_table.names[s] for s in frame.species.tolist())


def _archive(path: Path, file: TrajectoryFile, chosen: slice) -> Part:
    """Frames of a NumPy archive of atoms or beads: nothing must tell their atomic numbers."""
    held, where = open_archive(path), str(path)
    positions = pick_label(held, "positions", file.keys, ("coords", "R"), where)
    if positions is None:
        wanted = file.keys.positions or "coords' or 'R"
        raise DataError(f"{where} has no '{wanted}'; it holds {', '.join(held) or 'nothing'}")
    forces = pick_label(held, "forces", file.keys, ("forces", "F"), where)
    if forces is None:
        raise MissingLabelError(f"{where} has no forces; it holds {', '.join(held)}")
    if len(positions.shape) != 3 or positions.shape[2] != 3 or forces.shape != positions.shape:
        raise DataError(
            f"{where}: positions and forces have shapes {positions.shape} and {forces.shape}, not "
            f"both (frames, atoms, 3)"
        )
    factors = file.units.over(units_of(held, file.keys)).factors()
    n_frames, n_atoms, _ = positions.shape
    frames = range(n_frames)[chosen]
    usual = file.keys.cell or ("cell" if "cell" in held else "lattice")
    cells, pbc = frame_cells(held, usual, file.keys, n_frames, where)
    names, masses = None, None
    numbers = pick_label(held, "species", file.keys, ("nuclear_charges", "z", "beads"), where)
    if numbers is not None and numbers.shape == (n_atoms,):
        numbers = numbers[()]
        if np.issubdtype(numbers.dtype, np.integer):
            names = tuple(chemical_symbols[z] for z in numbers.tolist())
            table = SpeciesTable.from_symbols(names)
            masses = table.masses.numpy()[[table.index(name) for name in names]]
        else:
            names = tuple(str(name) for name in numbers.tolist())

    def snapshots(start: int) -> Iterator[Snapshot]:
        rows = (array.rows(frames[start:]) for array in (positions, forces))
        for k, x, f in zip(frames[start:], *rows, strict=True):
            yield Snapshot(
                f"{path.name}:{k}",
                x.astype(np.float64) * factors["length"],
                f.astype(np.float64) * factors["forces"],
                cells[k] * factors["length"],
                pbc[k],
            )

    return Part(where, len(frames), n_atoms, snapshots, names, masses)
