"""Structures that `potstill.testing` checks models on, and how it compares numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from potstill.errors import ModelError
from potstill.models.base import Edges, Potential, Prediction
from potstill.neighbors import build_neighbor_list, pair_vectors
from potstill.properties import LEARNABLE
from potstill.species import SpeciesTable
from potstill.structures import NeighborList, Structures

# Step of finite differences, Å (or strain), and the fourth-order stencil: offset -> weight.
STEP = 5e-4
_STENCIL = {-2: 1.0 / 12.0, -1: -8.0 / 12.0, 1: 8.0 / 12.0, 2: -1.0 / 12.0}


def contract_structures(potential: Potential, seed: int = 0) -> Structures:
    """Four disordered systems in units of the cutoff, with all species.

    A triclinic cell with many images of its 12 atoms within reach, an open cluster, a slab, and one
    atom in a small cell.
    """
    generator = torch.Generator().manual_seed(seed)
    spacing = 0.55 * potential.cutoff
    n_species = len(potential.species_table)
    parts = []
    for grid, pbc in (
        ((2, 2, 3), (True, True, True)),
        ((2, 2, 2), (False, False, False)),
        ((2, 2, 2), (True, True, False)),
        ((1, 1, 1), (True, True, True)),
    ):
        axes = [torch.arange(k, dtype=torch.float64) for k in grid]
        corners = torch.cartesian_prod(*axes)  # (n, 3)
        shear = torch.eye(3, dtype=torch.float64) + 0.12 * normal((3, 3), generator)
        positions = spacing * (corners @ shear)
        positions = positions + 0.1 * spacing * normal((len(corners), 3), generator)
        cell = spacing * torch.diag(torch.tensor(grid, dtype=torch.float64)) @ shear
        cell = torch.where(torch.tensor(pbc)[:, None], cell, 0.0)
        species = (torch.arange(len(corners)) % n_species).tolist()
        parts.append(structure(potential.species_table, positions, species, cell, pbc))
    return Structures.concatenate(parts)


def with_pairs(
    potential: Potential, systems: Sequence[int] | None = None
) -> tuple[Structures, NeighborList, Edges, Tensor]:
    """Some of `contract_structures`, all by default, and their pairs within the cutoff."""
    structures = contract_structures(potential).with_species_table(potential.species_table)
    structures = structures if systems is None else structures.select(systems)
    neighbors = build_neighbor_list(structures, potential.cutoff)
    edges = Edges(neighbors.center, neighbors.neighbor)
    return structures, neighbors, edges, pair_vectors(structures, neighbors)


def crystals(potential: Potential) -> list[tuple[str, Structures]]:
    """Crystals whose neighbor shells avoid the cutoff."""
    nearest = 0.47 * potential.cutoff
    half, quarter = 0.5, 0.25
    fcc = [(0, 0, 0), (0, half, half), (half, 0, half), (half, half, 0)]
    diamond = fcc + [(x + quarter, y + quarter, z + quarter) for x, y, z in fcc]
    rock_salt = fcc + [(x + half, y, z) for x, y, z in fcc]
    bcc = [(0, 0, 0), (half, half, half)]
    edge = {"sc": 1.0, "bcc": 2 / 3**0.5, "fcc": 2**0.5, "diamond": 4 / 3**0.5}
    sites: dict[str, list[tuple[float, float, float]]] = {
        "sc": [(0, 0, 0)],
        "bcc": bcc,
        "fcc": fcc,
        "diamond": diamond,
    }
    table = potential.species_table
    plans = [
        (f"{name} {table.names[s]}", sites[name], edge[name], [s] * len(sites[name]))
        for name in sites
        for s in range(len(table))
    ]
    if len(table) > 1:
        plans.append(("CsCl", bcc, edge["bcc"], [0, 1]))
        plans.append(("NaCl", rock_salt, 2.0, [0] * 4 + [1] * 4))
    result = []
    for name, fractional, ratio, species in plans:
        cell = nearest * ratio * torch.eye(3, dtype=torch.float64)
        positions = torch.tensor(fractional, dtype=torch.float64) @ cell
        result.append((name, structure(table, positions, species, cell, (True,) * 3)))
    return result


def structure(
    table: SpeciesTable,
    positions: Tensor,
    species: Sequence[int],
    cell: Tensor | None = None,
    pbc: tuple[bool, ...] = (False, False, False),
) -> Structures:
    """One system."""
    cell = torch.zeros(3, 3, dtype=torch.float64) if cell is None else cell
    return Structures(
        positions=positions,
        species=torch.tensor(list(species), dtype=torch.int64),
        system_index=torch.zeros(len(species), dtype=torch.int64),
        cell=cell[None],
        pbc=torch.tensor([pbc]),
        species_table=table,
    )


def normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Normally distributed numbers in float64."""
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# -- comparing ----------------------------------------------------------------------


def predictable(potential: Potential) -> tuple[str, ...]:
    """What a potential predicts."""
    return tuple(name for name in LEARNABLE if name != "stress" or not potential.direct_forces)


def predicted(potential: Potential, structures: Structures) -> Prediction:
    """All properties that a potential predicts, with all taps."""
    return potential.predict(
        structures, properties=predictable(potential), taps=list(potential.taps)
    )


def refused(call: Callable[[], object], otherwise: str) -> None:
    """Check that a call raises `ModelError`."""
    try:
        call()
    except ModelError:
        return
    raise AssertionError(otherwise)


def fourth_differences(values: Tensor) -> Tensor:
    """Fourth differences: steps of a series stand out, and what is smooth cancels."""
    return values.diff(n=4).abs()


def derivative(function: Callable[[float], Tensor]) -> Tensor:
    """Fourth-order central difference at zero."""
    terms = [weight * function(k * STEP) for k, weight in _STENCIL.items()]
    return torch.stack(terms).sum(dim=0) / STEP


def same(
    after: Prediction, before: Prediction, *, tolerance: float, names: Sequence[str] = LEARNABLE
) -> None:
    """Compare the properties of two predictions."""
    for name in names:
        if name in before.properties:
            close(after[name], before[name], tolerance, name)


def close(
    actual: Tensor, expected: Tensor, tolerance: float, what: str, *, scaled: bool = True
) -> None:
    """Compare, relative to the largest expected value or one; NaN must meet NaN."""
    assert actual.shape == expected.shape, (
        f"{what}: shape {tuple(actual.shape)} where {tuple(expected.shape)} was expected"
    )
    missing = torch.isnan(expected)
    assert torch.equal(torch.isnan(actual), missing), f"{what}: NaN in other places"
    actual, expected = actual[~missing], expected[~missing]
    if not actual.numel():
        return
    scale = max(1.0, float(expected.abs().max())) if scaled else 1.0
    worst = float((actual - expected).abs().max())
    assert worst <= tolerance * scale, f"{what} differs by {worst:.2e}, tolerance {tolerance:.0e}"


def zero(value: Tensor, what: str, tolerance: float = 1e-12) -> None:
    """Check that nothing exceeds the tolerance."""
    worst = float(value.abs().max()) if value.numel() else 0.0
    assert worst <= tolerance, f"{what}: {worst:.2e} where zero was expected"
