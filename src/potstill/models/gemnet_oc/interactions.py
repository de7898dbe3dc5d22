"""Message passing of GemNet-OC: between edges, between atoms, and from one to the other."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from potstill.models.gemnet_oc.bases import Angular, Bases
from potstill.models.gemnet_oc.graphs import Graphs, Quadruplets
from potstill.models.gemnet_oc.layers import INV_SQRT_2, Dense, ScaleFactor, residuals
from potstill.models.gemnet_oc.settings import GemNetOCSettings


class Bilinear(nn.Module):
    """The efficient bilinear layer: sum over the members of each group of basis × W × embedding.

    With the angular functions of the members summed first, nothing of the size members × basis ×
    embedding is formed.
    """

    def __init__(self, n_in: int, n_basis: int, n_out: int) -> None:
        super().__init__()
        self.n_in, self.n_basis = n_in, n_basis
        self.dense = Dense(n_basis * n_in, n_out, activate=False)

    def forward(
        self, basis: Angular, x: Tensor, onto: Tensor | None = None, n_onto: int = 0
    ) -> Tensor:
        """(M, n_out) from (R, n_in) and a basis whose radial part is (M, n_basis, A).

        Or (n_onto, n_out), with the M groups summed into the rows that `onto` (M,) names.
        """
        angular = basis.angular.transpose(1, 2) @ basis.groups.gather(x)  # (M, A, n_in)
        product = basis.radial @ angular  # (M, n_basis, n_in)
        if onto is not None:
            product = product.new_zeros(n_onto, *product.shape[1:]).index_add(0, onto, product)
        return self.dense(product.reshape(product.shape[0], self.n_basis * self.n_in))


class Messages(nn.Module):
    """Up-projection of the sums of messages to edges, in both directions of each."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.along = Dense(n_in, n_out)
        self.against = Dense(n_in, n_out)

    def forward(self, x: Tensor, reverse: Tensor) -> Tensor:
        """(M, n_out) from (M, n_in)."""
        return (self.along(x) + self.against(x)[reverse]) * INV_SQRT_2


class TripletInteraction(nn.Module):
    """What arrives at a from its edges or atoms b, by the angle between b and c.

    `n_in` and `n_out` are the widths of what sends (atoms or edges) and of what receives: main
    edges, or atoms without `to_edges`.
    """

    def __init__(
        self, n_in: int, n_out: int, settings: GemNetOCSettings, *, to_edges: bool = True
    ) -> None:
        super().__init__()
        s = settings
        self.dense = Dense(n_in, n_in)
        self.radial = Dense(s.emb_size_rbf, n_in, activate=False)
        self.scale_radial = ScaleFactor()
        self.down = Dense(n_in, s.emb_size_trip_in)
        self.bilinear = Bilinear(s.emb_size_trip_in, s.emb_size_cbf, s.emb_size_trip_out)
        self.scale_sum = ScaleFactor()
        self.up: Messages | Dense
        if to_edges:
            self.up = Messages(s.emb_size_trip_out, n_out)
        else:
            self.up = Dense(s.emb_size_trip_out, n_out)

    def forward(
        self,
        x: Tensor,
        radial: Tensor,
        angular: Angular,
        *,
        sender: Tensor | None = None,
        reverse: Tensor | None = None,
        receiver: tuple[Tensor, int] | None = None,
    ) -> Tensor:
        """(M, n_out) for main edges, or (N, n_out) for atoms, from (R, n_in).

        `radial` (P, emb_size_rbf) is the basis of the incoming edges. Where atoms send, `sender`
        (P,) are those of the incoming edges; where main edges receive, `reverse` (M,) are their
        reverses; where atoms receive, `receiver` are those into which outgoing edges are summed,
        (P,), and the number of all atoms.
        """
        x = self.dense(x)
        x = x if sender is None else x[sender]
        x = self.scale_radial(x * self.radial(radial), x)
        x = self.down(x)
        total = self.bilinear(angular, x, *(receiver or ()))
        total = self.scale_sum(total, x, angular.groups.member)
        return self.up(total) if reverse is None else self.up(total, reverse)


