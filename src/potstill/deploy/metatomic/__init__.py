"""Potentials as metatomic models, for the engines that read these."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from potstill import __version__
from potstill.checkpoint import potential_fingerprint
from potstill.errors import ModelError, require
from potstill.files import write_atomically
from potstill.models import Potential, summands
from potstill.models.tracing import traced

#: By kind of model: what introduced it.
_ARCHITECTURES = {
    "hipnn": "https://doi.org/10.1063/1.5011181",
    "schnet": "https://arxiv.org/abs/1706.08566",
    "painn": "https://arxiv.org/abs/2102.03150",
    "ani": "https://doi.org/10.1039/C6SC05720A",
}


def write_metatomic(
    potential: Potential, folder: Path, stem: str, info: Mapping[str, Any]
) -> list[Path]:
    """Write `-metatomic.pt`, a model of TorchScript that needs neither potstill nor Python.

    Its energies, positions and vectors are float64, whatever the network computes in.

    Parameters
    ----------
    potential : Potential
        HIP-NN, SchNet, PaiNN, ANI, and their sums with priors and offsets.
    folder : Path
        Where to.
    stem : str
        The file's name without ending.
    info : mapping
        What is known of the potential, as `load_potential` returns it; part of the metadata.

    Raises
    ------
    OptionalDependencyError
        If metatomic is not installed.
    ModelError
        If the model cannot be written as TorchScript, predicts forces directly, has beads, or does
        not say how far its energies reach.
    """
    metatomic = require("metatomic.torch", extra="metatomic", purpose="to write its models")
    potential.check_precision()
    numbers = potential.species_table.atomic_numbers.tolist()
    if min(numbers) < 0:
        raise ModelError("metatomic models know atoms by their atomic numbers, and beads have none")
    if potential.direct_forces or math.isinf(potential.reach):
        raise ModelError(
            f"{potential.kind} is not for metatomic, whose engines differentiate the energy and "
            "must know how far it reaches"
        )
    energies = traced(potential)
    from potstill.deploy.metatomic.module import PotstillModel

    energy = metatomic.ModelOutput(
        unit="eV", sample_kind="atom", description="potential energy with each element's zero"
    )
    capabilities = metatomic.ModelCapabilities(
        outputs={"energy": energy},
        atomic_types=numbers,
        interaction_range=potential.reach,
        length_unit="angstrom",
        supported_devices=["cpu"],
        dtype="float64",
    )
    path = folder / f"{stem}-metatomic.pt"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch.jit", DeprecationWarning)
        warnings.filterwarnings("ignore", ".*torch.jit", FutureWarning)
        model = metatomic.AtomisticModel(
            PotstillModel(energies, numbers, potential.cutoff).eval(),
            _metadata(metatomic, potential, stem, info),
            capabilities,
        )
        write_atomically(path, lambda file: model.save(file.name))
    return [path]


def _metadata(metatomic: Any, potential: Potential, stem: str, info: Mapping[str, Any]) -> Any:
    """Who made it, from what, and what it may be used for, as far as that is known."""
    kinds = [part.kind for part in summands(potential)]
    teacher = info.get("teacher")
    teacher = teacher if isinstance(teacher, Mapping) else {}
    extra = {
        "license": str(teacher.get("license", "unknown")),
        "teacher": str(teacher.get("name", "none")),
        "potstill": __version__,
        "fingerprint": potential_fingerprint(potential),
    }
    references = {
        "implementation": ["https://github.com/potstill/potstill"],
        "architecture": [_ARCHITECTURES[kind] for kind in kinds if kind in _ARCHITECTURES],
    }
    return metatomic.ModelMetadata(
        name=stem,
        description=f"Potential of potstill: {', '.join(kinds)}. Energies in eV, lengths in Å.",
        authors=[],
        references={kind: found for kind, found in references.items() if found},
        extra=extra,
    )
