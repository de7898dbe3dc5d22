"""Native kernels: HIP-NN with tensor sensitivities, fused for whole models.

Everything works on CPU tensors; `available()` says whether the kernels were compiled.
"""

from potstill.core.base import (
    available,
    describe_core,
    instruction_set,
    instruction_sets,
    release_memory,
    select_instruction_set,
    why_unavailable,
)
from potstill.core.geometry import (
    compact_forces,
    compact_pair_vectors,
    repeat_neighbors,
    select_neighbors,
)
from potstill.core.hipnn import (
    CompactNeighbors,
    HipnnParameters,
    HipnnShape,
    MdResult,
    PassResult,
    ZblParameters,
    compact_neighbors,
    hipnn_md,
    hipnn_pass,
    weighted_energy,
    weighted_partial_energies,
)
from potstill.core.neighbors import build_compact_neighbors

__all__ = [
    "available",
    "why_unavailable",
    "describe_core",
    "instruction_set",
    "instruction_sets",
    "select_instruction_set",
    "release_memory",
    "HipnnShape",
    "HipnnParameters",
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
    "weighted_partial_energies",
    "weighted_energy",
]