class QuadrupletInteraction(nn.Module):
    """What d -> b tells c -> a through b -> a, by two angles and the dihedral angle."""

    def __init__(self, settings: GemNetOCSettings) -> None:
        super().__init__()
        s = settings
        self.dense = Dense(s.emb_size_edge, s.emb_size_edge)
        self.radial = Dense(s.emb_size_rbf, s.emb_size_edge, activate=False)
        self.scale_radial = ScaleFactor()
        self.down = Dense(s.emb_size_edge, s.emb_size_quad_in)
        self.middle = Dense(s.emb_size_cbf, s.emb_size_quad_in, activate=False)
        self.scale_middle = ScaleFactor()
        self.bilinear = Bilinear(s.emb_size_quad_in, s.emb_size_sbf, s.emb_size_quad_out)
        self.scale_sum = ScaleFactor()
        self.up = Messages(s.emb_size_quad_out, s.emb_size_edge)

    def forward(
        self,
        m: Tensor,
        radial: Tensor,
        middle: Tensor,
        angular: Angular,
        quads: Quadruplets,
        reverse: Tensor,
    ) -> Tensor:
        """(M, emb_size_edge) from edge embeddings (M, emb_size_edge) and the bases."""
        x = self.dense(m)
        x = self.scale_radial(x * self.radial(radial), x)
        x = self.down(x)[quads.inner.member]  # (T, emb_size_quad_in)
        x = self.scale_middle(x * self.middle(middle), x)
        total = self.scale_sum(self.bilinear(angular, x), x, quads.paths.member)
        return self.up(total, reverse)


class PairInteraction(nn.Module):
    """What atoms b tell atom a, by their distance."""

    def __init__(self, settings: GemNetOCSettings) -> None:
        super().__init__()
        s = settings
        self.down = Dense(s.emb_size_atom, s.emb_size_aint_in)
        self.bilinear = Dense(
            s.emb_size_rbf * s.emb_size_aint_in, s.emb_size_aint_out, activate=False
        )
        self.scale_sum = ScaleFactor()
        self.up = Dense(s.emb_size_aint_out, s.emb_size_atom)

    def forward(self, h: Tensor, radial: Tensor, graphs: Graphs) -> Tensor:
        """(N, emb_size_atom) from (N, emb_size_atom) and the padded radial basis (N, K, basis)."""
        sent = self.down(h)[graphs.aint.neighbor]  # (P, emb_size_aint_in)
        product = radial.transpose(1, 2) @ graphs.atom_atom.gather(sent)
        total = self.bilinear(product.reshape(h.shape[0], self.bilinear.in_features))
        return self.up(self.scale_sum(total, sent))


class AtomUpdate(nn.Module):
    """Sum of an atom's edges, weighted by distance, through residual layers."""

    def __init__(self, settings: GemNetOCSettings) -> None:
        super().__init__()
        s = settings
        self.radial = Dense(s.emb_size_rbf, s.emb_size_edge, activate=False)
        self.scale_sum = ScaleFactor()
        same = s.emb_size_edge == s.emb_size_atom
        self.narrow = nn.Identity() if same else Dense(s.emb_size_edge, s.emb_size_atom)
        self.layers = residuals(s.num_atom, s.emb_size_atom)

    def forward(self, m: Tensor, radial: Tensor, graphs: Graphs) -> Tensor:
        """(N, emb_size_atom) from edges (M, emb_size_edge) and their basis (M, emb_size_rbf)."""
        weighted = m * self.radial(radial)
        total = m.new_zeros(graphs.main.n_atoms, m.shape[1])
        total = total.index_add(0, graphs.main.center, weighted)
        return self.layers(self.narrow(self.scale_sum(total, m)))


class EdgeEmbedding(nn.Module):
    """A dense layer of both atoms of an edge and something of the edge itself."""

    def __init__(self, n_edge: int, settings: GemNetOCSettings) -> None:
        super().__init__()
        self.dense = Dense(2 * settings.emb_size_atom + n_edge, settings.emb_size_edge)

    def forward(self, h: Tensor, of_edge: Tensor, graphs: Graphs) -> Tensor:
        """(M, emb_size_edge) from atoms (N, emb_size_atom) and (M, n_edge)."""
        main = graphs.main
        return self.dense(torch.cat([h[main.neighbor], h[main.center], of_edge], dim=1))


