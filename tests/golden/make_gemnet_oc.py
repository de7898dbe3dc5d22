"""Energies and forces of the published GemNet-OC, for tests/test_gemnet_oc.py.

    pip download --no-deps fairchem-core==1.10.0
    python -m zipfile -e fairchem_core-1.10.0-py3-none-any.whl published
    python tests/golden/make_gemnet_oc.py published

The published code (MIT licence) runs as it is, in float64, with stand-ins for the few functions
that it takes from compiled packages and from the rest of fairchem. The neighbor list is ours.
Weights are made from their names, so that the golden file needs none.
"""

from __future__ import annotations

import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from potstill.neighbors import build_neighbor_list, pair_vectors
from potstill.species import SpeciesTable
from potstill.structures import Structures

OUTPUT = Path(__file__).with_name("gemnet_oc_fairchem.json")

WIDTHS = {
    "atom": 6,
    "edge": 8,
    "trip_in": 4,
    "trip_out": 5,
    "quad_in": 4,
    "quad_out": 3,
    "aint_in": 4,
    "aint_out": 5,
    "rbf": 4,
    "cbf": 5,
    "sbf": 6,
}
HYPERPARAMETERS = {
    **{f"emb_size_{name}": width for name, width in WIDTHS.items()},
    "num_spherical": 7,
    "num_radial": 9,  # so that the centers are exact in float32, in which they are made
    "num_blocks": 2,
    "num_before_skip": 2,
    "num_after_skip": 2,
    "num_concat": 1,
    "num_atom": 3,
    "num_output_afteratom": 3,
    "num_atom_emb_layers": 2,
    "num_global_out_layers": 2,
    "cutoff": 3.6,
    "cutoff_qint": 2.7,
    "cutoff_aeaint": 3.1,
    "cutoff_aint": 4.0,
}
NO_CAPS = dict.fromkeys(
    ["max_neighbors", "max_neighbors_qint", "max_neighbors_aeaint", "max_neighbors_aint"]
)
CAPS = NO_CAPS | {"max_neighbors_qint": 3, "max_neighbors_aeaint": 4}


def made_up(name: str, shape: tuple[int, ...]) -> Tensor:
    """Weights of unit variance, over the square root of the last width; scale factors near 2."""
    if not shape:
        return torch.tensor(2.0 + math.sin(sum(map(ord, name))), dtype=torch.float64)
    count = torch.arange(math.prod(shape), dtype=torch.float64) + sum(map(ord, name))
    noise = math.sqrt(2.0) * torch.sin(1000.0 * torch.sin(count))
    fan_in = shape[0] * shape[1] if len(shape) == 3 else shape[-1]
    return noise.reshape(shape) / (1.0 if "embeddings" in name else math.sqrt(fan_in))


def cases() -> list[dict[str, Any]]:
    """A cell with many images, a cluster with caps and a slab with tags, all disordered."""
    generator = torch.Generator().manual_seed(7)
    found = []
    for grid, periodic, caps, tags in (
        ((2, 2, 1), (True, True, True), NO_CAPS, None),
        ((2, 2, 2), (False, False, False), CAPS, None),
        ((2, 2, 2), (True, True, False), NO_CAPS, [0, 0, 1, 0, 0, 0, 2, 0]),
    ):
        # An atom and two of its images on a line would have a dihedral angle from rounding errors.
        spacing = torch.tensor([2.2 if k > 1 else 3.0 for k in grid], dtype=torch.float64)
        corners = spacing * torch.cartesian_prod(
            *(torch.arange(k, dtype=torch.float64) for k in grid)
        )
        noise = torch.randn(len(corners) + 3, 3, generator=generator, dtype=torch.float64)
        shear = torch.eye(3, dtype=torch.float64) + 0.1 * noise[-3:]
        positions = corners @ shear + 0.2 * noise[:-3]
        cell = torch.diag(spacing * torch.tensor(grid)) @ shear
        cell = torch.where(torch.tensor(periodic)[:, None], cell, 0.0)
        found.append(
            {
                "positions": positions.tolist(),
                "cell": cell.tolist(),
                "pbc": list(periodic),
                "species": [k % 2 for k in range(len(corners))],
                "tags": tags,
                "caps": caps,
            }
        )
    return found


def structures_of(case: dict[str, Any]) -> Structures:
    """The structure of a case: magnesium and oxygen."""
    n = len(case["species"])
    return Structures(
        positions=torch.tensor(case["positions"], dtype=torch.float64),
        species=torch.tensor(case["species"]),
        system_index=torch.zeros(n, dtype=torch.int64),
        cell=torch.tensor(case["cell"], dtype=torch.float64)[None],
        pbc=torch.tensor([case["pbc"]]),
        species_table=SpeciesTable.from_symbols(["Mg", "O"]),
        tags=None if case["tags"] is None else torch.tensor(case["tags"]),
    )


# -- stand-ins -----------------------------------------------------------------------------------


def nearest(natoms: Tensor, index: Tensor, atom_distance: Tensor, **limit: Any) -> Any:
    """Mask of the nearest neighbors of each atom."""
    mask = torch.zeros_like(index, dtype=torch.bool)
    for atom in range(int(natoms.sum())):
        mine = (index == atom).nonzero()[:, 0]
        order = atom_distance[mine].argsort()[: limit["max_num_neighbors_threshold"]]
        mask[mine[order]] = True
    return mask, mask.sum()[None]


def summed(src: Tensor, index: Tensor, dim: int = 0, dim_size: int = 0, reduce: str = "") -> Tensor:
    """Sum of rows by index."""
    return src.new_zeros(dim_size, *src.shape[1:]).index_add(0, index, src)


