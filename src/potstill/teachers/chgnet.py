"""CHGNet: a universal potential whose wheel carries its weights."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from potstill.distill.taps import atom_feature, captured
from potstill.errors import DataError, TeacherError, require
from potstill.features import Feature
from potstill.models import TapSpec
from potstill.structures import NeighborList, Structures
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

    Pre-trained models are "0.3.0", "0.2.0" and "r2scan".
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
            license="Modified BSD (University of California)",
            citation="Deng et al., Nat. Mach. Intell. 5, 1031 (2023), "
            "doi:10.1038/s42256-023-00716-3",
            level_of_theory=_LEVELS[model],
            versions=versions_of("chgnet", "pymatgen", "torch"),
        )

    def compute(self, structures: Structures, properties: Sequence[str]) -> dict[str, Tensor]:
        """Convert to graphs and predict them as one batch."""
        graphs, cells = self._graphs(structures)
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

    @property
    def taps(self) -> Mapping[str, TapSpec]:
        """Features of atoms after each convolution and within the readout, and those of bonds."""
        width = self.model.model_args["atom_fea_dim"]
        n = self.model.n_conv
        bonds = TapSpec("edge_scalar", self.model.model_args["bond_fea_dim"])
        taps = {"atom_embedding": TapSpec("node_scalar", width), "bond_embedding": bonds}
        for k in range(n - 1):
            taps[f"atom_conv_layers.{k}"] = TapSpec("node_scalar", width)
            taps[f"bond_conv_layers.{k}"] = bonds
        taps[f"atom_conv_layers.{n - 1}"] = TapSpec("node_scalar", width)
        return taps | {self.default_tap: TapSpec("node_scalar", self._readout()[1].in_features)}

    @property
    def default_tap(self) -> str:
        """The input of the last linear layer of the readout."""
        return self._readout()[0]

    def _readout(self) -> tuple[str, torch.nn.Linear]:
        """Path of the layer before the last linear one, and that one."""
        layers = self.model.mlp.layers
        last = max(k for k, layer in enumerate(layers) if isinstance(layer, torch.nn.Linear))
        return f"mlp.layers.{last - 1}", layers[last]

    def compute_features(self, structures: Structures, taps: Sequence[str]) -> dict[str, Feature]:
        """Outputs of CHGNet's submodules by path; bonds are pairs, in both directions."""
        graphs, _ = self._graphs(structures)
        device = next(self.model.parameters()).device
        with captured(self.model, taps) as outputs, torch.no_grad():
            self.model.forward([graph.to(device) for graph in graphs], task="e")
        pairs, bond = _bonds(graphs, self.model.graph_converter.atom_graph_cutoff)
        n_bonds = sum(len(graph.undirected2directed) for graph in graphs)
        features = {}
        for tap in taps:
            values = outputs[tap].cpu() if tap in outputs else None
            spec = self.taps.get(tap)
            if spec is not None and spec.kind == "edge_scalar":
                assert values is not None
                assert len(values) == n_bonds
                recipe = f"CHGNet's atom graph within {pairs.cutoff:g} Å"
                features[tap] = Feature("edge_scalar", values[bond], pairs, recipe)
            else:
                features[tap] = atom_feature(values, structures.n_atoms, tap)
        return features

    def _graphs(self, structures: Structures) -> tuple[list[Any], list[np.ndarray]]:
        """CHGNet's graph of each system, and the cells that they are in."""
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
        return graphs, cells


def _bonds(graphs: Sequence[Any], cutoff: float) -> tuple[NeighborList, Tensor]:
    """Pairs of CHGNet's atom graphs, sorted by center, and the bond that each of them is."""
    centers, neighbors, shifts, bonds, counts = [], [], [], [], []
    n_atoms = n_bonds = 0
    for graph in graphs:
        centers.append(graph.atom_graph[:, 0].long().cpu() + n_atoms)
        neighbors.append(graph.atom_graph[:, 1].long().cpu() + n_atoms)
        shifts.append(graph.neighbor_image.long().cpu())
        bonds.append(graph.directed2undirected.long().cpu() + n_bonds)
        counts.append(len(graph.atom_graph))
        n_atoms += len(graph.atomic_number)
        n_bonds += len(graph.undirected2directed)
    center = torch.cat(centers)
    order = torch.argsort(center, stable=True)
    pairs = NeighborList(
        center[order],
        torch.cat(neighbors)[order],
        torch.cat(shifts)[order],
        torch.tensor(counts),
        float(cutoff),
    )
    return pairs, torch.cat(bonds)[order]


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