class InteractionBlock(nn.Module):
    """All interactions once, then the updates of edges, atoms, and edges by atoms."""

    def __init__(self, settings: GemNetOCSettings) -> None:
        super().__init__()
        s = settings
        atom, edge = s.emb_size_atom, s.emb_size_edge
        self.skip = Dense(edge, edge)
        self.edge_edge = TripletInteraction(edge, edge, s)
        self.quad = QuadrupletInteraction(s) if s.quad_interaction else None
        self.atom_edge = TripletInteraction(atom, edge, s) if s.atom_edge_interaction else None
        to_atoms = TripletInteraction(edge, atom, s, to_edges=False)
        self.edge_atom = to_atoms if s.edge_atom_interaction else None
        self.atom_atom = PairInteraction(s) if s.atom_interaction else None
        self.before_skip = residuals(s.num_before_skip, edge)
        self.after_skip = residuals(s.num_after_skip, edge)
        self.atom_layers = residuals(s.num_atom_emb_layers, atom)
        self.atom_update = AtomUpdate(s)
        self.mix = EdgeEmbedding(edge, s)
        self.after_mix = residuals(s.num_concat, edge)

    def forward(self, h: Tensor, m: Tensor, bases: Bases, graphs: Graphs) -> tuple[Tensor, Tensor]:
        """Embeddings of atoms (N, emb_size_atom) and main edges (M, emb_size_edge), updated."""
        to_edges = self._to_edges(h, m, bases, graphs)
        to_atoms = self._to_atoms(h, m, bases, graphs)
        m = (m + self.before_skip(to_edges)) * INV_SQRT_2
        m = self.after_skip(m)
        h = self.atom_layers(to_atoms)
        h = (h + self.atom_update(m, bases.atom_update, graphs)) * INV_SQRT_2
        m = (m + self.after_mix(self.mix(h, m, graphs))) * INV_SQRT_2
        return h, m

    def _to_edges(self, h: Tensor, m: Tensor, bases: Bases, graphs: Graphs) -> Tensor:
        """(M, emb_size_edge) mean of what edges get, with the variance of one."""
        reverse = graphs.reverse
        terms = [
            self.skip(m),
            self.edge_edge(m, bases.edge_edge_radial, bases.edge_edge, reverse=reverse),
        ]
        if self.quad is not None:
            of_paths = (bases.quad_radial, bases.quad_middle, bases.quad, bases.quadruplets)
            terms.append(self.quad(m, *of_paths, reverse))
        if self.atom_edge is not None:
            terms.append(
                self.atom_edge(
                    h,
                    bases.atom_edge_radial,
                    bases.atom_edge,
                    sender=graphs.aeaint.neighbor,
                    reverse=reverse,
                )
            )
        return torch.stack(terms).sum(dim=0) / math.sqrt(len(terms))

    def _to_atoms(self, h: Tensor, m: Tensor, bases: Bases, graphs: Graphs) -> Tensor:
        """(N, emb_size_atom) likewise for atoms."""
        terms = [h]
        if self.edge_atom is not None:
            receiver = (graphs.aeaint.center, h.shape[0])
            basis = (bases.edge_atom_radial, bases.edge_atom)
            terms.append(self.edge_atom(m, *basis, receiver=receiver))
        if self.atom_atom is not None:
            terms.append(self.atom_atom(h, bases.atom_atom, graphs))
        return torch.stack(terms).sum(dim=0) / math.sqrt(len(terms))


class OutputBlock(nn.Module):
    """What a block's embeddings contribute to energy and forces."""

    def __init__(self, settings: GemNetOCSettings) -> None:
        super().__init__()
        s = settings
        self.atom_update = AtomUpdate(s)
        self.after_atom = residuals(s.num_output_afteratom, s.emb_size_atom)
        self.adds_atom = s.num_output_afteratom > 0
        self.direct_forces = s.direct_forces
        if s.direct_forces:
            self.edge_layers = residuals(s.num_atom, s.emb_size_edge)
            self.edge_radial = Dense(s.emb_size_rbf, s.emb_size_edge, activate=False)
            self.scale_edge = ScaleFactor()

    def forward(
        self, h: Tensor, m: Tensor, radial: Tensor, graphs: Graphs
    ) -> tuple[Tensor, Tensor | None]:
        """(N, emb_size_atom) for the energy and, with direct forces, (M, emb_size_edge)."""
        x = self.atom_update(m, radial, graphs)
        if self.adds_atom:
            x = self.after_atom((x + h) * INV_SQRT_2)
        if not self.direct_forces:
            return x, None
        edge = self.edge_layers(m)
        return x, self.scale_edge(edge * self.edge_radial(radial), edge)
