"""Pair potentials: a cubic spline of the distance for each pair of species."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations_with_replacement
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from potstill.errors import ModelError, suggest
from potstill.models.base import Edges, LocalOutput, Potential
from potstill.models.engines import FirstOrder, Pairs, spelled_out
from potstill.models.graph import forces_from_pairs, virial_from_pairs
from potstill.models.hyper import Hyperparameters
from potstill.neighbors import build_neighbor_list, pair_vectors
from potstill.species import SpeciesTable
from potstill.structures import Structures

# Continued inward, a repulsion grows by a factor e within 0.15 to 1 Å, with at least the first and
# at most the second force, eV/Å: dynamics meets a wall there, and no force it could not integrate.
_DECAY = (0.15, 1.0)
_LEAST, _MOST = 0.1, 20.0


class PairHyperparameters(Hyperparameters):
    """Hyper-parameters of the pair potential.

    Parameters
    ----------
    cutoff : float
        Å.
    spacing : float
        Distance of the spline's knots, Å; made a little smaller if the cutoff is no multiple of it.
    """

    cutoff: float = Field(default=12.0, gt=0)
    spacing: float = Field(default=0.2, gt=0)


class PairPotential(Potential):
    """The sum over pairs of `u_ab(r)`, a cubic B-spline for each pair of species.

    `u_ab(r) = Σ_k c_k B(r / h - k + 1)`, k = 0 ... n - 1, with the cardinal cubic B-spline B and
    knots every `h` from 0 to the cutoff `n h`. Value, slope and curvature vanish at the cutoff, as
    the next three coefficients would be those of zero. Half of each pair's energy goes to each
    atom. Energies and forces are linear in the coefficients.

    Parameters
    ----------
    species_table : SpeciesTable
        Atoms or beads.
    *values, **named
        Fields of `PairHyperparameters`, in their order or by name.

    Notes
    -----
    `coefficients` is one parameter, (n_pairs, n) in eV, with a row for each of `pairs`. They start
    at zero. Distances that no data have seen need `continue_inward`.
    """

    kind = "pair"
    traceable = True
    exact_buffers = ("pair_index",)
    pair_index: Tensor

    hyper_class = PairHyperparameters
    hyper: PairHyperparameters

    def __init__(self, species_table: SpeciesTable, *values: Any, **named: Any) -> None:
        p = PairHyperparameters.of(*values, **named)
        self.n_knots = math.ceil(p.cutoff / p.spacing - 1e-9)
        if self.n_knots < 4:
            raise ModelError("a pair potential needs at least four knots below its cutoff")
        super().__init__(species_table, p.cutoff, p)
        self.spacing = p.cutoff / self.n_knots
        n = len(species_table)
        index = torch.zeros(n, n, dtype=torch.int64)
        a, b = torch.triu_indices(n, n)
        index[a, b] = index[b, a] = torch.arange(len(a))
        self.register_buffer("pair_index", index, persistent=False)
        self.coefficients = nn.Parameter(torch.zeros(len(a), self.n_knots))

    @property
    def kinds(self) -> tuple[tuple[str, str], ...]:
        """The pairs of species in the order of the coefficients' rows."""
        return tuple(combinations_with_replacement(self.species_table.names, 2))

    @property
    def pairs(self) -> tuple[str, ...]:
        """Their names, "A-B"."""
        return tuple(map("-".join, self.kinds))

    @property
    def reach(self) -> float:
        """The cutoff."""
        return self.cutoff

    def forward(
        self, species: Tensor, edges: Edges, r_ij: Tensor, n_local: int, taps: Sequence[str] = ()
    ) -> LocalOutput:
        """(n_local,) half of the energies of all pairs of an atom."""
        r_ij = r_ij.to(self.dtype)
        close = (r_ij.detach().square().sum(1) < self.cutoff**2).nonzero()[:, 0]
        center, neighbor = edges.center.take(close), edges.neighbor.take(close)
        r = torch.linalg.vector_norm(r_ij.index_select(0, close), dim=1)
        interval, weight = self.basis(r)
        row = self.pair_rows(species, center, neighbor) * self.n_knots + interval
        # Rows are looked up much faster than single coefficients.
        windows = self._windows.flatten(0, 1).index_select(0, row)
        pair = 0.5 * (windows * weight).sum(dim=1)
        return LocalOutput(pair.new_zeros(n_local).index_add(0, center, pair))

    @torch.no_grad()
    def evaluate(self, structures: Structures, neighbors: Pairs) -> FirstOrder:
        """Energies and first derivatives, these from the spline's slope: faster than a graph."""
        pairs = spelled_out(neighbors)
        r_ij = pair_vectors(structures, pairs)
        r = torch.linalg.vector_norm(r_ij, dim=1)
        close = (r < self.cutoff).nonzero()[:, 0]
        edges = Edges(pairs.center.take(close), pairs.neighbor.take(close))
        r, r_ij = r.take(close), r_ij.index_select(0, close)
        rows = self.pair_rows(structures.species, edges.center, edges.neighbor) * self.n_knots
        half = []  # of energies and slopes
        for derivative in (False, True):
            interval, weight = self.basis(r.to(self.dtype), derivative)
            windows = self._windows.flatten(0, 1).index_select(0, rows + interval)
            half.append(0.5 * (windows * weight).sum(dim=1).double())
        n = structures.n_atoms
        gradient = r_ij * (half[1] / r)[:, None]
        return FirstOrder(
            edges.sum_to_centers(half[0], n)[:, None],
            forces_from_pairs(gradient, edges, n),
            virial_from_pairs(gradient, r_ij, edges, structures),
        )

    def pair_rows(self, species: Tensor, center: Tensor, neighbor: Tensor) -> Tensor:
        """(E,) int64 rows of the coefficients of pairs of atoms."""
        flat = species.take(center) * len(self.species_table) + species.take(neighbor)
        return self.pair_index.take(flat)

    def basis(self, r: Tensor, derivative: bool = False) -> tuple[Tensor, Tensor]:
        """Weights of the four coefficients that count at a distance, and which these are.

        Parameters
        ----------
        r : Tensor
            (n,) distances below the cutoff, Å.
        derivative : bool
            For the slope du/dr instead of the energy.

        Returns
        -------
        first : Tensor
            (n,) int64, the first of the four; from `n_knots` on, a coefficient is zero.
        weight : Tensor
            (n, 4), or 1/Å for the slope.
        """
        first = (r.detach() / self.spacing).floor()
        t = r / self.spacing - first
        s = 1.0 - t
        if derivative:
            left, right = -0.5 * s * s, 0.5 * t * t
            inner = t * (1.5 * t - 2.0), s * (2.0 - 1.5 * s)
            weight = torch.stack([left, *inner, right], dim=1) / self.spacing
        else:
            left, right = s * s * s / 6.0, t * t * t / 6.0
            inner = 2.0 / 3.0 + t * t * (0.5 * t - 1.0), 2.0 / 3.0 + s * s * (0.5 * s - 1.0)
            weight = torch.stack([left, *inner, right], dim=1)
        return first.long(), weight

    @property
    def _windows(self) -> Tensor:
        """(n_pairs, n, 4) the coefficients that count between two knots."""
        return torch.nn.functional.pad(self.coefficients, (0, 3)).unfold(1, 4, 1)

    @property
    def roughness(self) -> Tensor:
        """(n, n) float64; the square of it times coefficients is the integral of (d³u/dr³)²."""
        third = torch.eye(self.n_knots + 3, dtype=torch.float64).diff(n=3, dim=0)
        return third[:, : self.n_knots] / self.spacing**2.5

    def table(self, r: Tensor) -> tuple[Tensor, Tensor]:
        """(n_pairs, n) energies in eV and forces -du/dr in eV/Å at distances below the cutoff."""
        with torch.no_grad():
            values = []
            for derivative in (False, True):
                first, weight = self.basis(r.to(self.dtype), derivative)
                values.append((self._windows[:, first] * weight).sum(dim=2))
        return values[0], -values[1]

    @torch.no_grad()
    def first_distances(self, structures: Structures, least: int = 50) -> dict[str, float]:
        """Where the first interval between knots begins that pairs of atoms are found in.

        Parameters
        ----------
        structures : Structures
            A data set.
        least : int
            How many pairs make an interval count.

        Returns
        -------
        dict
            By pair of species, Å; without those that are never so near.
        """
        structures = structures.with_species_table(self.species_table)
        counts = torch.zeros(self.coefficients.numel(), dtype=torch.int64)
        for systems in structures.batches(4096):
            part = structures.select(systems)
            list_ = build_neighbor_list(part, self.cutoff)
            r = torch.linalg.vector_norm(pair_vectors(part, list_), dim=1)
            interval = (r / self.spacing).long().clamp(max=self.n_knots - 1)
            rows = self.pair_rows(part.species, list_.center, list_.neighbor)
            counts += torch.bincount(rows * self.n_knots + interval, minlength=len(counts))
        seen = counts.view_as(self.coefficients) >= 2 * least  # both directions are in the list
        firsts = seen.int().argmax(dim=1).tolist()
        starts = zip(self.pairs, firsts, seen.any(dim=1).tolist(), strict=True)
        return {pair: self.spacing * first for pair, first, found in starts if found}

    @torch.no_grad()
    def continue_inward(self, start: Mapping[str, float]) -> None:
        """Replace the potential below the first distances that are known by a repulsion.

        Differences of successive coefficients go on as a geometric series, the force therefore as
        an exponential: smooth, and still in the space of the spline. Its decay length is that of
        the slope at the start, but within 0.15 to 1 Å; its force grows to at most 20 eV/Å and is
        at least 0.1 eV/Å where the potential is not repulsive at the start.

        Parameters
        ----------
        start : mapping of str to float
            By pair ("A-B", either order) the distance, Å, which is rounded up to a knot.

        Raises
        ------
        ModelError
            If a pair is unknown or a distance is not between 0 and three knots below the cutoff.
        """
        names = list(enumerate(self.species_table.names))
        rows = {f"{a}-{b}": int(self.pair_index[i, j]) for i, a in names for j, b in names}
        for name, distance in start.items():
            if name not in rows:
                raise ModelError(f"there is no pair '{name}'{suggest(name, rows)}")
            knot = math.ceil(distance / self.spacing - 1e-9)
            if not 0 <= knot <= self.n_knots - 3:
                raise ModelError(f"{name} cannot be continued inward from {distance:g} Å")
            self._continue_row(self.coefficients[rows[name]], knot)

    def _continue_row(self, row: Tensor, knot: int) -> None:
        h = self.spacing
        value, second, third = row[knot : knot + 3].tolist()
        step, next_step = value - second, second - third
        low, high = (math.exp(h / decay) for decay in reversed(_DECAY))
        growth = min(max(step / next_step, low), high) if next_step > 0.0 else low
        for k in reversed(range(knot)):
            step = min(max(step * growth, _LEAST * h), _MOST * h)
            value += step
            row[k] = value
