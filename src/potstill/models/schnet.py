"""SchNet: continuous-filter convolutions on scalar features.

Schütt, Kindermans, Sauceda, Chmiela, Tkatchenko, Müller, NeurIPS 2017 (arXiv:1706.08566), in the
form of the Open Catalyst Project, whose names the hyper-parameters keep.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, cast

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
from potstill.radial import cosine_envelope, gaussian_basis
from potstill.species import SpeciesTable

#: Hyper-parameters of Ekström Kelvinius et al. (Table 5) by data set.
SCHNET: dict[str, dict[str, Any]] = {
    "oc20": {
        "hidden_channels": 1024,
        "num_filters": 256,
        "num_interactions": 5,
        "num_gaussians": 200,
        "cutoff": 6.0,
    },
    "coll": {
        "hidden_channels": 128,
        "num_filters": 128,
        "num_interactions": 6,
        "num_gaussians": 50,
        "cutoff": 12.0,
    },
}


class ShiftedSoftplus(nn.Module):
    """ln(1 + exp(x)) - ln 2, zero at zero."""

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise."""
        return nn.functional.softplus(x) - math.log(2.0)


class SchNetInteraction(nn.Module):
    """The interaction block: what is added to the features of an atom.

    W3 ssp(W2 sum_j (W1 x_j) * filter(r_ij)), where W2 and W3 have biases.
    """

    def __init__(self, hidden_channels: int, num_filters: int, num_gaussians: int) -> None:
        super().__init__()
        self.filter_network = nn.Sequential(
            xavier_linear(num_gaussians, num_filters),
            ShiftedSoftplus(),
            xavier_linear(num_filters, num_filters),
        )
        self.before = xavier_linear(hidden_channels, num_filters, bias=False)
        self.after = nn.Sequential(
            xavier_linear(num_filters, hidden_channels),
            ShiftedSoftplus(),
            xavier_linear(hidden_channels, hidden_channels),
        )

    def filters(self, basis: Tensor, envelope: Tensor) -> Tensor:
        """(E, num_filters) from (E, num_gaussians) and (E,)."""
        return self.filter_network(basis) * envelope.unsqueeze(1)

    def forward(self, x: Tensor, filters: Tensor, edges: Edges, n_local: int) -> Tensor:
        """(n_local, hidden_channels) from (N, hidden_channels) features."""
        messages = self.before(x).index_select(0, edges.neighbor) * filters
        return self.after(edges.sum_to_centers(messages, n_local))


class SchNetHyperparameters(Hyperparameters):
    """Hyper-parameters of SchNet.

    Parameters
    ----------
    hidden_channels : int
        Width F of the features of an atom.
    num_filters : int
        Width of the convolutions.
    num_interactions : int
        Number of interaction blocks.
    num_gaussians : int
        Radial functions, from zero to the cutoff.
    cutoff : float
        Å.
    """

    hidden_channels: int = Field(default=128, ge=2)
    num_filters: int = Field(default=128, ge=1)
    num_interactions: int = Field(default=6, ge=1)
    num_gaussians: int = Field(default=50, ge=2)
    cutoff: float = Field(default=6.0, gt=0)


class SchNet(Potential):
    """SchNet with conservative forces.

    Parameters
    ----------
    species_table : SpeciesTable
        The species, each with an embedding of its own.
    *values, **named
        Fields of `SchNetHyperparameters`, in their order or by name.

    Notes
    -----
    A filter is a network of two linear layers with one shifted softplus between them, times a
    cosine envelope. The paper of 2017 has no envelope, which makes energies jump at the cutoff, and
    a second softplus. The energy of an atom is a network of one hidden layer of width F / 2;
    energies of atoms are summed (`readout: add` of the Open Catalyst Project).

    Taps: `embedding`, `filter_k` (pairs) and `interaction_k` for k from 1, and `last`.
    """

    kind = "schnet"
    traceable = True

    hyper_class = SchNetHyperparameters
    hyper: SchNetHyperparameters

    def __init__(self, species_table: SpeciesTable, *values: Any, **named: Any) -> None:
        p = SchNetHyperparameters.of(*values, **named)
        super().__init__(species_table, p.cutoff, p)
        self.embedding = nn.Embedding(len(species_table), p.hidden_channels)
        self.interactions = nn.ModuleList(
            SchNetInteraction(p.hidden_channels, p.num_filters, p.num_gaussians)
            for _ in range(p.num_interactions)
        )
        self.hidden = nn.Sequential(
            xavier_linear(p.hidden_channels, p.hidden_channels // 2), ShiftedSoftplus()
        )
        self.energy_layer = xavier_linear(p.hidden_channels // 2, 1)

    @property
    def reach(self) -> float:
        """A cutoff per interaction block."""
        return self.hyper.num_interactions * self.cutoff

    @property
    def taps(self) -> dict[str, TapSpec]:
        """Features of atoms after the embedding and each block, filters, and the last layer."""
        taps = {"embedding": TapSpec("node_scalar", self.hyper.hidden_channels)}
        for k in range(1, self.hyper.num_interactions + 1):
            taps[f"filter_{k}"] = TapSpec("edge_scalar", self.hyper.num_filters)
            taps[f"interaction_{k}"] = TapSpec("node_scalar", self.hyper.hidden_channels)
        return taps | {"last": TapSpec("node_scalar", self.hyper.hidden_channels // 2)}

    def forward(
        self, species: Tensor, edges: Edges, r_ij: Tensor, n_local: int, taps: Sequence[str] = ()
    ) -> LocalOutput:
        """(n_local,) atomic energies; ghosts are refused where there are several blocks."""
        if self.hyper.num_interactions > 1:
            refuse_ghosts("SchNet", species, n_local)
        found = FeatureRecorder(taps)
        r = torch.linalg.vector_norm(r_ij.to(self.dtype), dim=1)
        basis = gaussian_basis(r, self.hyper.num_gaussians, self.cutoff)
        envelope = cosine_envelope(r, self.cutoff)
        x = self.embedding(species)
        found.keep("embedding", x[:n_local])
        for k, block in enumerate(cast(Iterable[SchNetInteraction], self.interactions), start=1):
            filters = block.filters(basis, envelope)
            x = x[:n_local] + block(x, filters, edges, n_local)
            found.keep(f"filter_{k}", filters)
            found.keep(f"interaction_{k}", x)
        last = self.hidden(x)
        found.keep("last", last)
        return LocalOutput(self.energy_layer(last)[:, 0], found.features)
