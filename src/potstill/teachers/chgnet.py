"""CHGNet: a universal potential whose wheel carries its weights."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from potstill.errors import DataError, TeacherError, require
from potstill.structures import Structures
from potstill.teachers.base import Teacher, TeacherInfo, fingerprint_of, versions_of
from potstill.units import GPA

_LEVELS = {
    "0.3.0": "PBE and PBE+U with Materials Project corrections (MPtrj)",
    "0.2.0": "PBE and PBE+U with Materials Project corrections (MPtrj)",
    "r2scan": "r2SCAN, transferred from PBE (MP-r2SCAN)",
}


class CHGNetTeacher(Teacher):
    """CHGNet with energies, forces, stress and site energies.

    Site energies contain CHGNet's per-element reference already, so that they sum to the energy.
    CHGNet is periodic along all axes; a lattice vector long enough to separate images stands in for
    an open one. Frames with an atom that has no neighbor fail: CHGNet is wrong there.

    Parameters
    ----------
    model : str
        Which of the pre-trained models: "0.3.0", "0.2.0" or "r2scan".
    device : str
        Where to compute.
    """

    properties = frozenset({"energy", "forces", "stress", "atomic_energies"})
    batch_atoms = 256

    def __init__(self, model: str = "0.3.0", device: str = "cpu") -> None:
        if model not in _LEVELS:
            raise TeacherError(f"CHGNet has no model '{model}'; there are {', '.join(_LEVELS)}")
        package = require("chgnet.model", extra="chgnet", purpose="for the CHGNet teacher")
        self._pymatgen = require("pymatgen.core", extra="chgnet", purpose="for the CHGNet teacher")
        with contextlib.redirect_stdout(io.StringIO()):
            self.model = package.CHGNet.load(model_name=model, use_device=device, verbose=False)
        self.model.requires_grad_(False)
        self.model.graph_converter.set_isolated_atom_response("error")
        weights = self.model.state_dict()
        self.info = TeacherInfo(
            name="chgnet" if model == "0.3.0" else f"chgnet-{model}",
            fingerprint=fingerprint_of(
                "chgnet", *(part for k in sorted(weights) for part in (k, _bytes(weights[k])))
            ),
            licence="Modified BSD (University of California)",
            citation="Deng et al., Nat. Mach. Intell. 5, 1031 (2023), "
            "doi:10.1038/s42256-023-00716-3",
            level_of_theory=_LEVELS[model],
            versions=versions_of("chgnet", "pymatgen", "torch"),
        )

    def compute(self, structures: Structures, properties: Sequence[str]) -> dict[str, Tensor]:
        """Convert to graphs and predict them as one batch."""
        reach = self.model.graph_converter.atom_graph_cutoff
        cells, graphs = [], []
        for atoms in structures.to_ase():
            if len(atoms) == 0:
                raise DataError("CHGNet cannot label a system without atoms")
            cell = _closed_cell(atoms.cell.array, atoms.pbc, atoms.positions, reach)
            crystal = self._pymatgen.Structure(
                cell, atoms.numbers, atoms.positions, coords_are_cartesian=True
            )
            cells.append(cell)
            graphs.append(self.model.graph_converter(crystal))
        task = "efs" if "stress" in properties else "ef" if "forces" in properties else "e"
        with warnings.catch_warnings():
            # CHGNet makes a tensor of volumes that carry gradients.
            warnings.filterwarnings("ignore", message="Converting a tensor with requires_grad")
            answers = self.model.predict_graph(
                graphs, task=task, return_site_energies=True, batch_size=len(graphs)
            )
        answers = [answers] if isinstance(answers, dict) else answers
        sites = [np.asarray(a["site_energies"], dtype=np.float64) for a in answers]
        result = {}
        if "energy" in properties:
            # The sum of the site energies in float64 rather than CHGNet's own mean in float32.
            result["energy"] = np.array([e.sum() for e in sites])
        if "atomic_energies" in properties:
            result["atomic_energies"] = np.concatenate(sites)
        if "forces" in properties:
            result["forces"] = np.concatenate([a["f"] for a in answers])
        if "stress" in properties:
            # CHGNet divides by the signed volume: its stress has the wrong sign in left-handed
            # cells.
            stress = np.array(
                [a["s"] * np.sign(np.linalg.det(c)) for a, c in zip(answers, cells, strict=True)]
            )
            stress = 0.5 * GPA * (stress + stress.transpose(0, 2, 1))
            open_system = ~structures.pbc.all(dim=1).cpu().numpy()
            stress[open_system] = np.nan
            result["stress"] = stress
        return {k: torch.from_numpy(v.astype(np.float64)) for k, v in result.items()}


def _closed_cell(
    cell: np.ndarray, pbc: np.ndarray, positions: np.ndarray, reach: float
) -> np.ndarray:
    """Replace open directions by vectors that keep images farther apart than `reach`."""
    if pbc.all():
        return cell
    span = float(np.ptp(positions, axis=0).max()) * np.sqrt(3.0) + reach + 1.0
    closed = np.where(pbc[:, None], cell, 0.0)
    kept = closed[pbc]
    # Directions at right angles to all periodic ones.
    _, _, basis = np.linalg.svd(kept) if len(kept) else (None, None, np.eye(3))
    closed[~pbc] = span * basis[len(kept) :]
    return closed


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().numpy().tobytes()
