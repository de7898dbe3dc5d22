"""Potentials as TorchScript, which other programs run without Python."""

from __future__ import annotations

import warnings
from copy import deepcopy
from typing import cast

import torch
from torch import Tensor, nn

from potstill.errors import ModelError
from potstill.models.base import Edges, Potential
from potstill.neighbors import build_neighbor_list, pair_vectors
from potstill.structures import Structures


class _AtomicEnergies(nn.Module):
    """A potential as a function of tensors alone."""

    def __init__(self, potential: Potential) -> None:
        super().__init__()
        self.potential = potential

    def forward(self, species: Tensor, center: Tensor, neighbor: Tensor, r_ij: Tensor) -> Tensor:
        output = self.potential(species, Edges(center, neighbor), r_ij, species.shape[0])
        return output.atomic_energies.to(torch.float64)


def traced(potential: Potential) -> torch.jit.ScriptModule:
    """Record a potential on an example, as TorchScript.

    Parameters
    ----------
    potential : Potential
        On the CPU; it is copied.

    Returns
    -------
    ScriptModule
        From species (N,) int64, centers and neighbors (E,) int64, sorted by center, and vectors
        (E, 3) Å, to atomic energies (N,) eV, float64; of any sizes, differentiable in the vectors.

    Raises
    ------
    ModelError
        If it is not `traceable`.
    """
    if not potential.traceable:
        raise ModelError(
            f"{potential.kind} cannot be written as TorchScript: its operations depend on the "
            "numbers of neighbors"
        )
    network = _AtomicEnergies(deepcopy(potential)).eval().requires_grad_(False)
    kinds = torch.arange(2 * len(potential.species_table) + 6)
    steps = torch.tensor([0.4, 0.2, 0.1], dtype=torch.float64) * potential.cutoff
    structures = Structures(
        positions=steps * torch.stack([kinds, kinds % 2, kinds % 3], dim=1),
        species=kinds % len(potential.species_table),
        system_index=torch.zeros_like(kinds),
        cell=torch.zeros(1, 3, 3, dtype=torch.float64),
        pbc=torch.zeros(1, 3, dtype=torch.bool),
        species_table=potential.species_table,
    )
    pairs = build_neighbor_list(structures, potential.cutoff)
    example = (structures.species, pairs.center, pairs.neighbor, pair_vectors(structures, pairs))
    with warnings.catch_warnings():
        # Of conditions that concern hyper-parameters; and tracing itself is called outdated.
        warnings.simplefilter("ignore")
        return cast(torch.jit.ScriptModule, torch.jit.trace(network, example, check_trace=False))
