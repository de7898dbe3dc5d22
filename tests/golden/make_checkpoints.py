"""Writes `checkpoints.json`: a small potential per format version of checkpoints, with its numbers.

Run once per version, with the potstill that introduced it; entries that are there are kept.
"""

import base64
import gzip
import json
import tempfile
from pathlib import Path

import torch
from ase.build import molecule

from potstill.checkpoint import FORMAT_VERSION, potential_fingerprint, save_potential
from potstill.models import HIPNN, ZBL, SpeciesOffsets, SumPotential
from potstill.structures import Structures

FILE = Path(__file__).with_name("checkpoints.json")


def main() -> None:
    structures = Structures.from_ase(molecule("CH3CH2OH"))
    table = structures.species_table
    torch.manual_seed(3)
    network = HIPNN(table, 3, 4, 0.8, 3.5, 4, 1, 1, 1)  # an integer cutoff, as configs have it
    potential = SumPotential(
        {
            "offsets": SpeciesOffsets(table, [-13.6, -1029.0, -2041.0]),
            "prior": ZBL(table, 0.6, 0.9),
            "network": network,
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "potential.pt"
        save_potential(path, potential, {"seed": 3})
        content = base64.b64encode(gzip.compress(path.read_bytes())).decode()
    potential.use_core("torch")
    prediction = potential.predict(structures)
    known = json.loads(FILE.read_text()) if FILE.exists() else {}
    known[str(FORMAT_VERSION)] = {
        "file": content,
        "fingerprint": potential_fingerprint(potential),
        "energy": float(prediction["energy"]),
        "forces": prediction["forces"].tolist(),
    }
    FILE.write_text(json.dumps(known) + "\n")


if __name__ == "__main__":
    main()
