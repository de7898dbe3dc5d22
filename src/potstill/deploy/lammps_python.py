"""What LAMMPS' pair style potstill/python calls: a checkpoint's energies and forces in one domain.

The plugin (`pair_potstill_python.cpp`) fills structures of C in place, so that it needs of Python
little more than that it runs: `connect` gives it functions that look like C's.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from potstill.checkpoint import load_potential
from potstill.errors import ModelError
from potstill.features import pairs_within
from potstill.models import Edges, Potential
from potstill.models.engines import TorchEngine
from potstill.models.graph import forces_from_pairs
from potstill.neighbors import build_neighbor_list
from potstill.structures import NeighborList, Structures


class Model(ctypes.Structure):
    """A checkpoint that is opened: what LAMMPS says, its number, and what LAMMPS must know.

    `precision` is 0 for float32, 1 for float64, -1 for the checkpoint's. An `error` that is not
    empty ends the run.
    """

    _fields_ = (
        ("n_ranks", ctypes.c_int64),
        ("n_threads", ctypes.c_int64),
        ("precision", ctypes.c_int64),
        ("number", ctypes.c_int64),
        ("cutoff", ctypes.c_double),
        ("reach", ctypes.c_double),
        ("species", ctypes.c_char * 4096),
        ("error", ctypes.c_char * 2048),
    )


class Step(ctypes.Structure):
    """The atoms of a domain, own ones first, then ghosts; and places for the results.

    `fresh` says that LAMMPS has just made its neighbor lists: only then do atoms change places, and
    a list that reaches `skin` (Å) farther than the potential lasts until then.
    Rows of `cell` are lattice vectors, Å. A species is -1 where another style serves the atom.
    Results: `energies` (n_local), `forces` (n_all, 3), `virial` (3, 3), and if `by_atom` is set
    `virials` (n_all, 3, 3) with each pair's at both of its atoms; eV and Å.
    """

    _fields_ = (
        ("number", ctypes.c_int64),
        ("n_local", ctypes.c_int64),
        ("n_all", ctypes.c_int64),
        ("fresh", ctypes.c_int64),
        ("by_atom", ctypes.c_int64),
        ("periodic", ctypes.c_int64 * 3),
        ("skin", ctypes.c_double),
        ("cell", ctypes.c_double * 9),
        ("virial", ctypes.c_double * 9),
        ("species", ctypes.POINTER(ctypes.c_int32)),
        ("positions", ctypes.POINTER(ctypes.c_double)),
        ("energies", ctypes.POINTER(ctypes.c_double)),
        ("forces", ctypes.POINTER(ctypes.c_double)),
        ("virials", ctypes.POINTER(ctypes.c_double)),
        ("error", ctypes.c_char * 2048),
    )


class Functions(ctypes.Structure):
    """The functions that LAMMPS calls."""

    _fields_ = (
        ("open", ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.POINTER(Model))),
        ("step", ctypes.CFUNCTYPE(None, ctypes.POINTER(Step))),
        ("close", ctypes.CFUNCTYPE(None, ctypes.c_int64)),
    )


class Domain:
    """A potential and the part of a system that one MPI rank has.

    A single rank has a periodic system. Of several, each has its own atoms and ghosts, with images
    among them: the energies of the own atoms are summed, and their derivatives act on ghosts, too.

    Parameters
    ----------
    potential : Potential
        With forces that are derived from its energy.
    n_ranks : int
        How many ranks share the system.
    """

    def __init__(self, potential: Potential, n_ranks: int) -> None:
        self.potential = potential
        self.n_ranks = n_ranks
        self._engine = TorchEngine(potential)
        self._list: NeighborList | None = None
        self._sizes = (0, 0)

    def evaluate(
        self, structures: Structures, n_own: int, skin: float, *, fresh: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Energies and their derivatives.

        Parameters
        ----------
        structures : Structures
            The system, or a domain's own atoms and ghosts without periodicity.
        n_own : int
            Number of own atoms.
        skin : float
            How much farther than the potential a list must reach to last, Å.
        fresh : bool
            Whether a new one is due.

        Returns
        -------
        energies : Tensor
            (n_own,) eV.
        forces : Tensor
            (N, 3) eV/Å.
        centers, neighbors : Tensor
            (N, 3, 3) eV, of r_ij outer dE/dr_ij what belongs to the centers of pairs, and to their
            neighbors: the same numbers twice.
        """
        n_atoms = structures.n_atoms
        sizes = (n_own, n_atoms)
        sees_neighbors_only = self.potential.reach <= self.potential.cutoff
        if self._list is None or fresh or sizes != self._sizes:
            self._sizes = sizes
            self._list = build_neighbor_list(structures, self.potential.cutoff + skin)
            if sees_neighbors_only:  # ghosts' own neighbors do not matter
                self._list = _with_centers(self._list, n_own)
        pairs, _ = pairs_within(structures, self._list, self.potential.cutoff)
        n_local = n_own if sees_neighbors_only else n_atoms
        terms, r_ij, gradient = self._engine.by_pairs(structures, pairs, n_local, n_own)
        forces = forces_from_pairs(gradient, Edges(pairs.center, pairs.neighbor), n_atoms)
        outer = r_ij.unsqueeze(2) * gradient.unsqueeze(1)
        centers, neighbors = (
            outer.new_zeros(n_atoms, 3, 3).index_add(0, atom, outer)
            for atom in (pairs.center, pairs.neighbor)
        )
        return terms.sum(dim=1), forces, centers, neighbors


