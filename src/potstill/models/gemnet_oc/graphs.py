"""The graphs of GemNet-OC and the pairs, triplets and quadruplets of atoms that they hold.

All graphs are subsets of one list of pairs. An edge b -> a brings messages to a: a is its center, b
its neighbor. No number of an atom or an edge decides what is kept, so that results do not depend on
the order of the atoms.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from potstill.errors import ModelError
from potstill.models.base import Edges
from potstill.models.gemnet_oc.settings import GemNetOCSettings
from potstill.ragged import offsets_from_counts

#: Å. Pairs that are farther than the last one that a cap allows by less than this are kept, too.
TIE = 1e-4

#: Å. Two ways to the same image of an atom agree to this.
_SAME = 1e-3

# Any direction without symmetry: images of a pair of atoms are told apart by projections on it.
_DIRECTION = (0.5257311121, 0.3118049513, 0.7914766507)


@dataclass(frozen=True)
class Graph:
    """A subset of the given pairs, sorted by center as they are."""

    pair: Tensor  # (M,) int64, numbers of the given pairs, ascending
    center: Tensor  # (M,) int64
    neighbor: Tensor  # (M,) int64
    n_atoms: int  # N

    @classmethod
    def of(cls, chosen: Tensor, edges: Edges, n_atoms: int) -> Graph:
        """Keep the pairs of an (E,) mask."""
        pair = chosen.nonzero()[:, 0]
        return cls(pair, edges.center[pair], edges.neighbor[pair], n_atoms)

    @property
    def n_edges(self) -> int:
        """Number of edges M."""
        return self.pair.shape[0]

    @cached_property
    def start(self) -> Tensor:
        """(N+1,) int64: edges of atom a are `start[a]:start[a + 1]`."""
        return offsets_from_counts(torch.bincount(self.center, minlength=self.n_atoms))


@dataclass(frozen=True)
class Groups:
    """Which rows are summed into which groups; sorted by group."""

    member: Tensor  # (T,) int64, a row of some table
    group: Tensor  # (T,) int64, the group that it is summed into, non-decreasing
    n_groups: int  # G

    @cached_property
    def start(self) -> Tensor:
        """(G+1,) int64: members of group g are `start[g]:start[g + 1]`."""
        return offsets_from_counts(torch.bincount(self.group, minlength=self.n_groups))

    @cached_property
    def width(self) -> int:
        """Size K of the largest group."""
        return int(self.start.diff().max()) if self.member.numel() else 0

    @cached_property
    def _slot(self) -> Tensor:
        """(T,) places in the flattened (G, K) rectangle."""
        rank = torch.arange(self.member.shape[0], device=self.member.device)
        return self.group * self.width + rank - self.start[self.group]

    @cached_property
    def _padded_member(self) -> Tensor:
        """(G * K,) members; 0 in unused places."""
        empty = self.member.new_zeros(self.n_groups * self.width)
        return empty.index_copy(0, self._slot, self.member)

    def gather(self, table: Tensor) -> Tensor:
        """(G, K, F) rows of the members from an (R, F) table; anything finite in unused places."""
        rows = table.index_select(0, self._padded_member)
        return rows.view(self.n_groups, self.width, *table.shape[1:])

    def spread(self, values: Tensor) -> Tensor:
        """(G, K, F) from (T, F) values of the members; zero in unused places."""
        empty = values.new_zeros(self.n_groups * self.width, *values.shape[1:])
        filled = empty.index_copy(0, self._slot, values)
        return filled.view(self.n_groups, self.width, *values.shape[1:])


@dataclass(frozen=True)
class Quadruplets:
    """Paths d -> b -> a <- c: the edge d -> b tells c -> a about itself, through b -> a.

    Edges d -> b and c -> a are of the main graph, b -> a is of the quadruplets' own graph.
    """

    inner: Groups  # main edges d -> b by the edge b -> a that they arrive at
    outer_edge: Tensor  # (T,) int64, main edges c -> a of the outer triplets b -> a <- c
    outer_through: Tensor  # (T,) int64, edges b -> a of these
    paths: Groups  # rows of `inner` by main edge c -> a
    path_outer: Tensor  # (Q,) int64, the outer triplet of each path


@dataclass(frozen=True)
class Graphs:
    """Everything about the connectivity of a batch."""

    main: Graph  # edges that carry embeddings; with each edge its reverse
    reverse: Tensor  # (M,) int64, the reverse of each main edge
    aeaint: Graph  # of the interactions between atoms and edges
    aint: Graph  # of the interactions between atoms
    qint: Graph  # of the middle edges of quadruplets
    given_reverse: Tensor  # (E,) int64, the reverse of each given pair

    @cached_property
    def edge_edge(self) -> Groups:
        """Main edges b -> a by main edge c -> a."""
        return _triplets(self.main, self.main)

    @cached_property
    def atom_edge(self) -> Groups:
        """Atom-edge edges b -> a by main edge c -> a."""
        return _triplets(self.aeaint, self.main)

    @cached_property
    def edge_atom(self) -> Groups:
        """Main edges b -> a by atom-edge edge c -> a."""
        return _triplets(self.main, self.aeaint)

    @cached_property
    def atom_atom(self) -> Groups:
        """Edges b -> a by atom a."""
        number = torch.arange(self.aint.n_edges, device=self.aint.pair.device)
        return Groups(number, self.aint.center, self.aint.n_atoms)

    def quadruplets(self, r_ij: Tensor) -> Quadruplets:
        """All paths d -> b -> a <- c of four different (images of) atoms; `r_ij` is (E, 3) Å."""
        main, qint = self.main, self.qint
        through, edge = _members(qint.neighbor, main.start)  # d -> b of each b -> a
        keep = main.pair[edge] != self.given_reverse[qint.pair[through]]  # d is not a
        inner = Groups(edge[keep], through[keep], qint.n_edges)

        outer_edge, outer_through = _members(main.center, qint.start)
        keep = main.pair[outer_edge] != qint.pair[outer_through]  # c is not b
        outer_edge, outer_through = outer_edge[keep], outer_through[keep]

        path_outer, path_inner = _members(outer_through, inner.start)
        c, d = outer_edge[path_outer], inner.member[path_inner]
        suspects = (main.neighbor[c] == main.neighbor[d]).nonzero()[:, 0]
        to_d = r_ij[main.pair[d[suspects]]] + r_ij[qint.pair[outer_through[path_outer[suspects]]]]
        apart = (to_d - r_ij[main.pair[c[suspects]]]).abs().amax(dim=1) > _SAME
        keep = torch.ones_like(c, dtype=torch.bool).index_copy(0, suspects, apart)  # d is not c
        paths = Groups(path_inner[keep], c[keep], main.n_edges)
        return Quadruplets(inner, outer_edge, outer_through, paths, path_outer[keep])


def build_graphs(edges: Edges, r_ij: Tensor, n_atoms: int, settings: GemNetOCSettings) -> Graphs:
    """Choose the edges of all graphs.

    Caps keep the nearest neighbors of a center, and all those that tie with the last one within
    `TIE`. The main graph holds a pair in both directions if either end chooses the other. Middle
    edges of quadruplets have one of the tags `qint_tags`, or none, at one end at least.

    Parameters
    ----------
    edges : Edges
        The given pairs, each in both directions, up to the largest cutoff at least.
    r_ij : Tensor
        (E, 3) Å.
    n_atoms : int
        Number of atoms N.
    settings : GemNetOCSettings
        Cutoffs, caps and tags.

    Raises
    ------
    ModelError
        If a pair comes without its reverse.
    """
    s = settings
    r_ij = r_ij.detach()
    reverse = reverse_pairs(edges, r_ij)
    distance = torch.linalg.vector_norm(r_ij, dim=1)
    distance = torch.minimum(distance, distance[reverse])  # equal to the last digit both ways
    limits = _Limits(edges.center, distance, n_atoms)

    def reached(cutoff: float, max_neighbors: int | None) -> Tensor:
        return (distance < cutoff) & limits.within(max_neighbors)

    chosen = reached(s.cutoff, s.max_neighbors)
    main_graph = Graph.of(chosen | chosen[reverse], edges, n_atoms)
    number = torch.full_like(reverse, -1)
    number[main_graph.pair] = torch.arange(main_graph.n_edges, device=number.device)
    middle = reached(s.cutoff_qint, s.max_neighbors_qint)
    if edges.tags is not None:
        wanted = torch.tensor([-1, *s.qint_tags], device=edges.tags.device)
        tagged = torch.isin(edges.tags, wanted)
        middle = middle & (tagged[edges.center] | tagged[edges.neighbor])
    return Graphs(
        main=main_graph,
        reverse=number[reverse[main_graph.pair]],
        aeaint=Graph.of(reached(s.cutoff_aeaint, s.max_neighbors_aeaint), edges, n_atoms),
        aint=Graph.of(reached(s.cutoff_aint, s.max_neighbors_aint), edges, n_atoms),
        qint=Graph.of(middle, edges, n_atoms),
        given_reverse=reverse,
    )


class _Limits:
    """Distances of the n-th nearest neighbors."""

    def __init__(self, center: Tensor, distance: Tensor, n_atoms: int) -> None:
        order = _lexicographic(center, distance)
        start = offsets_from_counts(torch.bincount(center, minlength=n_atoms))
        self.center, self.distance, self.n_atoms = center, distance, n_atoms
        self.sorted = distance[order]
        self.rank = torch.arange(len(order), device=order.device) - start[center]

    def within(self, cap: int | None) -> Tensor:
        """(E,) whether a pair is among the nearest of its center."""
        if cap is None:
            return torch.ones_like(self.center, dtype=torch.bool)
        last = self.rank == cap - 1
        limit = self.distance.new_full((self.n_atoms,), torch.inf)
        limit[self.center[last]] = self.sorted[last]
        return self.distance <= limit[self.center] + TIE


def reverse_pairs(edges: Edges, r_ij: Tensor) -> Tensor:
    """(E,) int64: the pair (j, i, -r) of each pair (i, j, r).

    Images of one pair of atoms are put in the order of their vectors' (E, 3) projections on a
    direction, from the one end upwards, from the other downwards.

    Raises
    ------
    ModelError
        If a pair comes without its reverse.
    """
    n = int(torch.max(edges.center.max(), edges.neighbor.max())) + 1 if edges.n_pairs else 0
    along = r_ij @ r_ij.new_tensor(_DIRECTION)
    forward = _lexicographic(edges.center * n + edges.neighbor, along)
    backward = _lexicographic(edges.neighbor * n + edges.center, -along)
    reverse = torch.empty_like(forward)
    reverse[forward] = backward
    fits = (edges.center[reverse] == edges.neighbor) & (edges.neighbor[reverse] == edges.center)
    fits = fits & ((r_ij + r_ij[reverse]).abs().amax(dim=1) < _SAME)
    if not bool(fits.all()):
        raise ModelError("GemNet-OC needs every pair of the neighbor list in both directions")
    return reverse


def _lexicographic(major: Tensor, minor: Tensor) -> Tensor:
    """Order by `major`, and by `minor` where that is equal."""
    order = torch.argsort(minor)
    return order[torch.argsort(major[order], stable=True)]


def _triplets(incoming: Graph, outgoing: Graph) -> Groups:
    """Edges b -> a of one graph by edge c -> a of another, b and c different (images of) atoms."""
    group, member = _members(outgoing.center, incoming.start)
    keep = incoming.pair[member] != outgoing.pair[group]
    return Groups(member[keep], group[keep], outgoing.n_edges)


def _members(keys: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """All (k, e) with e in `start[keys[k]]:start[keys[k] + 1]`, sorted."""
    first = start[keys]
    counts = start[keys + 1] - first
    ends = counts.cumsum(0)
    k = torch.repeat_interleave(torch.arange(len(keys), device=keys.device), counts)
    inside = torch.arange(len(k), device=keys.device) - (ends - counts)[k]
    return k, first[k] + inside
