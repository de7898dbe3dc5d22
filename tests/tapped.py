"""A small potential with features of all kinds, for tests of feature distillation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from potstill.models import Edges, LocalOutput, Potential, TapSpec
from potstill.species import SpeciesTable


class Tapped(Potential):
    """Features of pairs, summed to scalars and vectors of atoms, and one more layer.

    Its layers come in the order `embedding`, `radial` (tap `pair`), `message` (`message`), `vector`
    (`message.vector`), `update` (`update`), `output`.
    """

    kind = "tapped"

    def __init__(
        self, species_table: SpeciesTable, width: int = 6, cutoff: float = 3.5, seed: int = 0
    ) -> None:
        super().__init__(species_table, cutoff)
        self.width, self.seed = width, seed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(len(species_table), width)
            self.radial = nn.Linear(4, width)
            self.message = nn.Linear(width, width)
            self.vector = nn.Linear(width, width, bias=False)
            self.update = nn.Linear(2 * width, width)
            self.output = nn.Linear(width, 1)

    @property
    def taps(self) -> dict[str, TapSpec]:
        return {
            "pair": TapSpec("edge_scalar", self.width),
            "message": TapSpec("node_scalar", self.width),
            "message.vector": TapSpec("node_vector", self.width),
            "update": TapSpec("node_scalar", self.width),
        }

    @property
    def default_tap(self) -> str:
        return "update"

    def forward(
        self, species: Tensor, edges: Edges, r_ij: Tensor, n_local: int, taps: Sequence[str] = ()
    ) -> LocalOutput:
        r_ij = r_ij.to(self.dtype)
        distance = torch.linalg.vector_norm(r_ij, dim=1, keepdim=True)
        x = distance / self.cutoff
        envelope = (1.0 - x).clamp(min=0.0) ** 3
        radial = self.radial(torch.cat([x**k for k in range(4)], dim=1))
        atom = self.embedding(species)
        pair = envelope * torch.tanh(radial) * (1.0 + atom[edges.neighbor])
        zeros = pair.new_zeros(n_local, self.width)
        message = atom[:n_local] + self.message(zeros.index_add(0, edges.center, pair))
        direction = (r_ij / distance).unsqueeze(2) * self.vector(pair).unsqueeze(1)
        vector = pair.new_zeros(n_local, 3, self.width).index_add(0, edges.center, direction)
        both = torch.cat([message, vector.square().sum(dim=1)], dim=1)
        update = torch.tanh(self.update(both))
        found = {"pair": pair, "message": message, "message.vector": vector, "update": update}
        atomic = self.output(update).squeeze(1).to(torch.float64)
        return LocalOutput(atomic, {name: found[name] for name in taps})

    def hyperparameters(self) -> dict[str, Any]:
        return {"width": self.width, "cutoff": self.cutoff, "seed": self.seed}


class Choosing(Tapped):
    """Its features of pairs are those of the shorter half of the cutoff alone."""

    kind = "choosing"

    @property
    def taps(self) -> dict[str, TapSpec]:
        return {"edges": TapSpec("edge_scalar", 1), **super().taps}

    def forward(
        self, species: Tensor, edges: Edges, r_ij: Tensor, n_local: int, taps: Sequence[str] = ()
    ) -> LocalOutput:
        own = [tap for tap in taps if tap != "edges"]
        output = super().forward(species, edges, r_ij, n_local, own)
        chosen = torch.linalg.vector_norm(r_ij, dim=1) < 0.8 * self.cutoff
        features = dict(output.features)
        if "pair" in features:
            features["pair"] = features["pair"][chosen]
        if "edges" in taps:
            features["edges"] = chosen.nonzero()
        return LocalOutput(output.atomic_energies, features)
