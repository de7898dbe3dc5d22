"""A potential as a metatomic model: what its engines call, compiled by TorchScript."""

# No postponed annotations: metatomic looks at them, and knows those of `typing` alone.
# ruff: noqa: UP006, UP035, UP045
# mypy: disable-error-code="valid-type,attr-defined"

from typing import Dict, List, Optional

import torch

from potstill.errors import require

_metatensor = require("metatensor.torch", extra="metatomic", purpose="by its models")
_metatomic = require("metatomic.torch", extra="metatomic", purpose="by its models")
Labels = _metatensor.Labels
TensorBlock = _metatensor.TensorBlock
TensorMap = _metatensor.TensorMap
ModelOutput = _metatomic.ModelOutput
NeighborListOptions = _metatomic.NeighborListOptions
System = _metatomic.System


class PotstillModel(torch.nn.Module):
    """Energies of systems or atoms, which engines differentiate.

    Parameters
    ----------
    energies : ScriptModule
        As of `potstill.models.tracing.traced`.
    numbers : list of int
        Atomic numbers by species.
    cutoff : float
        Å.
    """

    species: torch.Tensor

    def __init__(self, energies: torch.jit.ScriptModule, numbers: List[int], cutoff: float) -> None:
        super().__init__()
        self.energies = energies
        species = torch.full((max(numbers) + 1,), -1, dtype=torch.int64)
        species[numbers] = torch.arange(len(numbers))
        self.register_buffer("species", species)
        self.pairs = NeighborListOptions(cutoff=cutoff, full_list=True, strict=True)

    def requested_neighbor_lists(self) -> List[NeighborListOptions]:
        """The pairs within the cutoff, in both directions."""
        return [self.pairs]

    def forward(
        self,
        systems: List[System],
        outputs: Dict[str, ModelOutput],
        selected_atoms: Optional[Labels] = None,
    ) -> Dict[str, TensorMap]:
        """`energy`, eV, of systems or atoms; of the selected atoms alone if there are such."""
        results: Dict[str, TensorMap] = {}
        if "energy" not in outputs or len(systems) == 0:
            return results
        species: List[torch.Tensor] = []
        center: List[torch.Tensor] = []
        neighbor: List[torch.Tensor] = []
        vectors: List[torch.Tensor] = []
        atoms: List[torch.Tensor] = []
        n_atoms = 0
        for number, system in enumerate(systems):
            block = system.get_neighbor_list(self.pairs)
            first = block.samples.column("first_atom").to(torch.int64)
            second = block.samples.column("second_atom").to(torch.int64)
            order = torch.argsort(first, stable=True)
            center.append(first[order] + n_atoms)
            neighbor.append(second[order] + n_atoms)
            vectors.append(block.values.reshape(-1, 3)[order])
            species.append(self.species[system.types.to(torch.int64)])
            own = torch.arange(len(system), device=system.device)
            atoms.append(torch.stack([torch.full_like(own, number), own], dim=1))
            n_atoms += len(system)
        energies = self.energies(
            torch.cat(species), torch.cat(center), torch.cat(neighbor), torch.cat(vectors)
        )
        labels = Labels(["system", "atom"], torch.cat(atoms).to(torch.int32))
        if selected_atoms is not None:
            chosen = labels.select(selected_atoms)
            energies = energies[chosen]
            labels = Labels(["system", "atom"], labels.values[chosen])
        if outputs["energy"].sample_kind == "system":
            totals = torch.zeros(len(systems), dtype=energies.dtype, device=energies.device)
            energies = totals.index_add(0, labels.values[:, 0].to(torch.int64), energies)
            numbers = torch.arange(len(systems), dtype=torch.int32, device=energies.device)
            labels = Labels(["system"], numbers.unsqueeze(1))
        zero = torch.zeros(1, 1, dtype=torch.int32, device=energies.device)
        values = TensorBlock(
            values=energies.unsqueeze(1),
            samples=labels,
            components=torch.jit.annotate(List[Labels], []),
            properties=Labels(["energy"], zero),
        )
        results["energy"] = TensorMap(Labels(["_"], zero), [values])
        return results
