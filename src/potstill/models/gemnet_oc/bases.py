"""Radial, circular and spherical bases of GemNet-OC, and their shared down-projections.

Gasteiger et al., TMLR (2022): Gaussians of the distance with a polynomial envelope, spherical
harmonics of order 0 for angles, products of two of them for angle and dihedral angle.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from potstill.models.gemnet_oc.graphs import Graphs, Groups, Quadruplets
from potstill.models.gemnet_oc.layers import Dense, he_orthogonal_
from potstill.models.gemnet_oc.settings import GemNetOCSettings
from potstill.radial import polynomial_envelope


def radial_basis(distance: Tensor, cutoff: float, settings: GemNetOCSettings) -> Tensor:
    """(M, num_radial) Gaussians of r / cutoff, evenly spaced in [0, 1], times the envelope."""
    n = settings.num_radial
    x = distance / cutoff
    offsets = torch.linspace(0.0, 1.0, n, dtype=x.dtype, device=x.device)
    gaussians = torch.exp(-0.5 * ((n - 1) * (x.unsqueeze(1) - offsets)).square())
    envelope = polynomial_envelope(distance, cutoff, settings.envelope_exponent)
    return gaussians * envelope.unsqueeze(1)


def circular_basis(cosine: Tensor, n: int) -> Tensor:
    """(..., n) spherical harmonics Y_l0 for l < n: sqrt((2l + 1) / 4 pi) P_l(cosine)."""
    legendre = [torch.ones_like(cosine), cosine]
    for k in range(2, n):
        legendre.append(((2 * k - 1) * cosine * legendre[-1] - (k - 1) * legendre[-2]) / k)
    scaled = [math.sqrt((2 * k + 1) / (4.0 * math.pi)) * p for k, p in enumerate(legendre[:n])]
    return torch.stack(scaled, dim=-1)


class BasisEmbedding(nn.Module):
    """Down-projection of the product of a radial and an angular basis, angles to be summed later.

    The bilinear layer sums over triplets first and over radial functions last: what is needed
    before is, for every edge, a matrix from the angular functions to the embedding.
    """

    def __init__(self, num_radial: int, n_angular: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, num_radial * n_angular))
        he_orthogonal_(self.weight, fan_in=num_radial * n_angular)
        self.n_angular = n_angular

    def forward(self, radial: Tensor) -> Tensor:
        """(M, width, n_angular) from (M, num_radial)."""
        weight = self.weight.view(self.weight.shape[0], -1, self.n_angular)
        return torch.einsum("mr,wra->mwa", radial, weight)


@dataclass(frozen=True)
class Angular:
    """An angular basis of triplets or quadruplets, in the form of the efficient bilinear layer."""

    groups: Groups  # who is summed into which outgoing edge
    radial: Tensor  # (M, width, A), of the outgoing edges
    angular: Tensor  # (M, K, A), of the members of each group; zero in unused places


@dataclass(frozen=True)
class Bases:
    """All bases of a batch; None for interactions that are switched off."""

    main: Tensor  # (M, num_radial), of the main edges
    atom_update: Tensor  # (M, emb_size_rbf)
    output: Tensor  # (M, emb_size_rbf)
    edge_edge_radial: Tensor  # of incoming main edges
    edge_edge: Angular  # between main edges
    quad_radial: Tensor | None = None  # of d -> b
    quad_middle: Tensor | None = None  # (T, emb_size_cbf), of d -> b -> a
    quad: Angular | None = None  # of the paths
    quadruplets: Quadruplets | None = None
    atom_edge_radial: Tensor | None = None
    atom_edge: Angular | None = None
    edge_atom_radial: Tensor | None = None
    edge_atom: Angular | None = None
    atom_atom: Tensor | None = None  # (N, K, emb_size_rbf) by atom; zero in unused places


class SharedBases(nn.Module):
    """The bases with their down-projections, shared by all blocks."""

    def __init__(self, settings: GemNetOCSettings) -> None:
        super().__init__()
        self.settings = s = settings

        def radial() -> Dense:
            return Dense(s.num_radial, s.emb_size_rbf, activate=False)

        def circular() -> BasisEmbedding:
            return BasisEmbedding(s.num_radial, s.num_spherical, s.emb_size_cbf)

        self.atom_update = radial()
        self.output = radial()
        self.edge_edge_radial, self.edge_edge = radial(), circular()
        if s.quad_interaction:
            self.quad_radial, self.quad_middle = radial(), circular()
            self.quad = BasisEmbedding(s.num_radial, s.num_spherical**2, s.emb_size_sbf)
        if s.atom_edge_interaction:
            self.atom_edge_radial, self.atom_edge = radial(), circular()
        if s.edge_atom_interaction:
            self.edge_atom_radial, self.edge_atom = radial(), circular()
        if s.atom_interaction:
            self.atom_atom = radial()

    def forward(self, graphs: Graphs, r_ij: Tensor) -> Bases:
        """All bases from the vectors (E, 3) of the given pairs."""
        s = self.settings
        distance = torch.linalg.vector_norm(r_ij, dim=1)
        unit = r_ij / distance.unsqueeze(1)
        near = distance[graphs.aeaint.pair]
        along, along_near = unit[graphs.main.pair], unit[graphs.aeaint.pair]
        main = radial_basis(distance[graphs.main.pair], s.cutoff, s)
        found: dict[str, Tensor | Angular | Quadruplets] = {}
        if s.quad_interaction:
            found |= self._quadruplets(graphs, r_ij, distance, unit, main)
        if s.atom_edge_interaction:
            near_radial = radial_basis(near, s.cutoff_aeaint, s)
            cosine = _cosine(graphs.atom_edge, along_near, along)
            found["atom_edge_radial"] = self.atom_edge_radial(near_radial)
            found["atom_edge"] = self._angular(self.atom_edge, graphs.atom_edge, main, cosine)
        if s.edge_atom_interaction:
            near_radial = radial_basis(near, s.cutoff_aeaint, s)
            cosine = _cosine(graphs.edge_atom, along, along_near)
            found["edge_atom_radial"] = self.edge_atom_radial(main)
            angular = self._angular(self.edge_atom, graphs.edge_atom, near_radial, cosine)
            found["edge_atom"] = angular
        if s.atom_interaction:
            radial = radial_basis(distance[graphs.aint.pair], s.cutoff_aint, s)
            found["atom_atom"] = graphs.atom_atom.spread(self.atom_atom(radial))
        cosine = _cosine(graphs.edge_edge, along, along)
        return Bases(
            main=main,
            atom_update=self.atom_update(main),
            output=self.output(main),
            edge_edge_radial=self.edge_edge_radial(main),
            edge_edge=self._angular(self.edge_edge, graphs.edge_edge, main, cosine),
            **found,  # type: ignore[arg-type]
        )

    def _angular(
        self, embedding: BasisEmbedding, groups: Groups, radial: Tensor, cosine: Tensor
    ) -> Angular:
        angular = circular_basis(cosine, self.settings.num_spherical)  # (T, A)
        return Angular(groups, embedding(radial), groups.spread(angular))

    def _quadruplets(
        self, graphs: Graphs, r_ij: Tensor, distance: Tensor, unit: Tensor, main: Tensor
    ) -> dict[str, Tensor | Angular | Quadruplets]:
        s = self.settings
        quads = graphs.quadruplets(r_ij.detach())
        ab, bd, ac = (
            unit[graphs.qint.pair[quads.inner.group]],
            unit[graphs.main.pair[quads.inner.member]],
            unit[graphs.main.pair[quads.outer_edge]],
        )
        radial = radial_basis(distance[graphs.qint.pair], s.cutoff_qint, s)
        middle = self.quad_middle(radial)[quads.inner.group]  # (T, emb_size_cbf, A)
        angle = circular_basis((ab * bd).sum(dim=1), s.num_spherical)
        inner_normal = self._normal(bd, ab)
        ab = unit[graphs.qint.pair[quads.outer_through]]
        outer_normal = self._normal(ac, ab)
        outer_angle = circular_basis((ac * ab).sum(dim=1), s.num_spherical)
        dihedral = (outer_normal[quads.path_outer] * inner_normal[quads.paths.member]).sum(dim=1)
        second = circular_basis(dihedral, s.num_spherical)
        product = outer_angle[quads.path_outer].unsqueeze(2) * second.unsqueeze(1)
        return {
            "quadruplets": quads,
            "quad_radial": self.quad_radial(main),
            "quad_middle": (middle @ angle.unsqueeze(2))[..., 0],
            "quad": Angular(quads.paths, self.quad(main), quads.paths.spread(product.flatten(1))),
        }

    def _normal(self, u: Tensor, v: Tensor) -> Tensor:
        """(T, 3) u × v, of length 1 except where u and v are nearly parallel: there it vanishes.

        Dihedral angles are undefined on a line. Without the regularization their cosine would jump
        from one value to another, and forces would be infinite.
        """
        normal = torch.linalg.cross(u, v)
        square = normal.square().sum(dim=1, keepdim=True)
        return normal / torch.sqrt(square + self.settings.dihedral_reg)


def _cosine(groups: Groups, members: Tensor, outgoing: Tensor) -> Tensor:
    """(T,) cosines of the angles between the unit vectors of incoming and outgoing edges."""
    return (members[groups.member] * outgoing[groups.group]).sum(dim=1)
