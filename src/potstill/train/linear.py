"""Least squares for models that are linear in their coefficients."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from potstill.errors import ConfigError, DataError, MissingLabelError, suggest
from potstill.models import SNAP, Edges, PairPotential, Potential
from potstill.neighbors import build_neighbor_list, pair_vectors
from potstill.structures import NeighborList, Properties, Structures

#: Models that are linear in their `coefficients`.
Linear = SNAP | PairPotential

#: What can be fitted, and the six independent components of a stress.
_FITTED = ("energy", "forces", "stress")
_VOIGT = ((0, 1, 2, 1, 0, 0), (0, 1, 2, 2, 2, 1))

#: A weight for all systems, one for each, or one per group.
Weight = float | Tensor | Mapping[str, float]


@dataclass(frozen=True)
class LinearFit:
    """The solution of a linear least-squares problem.

    Parameters
    ----------
    coefficients : Tensor
        (n_species or n_pairs, n_coefficients) float64, eV.
    rank : int
        Number of independent directions among the coefficients that the data determine.
    n_coefficients, n_rows : int
        Size of the problem.
    condition : float
        Largest over smallest singular value that was kept, of the matrix with columns scaled to
        unit length.
    weighted_rmse : float
        Root of the mean squared residual of the weighted rows.
    ridge : float
        The penalty's factor, the best of those that were given.
    validation_rmse : float
        As `weighted_rmse`, of the validation set; NaN without one.
    """

    coefficients: Tensor
    rank: int
    n_coefficients: int
    n_rows: int
    condition: float
    weighted_rmse: float
    ridge: float = 0.0
    validation_rmse: float = math.nan


def fit_linear(
    model: Linear,
    structures: Structures,
    properties: Properties,
    *,
    weights: Mapping[str, Weight],
    baseline: Potential | None = None,
    ridge: float | Sequence[float] = 0.0,
    validation: tuple[Structures, Properties] | None = None,
    tolerance: float = 1e-13,
    batch_atoms: int = 256,
) -> LinearFit:
    """Fit the coefficients of a linear model to energies, forces and stresses, in float64.

    Rows are energies per atom (eV), components of forces (eV/Å) and the six components of stresses
    (eV/Å³). Each is multiplied by its weight, so that the squares of the weights enter the sum of
    squares, as in FitSNAP. The matrix is reduced batch by batch (QR), so that memory does not grow
    with the data.

    Parameters
    ----------
    model : SNAP or PairPotential
        Its coefficients are replaced by the solution, in its own dtype.
    properties : Properties
        The labels; systems without one contribute no rows for it.
    weights : mapping
        By property (energy, forces, stress): a number, one per system (S,), or one per name of a
        group. Properties that are left out, and weights of zero, give no rows.
    baseline : Potential, optional
        A fixed potential, such as `ZBL`, that is taken off the labels first.
    ridge : float or sequence of float
        `ridge |coefficients|²` is added to the weighted sum of squares, without the constants; for
        pair potentials `ridge` times the integral of the squared third derivatives, which leaves
        parabolas alone. Of several factors the one with the least residual of `validation`.
    validation : (Structures, Properties), optional
        Labels that are not fitted, with the same weights.
    tolerance : float
        Directions with singular values below this part of the largest are set to zero.
    batch_atoms : int
        Atoms per batch, at least one system.

    Raises
    ------
    ConfigError
        If a weight is for no known property, or misses a group, or several factors are to be
        chosen from without a validation set.
    MissingLabelError
        If a property with a weight is not among the labels.
    DataError
        If no rows are left.
    """
    ridges = [ridge] if isinstance(ridge, int | float) else list(ridge)
    if len(ridges) > 1 and validation is None:
        raise ConfigError("several ridges need a validation set to choose from them")
    work = copy.deepcopy(model).double()

    def reduce(data: Structures, labels: Properties) -> tuple[Tensor, int]:
        return _triangle(work, data, labels, weights, baseline, batch_atoms)

    triangle, n_rows = reduce(structures, properties)
    penalty = _penalty(work)
    fits = [
        _solve(triangle, work.coefficients.shape, n_rows, penalty, r, tolerance) for r in ridges
    ]
    if validation is not None:
        unseen, n_unseen = reduce(*validation)
        fits = [
            replace(fit, validation_rmse=_rmse(unseen, fit.coefficients.flatten(), n_unseen))
            for fit in fits
        ]
    fit = min(fits, key=lambda fit: fit.validation_rmse)
    with torch.no_grad():
        model.coefficients.copy_(fit.coefficients)
    return fit


def _triangle(
    model: Linear,
    structures: Structures,
    properties: Properties,
    weights: Mapping[str, Weight],
    baseline: Potential | None,
    batch_atoms: int,
) -> tuple[Tensor, int]:
    """Triangle of the QR decomposition of the matrix with its right-hand side, and its rows."""
    structures = structures.with_species_table(model.species_table)
    scale = {
        name: _by_system(name, weight, structures, properties) for name, weight in weights.items()
    }
    triangle = torch.zeros(0, model.coefficients.numel() + 1, dtype=torch.float64)
    n_rows = 0
    for systems in structures.batches(batch_atoms):
        part = structures.select(systems)
        labels = _labels(part, properties.select(structures.rows(systems)), list(scale), baseline)
        for name, matrix in _design(model, part, list(scale)).items():
            weight = part.per_row(name, scale[name][systems])
            rows = torch.cat([matrix, labels[name][:, :, None]], dim=2) * weight[:, None, None]
            rows = rows[weight != 0.0].flatten(0, 1)
            n_rows += len(rows)
            triangle = torch.linalg.qr(torch.cat([triangle, rows]), mode="r")[1]
    if n_rows == 0:
        raise DataError("there is nothing to fit to: no label has a weight above zero")
    if not bool(torch.isfinite(triangle).all()):
        raise DataError("labels or descriptors are not finite")
    return triangle, n_rows


def _by_system(name: str, weight: Weight, structures: Structures, properties: Properties) -> Tensor:
    """(S,) float64, zero where a system has no such label."""
    if name not in _FITTED:
        raise ConfigError(f"weights are for {', '.join(_FITTED)}: '{name}'{suggest(name, _FITTED)}")
    if name not in properties:
        raise MissingLabelError(f"there is a weight for {name}, but there are no such labels")
    if isinstance(weight, Mapping):
        groups = structures.group or ("",) * structures.n_systems
        for group in set(groups) - set(weight):
            raise ConfigError(f"the weights for {name} have no entry for group '{group}'")
        weight = torch.tensor([weight[group] for group in groups], dtype=torch.float64)
    values = torch.as_tensor(weight, dtype=torch.float64).expand(structures.n_systems)
    return torch.where(properties.presence(name, structures.n_systems), values, 0.0)


def _labels(
    structures: Structures, properties: Properties, names: list[str], baseline: Potential | None
) -> dict[str, Tensor]:
    """Targets as (S or N, rows of each): energies per atom, forces, stress components."""
    values = {name: properties[name] for name in names}
    if baseline is not None:
        taken = baseline.predict(structures, properties=names)
        values = {name: value - taken[name] for name, value in values.items()}
    if "energy" in values:
        n_atoms = structures.n_atoms_per_system.clamp(min=1)
        values["energy"] = (values["energy"] / n_atoms)[:, None]
    if "stress" in values:
        values["stress"] = values["stress"][:, _VOIGT[0], _VOIGT[1]]
    return values


def _design(model: Linear, structures: Structures, names: list[str]) -> dict[str, Tensor]:
    """By property: how its rows depend on the coefficients, (S or N, rows of each, n)."""
    neighbors = build_neighbor_list(structures, model.cutoff)
    if isinstance(model, PairPotential):
        return _design_of_pairs(model, structures, neighbors, names)
    edges = Edges(neighbors.center, neighbors.neighbor)
    r = pair_vectors(structures, neighbors)
    components, slopes = model.bispectrum_slopes(structures.species, edges, r, structures.n_atoms)
    matrices = {}
    terms = model.terms(components)  # (N, n_coefficients)
    if "energy" in names:
        atomic = _columns_of_species(model, terms, structures.species)
        total = atomic.new_zeros(structures.n_systems, atomic.shape[1])
        total = total.index_add(0, structures.system_index, atomic)
        n_atoms = structures.n_atoms_per_system.clamp(min=1)
        matrices["energy"] = (total / n_atoms[:, None])[:, None]
    if {"forces", "stress"} & set(names):
        change = model.term_derivatives(components[edges.center][:, None], slopes)
        change = _columns_of_species(model, change, structures.species[edges.center])
        if "forces" in names:
            forces = change.new_zeros(structures.n_atoms, *change.shape[1:])
            forces = forces.index_add(0, edges.center, change)
            matrices["forces"] = forces.index_add(0, edges.neighbor, -change)
        if "stress" in names:
            a, b = (torch.tensor(axes) for axes in _VOIGT)
            outer = r[:, a, None] * change[:, b] + r[:, b, None] * change[:, a]  # (E, 6, n)
            virial = outer.new_zeros(structures.n_systems, *outer.shape[1:])
            virial = virial.index_add(0, structures.system_index[edges.center], 0.5 * outer)
            matrices["stress"] = virial / structures.volume[:, None, None]
    return matrices


@torch.no_grad()
def _design_of_pairs(
    model: PairPotential, structures: Structures, neighbors: NeighborList, names: list[str]
) -> dict[str, Tensor]:
    """As of `_design`: each pair of atoms has a part in four columns."""
    vectors = pair_vectors(structures, neighbors)
    r = torch.linalg.vector_norm(vectors, dim=1)
    close = (r < model.cutoff).nonzero()[:, 0]
    center, neighbor = neighbors.center[close], neighbors.neighbor[close]
    r, vectors, system = r[close], vectors[close], structures.system_index[center]
    # With three more columns per pair of species: those of the coefficients that are zero.
    width = model.n_knots + 3
    first, weight = model.basis(r)
    slope = model.basis(r, derivative=True)[1] / r[:, None]
    column = model.pair_rows(structures.species, center, neighbor) * width + first
    columns = column[:, None] + torch.arange(4)

    def spread(target: Tensor, n_targets: int, values: Tensor) -> Tensor:
        """(n_targets, rows, n) from (E, rows, 4), added up over the pairs of each target."""
        n_pairs, n_rows = len(model.coefficients), values.shape[1]
        total = values.new_zeros(n_targets * n_rows * n_pairs * width)
        row = target[:, None] * n_rows + torch.arange(n_rows)
        place = row[:, :, None] * (n_pairs * width) + columns[:, None]
        total.index_add_(0, place.flatten(), values.flatten())
        return total.view(n_targets, n_rows, n_pairs, width)[..., : model.n_knots].flatten(2)

    matrices = {}
    if "energy" in names:
        energy = spread(system, structures.n_systems, 0.5 * weight[:, None])
        n_atoms = structures.n_atoms_per_system.clamp(min=1)
        matrices["energy"] = energy / n_atoms[:, None, None]
    if "forces" in names:
        # Both directions of a pair are in the list.
        force = vectors[:, :, None] * slope[:, None]
        matrices["forces"] = spread(center, structures.n_atoms, force)
    if "stress" in names:
        outer = 0.5 * vectors[:, _VOIGT[0]] * vectors[:, _VOIGT[1]]
        virial = spread(system, structures.n_systems, outer[:, :, None] * slope[:, None])
        matrices["stress"] = virial / structures.volume[:, None, None]
    return matrices


def _columns_of_species(model: SNAP, terms: Tensor, species: Tensor) -> Tensor:
    """Spread (n, ..., n_coefficients) over the columns of the rows' species; others are zero."""
    if len(model.species_table) == 1:
        return terms
    own = torch.nn.functional.one_hot(species, len(model.species_table)).to(terms.dtype)
    own = own.reshape(len(species), *[1] * (terms.ndim - 2), -1, 1)
    return (own * terms.unsqueeze(-2)).flatten(-2)