def summed_ranges(src: Tensor, indptr: Tensor, reduce: str = "sum") -> Tensor:
    """Sum of rows by ranges."""
    total = torch.cat([src.new_zeros(1), src.cumsum(0)])
    return total[indptr[1:]] - total[indptr[:-1]]


class Sparse:
    """What the published code uses of a sparse matrix."""

    def __init__(self, row: Tensor, col: Tensor, value: Tensor, sparse_sizes: Any) -> None:
        order = torch.argsort(row * sparse_sizes[1] + col, stable=True)
        self._row, self._col, self._value = row[order], col[order], value[order]
        self._sizes = tuple(sparse_sizes)
        self.storage = self

    def row(self) -> Tensor:
        return self._row

    def value(self) -> Tensor:
        return self._value

    def coo(self) -> tuple[Tensor, Tensor, Tensor]:
        return self._row, self._col, self._value

    def sparse_sizes(self) -> Any:
        return self._sizes

    def set_value_(self, value: Tensor, layout: str) -> None:
        self._value = value

    def __getitem__(self, rows: Tensor) -> Sparse:
        places = [(self._row == row).nonzero()[:, 0] for row in rows.tolist()]
        place = torch.cat([rows[:0], *places])
        counts = torch.tensor([len(p) for p in places], dtype=torch.int64)
        row = torch.repeat_interleave(torch.arange(len(places)), counts)
        sizes = (len(places), self._sizes[1])
        return Sparse(row, self._col[place], self._value[place], sizes)


def published_model(folder: Path) -> type[torch.nn.Module]:
    """Import the published class."""

    def module(name: str, path: str = "", **content: Any) -> None:
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__dict__.update(content)
        if path:
            sys.modules[name].__path__ = [str(folder / path)]

    core = "fairchem.core"
    for name in ("fairchem", core, f"{core}.models", f"{core}.modules"):
        module(name, name.replace(".", "/"))
    registry = types.SimpleNamespace(register_model=lambda _: lambda cls: cls)
    module(f"{core}.common")
    module(f"{core}.common.registry", registry=registry)
    module(f"{core}.common.typing", assert_is_instance=lambda value, _: value)
    module(
        f"{core}.common.utils",
        conditional_grad=lambda _: lambda function: function,
        get_max_neighbors_mask=nearest,
        scatter_det=summed,
    )
    names = ("BackboneInterface", "GraphModelMixin", "HeadInterface")
    module(f"{core}.models.base", **{name: type(name, (), {}) for name in names})
    module(f"{core}.modules.scaling.compat", load_scales_compat=lambda *_: None)
    module("torch_scatter", segment_coo=summed, segment_csr=summed_ranges, scatter=None)
    module("torch_sparse", SparseTensor=Sparse)
    torch.Tensor.float = lambda self: self  # energies and forces stay in float64
    from fairchem.core.models.gemnet_oc.gemnet_oc import GemNetOC

    class OnGivenPairs(GemNetOC):
        def generate_graph_dict(self, data: Any, cutoff: float, max_neighbors: int) -> Any:
            limit = {"max_num_neighbors_threshold": max_neighbors}
            graph = data.graph
            mask, count = nearest(data.natoms, graph["edge_index"][1], graph["distance"], **limit)
            chosen = {k: v[:, mask] if k == "edge_index" else v[mask] for k, v in graph.items()}
            return chosen | {"num_neighbors": count}

    return OnGivenPairs


def evaluate(published: type[torch.nn.Module], case: dict[str, Any]) -> dict[str, Any]:
    """The case with energy, direct forces and gradient of the energy."""
    model = published(
        num_elements=20,
        direct_forces=True,
        rbf={"name": "gaussian"},
        envelope={"name": "polynomial", "exponent": 5},
        cbf={"name": "spherical_harmonics"},
        sbf={"name": "legendre_outer"},
        qint_tags=[1, 2],
        **dict.fromkeys(
            ("quad_interaction", "atom_edge_interaction", "edge_atom_interaction"), True
        ),
        atom_interaction=True,
        **HYPERPARAMETERS,
        **{name: 10**6 if cap is None else cap for name, cap in case["caps"].items()},
    ).double()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(made_up(name, tuple(parameter.shape)))
    structures = structures_of(case)
    neighbors = build_neighbor_list(structures, HYPERPARAMETERS["cutoff_aint"])
    structures.positions.requires_grad_(True)
    r_ij = pair_vectors(structures, neighbors)
    distance = torch.linalg.vector_norm(r_ij, dim=1)
    n = structures.n_atoms
    data = types.SimpleNamespace(
        pos=structures.positions,
        batch=structures.system_index,
        natoms=torch.tensor([n]),
        atomic_numbers=structures.atomic_numbers,
        tags=torch.full((n,), 2) if structures.tags is None else structures.tags,
        graph={
            "edge_index": torch.stack([neighbors.neighbor, neighbors.center]),
            "distance": distance,
            "vector": -r_ij / distance[:, None],
            "cell_offset": neighbors.shifts,
        },
    )
    found = model(data)
    (gradient,) = torch.autograd.grad(found["energy"].sum(), structures.positions)
    return case | {
        "energy": float(found["energy"].detach()),
        "direct_forces": found["forces"].detach().reshape(n, 3).tolist(),
        "gradient": gradient.tolist(),
        "weights": {name: list(value.shape) for name, value in parameters.items()},
    }


def main() -> None:
    published = published_model(Path(sys.argv[1]))
    results = [evaluate(published, case) for case in cases()]
    weights = results[0]["weights"]
    golden = {
        "made_with": "fairchem-core 1.10.0, fairchem.core.models.gemnet_oc, float64",
        "hyperparameters": HYPERPARAMETERS,
        "weights": weights,
        "cases": [{k: v for k, v in result.items() if k != "weights"} for result in results],
    }
    OUTPUT.write_text(json.dumps(golden, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
