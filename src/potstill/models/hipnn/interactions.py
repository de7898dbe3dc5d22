"""How HIP-NN's atoms see their neighbors: radial functions, tensors, and invariants of their sums.

Two forms: the norms of hippynn, with trainable Gaussians and the same weights for every rank, and
smooth invariants with Chebyshev polynomials and weights of each rank's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol, Self

import numpy as np
import torch
from torch import Tensor, nn

#: Highest rank of the tensors.
HIGHEST_RANK = 4

#: Ranks of the tensors whose products of three are invariants, in the order of the kernels.
TRIPLES = (
    (1, 1, 2),
    (2, 2, 2),
    (1, 2, 3),
    (2, 3, 3),
    (1, 3, 4),
    (2, 2, 4),
    (2, 4, 4),
    (3, 3, 4),
    (4, 4, 4),
)

#: Largest ratio of the variances that `SmoothInteraction.whiten` takes for signal, and the least
#: one, as a share of the scalar sums' mean square.
_CONDITION, _SIGNAL = 1e4, 1e-7


def cosine_squared(r: Tensor, cutoff: float) -> Tensor:
    """cos²(pi r / 2 cutoff): continuous with its first derivative at the cutoff."""
    return torch.cos(r * (0.5 * math.pi / cutoff)).square()


def polynomial(r: Tensor, cutoff: float) -> Tensor:
    """1 - 10 x³ + 15 x⁴ - 6 x⁵: continuous with two derivatives at the cutoff."""
    x = (r / cutoff).clamp(max=1.0)
    return 1.0 - x**3 * (10.0 - 15.0 * x + 6.0 * x**2)


CUTOFF_FUNCTIONS = {"cosine_squared": cosine_squared, "polynomial": polynomial}


class Sizes(Protocol):
    """The hyper-parameters that an interaction layer is made from; see `HIPNNHyperparameters`."""

    n_sensitivities: int
    n_channels: int
    n_triples: int
    dist_soft_min: float
    dist_soft_max: float
    dist_hard_max: float
    l_max: int
    cusp_reg: float
    cutoff_function: str

    @property
    def n_tensor_sensitivities(self) -> tuple[int, ...]:
        """Radial functions of the tensors of rank 1 to l_max."""


class Sensitivity(nn.Module):
    """Gaussians in inverse distance with trainable centers and widths, times a cutoff function.

    s_n(r) = exp(-(1/r - 1/mu_n)² sigma_n² / 2) f(r); mu_n start evenly spaced in 1/r from
    `dist_soft_max` to `dist_soft_min`, all sigma_n at 2 n_sensitivities dist_soft_min.
    """

    def __init__(self, p: Sizes) -> None:
        super().__init__()
        self.cutoff = p.dist_hard_max
        self.cutoff_function = CUTOFF_FUNCTIONS[p.cutoff_function]
        n, low = p.n_sensitivities, p.dist_soft_min
        inverse = torch.linspace(1.0 / p.dist_soft_max, 1.0 / low, n)
        self.mu = nn.Parameter(1.0 / inverse)
        self.sigma = nn.Parameter(torch.full((n,), 2.0 * n * low))

    def forward(self, r: Tensor) -> Tensor:
        """(..., n_sensitivities) from (...) distances; zero from the cutoff on."""
        deviation = (1.0 / r.unsqueeze(-1) - 1.0 / self.mu) * self.sigma
        envelope = self.cutoff_function(r, self.cutoff) * (r < self.cutoff)
        return torch.exp(-0.5 * deviation.square()) * envelope.unsqueeze(-1)


class Chebyshev(nn.Module):
    """Chebyshev polynomials T_n(2 r / cutoff - 1), n = 0, 1, ..., times a cutoff function."""

    def __init__(self, p: Sizes) -> None:
        super().__init__()
        self.n, self.cutoff = p.n_sensitivities, p.dist_hard_max
        self.cutoff_function = CUTOFF_FUNCTIONS[p.cutoff_function]

    def forward(self, r: Tensor) -> Tensor:
        """(..., n_sensitivities) from (...) distances; zero from the cutoff on."""
        # Beyond the cutoff, where the envelope is zero, polynomials stay finite.
        x = (2.0 * r / self.cutoff - 1.0).clamp(max=1.0)
        values = [torch.ones_like(r), x]
        while len(values) < self.n:
            values.append(2.0 * x * values[-1] - values[-2])
        envelope = self.cutoff_function(r, self.cutoff) * (r < self.cutoff)
        return torch.stack(values[: self.n], dim=-1) * envelope.unsqueeze(-1)


def tensor_components(unit: Tensor, l_max: int) -> Tensor:
    """Tensors of a direction up to rank `l_max`, flattened side by side.

    Parameters
    ----------
    unit : Tensor
        (..., 3) unit vectors u.
    l_max : int
        0 to 4.

    Returns
    -------
    Tensor
        (..., (l_max + 1)²): 1; u; xx, xy, xz, yy, yz of u u - 1/3; of rank 3 and 4 the real
        spherical harmonics from m = -l to l, the sum of whose squares is 1.
    """
    x, y, z = unit.unbind(-1)
    parts = [torch.ones_like(x)]
    if l_max >= 1:
        parts += [x, y, z]
    if l_max >= 2:
        third = (x * x + y * y + z * z) / 3.0
        parts += [x * x - third, x * y, x * z, y * y - third, y * z]
    if l_max >= 3:
        a, b, c, d = (math.sqrt(f) for f in (5 / 8, 15, 3 / 8, 15 / 4))
        parts += [a * y * (3 * x * x - y * y), b * x * y * z, c * y * (5 * z * z - 1)]
        parts += [0.5 * z * (5 * z * z - 3), c * x * (5 * z * z - 1), d * z * (x * x - y * y)]
        parts += [a * x * (x * x - 3 * y * y)]
    if l_max >= 4:
        a, b, c, d = (math.sqrt(f) for f in (35, 35 / 8, 5, 5 / 8))
        difference, zz = x * x - y * y, z * z
        parts += [0.5 * a * x * y * difference, b * y * z * (3 * x * x - y * y)]
        parts += [0.5 * c * x * y * (7 * zz - 1), d * y * z * (7 * zz - 3)]
        parts += [(35 * zz * zz - 30 * zz + 3) / 8, d * x * z * (7 * zz - 3)]
        parts += [0.25 * c * difference * (7 * zz - 1), b * x * z * (x * x - 3 * y * y)]
        parts += [0.125 * a * (difference * difference - 4 * x * x * y * y)]
    return torch.stack(parts, dim=-1)


class Interaction(nn.Module):
    """What the interaction layers share: the sums over an atom's neighbors.

    `unit_input` says that the only input feature is 1 on every atom, as one species' one-hot is.
    """

    int_weights: nn.Parameter
    selfint: nn.Linear

    def __init__(self, p: Sizes, radial: nn.Module, *, unit_input: bool) -> None:
        super().__init__()
        self.l_max = p.l_max
        self.unit_input = unit_input
        self.sensitivity = radial

    def environment(self, features: Tensor, geometry: Geometry) -> Tensor:
        """(n_local, (l_max + 1)², n_sens * n_in) sums of sensitivity x tensor x feature.

        As batched matrix products: whichever of (tensor x feature) and (sensitivity x tensor) is
        narrower is spelled out per pair; the other factor comes in by the product.
        """
        sense = self.sensitivity(geometry.distance) * geometry.used  # (n, K, n_sens)
        n_local, width, n_sens = sense.shape
        tensor = geometry.tensor  # (n, K, m)
        m, n_in = tensor.shape[2], features.shape[1]
        if self.unit_input:
            return (sense.transpose(1, 2) @ tensor).transpose(1, 2)  # (n, m, n_sens)
        near = features.index_select(0, geometry.neighbor.flatten()).view(n_local, width, n_in)
        if n_in <= n_sens:
            pair = (tensor.unsqueeze(3) * near.unsqueeze(2)).flatten(2)  # (n, K, m * n_in)
            env = (sense.transpose(1, 2) @ pair).view(n_local, n_sens, m, n_in).transpose(1, 2)
        else:
            pair = (tensor.unsqueeze(3) * sense.unsqueeze(2)).flatten(2)  # (n, K, m * n_sens)
            env = (pair.transpose(1, 2) @ near).view(n_local, m, n_sens, n_in)
        return env.reshape(n_local, m, n_sens * n_in)

    def kernel_tensors(self) -> list[Tensor]:
        """The parameters as native kernels take them, in their order."""
        raise NotImplementedError

    def regularized_weights(self) -> list[Tensor]:
        """Interaction and self-interaction weights."""
        return [self.int_weights, self.selfint.weight]


class NormInteraction(Interaction):
    """hippynn's layer: Z' = V S Z + W Z + b, and the norms of its tensor counterparts.

    The same weights V serve every rank (weights are tied); each rank has one scale per feature.
    """

    def __init__(self, n_in: int, n_out: int, p: Sizes, *, unit_input: bool) -> None:
        super().__init__(p, Sensitivity(p), unit_input=unit_input)
        self.cusp_reg = p.cusp_reg
        self.int_weights = nn.Parameter(torch.empty(p.n_sensitivities, n_out, n_in))
        nn.init.xavier_normal_(self.int_weights)
        self.selfint = linear(n_in, n_out)
        self.scales = nn.ParameterList([nn.Parameter(torch.randn(n_out)) for _ in range(p.l_max)])

    def forward(self, features: Tensor, geometry: Geometry) -> Tensor:
        """(n_local, n_out) from (N, n_in) features of local atoms and ghosts."""
        environment = self.environment(features, geometry)  # (n_local, m, n_sens * n_in)
        weights = self.int_weights.permute(0, 2, 1).flatten(0, 1)  # (n_sens * n_in, n_out)
        scalar, *tensors = _by_rank(environment @ weights, self.l_max)
        out = scalar[:, 0] + self.selfint(features[: scalar.shape[0]])
        for rank, (tensor, scale) in enumerate(zip(tensors, self.scales, strict=True), start=1):
            norm = torch.sqrt(_inner(tensor, tensor, rank) + self.cusp_reg)
            out = out + norm * scale
        return out

    def kernel_tensors(self) -> list[Tensor]:
        """All parameters."""
        return list(self.parameters())


class SmoothInteraction(Interaction):
    """Scalars, and invariants of the tensors of every rank, mixed linearly.

    Every rank has weights of its own. With T_l = V_l A_l the tensors, from the sums A_l of rank l
    over the neighbors: Z' = V_0 A_0 + W Z + b + U [invariants]. The invariants are
    sqrt(1 + |T_l|²) - 1 for l = 1, ..., l_max, in which there are angles between two neighbors; and
    of the first `n_triples` channels (T_a T_b T_c) / (1 + |T_a|² + |T_b|² + |T_c|²), in which there
    are three. The products are those of the bispectrum (Bartók et al., Phys. Rev. Lett. 104, 136403
    (2010)) for all `TRIPLES` of ranks up to l_max. All this is analytic where a tensor vanishes by
    symmetry, as on the sites of a crystal, and grows no faster than the density of neighbors.

    Tensors of rank l have the first n_tensor_sensitivities[l - 1] radial functions, the smoothest:
    the work per pair is that of the components times the functions, and what varies fast with both
    angle and distance matters least (linear ACE truncates its basis alike, by a total degree).

    The sums of different radial functions are nearly collinear. Weights therefore act on whitened
    sums, whose mean and covariance `whiten` takes from data; `kernel_tensors` multiplies both.
    """

    whitening: Tensor
    center: Tensor

    def __init__(self, n_in: int, n_out: int, p: Sizes, *, unit_input: bool) -> None:
        super().__init__(p, Chebyshev(p), unit_input=unit_input)
        n_sums = p.n_sensitivities * n_in
        self.int_weights = nn.Parameter(torch.randn(p.n_sensitivities, n_out, n_in) / n_sums**0.5)
        tensors = (
            nn.Parameter(torch.randn(n, p.n_channels, n_in) / (n * n_in) ** 0.5)
            for n in p.n_tensor_sensitivities
        )
        self.tensor_weights = nn.ParameterList(tensors)
        self.n_triples = p.n_triples
        self.triples = Triples.up_to(p.l_max if p.n_triples > 0 else 0)
        n_invariants = p.l_max * p.n_channels + len(self.triples.weights) * p.n_triples
        mixing = torch.empty(n_out, n_invariants)
        self.mixing = nn.Parameter(nn.init.xavier_normal_(mixing)) if p.l_max > 0 else None
        self.selfint = linear(n_in, n_out)
        self.register_buffer("whitening", torch.eye(n_sums).repeat(p.l_max + 1, 1, 1))
        self.register_buffer("center", torch.zeros(n_sums))

    def forward(self, features: Tensor, geometry: Geometry) -> Tensor:
        """(n_local, n_out) from (N, n_in) features of local atoms and ghosts."""
        environment = self.environment(features, geometry)  # (n_local, m, n_sens * n_in)
        scalar, *tensors = _by_rank(environment, self.l_max)
        own = nn.functional.linear(features[: scalar.shape[0]], self.selfint.weight, self._bias())
        out = scalar[:, 0] @ self._weights(0) + own
        if not tensors:
            return out
        assert self.mixing is not None
        mixed = []
        for rank, tensor in enumerate(tensors, start=1):
            weights = self._weights(rank)
            mixed.append(tensor[..., : len(weights)] @ weights)
        squares = [_inner(tensor, tensor, rank) for rank, tensor in enumerate(mixed, start=1)]
        # sqrt(1 + x) - 1, without the cancellation for small ones
        invariants = [square / (torch.sqrt(1.0 + square) + 1.0) for square in squares]
        if len(self.triples.weights) > 0:
            first = slice(self.n_triples)
            components = torch.cat([tensor[..., first] for tensor in mixed], dim=1)
            size = torch.stack([square[:, first] for square in squares], dim=1)
            invariants.append(self.triples(components, size).flatten(1))
        return out + nn.functional.linear(torch.cat(invariants, dim=1), self.mixing)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.triples = self.triples.to(self.int_weights.device)
        return self

    def _weights(self, rank: int) -> Tensor:
        """(n_sens of the rank * n_in, n_out or n_channels) that act on the sums of a rank."""
        own = self.int_weights if rank == 0 else self.tensor_weights[rank - 1]
        own = own.permute(0, 2, 1).flatten(0, 1)
        n = len(own)
        return self.whitening[rank, :n, :n] @ own

    def _bias(self) -> Tensor:
        return self.selfint.bias - self.center @ self._weights(0)

    def kernel_tensors(self) -> list[Tensor]:
        """Weights of every rank, mixing, self-interaction and bias, all for sums as they are."""
        n_in = self.int_weights.shape[2]
        weights = (self._weights(rank) for rank in range(self.l_max + 1))
        by_rank = [w.view(-1, n_in, w.shape[1]).permute(0, 2, 1).contiguous() for w in weights]
        mixing = self.selfint.weight.new_empty(len(self.selfint.weight), 0)
        mixing = mixing if self.mixing is None else self.mixing
        return [*by_rank, mixing, self.selfint.weight, self._bias()]

    def regularized_weights(self) -> list[Tensor]:
        """As of the other form, and the weights of tensors and invariants."""
        mixing = [] if self.mixing is None else [self.mixing]
        return [*super().regularized_weights(), *self.tensor_weights, *mixing]

    @torch.no_grad()
    def whiten(self, environment: Tensor) -> None:
        """Take mean and covariances from (n, m, n_sens * n_in) sums.

        Directions with less than 1e-4 of the largest variance count as if they had that: more would
        amplify the rounding of float32, and the noise of the labels. In small cells of a crystal
        all sums of a rank may hardly vary, so there is a least variance as well.
        """
        least = 0.0
        for rank, sums in enumerate(_by_rank(environment.to(torch.float64), self.l_max)):
            if rank == 0:
                self.center.copy_(sums.mean(dim=(0, 1)))
                moments = torch.einsum("nme,nmf->ef", sums, sums) / len(sums)
                least = _SIGNAL * float(torch.linalg.eigvalsh(moments)[-1])
                sums = sums - sums.mean(dim=0)
            n = len(self._weights(rank))
            sums = sums[..., :n]
            covariance = torch.einsum("nme,nmf->ef", sums, _dual(sums, rank)) / len(sums)
            values, vectors = torch.linalg.eigh(covariance)
            if values[-1] > 0.0:
                floor = values.clamp(min=max(float(values[-1]) / _CONDITION, least))
                self.whitening[rank, :n, :n] = vectors / floor.sqrt()


class Indices(NamedTuple):
    """Species, and the slots of every atom's K neighbors.

    Parameters
    ----------
    species : Tensor
        (N,) int64, local atoms first.
    pair, neighbor : Tensor
        (n_local, K) int64, the pair in a slot and the atom at its other end; any in unused slots.
    used : Tensor
        (n_local, K) bool.
    """

    species: Tensor
    pair: Tensor
    neighbor: Tensor
    used: Tensor


class Geometry:
    """Padded pair geometry that all interaction layers share."""

    def __init__(self, indices: Indices, r_ij: Tensor, l_max: int) -> None:
        pair = indices.pair  # (n_local, K)
        self.used = indices.used.unsqueeze(2)
        self.neighbor = indices.neighbor
        vector = r_ij.index_select(0, pair.flatten()).view(*pair.shape, 3)
        self.distance = torch.linalg.vector_norm(vector, dim=2)  # (n_local, K)
        self.tensor = tensor_components(vector / self.distance.unsqueeze(2), l_max)


def _by_rank(components: Tensor, l_max: int) -> Sequence[Tensor]:
    """Split (n, (l_max + 1)², ...) tensor components by rank."""
    return components.split([2 * rank + 1 for rank in range(l_max + 1)], dim=1)


def _inner(a: Tensor, b: Tensor, rank: int) -> Tensor:
    """Inner product over dim 1 of tensors of a rank."""
    return (a * _dual(b, rank)).sum(dim=1)


def _dual(tensor: Tensor, rank: int) -> Tensor:
    """What the components of dim 1 are multiplied with in an inner product.

    Rank 2 has five of nine components, with zz = -xx - yy.
    """
    if rank != 2:
        return tensor
    swapped = torch.zeros_like(tensor)
    swapped[:, 0], swapped[:, 3] = tensor[:, 3], tensor[:, 0]
    return 2.0 * tensor + swapped


@lru_cache
def triple_coupling(*ranks: int) -> np.ndarray:
    """(2 a + 1, 2 b + 1, 2 c + 1) float64, of the product; it is |A| |B| |C| for aligned tensors.

    There is one invariant tensor of these ranks: the integral over the sphere of the product of
    components, which the points and weights take exactly.
    """
    z, weights = np.polynomial.legendre.leggauss(8)
    angle = np.arange(16) * (2.0 * math.pi / 16)
    z, angle = np.repeat(z, 16), np.tile(angle, 8)
    radius = np.sqrt(1.0 - z**2)
    points = torch.from_numpy(np.stack([radius * np.cos(angle), radius * np.sin(angle), z], axis=1))
    of_rank = _by_rank(tensor_components(points, HIGHEST_RANK), HIGHEST_RANK)
    duals = [_dual(of_rank[rank], rank).numpy() for rank in ranks]
    coupling = np.einsum("q,qi,qj,qk->ijk", np.repeat(weights, 16), *duals)
    aligned = [of_rank[rank][0].numpy() for rank in ranks]
    sizes = [math.sqrt(tensor @ dual[0]) for tensor, dual in zip(aligned, duals, strict=True)]
    return coupling * math.prod(sizes) / np.einsum("ijk,i,j,k->", coupling, *aligned)


@dataclass(frozen=True)
class Triples:
    """Invariant products of three tensors, as sums of monomials of their components.

    Parameters
    ----------
    index : Tensor
        (3, E) int64, which components of rank 1 to l_max, side by side, are multiplied.
    weights : Tensor
        (P, E) float64, how the monomials are summed to products.
    ranks : Tensor
        (P, l_max) float64, how many tensors of a rank a product has.
    """

    index: Tensor
    weights: Tensor
    ranks: Tensor

    @classmethod
    def up_to(cls, l_max: int) -> Triples:
        """All `TRIPLES` of ranks up to `l_max`, each distinct monomial once."""
        triples = [ranks for ranks in TRIPLES if max(ranks) <= l_max]
        monomials: list[dict[tuple[int, ...], float]] = []
        for ranks in triples:
            coupling = triple_coupling(*ranks)
            found: dict[tuple[int, ...], float] = {}
            for at in np.argwhere(np.abs(coupling) > 1e-9):
                # Rank l starts at l² - 1 where rank 0 is left out.
                key = tuple(sorted(rank**2 - 1 + int(i) for rank, i in zip(ranks, at, strict=True)))
                found[key] = found.get(key, 0.0) + float(coupling[tuple(at)])
            monomials.append(found)
        index = [key for found in monomials for key in found]
        weights = torch.block_diag(
            *(torch.tensor([list(found.values())], dtype=torch.float64) for found in monomials)
        )
        counts = [[float(ranks.count(rank)) for rank in range(1, l_max + 1)] for ranks in triples]
        n = len(triples)
        return cls(
            torch.tensor(index, dtype=torch.int64).reshape(-1, 3).T,
            weights.reshape(n, -1) if n else torch.zeros(0, 0, dtype=torch.float64),
            torch.tensor(counts, dtype=torch.float64).reshape(n, l_max),
        )

    def to(self, device: torch.device) -> Triples:
        """On a device. Types stay, whatever the network's: coefficients are exact."""
        return Triples(*(t.to(device) for t in (self.index, self.weights, self.ranks)))

    def __call__(self, components: Tensor, squares: Tensor) -> Tensor:
        """(n, P, channels), bounded, from (n, (l_max + 1)² - 1, channels) and |T|²."""
        i, j, k = self.index
        monomials = components[:, i] * components[:, j] * components[:, k]
        size = 1.0 + self.ranks.to(squares.dtype) @ squares
        return self.weights.to(components.dtype) @ monomials / size


def linear(n_in: int, n_out: int) -> nn.Linear:
    """A linear map with weights as hippynn starts them."""
    layer = nn.Linear(n_in, n_out)
    nn.init.xavier_normal_(layer.weight)
    return layer