def _penalty(model: Linear) -> Tensor:
    """(m, n) what the coefficients are multiplied with for the vector whose square is penalized."""
    if isinstance(model, PairPotential):
        return torch.block_diag(*[model.roughness] * len(model.coefficients))
    kept = torch.ones(model.coefficients.shape, dtype=torch.float64)
    kept[:, 0] = 0.0
    return torch.diag(kept.flatten())


def _rmse(triangle: Tensor, solution: Tensor, n_rows: int) -> float:
    residual = triangle[:, -1] - triangle[:, :-1] @ solution
    return float(residual.square().sum().div(n_rows).sqrt())


def _solve(
    triangle: Tensor,
    shape: torch.Size,
    n_rows: int,
    penalty: Tensor,
    ridge: float,
    tolerance: float,
) -> LinearFit:
    """Least squares from the triangle of the QR decomposition of matrix and right-hand side."""
    matrix, target = triangle[:, :-1], triangle[:, -1]
    if ridge > 0.0:
        matrix = torch.cat([matrix, math.sqrt(ridge) * penalty])
        target = torch.cat([target, target.new_zeros(len(penalty))])
    # Columns differ by orders of magnitude; what counts as dependent should not.
    length = torch.linalg.vector_norm(matrix, dim=0)
    length = torch.where(length > 0.0, length, 1.0)
    u, singular, vh = torch.linalg.svd(matrix / length, full_matrices=False)
    kept = singular > tolerance * singular[0]
    inverse = torch.where(kept, 1.0 / singular, 0.0)
    solution = (vh.T @ (inverse * (u.T @ target))) / length
    return LinearFit(
        coefficients=solution.reshape(shape),
        rank=int(kept.sum()),
        n_coefficients=solution.numel(),
        n_rows=n_rows,
        condition=float(singular[0] / singular[kept][-1]),
        weighted_rmse=_rmse(triangle, solution, n_rows),
        ridge=float(ridge),
    )
