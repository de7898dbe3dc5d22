"""Whole potentials on native kernels: one call for energies, forces and virial.

A student is a sum of offsets, a ZBL prior and a HIP-NN. Where native kernels serve the network, the
sum needs no pair vectors, no graph and no tensor of the size of the neighbor list.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from potstill.core import CompactNeighbors, MdResult, ZblParameters, hipnn_md
from potstill.models.base import Potential
from potstill.models.hipnn import HIPNN
from potstill.models.prior import ZBL
from potstill.models.sums import SpeciesOffsets, SumPotential
from potstill.structures import Structures


@dataclass(frozen=True)
class NativePotential:
    """The parts of a potential that one call of the native kernels evaluates together.

    Parameters
    ----------
    network : HIPNN
        The network.
    prior : ZBL, optional
        Short-range repulsion.
    offsets : SpeciesOffsets, optional
        Constant energies per species.
    """

    network: HIPNN
    prior: ZBL | None = None
    offsets: SpeciesOffsets | None = None

    @classmethod
    def of(cls, potential: Potential) -> NativePotential | None:
        """Take a potential apart; None where native kernels do not serve it.

        Raises
        ------
        ModelError
            If the potential's core is set to `native`, and native kernels do not serve it.
        """
        parts = list(potential.components.values()) if isinstance(potential, SumPotential) else []
        parts = parts or [potential]
        networks = [part for part in parts if isinstance(part, HIPNN)]
        priors = [part for part in parts if isinstance(part, ZBL)]
        offsets = [part for part in parts if isinstance(part, SpeciesOffsets)]
        counts = (len(networks), len(priors), len(offsets))
        if sum(counts) < len(parts) or counts[0] != 1 or max(counts) > 1:
            return None
        (network,) = networks
        if not network.uses_native:
            return None
        prior = priors[0] if priors else None
        return cls(network, prior, offsets[0] if offsets else None)

    def evaluate(
        self, structures: Structures, neighbors: CompactNeighbors, *, virial: bool
    ) -> MdResult:
        """Atomic energies, forces and virial of one system.

        Parameters
        ----------
        structures : Structures
            One system, in the potential's species table.
        neighbors : CompactNeighbors
            Pairs up to the cutoff at least; those beyond are skipped.
        virial : bool
            Whether it is asked for.

        Returns
        -------
        MdResult
            In float64.
        """
        result = hipnn_md(
            self.network.native_parameters(),
            structures.species,
            neighbors,
            structures.positions,
            structures.cell[0],
            zbl=self._zbl(),
            virial=virial,
        )
        if self.offsets is None:
            return result
        energies: Tensor = result.energies + self.offsets.offsets[structures.species]
        return MdResult(energies, result.forces, result.virial)

    def _zbl(self) -> ZblParameters | None:
        if self.prior is None:
            return None
        return ZblParameters(self.prior.nuclear_charge, self.prior.inner, self.prior.cutoff)
