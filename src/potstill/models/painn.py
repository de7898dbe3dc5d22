"""PaiNN: equivariant messages between scalar and vector features.

Schütt, Unke, Gastegger, ICML 2021 (arXiv:2102.03150), and the variant of the Open Catalyst Project
(OCP), whose names the hyper-parameters keep.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from potstill.models.base import (
    Edges,
    FeatureRecorder,
    LocalOutput,
    Potential,
    TapSpec,
    refuse_ghosts,
    xavier_linear,
)
from potstill.models.hyper import Hyperparameters
from potstill.radial import bessel_basis, cosine_envelope, gaussian_basis, polynomial_envelope
from potstill.species import SpeciesTable

Variant = Literal["original", "ocp"]

_TABLE: dict[str, Any] = {
    "num_rbf": 128,
    "cutoff": 12.0,
    "max_neighbors": 50,
    "direct_forces": True,
    "variant": "ocp",
}

#: PaiNN-big of Ekström Kelvinius et al. (Tables 4 and 6) by data set.
PAINN_BIG: dict[str, dict[str, Any]] = {
    "oc20": {"hidden_channels": 512, "num_layers": 6} | _TABLE,
    "coll": {"hidden_channels": 256, "num_layers": 6} | _TABLE,
}

#: PaiNN-small of the same tables.
PAINN_SMALL: dict[str, dict[str, Any]] = {
    "oc20": {"hidden_channels": 256, "num_layers": 4} | _TABLE,
    "coll": {"hidden_channels": 128, "num_layers": 4} | _TABLE,
}

#: Added under the square root of norms, whose slope at zero would be infinite.
_CUSP = 1e-8


class ScaledSiLU(nn.Module):
    """silu(x) / 0.6, which keeps the variance of normal variables near one."""

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise."""
        return nn.functional.silu(x) * (1.0 / 0.6)


class Message(nn.Module):
    """The message block: sums over neighbors of scalars and vectors.

    With phi = network(x_j) and W the filters, both in three parts s, u and v: x gains
    sum_j phi_s W_s, and the vectors sum_j phi_u W_u r_ij / |r_ij| + phi_v W_v v_j.
    """

    def __init__(self, hidden_channels: int, num_rbf: int, variant: Variant) -> None:
        super().__init__()
        ocp = variant == "ocp"
        self.norm = nn.LayerNorm(hidden_channels) if ocp else nn.Identity()
        self.network = _network(hidden_channels, hidden_channels, 3 * hidden_channels, variant)
        self.filters = xavier_linear(num_rbf, 3 * hidden_channels)
        self.unit_scale = hidden_channels**-0.5 if ocp else 1.0
        self.vector_scale = (3.0 * hidden_channels) ** -0.5 if ocp else 1.0

    def forward(
        self, x: Tensor, vector: Tensor | None, graph: _Graph, n_local: int
    ) -> tuple[Tensor, Tensor]:
        """(n_local, F) and (n_local, 3, F); `vector` is None where all vectors are zero."""
        edges = graph.edges
        neighbor = edges.neighbor
        filters = self.filters(graph.basis) * graph.envelope
        # Not chunk: where a last part is unused, TorchScript's gradient of it is wrong.
        phi = self.network(self.norm(x)).split(x.shape[1], dim=1)
        w = filters.split(x.shape[1], dim=1)
        scalars = phi[0].index_select(0, neighbor) * w[0]
        along = (self.unit_scale * phi[1]).index_select(0, neighbor) * w[1]
        vectors = along.unsqueeze(1) * graph.unit.unsqueeze(2)  # (E, 3, F)
        if vector is not None:
            carried = (self.vector_scale * phi[2]).index_select(0, neighbor) * w[2]
            vectors = vectors + carried.unsqueeze(1) * vector.index_select(0, neighbor)
        return edges.sum_to_centers(scalars, n_local), edges.sum_to_centers(vectors, n_local)


