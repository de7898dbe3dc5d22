"""LMDB files of pickled graphs, as OC20's S2EF task (Chanussot et al., 2021) and COLL come in them.

A value is a pickled `torch_geometric` Data object. Unpickling whatever a file asks for would run
whatever code it asks for: here only the parts of such an object are put together (its attributes,
tensors, plain numbers), neither torch_geometric nor anything else is imported on a file's behalf,
and a file that names any other class is refused.

| attribute | meaning |
|---|---|
| `pos`, `atomic_numbers` | (n, 3) Å and (n,); asked for |
| `cell` | (1, 3, 3) or (3, 3) Å, rows are lattice vectors |
| `pbc` | (3,) or (1, 3), rarely there; see below |
| `natoms` | number of atoms, compared with `pos` |
| `y`, or `energy` | eV, of the task: OC20's are relative to a reference or total |
| `y_relaxed` | eV, of the relaxed structure: the label `energy` where a key map names it |
| `force`, or `forces` | (n, 3) eV/Å, raw on fixed atoms |
| `fixed` | (n,) 1 for atoms held in place |
| `tags` | (n,) 0 below the surface, 1 at it, 2 of the adsorbate |
| `sid`, `fid` | number of the system, the group `random<sid>`, and of its frame |

Where `pbc` is absent a cell means periodicity along all three vectors, as it does for OC20. No
cell, zeros, and the unit matrix, which ASE's `complete=True` makes of no cell, mean a molecule.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from potstill.errors import DataError
from potstill.readers.base import ASE_UNITS, Frame, KeyMap, Units, by_part, pick_labels
from potstill.readers.lmdb import Shard, open_shards

_USUAL = {
    "energy": ("y", "energy"),
    "forces": ("force", "forces"),
    "stress": ("stress", "stresses"),
}

#: Modules of torch_geometric that define Data and its storage, in versions 1 and 2.
_GRAPH_MODULES = frozenset(
    {"torch_geometric.data", "torch_geometric.data.data", "torch_geometric.data.storage"}
)
_GRAPH_CLASSES = frozenset(
    {"Data", "GlobalStorage", "BaseStorage", "DataTensorAttr", "DataEdgeAttr"}
)


def read_oc20(path: Path, keys: KeyMap, index: slice) -> tuple[Iterator[Frame], Units]:
    """Frames of an LMDB file, or of all `*.lmdb` in a folder in the order of their names.

    Frames of a shard stand under the keys "0", "1", ...; their number under "length", or it is
    the number of entries.

    Raises
    ------
    OptionalDependencyError
        If lmdb is not installed.
    DataError
        If it is not an LMDB file.
    """
    shards = open_shards(path, "*.lmdb")
    parts = zip(shards, by_part([_size(shard) for shard in shards], index), strict=True)
    return (_frame(shard, k, keys) for shard, numbers in parts for k in numbers), ASE_UNITS


def _size(shard: Shard) -> int:
    stored = shard.get("length")
    if stored is None:
        return shard.n_entries
    length = load_graph(stored, f"{shard.path}, key 'length'")
    if not isinstance(length, int | np.integer) or length < 0:
        raise DataError(f"{shard.path}: 'length' holds {str(length)[:40]}, not a number of frames")
    return int(length)


def _frame(shard: Shard, k: int, keys: KeyMap) -> Frame:
    where = f"{shard.path}, frame {k}"
    stored = shard.get(str(k))
    if stored is None:
        raise DataError(f"{where} is not there: the file has no key '{k}'")
    held = _attributes(load_graph(stored, where), where)
    for name in ("pos", "atomic_numbers"):
        if name not in held:
            raise DataError(f"{where} has no '{name}'; it holds {', '.join(sorted(held))}")
    numbers = _whole_numbers(held["atomic_numbers"], "atomic_numbers", where)
    positions = _array(held["pos"])
    natoms = int(_whole_numbers(held.get("natoms", len(numbers)), "natoms", where).sum())
    if positions.shape != (len(numbers), 3) or natoms != len(numbers):
        raise DataError(
            f"{where}: 'pos' has shape {positions.shape} and 'natoms' is {natoms} for "
            f"{len(numbers)} atomic numbers"
        )
    cell, pbc = _cell(held, where)
    labels = pick_labels(held, keys, _USUAL, where)
    sid, fid = (_identity(held, name) for name in ("sid", "fid"))
    return Frame(
        where=where,
        frame_id=f"{shard.path.name}:{k}" + (f" frame{fid}" if fid else ""),
        numbers=numbers,
        positions=positions,
        cell=cell,
        pbc=pbc,
        labels={name: _array(value) for name, value in labels.items()},
        keys=tuple(held),
        group=str(held[keys.group]) if keys.group in held else f"random{sid}" if sid else "",
        fixed=_per_atom(held, "fixed", len(numbers), where),
        tags=_per_atom(held, "tags", len(numbers), where),
    )


def _cell(held: Mapping[str, Any], where: str) -> tuple[np.ndarray, np.ndarray]:
    """(3, 3) cell and (3,) pbc; see the module's text for files without `pbc`."""
    cell = _array(held.get("cell", np.zeros((3, 3))))
    if cell.size != 9:
        raise DataError(f"{where}: 'cell' has shape {cell.shape}, not (1, 3, 3)")
    cell = cell.reshape(3, 3)
    if "pbc" in held:
        pbc = _array(held["pbc"]).astype(bool).reshape(-1)
        if pbc.shape != (3,):
            raise DataError(f"{where}: 'pbc' has shape {_array(held['pbc']).shape}, not (3,)")
        return cell, pbc
    absent = not cell.any() or np.array_equal(cell, np.eye(3))
    return (np.zeros((3, 3)) if absent else cell), np.full(3, not absent)


