"""Batched dynamics of any potential in torch-sim. Needs the extra `torch-sim`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from potstill.calculators import BatchCalculator
from potstill.checkpoint import load_potential
from potstill.errors import DataError, ModelError, require
from potstill.models import Potential
from potstill.structures import Structures

_torch_sim = require("torch_sim", extra="torch-sim", purpose="for batched dynamics")
_interface = require("torch_sim.models.interface", extra="torch-sim", purpose="as well")


class TorchSimModel(_interface.ModelInterface):  # type: ignore[name-defined]
    """A potstill potential as a model of torch-sim.

    Gives `energy` (S,), `forces` (N, 3) and `stress` (S, 3, 3), eV and Å, tension positive; the
    stress is NaN without full periodicity, and left out for potentials with direct forces. Models
    that native kernels serve are evaluated by them, one system after the other, with neighbor lists
    that last until atoms have moved; others in one batch by PyTorch.

    Parameters
    ----------
    potential : Potential or path
        A model, or a checkpoint. The device is that of the potential.
    dtype : torch.dtype
        Of states and results. Energies are sums in float64, whatever the network computes in.
    compute_stress : bool
        Whether to give the stress.
    skin : float
        How much farther than the potential neighbor lists reach, Å.
    """

    def __init__(
        self,
        potential: Potential | str | Path,
        *,
        dtype: torch.dtype = torch.float64,
        compute_stress: bool = True,
        skin: float = 1.0,
    ) -> None:
        super().__init__()
        if not isinstance(potential, Potential):
            potential, _ = load_potential(potential)
        self._calculator = BatchCalculator(potential, skin)
        numbers = potential.species_table.atomic_numbers
        if bool((numbers < 0).any()):
            raise ModelError("torch-sim knows atoms by their atomic numbers, and beads have none")
        self.potential = potential
        self._device, self._dtype = potential.device, dtype
        self._compute_forces = True
        self._compute_stress = compute_stress and not potential.direct_forces
        self._memory_scales_with = "n_atoms_x_density"
        self._species = torch.full((int(numbers.max()) + 1,), -1, dtype=torch.int64)
        self._species[numbers] = torch.arange(len(numbers))

    def forward(self, state: Any, **_: Any) -> dict[str, Tensor]:
        """Energies, forces and stress of a `SimState`, or of a dictionary of its fields.

        Raises
        ------
        DataError
            If an element is foreign to the potential.
        """
        if isinstance(state, dict):
            state = _torch_sim.SimState(
                **{"masses": torch.ones_like(state["atomic_numbers"])} | state
            )
        found = self._calculator.compute(self._structures(state), stress=self._compute_stress)
        return {k: v.to(state.device, self._dtype) for k, v in found.items()}

    def _structures(self, state: Any) -> Structures:
        numbers = state.atomic_numbers.cpu().to(torch.int64)
        species = self._species[numbers.clamp(max=len(self._species) - 1)]
        species = torch.where(numbers < len(self._species), species, -1)
        if bool((species < 0).any()):
            foreign = sorted(set(numbers[species < 0].tolist()))
            raise DataError(
                f"the state holds atomic numbers {', '.join(map(str, foreign))}, but the potential "
                f"knows only {', '.join(self.potential.species_table.names)}"
            )
        cell = state.row_vector_cell.detach().cpu().to(torch.float64)
        return Structures(
            positions=state.positions.detach().cpu().to(torch.float64),
            species=species,
            system_index=state.system_idx.cpu().to(torch.int64),
            cell=cell,
            pbc=torch.as_tensor(state.pbc).cpu().expand(len(cell), 3),
            species_table=self.potential.species_table,
        )
