"""A small store with everything in it: `python tests/store_maker.py` writes it in today's format.

`golden/store_v1.zip` was written by potstill 0.1 at the last commit that wrote format 1, before
offsets were stored. The test that reads it takes what should be in it from `fill`.
"""

import json
import shutil
import tempfile
from pathlib import Path

import ase.build
import numpy as np
import torch

import potstill.store
from potstill.features import Feature
from potstill.neighbors import build_neighbor_list
from potstill.structures import Properties, Structures


def batch() -> Structures:
    """Six frames of two elements; the last ones have charges, tags, fixed atoms and velocities."""
    frames = [ase.build.bulk("Cu", cubic=True), ase.build.molecule("H2O"), ase.build.bulk("Cu")]
    frames += [ase.build.molecule("CO2"), ase.build.molecule("H2"), ase.build.bulk("Cu")]
    for k, atoms in enumerate(frames):
        atoms.positions += np.random.default_rng(k).normal(0.0, 0.03, atoms.positions.shape)
        atoms.info.update(frame_id=f"a.xyz:{k}", config_type="größer" if k % 2 else "")
        if k >= 3:
            atoms.info.update(charge=float(k - 4), spin=2)
            atoms.set_tags(np.arange(len(atoms)) + k)
            atoms.set_velocities(np.full((len(atoms), 3), 0.01 * k))
            atoms.set_constraint(ase.constraints.FixAtoms([0]))
    return Structures.from_ase(frames)


def labels_of(structures: Structures, seed: int) -> Properties:
    """Random energies, with weights, and forces."""
    generator = torch.Generator().manual_seed(seed)
    energy = torch.randn(len(structures), generator=generator, dtype=torch.float64)
    forces = torch.randn(structures.n_atoms, 3, generator=generator, dtype=torch.float64)
    weights = {"energy": torch.arange(1.0, 1.0 + len(structures)).double()}
    return Properties({"energy": energy, "forces": forces}, {}, weights)


def features_of(structures: Structures) -> dict[str, Feature]:
    """One value per atom, and one per pair."""
    graph = build_neighbor_list(structures, 3.0)
    atoms = structures.positions[:, :2].float()
    pairs = torch.arange(2.0 * graph.n_pairs).reshape(-1, 2)
    return {
        "atom": Feature("node_scalar", atoms),
        "pair": Feature("edge_scalar", pairs, graph, "r"),
    }


def fill(store, start: int, stop: int) -> None:
    """Add the frames start..stop-1, their reference labels, and a teacher's of the last but one."""
    whole, part = batch(), range(start, stop)
    structures = whole.select(part)
    reference = labels_of(whole, 1).select(whole.rows(part))
    store.append(structures, reference if stop > 3 else None)
    info = {"fingerprint": "x", "citation": "nobody"}
    store.begin_labels("t", {**info, "properties": ["energy", "forces"]})
    failed = [{"system": 1, "reason": "did not converge"}]
    store.write_labels("t", start, labels_of(whole, 2).select(whole.rows(part)), structures, failed)
    for tap, feature in features_of(whole).items():
        store.begin_features("t", tap, info)
        store.write_features("t", tap, start, feature.select(whole.rows(part)), structures, [])


if __name__ == "__main__":
    here = Path(__file__).with_name("golden")
    with tempfile.TemporaryDirectory() as folder:
        store = potstill.store.LabeledStore.create(Path(folder) / "store", info={"seed": 1})
        fill(store, 0, 2)
        fill(store, 2, 4)
        version = json.loads((store.path / "commit.json").read_text())["version"]
        shutil.make_archive(str(here / f"store_v{version}"), "zip", folder)
