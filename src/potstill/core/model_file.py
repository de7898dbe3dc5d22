"""Models in files that engines read without Python: written here, read by the core in C++.

The file is in the safetensors format: eight bytes with the length of a JSON header, the header, and
raw little-endian arrays. What they mean stands in the header's metadata; `docs/lammps.md` describes
it.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from potstill.core.base import call, native
from potstill.core.hipnn import HipnnParameters, MdResult, md_geometry
from potstill.core.neighbors import CompactNeighbors
from potstill.core.prior import BondParameters, PairPrior, RepulsionParameters, ZblParameters
from potstill.errors import ModelError
from potstill.files import write_atomically
from potstill.units import COULOMB

#: Files of a later version are refused by earlier readers: 2 has a repulsion or bonds of beads.
FORMAT_VERSION = 2

_NO_SUM = b"00000000"


def write_model_file(
    path: str | Path,
    species: Sequence[str],
    parameters: HipnnParameters,
    offsets: Tensor,
    prior: PairPrior | None = None,
    provenance: Mapping[str, Any] | None = None,
    bonds: BondParameters | None = None,
) -> None:
    """Write all parts of a potential that native kernels evaluate.

    Parameters
    ----------
    path : path
        The file, written atomically.
    species : sequence of str
        Names, in the order of the network's species.
    parameters : HipnnParameters
        The network, in float32 or float64.
    offsets : Tensor
        (n_species,) energies of single atoms, eV.
    prior : ZblParameters or RepulsionParameters, optional
        Short-range repulsion.
    provenance : mapping, optional
        JSON-able: versions, training, license.
    bonds : BondParameters, optional
        Bonds and angles of beads.
    """
    arrays = {"parameters": parameters.flat().numpy(), "offsets": offsets.to(torch.float64).numpy()}
    model: dict[str, Any] = {
        "units": "angstrom, eV",
        "species": list(species),
        "precision": str(parameters.dtype).removeprefix("torch."),
        "network": "hipnn",
        "hipnn": asdict(parameters.shape),
        "zbl": None,
    }
    version = 1
    if isinstance(prior, ZblParameters):
        arrays["zbl.charge"] = prior.charge.to(torch.float64).numpy()
        model["zbl"] = {"coulomb": COULOMB, "inner": prior.inner, "cutoff": prior.cutoff}
    elif isinstance(prior, RepulsionParameters):
        version = FORMAT_VERSION
        arrays["repulsion.strength"] = prior.strength.to(torch.float64).numpy()
        arrays["repulsion.radius"] = prior.radius.to(torch.float64).numpy()
        model["repulsion"] = {}
    if bonds is not None:
        version = FORMAT_VERSION
        arrays["bonds.pairs"] = bonds.pairs.to(torch.float64).numpy()
        arrays["bonds.angles"] = bonds.angles.to(torch.float64).numpy()
        model["bonds"] = {}
    metadata = {
        "format": "potstill",
        "format_version": str(version),
        "checksum": _NO_SUM.decode(),
        "model": json.dumps(model),
        "provenance": json.dumps(dict(provenance or {}), indent=1),
    }
    write_atomically(path, _with_sum(_packed(metadata, arrays)))


def _packed(metadata: Mapping[str, str], arrays: Mapping[str, np.ndarray]) -> bytes:
    """The bytes of a safetensors file."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    data = b""
    for name, array in arrays.items():
        little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
        kind = {4: "F32", 8: "F64"}[array.itemsize]
        place = [len(data), len(data) + little.nbytes]
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": place}
        data += little.tobytes()
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def _with_sum(content: bytes) -> bytes:
    """The same with the CRC-32 of all bytes, taken with zeros in its own place."""
    mark = b'"checksum":"' + _NO_SUM
    assert content.count(mark) == 1
    return content.replace(mark, mark.replace(_NO_SUM, b"%08x" % zlib.crc32(content)))


@dataclass(frozen=True)
class ModelFile:
    """A model file, read and evaluated by the core as other engines do it.

    Parameters
    ----------
    path : path
        What `write_model_file` wrote.

    Raises
    ------
    ModelError
        If it is missing, damaged, newer than this potstill, or no model file.
    """

    path: str | Path

    def __post_init__(self) -> None:
        _ = self._native

    @cached_property
    def _native(self) -> Any:
        try:
            return native().ModelFile(str(self.path))
        except RuntimeError as error:
            raise ModelError(f"{self.path}: {error}") from None

    @property
    def species(self) -> tuple[str, ...]:
        """Names, in the order of the network's species."""
        return tuple(self._native.species)

    @property
    def cutoff(self) -> float:
        """Largest cutoff of all parts, Å."""
        return float(self._native.cutoff)

    @property
    def n_layers(self) -> int:
        """Interaction layers of the network."""
        return int(self._native.n_layers)

    @property
    def dtype(self) -> torch.dtype:
        """What the network was trained in."""
        return torch.float64 if self._native.is_double else torch.float32

    @property
    def provenance(self) -> dict[str, Any]:
        """As given to `write_model_file`."""
        found: dict[str, Any] = json.loads(self._native.provenance)
        return found

    def evaluate(
        self,
        species: Tensor,
        neighbors: CompactNeighbors,
        positions: Tensor,
        cell: Tensor,
        *,
        dtype: torch.dtype | None = None,
        atom_virials: bool = False,
        n_threads: int | None = None,
    ) -> MdResult:
        """Energies, forces and virial of one system without ghosts.

        Parameters
        ----------
        species, neighbors, positions, cell, n_threads
            As for `hipnn_md`.
        dtype : torch.dtype, optional
            What the network computes in; the file's by default.
        atom_virials : bool
            Whether to give the virial by atoms as well.

        Raises
        ------
        ModelError
            If an array does not fit.
        """
        geometry, result = md_geometry(
            species, neighbors, positions, cell, None, True, True, atom_virials
        )
        in_double = (dtype or self.dtype) == torch.float64
        threads = n_threads or torch.get_num_threads()
        call(self._native.evaluate, geometry, in_double, threads)
        return result
