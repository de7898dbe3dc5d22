"""What the atoms of a trajectory are called, which residue they are in, and what bonds them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from ase.data import atomic_masses, atomic_numbers

from potstill.coarse.settings import Residue, Selection
from potstill.errors import ConfigError, DataError, require, suggest

_PURPOSE = "to read trajectories and topologies of GROMACS, LAMMPS and others"


@dataclass(frozen=True)
class Topology:
    """Names, residues, masses and bonds of N atoms.

    Parameters
    ----------
    where : str
        The file, or other origin, for messages.
    names : ndarray
        (N,) names of the atoms.
    residues : ndarray
        (N,) int64, which residue an atom is in, counted from 0.
    residue_names : ndarray
        One name per residue.
    masses : ndarray
        (N,) amu; NaN where it is unknown.
    bonds : ndarray
        (n_bonds, 2) int64; none if the file has none.
    source : optional
        The universe of MDAnalysis that this was read from.
    """

    where: str
    names: np.ndarray
    residues: np.ndarray
    residue_names: np.ndarray
    masses: np.ndarray
    bonds: np.ndarray
    source: Any = None

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def universe(self) -> Any:
        """A universe of MDAnalysis, for its selections."""
        if self.source is not None:
            return self.source
        package = import_mdanalysis()
        universe = package.Universe.empty(
            len(self), len(self.residue_names), atom_resindex=self.residues
        )
        universe.add_TopologyAttr("names", list(self.names))
        universe.add_TopologyAttr("types", list(self.names))
        universe.add_TopologyAttr("resnames", list(self.residue_names))
        universe.add_TopologyAttr("masses", self.masses)
        return universe

    def atom(self, index: int) -> str:
        """An atom for messages: `CA of residue CHOL 3 (atom 51)`, counted from 0."""
        residue = int(self.residues[index])
        name = f"{self.residue_names[residue]} {residue}".strip()
        return f"{self.names[index]} of residue {name} (atom {index})"

    def with_masses(self, masses: Mapping[str, float]) -> Topology:
        """The same, with masses (amu) by names of atoms where they are given.

        Raises
        ------
        ConfigError
            If there is no atom of a name.
        """
        own = self.masses.copy()
        for name, mass in masses.items():
            named = self.names == name
            if not named.any():
                raise ConfigError(
                    f"masses: no atom is called '{name}'{suggest(name, set(self.names))}"
                )
            own[named] = mass
        return replace(self, masses=own)

    def select(self, selection: Selection, what: str) -> np.ndarray:
        """(N,) bool: the atoms that a selection means; `what` it is for is told in messages.

        Raises
        ------
        ConfigError
            If a name is unknown, or nothing is selected.
        """
        chosen = np.ones(len(self), dtype=bool)
        if selection.residue is not None:
            there = self.residue_names == selection.residue
            if not there.any():
                known = set(self.residue_names.tolist())
                raise ConfigError(
                    f"{what}: no residue is called '{selection.residue}'"
                    f"{suggest(selection.residue, known)}"
                )
            chosen = there[self.residues]
        if selection.atoms is not None:
            in_residues, chosen = chosen, chosen & np.isin(self.names, selection.atoms)
            wanted = np.unique(self.residues[in_residues])
            for name in selection.atoms:
                without = np.setdiff1d(wanted, self.residues[in_residues & (self.names == name)])
                if len(without) == len(wanted) or (selection.residue and len(without)):
                    known = set(self.names[in_residues].tolist())
                    label = f"{self.residue_names[without[0]]} {without[0]}".strip()
                    raise ConfigError(
                        f"{what}: residue {label} has no atom called '{name}'{suggest(name, known)}"
                    )
        if selection.select is not None:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    found = self.universe.select_atoms(selection.select).indices
            except Exception as error:  # its parser raises errors of many kinds
                raise ConfigError(
                    f"{what}: '{selection.select}' is not a selection of MDAnalysis ({error})"
                ) from error
            mask = np.zeros(len(self), dtype=bool)
            mask[found] = True
            chosen = chosen & mask
        if not chosen.any():
            raise ConfigError(f"{what} selects no atoms")
        return chosen


def import_mdanalysis() -> Any:
    """Return the package MDAnalysis, or say which extra brings it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return require("MDAnalysis", extra="coarse", purpose=_PURPOSE)


def read_topology(path: str) -> Topology:
    """Read a topology that MDAnalysis knows: TPR, GRO, PDB, PSF, data of LAMMPS and others.

    Where a file has no names of atoms, as LAMMPS' data, their types are the names. Masses that it
    does not hold are those of its elements, but not guessed from names: `CS` may be a carbon.

    Raises
    ------
    DataError
        If it cannot be read.
    OptionalDependencyError
        If MDAnalysis is not installed.
    """
    package = import_mdanalysis()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            universe = package.Universe(path, to_guess=())
    except Exception as error:  # its parsers raise whatever they meet
        message = " ".join(str(error).split())
        raise DataError(f"{path} cannot be read by MDAnalysis as a topology: {message}") from error
    atoms = universe.atoms
    masses = np.full(len(atoms), np.nan)
    if hasattr(atoms, "masses"):
        masses = np.array(atoms.masses, dtype=np.float64)
    elif hasattr(atoms, "elements"):
        numbers = [atomic_numbers.get(str(e).capitalize(), 0) for e in atoms.elements]
        masses = np.where(np.array(numbers) > 0, atomic_masses[numbers], np.nan)
    bonds = atoms.bonds.indices if hasattr(atoms, "bonds") else np.zeros((0, 2))
    names = atoms.names if hasattr(atoms, "names") else atoms.types
    residues = atoms.residues
    residue_names = residues.resnames if hasattr(residues, "resnames") else [""] * len(residues)
    return Topology(
        where=path,
        names=np.array([str(name) for name in names]),
        residues=atoms.resindices.astype(np.int64),
        residue_names=np.array([str(name) for name in residue_names]),
        masses=np.where(masses > 0, masses, np.nan),
        bonds=np.asarray(bonds, dtype=np.int64).reshape(-1, 2),
        source=universe,
    )


def topology_of(
    residues: Sequence[Residue], where: str, masses: np.ndarray | None = None
) -> Topology:
    """Topology without bonds from residues in the order of the trajectory.

    `masses`, (N,) in amu, are those of the trajectory if it has any.
    """
    blocks = [block for block in residues for _ in range(block.count)]
    names = np.array([name for block in blocks for name in block.atoms])
    unknown = masses is None or len(masses) != len(names)
    return Topology(
        where=where,
        names=names,
        residues=np.repeat(np.arange(len(blocks)), [len(block.atoms) for block in blocks]),
        residue_names=np.array([block.name for block in blocks]),
        masses=np.full(len(names), np.nan) if unknown else np.asarray(masses),
        bonds=np.zeros((0, 2), dtype=np.int64),
    )