def _with_centers(pairs: NeighborList, n: int) -> NeighborList:
    """The pairs of the first atoms."""
    end = int(torch.searchsorted(pairs.center, n))
    return NeighborList(
        pairs.center[:end],
        pairs.neighbor[:end],
        pairs.shifts[:end],
        torch.tensor([end]),
        pairs.cutoff,
    )


_numbers = itertools.count()
_domains: dict[int, Domain] = {}


def _telling(function: Callable[..., None]) -> Callable[..., None]:
    """Write what is raised into the structure that comes last: it cannot pass through C."""

    @functools.wraps(function)
    def told(*arguments: Any) -> None:
        place = arguments[-1].contents
        try:
            function(*arguments[:-1], place)
        except Exception as error:
            place.error = f"{error or type(error).__name__}".encode()[:2047]

    return told


def _open(path: bytes, model: Model) -> None:
    torch.set_num_threads(max(1, model.n_threads))
    potential, _ = load_potential(path.decode())
    if potential.direct_forces:
        raise ModelError("its forces are not the derivative of an energy")
    if model.precision >= 0:
        potential = potential.double() if model.precision else potential.float()
    model.cutoff, model.reach = potential.cutoff, potential.reach
    model.species = " ".join(potential.species_table.names).encode()
    model.number = next(_numbers)
    _domains[model.number] = Domain(potential, model.n_ranks)


def _step(step: Step) -> None:
    domain = _domains[step.number]
    whole = domain.n_ranks == 1
    n = step.n_local if whole else step.n_all
    species = np.ctypeslib.as_array(step.species, (n,))
    kept = np.flatnonzero(species >= 0)  # all but those of other styles
    n_own = int(np.searchsorted(kept, step.n_local))
    cell = torch.tensor(step.cell, dtype=torch.float64).view(1, 3, 3)
    structures = Structures(
        positions=torch.from_numpy(np.ctypeslib.as_array(step.positions, (n, 3))[kept]),
        species=torch.from_numpy(species[kept].astype(np.int64)),
        system_index=torch.zeros(len(kept), dtype=torch.int64),
        cell=cell,
        pbc=torch.tensor([[whole and bool(p) for p in step.periodic]]),
        species_table=domain.potential.species_table,
    )
    found = domain.evaluate(structures, n_own, step.skin, fresh=bool(step.fresh))
    energies, forces, centers, neighbors = (values.numpy() for values in found)
    places = [
        (step.energies, (step.n_local,), energies, kept[:n_own]),
        (step.forces, (step.n_all, 3), forces, kept),
    ]
    if step.by_atom:
        places.append((step.virials, (step.n_all, 3, 3), centers + neighbors, kept))
    for place, shape, values, rows in places:
        array = np.ctypeslib.as_array(place, shape)
        array[:] = 0.0
        array[rows] = values
    step.virial[:] = centers.sum(axis=0).ravel()


def _close(number: int) -> None:
    _domains.pop(number, None)


def connect(address: int, size: int) -> None:
    """Give LAMMPS' plugin its functions.

    Parameters
    ----------
    address : int
        Of `Functions` in C.
    size : int
        Bytes of `Model` and `Step` there.

    Raises
    ------
    ModelError
        If the plugin is another version's.
    """
    if size != ctypes.sizeof(Model) + ctypes.sizeof(Step):
        raise ModelError("the plugin was built by another potstill: run `potstill lammps build`")
    functions = Functions.from_address(address)
    kinds = dict(Functions._fields_)
    for name, function in (("open", _telling(_open)), ("step", _telling(_step)), ("close", _close)):
        called = kinds[name](function)
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(called))  # LAMMPS may outlive this module
        setattr(functions, name, called)
