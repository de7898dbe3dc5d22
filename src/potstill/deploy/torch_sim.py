"""Batched dynamics of any potential in torch-sim. Needs the extra `torch-sim`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from potstill.calculators import list_holds
from potstill.checkpoint import load_potential
from potstill.core import CompactNeighbors, build_compact_neighbors
from potstill.errors import DataError, ModelError, require
from potstill.models import Potential
from potstill.models.engines import NativeParts
from potstill.structures import Structures

_torch_sim = require("torch_sim", extra="torch-sim", purpose="for batched dynamics")
_interface = require("torch_sim.models.interface", extra="torch-sim", purpose="as well")


@dataclass(frozen=True)
class _Kept:
    """A system where its neighbor list was made."""

    structures: Structures
    pairs: CompactNeighbors


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
        if skin < 0:
            raise ModelError(f"the skin must not be negative: {skin} Å")
        numbers = potential.species_table.atomic_numbers
        if bool((numbers < 0).any()):
            raise ModelError("torch-sim knows atoms by their atomic numbers, and beads have none")
        self.potential = potential
        self.skin = skin
        self._device, self._dtype = potential.device, dtype
        self._compute_forces = True
        self._compute_stress = compute_stress and not potential.direct_forces
        self._memory_scales_with = "n_atoms_x_density"
        self._species = torch.full((int(numbers.max()) + 1,), -1, dtype=torch.int64)
        self._species[numbers] = torch.arange(len(numbers))
        self._kept: list[_Kept | None] = []

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
        structures = self._structures(state)
        native = self.potential.native_parts()
        if native is not None and native.network is not None:
            found = self._natively(native, structures)
        else:
            wanted = ["energy", "forces", *(["stress"] if self._compute_stress else [])]
            on_device = structures.to(self._device)
            found = dict(self.potential.predict(on_device, None, wanted).properties.values)
        if not self._compute_stress:
            found.pop("stress", None)
        return {k: v.detach().to(state.device, self._dtype) for k, v in found.items()}

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

    def _natively(self, native: NativeParts, structures: Structures) -> dict[str, Tensor]:
        """System by system: a call is quick, and needs no tensor of the size of all lists."""
        offsets = structures.atom_offsets.tolist()
        self._kept = [*self._kept, *[None] * structures.n_systems][: structures.n_systems]
        forces = torch.empty_like(structures.positions)
        energy = torch.empty(structures.n_systems, dtype=torch.float64)
        stress = torch.full_like(structures.cell, torch.nan)
        for s in range(structures.n_systems):
            atoms = slice(offsets[s], offsets[s + 1])
            system, pairs = self._with_list(s, structures, atoms)
            periodic = self._compute_stress and bool(system.pbc.all())
            result = native.evaluate(system, pairs, virial=periodic)
            energy[s] = result.energies.sum()
            assert result.forces is not None
            forces[atoms] = result.forces
            if periodic:
                assert result.virial is not None
                stress[s] = 0.5 * (result.virial + result.virial.T) / system.volume[0]
        return {"energy": energy, "forces": forces, "stress": stress}

    def _with_list(
        self, s: int, structures: Structures, atoms: slice
    ) -> tuple[Structures, CompactNeighbors]:
        """A system of the batch and its list, made anew if a pair might be missing.

        Torch-sim may put another system in a place: then atoms are others, or have moved far.
        """
        kept = self._kept[s]
        if (
            kept is not None
            and torch.equal(kept.structures.species, structures.species[atoms])
            and torch.equal(kept.structures.pbc[0], structures.pbc[s])
        ):
            positions, cell = structures.positions[atoms], structures.cell[s : s + 1]
            system = kept.structures.with_fields(positions=positions, cell=cell)
            if list_holds(kept.structures, system, self.potential.cutoff, self.skin):
                return system, kept.pairs
        system = structures[s]
        pairs = build_compact_neighbors(system, self.potential.cutoff + self.skin)
        self._kept[s] = _Kept(system, pairs)
        return system, pairs
