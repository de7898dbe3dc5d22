"""Native kernels: HIP-NN with tensor sensitivities, fused for whole models.

Everything works on CPU tensors; `available()` says whether the kernels were compiled.
"""

from potstill.core.base import (
    available,
    describe_core,
    instruction_set,
    instruction_sets,
    note_missing_kernels,
    release_memory,
    select_instruction_set,
    why_unavailable,
)
from potstill.core.geometry import compact_forces, compact_pair_vectors
from potstill.core.hipnn import (
    HipnnLayers,
    HipnnParameters,
    HipnnShape,
    MdResult,
    PassResult,
    hipnn_md,
    hipnn_pass,
    weighted_energy,
)
from potstill.core.neighbors import (
    CompactNeighbors,
    build_compact_neighbors,
    compact_neighbors,
    repeat_neighbors,
    select_neighbors,
)
from potstill.core.prior import BondParameters, PairPrior, RepulsionParameters, ZblParameters

__all__ = [
    "available",
    "why_unavailable",
    "note_missing_kernels",
    "describe_core",
    "instruction_set",
    "instruction_sets",
    "select_instruction_set",
    "release_memory",
    "HipnnShape",
    "HipnnParameters",
    "BondParameters",
    "PairPrior",
    "RepulsionParameters",
    "ZblParameters",
    "CompactNeighbors",
    "compact_neighbors",
    "build_compact_neighbors",
    "select_neighbors",
    "repeat_neighbors",
    "compact_pair_vectors",
    "compact_forces",
    "PassResult",
    "hipnn_pass",
    "MdResult",
    "hipnn_md",
    "HipnnLayers",
    "weighted_energy",
]