class Update(nn.Module):
    """The update block: scalars and vectors of an atom mix.

    With a = network(x, |V v|) in three parts: x gains a_s + a_d (U v · V v), and v gains a_v U v.
    """

    def __init__(self, hidden_channels: int, variant: Variant) -> None:
        super().__init__()
        ocp = variant == "ocp"
        self.mix = xavier_linear(hidden_channels, 2 * hidden_channels, bias=False)
        self.network = _network(2 * hidden_channels, hidden_channels, 3 * hidden_channels, variant)
        self.dot_scale = hidden_channels**-0.5 if ocp else 1.0
        self.scale = 0.5**0.5 if ocp else 1.0

    def forward(self, x: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
        """What is added to (N, F) scalars and (N, 3, F) vectors."""
        u, v = self.mix(vector).chunk(2, dim=2)
        a = self.network(torch.cat([x, _norm(v)], dim=1)).split(x.shape[1], dim=1)
        dot = self.dot_scale * (u * v).sum(dim=1)
        return self.scale * (a[0] + a[1] * dot), a[2].unsqueeze(1) * u


class GatedEquivariantBlock(nn.Module):
    """Scalars and vectors to fewer of both; scalars gate the vectors."""

    def __init__(self, n_in: int, n_out: int, variant: Variant) -> None:
        super().__init__()
        self.for_norms = xavier_linear(n_in, n_in, bias=False)
        self.for_vectors = xavier_linear(n_in, n_out, bias=False)
        self.network = _network(2 * n_in, n_in, 2 * n_out, variant)
        self.activation = _activation(variant)

    def forward(self, x: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
        """(N, n_out) and (N, 3, n_out)."""
        both = torch.cat([x, _norm(self.for_norms(vector))], dim=1)
        scalar, gate = self.network(both).chunk(2, dim=1)
        return self.activation(scalar), gate.unsqueeze(1) * self.for_vectors(vector)


class PaiNNHyperparameters(Hyperparameters):
    """Hyper-parameters of PaiNN.

    Parameters
    ----------
    hidden_channels : int
        Number F of scalar and of vector features of an atom.
    num_layers : int
        Message blocks, each with an update block after it.
    num_rbf : int
        Radial functions.
    cutoff : float
        Å.
    max_neighbors : int, optional
        Drop pairs that are not among so many nearest of either atom; energies then jump when
        neighbors change places.
    direct_forces : bool
        Predict forces from the vectors by two gated equivariant blocks, instead of deriving them
        from the energy: faster, but energy is not conserved and there is no stress.
    variant : {"original", "ocp"}
        The paper's, or that of the Open Catalyst Project; see `PaiNN`.
    """

    hidden_channels: int = Field(default=128, ge=2)
    num_layers: int = Field(default=3, ge=1)
    num_rbf: int = Field(default=20, ge=2)
    cutoff: float = Field(default=5.0, gt=0)
    max_neighbors: int | None = Field(default=None, ge=1)
    direct_forces: bool = False
    variant: Variant = "original"


class PaiNN(Potential):
    """Polarizable atom interaction neural network.

    Parameters
    ----------
    species_table : SpeciesTable
        The species, each with an embedding of its own.
    *values, **named
        Fields of `PaiNNHyperparameters`, in their order or by name.

    Notes
    -----
    Both variants multiply filters, a linear map of radial functions, by an envelope; read the
    energy of an atom from its scalars by a network with one hidden layer of width F / 2; and put
    1e-8 under the roots of norms. The original has radial functions sin(n pi r / cutoff) / r, the
    cosine envelope, SiLU, and no scales. The variant of OCP has

    - Gaussians from zero to the cutoff, as wide as their spacing; a polynomial envelope, p = 5;
    - a layer norm of the scalars before each message network;
    - vector messages times 1 / sqrt(F), and the part from the neighbors' vectors times 1 / sqrt(3);
    - scalars divided by sqrt(2) after the message is added, and the scalar update by sqrt(2);
    - U v · V v times 1 / sqrt(F);
    - SiLU divided by 0.6, and embeddings that start uniform in ±sqrt(3) instead of normal.

    It departs from OCP's program in what follows. The envelope multiplies the filters with their
    bias, not the radial functions alone: else a trained bias makes energies jump at the cutoff.
    With zero biases, as at the start, both are the same. Forces by gradient are those of the energy
    (OCP differentiates the sum of the scalars). `max_neighbors` does not depend on the order of
    atoms. There are no fitted scale factors after the updates.

    Taps, with k from 1: `embedding`; `message_k` and `update_k`, scalars after the block, and
    `message_k.vector` and `update_k.vector`; `last`; with direct forces, `last.vector`, which the
    last linear layer before the forces reads.
    """

    kind = "painn"

    hyper_class = PaiNNHyperparameters
    hyper: PaiNNHyperparameters

    def __init__(self, species_table: SpeciesTable, *values: Any, **named: Any) -> None:
        p = PaiNNHyperparameters.of(*values, **named)
        super().__init__(species_table, p.cutoff, p)
        self.direct_forces = p.direct_forces
        self.traceable = p.max_neighbors is None
        hidden_channels, num_layers, variant = p.hidden_channels, p.num_layers, p.variant
        half = hidden_channels // 2
        self.embedding = nn.Embedding(len(species_table), hidden_channels)
        if variant == "ocp":
            nn.init.uniform_(self.embedding.weight, -math.sqrt(3.0), math.sqrt(3.0))
        self.messages = nn.ModuleList(
            Message(hidden_channels, p.num_rbf, variant) for _ in range(num_layers)
        )
        self.updates = nn.ModuleList(Update(hidden_channels, variant) for _ in range(num_layers))
        self.message_scale = 0.5**0.5 if variant == "ocp" else 1.0
        self.hidden = nn.Sequential(xavier_linear(hidden_channels, half), _activation(variant))
        self.energy_layer = xavier_linear(half, 1)
        self.force_blocks: nn.ModuleList | None = None
        if p.direct_forces:
            widths = ((hidden_channels, half), (half, 1))
            self.force_blocks = nn.ModuleList(
                GatedEquivariantBlock(n_in, n_out, variant) for n_in, n_out in widths
            )

    @property
    def reach(self) -> float:
        """A cutoff per layer, and one more where the neighbors of neighbors decide which count."""
        capped = self.hyper.max_neighbors is not None
        return (self.hyper.num_layers + capped) * self.cutoff

    @property
    def taps(self) -> dict[str, TapSpec]:
        """Scalars and vectors after each block, and what the last layers read."""
        scalar = TapSpec("node_scalar", self.hyper.hidden_channels)
        vector = TapSpec("node_vector", self.hyper.hidden_channels)
        taps = {"embedding": scalar}
        for k in range(1, self.hyper.num_layers + 1):
            for block in ("message", "update"):
                taps |= {f"{block}_{k}": scalar, f"{block}_{k}.vector": vector}
        taps["last"] = TapSpec("node_scalar", self.hyper.hidden_channels // 2)
        if self.direct_forces:
            taps["last.vector"] = TapSpec("node_vector", self.hyper.hidden_channels // 2)
        return taps

    def forward(
        self, species: Tensor, edges: Edges, r_ij: Tensor, n_local: int, taps: Sequence[str] = ()
    ) -> LocalOutput:
        """(n_local,) atomic energies, and (n_local, 3) forces where they are direct.

        Ghosts are refused where there are several layers or a limited number of neighbors.
        """
        if self.hyper.num_layers > 1 or self.hyper.max_neighbors is not None:
            refuse_ghosts("PaiNN", species, n_local)
        found = FeatureRecorder(taps)
        graph = self._graph(edges, r_ij, n_local)
        x = self.embedding(species)
        found.keep("embedding", x[:n_local])
        vector: Tensor | None = None
        for k, (message, update) in enumerate(self._layers(), start=1):
            dx, dv = message(x, vector, graph, n_local)
            x = self.message_scale * (x[:n_local] + dx)
            vector = dv if vector is None else vector + dv
            found.keep(f"message_{k}", x)
            found.keep(f"message_{k}.vector", vector)
            dx, dv = update(x, vector)
            x, vector = x + dx, vector + dv
            found.keep(f"update_{k}", x)
            found.keep(f"update_{k}.vector", vector)
        last = self.hidden(x)
        found.keep("last", last)
        atomic = self.energy_layer(last)[:, 0]
        if self.force_blocks is None:
            return LocalOutput(atomic, found.features)
        assert vector is not None  # there is at least one layer
        first_block, last_block = self.force_blocks
        x, vector = first_block(x, vector)
        found.keep("last.vector", vector)
        _, forces = last_block(x, vector)
        return LocalOutput(atomic, found.features, forces[:, :, 0])

    def _graph(self, edges: Edges, r_ij: Tensor, n_local: int) -> _Graph:
        """Geometry that all message blocks share."""
        if self.hyper.max_neighbors is not None:
            distance = torch.linalg.vector_norm(r_ij, dim=1)
            near = edges.among_nearest(distance, n_local, self.hyper.max_neighbors).nonzero()[:, 0]
            edges, r_ij = Edges(edges.center[near], edges.neighbor[near]), r_ij[near]
        r_ij = r_ij.to(self.dtype)
        r = torch.linalg.vector_norm(r_ij, dim=1)
        if self.hyper.variant == "ocp":
            basis = gaussian_basis(r, self.hyper.num_rbf, self.cutoff)
            envelope = polynomial_envelope(r, self.cutoff)
        else:
            basis = bessel_basis(r, self.hyper.num_rbf, self.cutoff)
            envelope = cosine_envelope(r, self.cutoff)
        return _Graph(edges, basis, envelope.unsqueeze(1), r_ij / r.unsqueeze(1))

    def _layers(self) -> Iterable[tuple[Message, Update]]:
        return cast(Iterable[tuple[Message, Update]], zip(self.messages, self.updates, strict=True))


@dataclass(frozen=True)
class _Graph:
    """Pairs, (E, num_rbf) radial functions, (E, 1) envelope and (E, 3) directions."""

    edges: Edges
    basis: Tensor
    envelope: Tensor
    unit: Tensor


def _norm(vector: Tensor) -> Tensor:
    """(N, F) from (N, 3, F)."""
    return torch.sqrt(vector.square().sum(dim=1) + _CUSP)


def _activation(variant: Variant) -> nn.Module:
    return ScaledSiLU() if variant == "ocp" else nn.SiLU()


def _network(n_in: int, n_hidden: int, n_out: int, variant: Variant) -> nn.Sequential:
    first, second = xavier_linear(n_in, n_hidden), xavier_linear(n_hidden, n_out)
    return nn.Sequential(first, _activation(variant), second)
