"""Versioned files of potentials: weights as a state dict, everything else as JSON.

Files are loaded with `weights_only=True`; pickles of whole objects are never read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from potstill.errors import ModelError
from potstill.files import write_atomically
from potstill.models import Potential, build_model
from potstill.species import SpeciesTable

FORMAT_VERSION = 1

#: Upgrade functions by the version they start from; each returns the payload one version later.
UPGRADES: dict[int, Callable[[dict], dict]] = {}


def save_potential(path: str | Path, potential: Potential, info: dict[str, Any]) -> None:
    """Write a potential, with its offsets and prior if it is a sum, to a file (`*.pt`), atomically.

    `info` is JSON-able: what it was trained on, its teacher, versions, seed.
    """
    header = {
        "kind": potential.spec,
        "hyperparameters": potential.hyperparameters(),
        "species_table": potential.species_table.to_json(),
        "dtypes": sorted({str(p.dtype).removeprefix("torch.") for p in potential.parameters()}),
        "info": info,
    }
    payload = {
        "potstill_format": FORMAT_VERSION,
        "header": json.dumps(header),
        "state": potential.state_dict(),
    }
    write_atomically(path, lambda file: torch.save(payload, file))


@torch.inference_mode(False)  # weights made in it could never be differentiated
def load_potential(path: str | Path) -> tuple[Potential, dict[str, Any]]:
    """Read a potential and what is known of it.

    Returns
    -------
    potential : Potential
        In evaluation mode, on the CPU, in the dtypes it was saved in.
    info : dict
        As given to `save_potential`.

    Raises
    ------
    ModelError
        If the file is missing, is no potstill file, or is newer than this potstill.
    """
    payload = read_payload(path)
    header = json.loads(payload["header"])
    table = SpeciesTable.from_json(header["species_table"])
    potential = build_model(header["kind"], table, header["hyperparameters"])
    state = payload["state"]
    for name, tensor in potential.state_dict(keep_vars=True).items():
        if name in state:
            tensor.data = tensor.data.to(state[name].dtype)
    try:
        potential.load_state_dict(state)
    except RuntimeError as error:
        raise ModelError(
            f"{path}: weights do not match the model described in the file ({error})"
        ) from None
    return potential.eval(), header["info"]


def read_payload(path: str | Path) -> dict[str, Any]:
    """Read and upgrade the raw content of a potstill file (a potential or a training state)."""
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"{path}: no such file")
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ModelError(f"{path}: not a potstill file, or damaged ({error})") from None
    if not isinstance(payload, dict) or "potstill_format" not in payload:
        raise ModelError(f"{path}: not a potstill file")
    version = payload["potstill_format"]
    if version > FORMAT_VERSION:
        raise ModelError(
            f"{path}: written by a newer potstill (format {version}, this one reads up to "
            f"{FORMAT_VERSION}); upgrade potstill"
        )
    while version < FORMAT_VERSION:
        payload = UPGRADES[version](payload)
        version = payload["potstill_format"]
    return payload


def potential_fingerprint(potential: Potential) -> str:
    """Short hash of a potential's kind, hyper-parameters and weights."""
    potential.check_precision()
    digest = hashlib.blake2b(digest_size=12)
    description = [potential.spec, potential.hyperparameters(), potential.species_table.to_json()]
    digest.update(json.dumps(description, sort_keys=True).encode())
    for name, tensor in sorted(potential.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