def _per_atom(held: Mapping[str, Any], name: str, n: int, where: str) -> np.ndarray | None:
    if name not in held:
        return None
    value = _whole_numbers(held[name], name, where)
    if value.shape != (n,):
        raise DataError(f"{where}: '{name}' has shape {value.shape}, not ({n},)")
    return value


def _whole_numbers(value: Any, name: str, where: str) -> np.ndarray:
    """(n,) integers; OC20 stores atomic numbers and flags as floating-point numbers."""
    array = np.atleast_1d(_array(value))
    plain = array.ndim == 1 and array.dtype.kind in "iufb" and bool(np.isfinite(array).all())
    if not plain or not np.array_equal(array, np.floor(array)):
        raise DataError(f"{where}: '{name}' does not hold a row of whole numbers")
    return array.astype(np.int64)


def _identity(held: Mapping[str, Any], name: str) -> str:
    """A system's or frame's number as text, empty if there is none."""
    value = held.get(name, "")
    return str(_array(value).reshape(-1)[0]) if isinstance(value, Tensor) else str(value)


def _array(value: Any) -> np.ndarray:
    return value.numpy() if isinstance(value, Tensor) else np.asarray(value)


# -- unpickling, without trust -------------------------------------------------------------------


class GraphObject:
    """What a file calls an object of torch_geometric: a bag of attributes."""


def load_graph(data: bytes, where: str) -> Any:
    """Unpickle plain values and graphs, and nothing else; `where` is for messages.

    Returns
    -------
    object
        Numbers, text, containers and tensors; `GraphObject` for torch_geometric's objects.

    Raises
    ------
    DataError
        If the pickle is damaged or names another class or function.
    """
    try:
        return _Unpickler(io.BytesIO(data)).load()
    except _ForeignClassError as error:
        raise DataError(
            f"{where} asks for {error}, which a published graph never does: it was not loaded"
        ) from None
    except Exception as error:  # a damaged pickle fails in many ways
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise DataError(f"{where} cannot be unpickled: {reason}") from error


class _ForeignClassError(Exception):
    """A pickle names something that no published file needs."""


class _Unpickler(pickle.Unpickler):
    """Knows the few names that a pickled graph needs.

    A pickle may set attributes of what it has named. It is therefore handed bound methods, whose
    attributes cannot be set, classes of C, and a class made for this one pickle.
    """

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        graph = type("GraphObject", (GraphObject,), {})
        self._known: dict[tuple[str, str], Callable[..., Any]] = {
            **{(module, name): graph for module in _GRAPH_MODULES for name in _GRAPH_CLASSES},
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch.storage", "_load_from_bytes"): self._storage,
            ("numpy", "dtype"): np.dtype,
            ("numpy", "ndarray"): np.ndarray,
        }
        for core in ("numpy.core", "numpy._core"):
            self._known[f"{core}.multiarray", "scalar"] = self._scalar
            self._known[f"{core}.multiarray", "_reconstruct"] = self._empty_array
            self._known[f"{core}.numeric", "_frombuffer"] = self._full_array

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for a name."""
        if (module, name) not in self._known:
            raise _ForeignClassError(f"{module}.{name}")
        return self._known[module, name]

    def persistent_load(self, identity: Any) -> Any:
        """Refuse references to objects outside the pickle."""
        raise _ForeignClassError(f"the outside object {str(identity)[:40]}")

    def _storage(self, data: bytes) -> Any:
        """A storage that torch has pickled into a pickle; torch restricts what that may name."""
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)

    def _tensor(self, storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
        whole = torch.tensor([], dtype=storage.dtype).set_(storage._untyped_storage)
        return whole.as_strided(size, stride, offset)  # checks the bounds

    def _scalar(self, dtype: np.dtype, data: bytes) -> Any:
        if dtype.hasobject:
            raise _ForeignClassError("a NumPy scalar of any object")
        return np.frombuffer(data, dtype)[0]

    def _full_array(self, data: Any, dtype: np.dtype, shape: Any, order: Any) -> np.ndarray:
        return np.frombuffer(data, dtype).reshape(shape, order=order)

    def _empty_array(self, *_: Any) -> np.ndarray:
        """An array whose shape and values follow in the pickle."""
        return np.ndarray((0,))


def _attributes(loaded: Any, where: str) -> dict[str, Any]:
    """Attributes of a graph that are there, from torch_geometric before 2.0 or since."""
    if not isinstance(loaded, GraphObject):
        raise DataError(f"{where} holds a {type(loaded).__name__}, not a graph")
    held = vars(loaded)
    if "_store" in held:
        held = getattr(held["_store"], "_mapping", {})
    return {name: value for name, value in held.items() if value is not None}
