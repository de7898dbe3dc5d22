"""SNAP: energies linear or quadratic in the bispectrum components of the neighbor density."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from potstill.bispectrum import (
    component_labels,
    components_and_slopes,
    components_of,
    half_layers,
    whole_layer,
)
from potstill.errors import DataError, ModelError, suggest
from potstill.models.base import Edges, LocalOutput, Potential, TapSpec
from potstill.models.hyper import Hyperparameters
from potstill.species import SpeciesTable

# Atoms are worked on in blocks of similar neighbor number: little padding, short vectors in cache.
_BLOCK, _SLOPE_BLOCK = 512, 64

#: Keywords of a .snapparam file, each with the argument of `SNAP` (which has the same default) and
#: its type.
_KEYWORDS: dict[str, tuple[str, Callable[[float], Any]]] = {
    "rcutfac": ("rcutfac", float),
    "twojmax": ("twojmax", int),
    "rfac0": ("rfac0", float),
    "rmin0": ("rmin0", float),
    "switchflag": ("switch", bool),
    "bzeroflag": ("bzero", bool),
    "quadraticflag": ("quadratic", bool),
}

#: Keywords of a .snapparam file that change the descriptors, with the only value understood here.
_FIXED_KEYWORDS = {"chemflag": 0, "bnormflag": 0, "wselfallflag": 0, "switchinnerflag": 0}

#: Keywords of a .snapparam file that say nothing about the energy.
_IGNORED_KEYWORDS = {"chunksize", "parallelthresh", "diagonalstyle"}


class SNAPHyperparameters(Hyperparameters):
    """Hyper-parameters of SNAP.

    Parameters
    ----------
    twojmax : int
        Largest doubled angular momentum.
    rcutfac : float
        Scales the sum of two species' radii to their cutoff, Å if the radii are pure numbers.
    radii : sequence of float
        (n_species,) R_i (LAMMPS' `radelem`), 0.5 each if left out: `rcutfac` is then the cutoff.
    weights : sequence of float
        (n_species,) w_k (`welem`), one if left out.
    rfac0 : float
        Polar angle that the cutoff is mapped to, as a fraction of π.
    rmin0 : float
        Distance that is mapped to an angle of zero, Å.
    switch : bool
        Let f go to zero at the cutoff (`switchflag`); without it energies jump there.
    bzero : bool
        Subtract the components of an isolated atom (`bzeroflag`).
    quadratic : bool
        Add quadratic terms to the energy.
    """

    twojmax: int = Field(default=6, ge=0)
    rcutfac: float = Field(default=5.0, gt=0)
    radii: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    weights: tuple[float, ...] | None = None
    rfac0: float = Field(default=0.99363, gt=0, le=1)
    rmin0: float = Field(default=0.0, ge=0)
    switch: bool = True
    bzero: bool = True
    quadratic: bool = False


class SNAP(Potential):
    """Spectral neighbor analysis potential with the conventions of LAMMPS.

    Neighbors within `R_ij = rcutfac (R_i + R_j)` become points on the unit sphere in four
    dimensions, with the polar angle `θ = π rfac0 (r - rmin0) / (R_ij - rmin0)`. Their density is
    expanded in Wigner's U (Thompson, Swiler, Trott, Foiles, Tucker, J. Comput. Phys. 285, 316
    (2015), Eqs. 1-7; labels j are doubled, as in LAMMPS):

        U_j = 1 + Σ_k w_k f(r_ik) U_j(θ, direction),   f = ½ + ½ cos[π (r - rmin0) / (R_ij - rmin0)]

        B_{j1 j2 j} = Σ conj(U_j) (U_j1 ⊗ U_j2 coupled to j),    0 <= j2 <= j1 <= j <= twojmax

    and the atomic energy is `β_0 + β · B`, plus `½ B · α · B` if `quadratic`. Layers of odd j
    (half-integer spin) are continued smoothly to r < rmin0, where LAMMPS changes their sign.

    Parameters
    ----------
    species_table : SpeciesTable
        The species.
    *values, **named
        Fields of `SNAPHyperparameters`, in their order or by name.

    Notes
    -----
    `coefficients` is one parameter, (n_species, n_coefficients) in eV, each row in the order of a
    .snapcoeff file: β_0, β, then the upper triangle of α row by row. They start at random as He et
    al. (2015) advise, normal with variance 2 / fan-in, the fan-in being the number of terms that
    are summed (without β_0, which starts at zero).

    Raises
    ------
    ModelError
        If a hyper-parameter is out of range or does not fit the number of species.
    """

    kind = "snap"

    # Cast where they are used.
    exact_buffers = ("radii", "weights")
    radii: Tensor
    weights: Tensor

    hyper_class = SNAPHyperparameters
    hyper: SNAPHyperparameters

    def __init__(self, species_table: SpeciesTable, *values: Any, **named: Any) -> None:
        p = SNAPHyperparameters.of(*values, **named)
        n_species = len(species_table)
        radii = (0.5,) * n_species if p.radii is None else p.radii
        weights = (1.0,) * n_species if p.weights is None else p.weights
        if len(radii) != n_species or len(weights) != n_species:
            raise ModelError(
                f"SNAP needs a radius and a weight for each of {n_species} species, not "
                f"{len(radii)} and {len(weights)}"
            )
        if p.rmin0 >= 2.0 * p.rcutfac * min(radii):
            raise ModelError("SNAP needs an rmin0 below the cutoff")
        of_species = {"radii": radii, "weights": weights}
        super().__init__(
            species_table, 2.0 * p.rcutfac * max(radii), p.model_copy(update=of_species)
        )
        self.twojmax, self.quadratic = p.twojmax, p.quadratic
        for name, row in of_species.items():
            # Not in the state dict: they are hyper-parameters.
            buffer = torch.tensor(row, dtype=torch.float64)
            self.register_buffer(name, buffer, persistent=False)
        start = torch.randn(n_species, self.n_coefficients)
        start = start * math.sqrt(2.0 / max(1, self.n_coefficients - 1))
        start[:, 0] = 0.0
        self.coefficients = nn.Parameter(start)

    @property
    def n_components(self) -> int:
        """Number of bispectrum components of an atom."""
        return len(component_labels(self.twojmax))

    @property
    def n_coefficients(self) -> int:
        """Number of coefficients of a species: one, and one per linear and per quadratic term."""
        n = self.n_components
        return 1 + n + (n * (n + 1) // 2 if self.quadratic else 0)

    @property
    def taps(self) -> dict[str, TapSpec]:
        """The bispectrum components, in the order of `component_labels`."""
        return {"bispectrum": TapSpec("node_scalar", self.n_components)}

    @property
    def reach(self) -> float:
        """The cutoff."""
        return self.cutoff

    def forward(
        self, species: Tensor, edges: Edges, r_ij: Tensor, n_local: int, taps: Sequence[str] = ()
    ) -> LocalOutput:
        """(n_local,) atomic energies in float64: the terms cancel by orders of magnitude."""
        components = self.bispectrum(species, edges, r_ij, n_local)
        atomic = components.new_zeros(n_local, dtype=torch.float64)
        for s in range(len(self.species_table)):
            atoms = (species[:n_local] == s).nonzero()[:, 0]
            energies = self._energies(components[atoms], self.coefficients[s])
            atomic = atomic.index_copy(0, atoms, energies)
        return LocalOutput(atomic, {"bispectrum": components} if "bispectrum" in taps else {})

    def _energies(self, components: Tensor, coefficients: Tensor) -> Tensor:
        """(n,) float64 from (n, n_components) and one species' coefficients."""
        n = self.n_components
        linear = coefficients[1 : n + 1]
        total = coefficients[0].double() + (components * linear).double().sum(dim=1)
        if self.quadratic:
            row, column = torch.triu_indices(n, n, device=components.device)
            alpha = coefficients.new_zeros(n, n).index_put((row, column), coefficients[n + 1 :])
            # The file gives α_ii and, once, α_ij: half of the former, the whole of the latter.
            alpha = alpha - 0.5 * torch.diag(alpha.diagonal())
            total = total + ((components @ alpha) * components).double().sum(dim=1)
        return total

    def terms(self, components: Tensor) -> Tensor:
        """(n, n_coefficients) what the coefficients multiply, from (n, n_components)."""
        columns = [torch.ones_like(components[:, :1]), components]
        if self.quadratic:
            row, column, half = self._products(components)
            columns.append(half * components[:, row] * components[:, column])
        return torch.cat(columns, dim=1)

    def term_derivatives(self, components: Tensor, slopes: Tensor) -> Tensor:
        """(..., n_coefficients) change of `terms` where components change by `slopes`.

        Both arguments are (..., n_components) and broadcast.
        """
        columns = [torch.zeros_like(slopes[..., :1]), slopes]
        if self.quadratic:
            row, column, half = self._products(components)
            product = components[..., row] * slopes[..., column]
            product = product + components[..., column] * slopes[..., row]
            columns.append(half * product)
        return torch.cat(columns, dim=-1)

    def _products(self, components: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Components multiplied in each quadratic term, and its factor: a square counts half."""
        row, column = torch.triu_indices(*[self.n_components] * 2, device=components.device)
        return row, column, torch.where(row == column, 0.5, 1.0).to(components.dtype)

    def bispectrum(self, species: Tensor, edges: Edges, r_ij: Tensor, n_local: int) -> Tensor:
        """(n_local, n_components) components of the local atoms; arguments as of `forward`."""
        _, edges, reach, r_ij = self._near(species, edges, r_ij)
        a, b, weight = self._points(species, edges, r_ij, reach)
        blocks = [r_ij.new_zeros(0, self.n_components)]
        order, slotted = _blocks(edges, n_local, _BLOCK)
        for slots, filled in slotted:
            values = _take(a, slots), _take(b, slots), _take(weight, slots) * filled
            layers = half_layers(*values, self.twojmax)
            density = [whole_layer(layer.sum(dim=2), j) for j, layer in enumerate(layers)]
            blocks.append(components_of(density, self.twojmax))
        return self._without_lone_atom(torch.cat(blocks).index_select(0, order.argsort()))

    @torch.no_grad()
    def bispectrum_slopes(
        self, species: Tensor, edges: Edges, r_ij: Tensor, n_local: int
    ) -> tuple[Tensor, Tensor]:
        """The bispectrum components, and the derivatives of each by all of its atom's pair vectors.

        What backward passes through `bispectrum` give, one per component, at a small part of their
        cost: derivatives of the components by the density are taken once per atom, and those of the
        density by the pair vectors once for all components.

        Returns
        -------
        components : Tensor
            (n_local, n_components).
        slopes : Tensor
            (E, 3, n_components), of the components of a pair's center.
        """
        slopes = r_ij.new_zeros(*r_ij.shape, self.n_components, dtype=self.dtype)
        near, edges, reach, r_ij = self._near(species, edges, r_ij)

        def points(r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return self._points(species, edges, r, reach)

        along = torch.eye(3, dtype=r_ij.dtype, device=r_ij.device)
        moved = [torch.func.jvp(points, (r_ij,), (axis.expand_as(r_ij),))[1] for axis in along]
        # Each with its three derivatives below it: (4, E).
        a, b, weight = (torch.stack(x) for x in zip(points(r_ij), *moved, strict=True))
        blocks = [r_ij.new_zeros(0, self.n_components)]
        order, slotted = _blocks(edges, n_local, _SLOPE_BLOCK)
        for slots, filled in slotted:
            values = a[:, slots], b[:, slots], weight[:, slots] * filled
            layers = list(half_layers(*values, self.twojmax))
            components, by_density = components_and_slopes(
                [layer[0].sum(dim=2) for layer in layers], self.twojmax
            )
            blocks.append(components)
            # (3, U, K, n) complex -> (n, 2 U, 3 K)
            by_vector = torch.view_as_real(torch.cat([x[1:].flatten(1, 2) for x in layers], dim=1))
            by_vector = by_vector.permute(3, 1, 4, 0, 2).flatten(3, 4).flatten(1, 2)
            found = (by_density @ by_vector).unflatten(2, (3, -1)).permute(0, 3, 2, 1)
            slopes[near[slots.T[filled.T]]] = found[filled.T]
        components = torch.cat(blocks).index_select(0, order.argsort())
        return self._without_lone_atom(components), slopes

    def _near(
        self, species: Tensor, edges: Edges, r_ij: Tensor
    ) -> tuple[Tensor, Edges, Tensor, Tensor]:
        """Which pairs are within their species' cutoff; these, their cutoffs and vectors."""
        r_ij = r_ij.to(self.dtype)
        radii = self.radii.to(self.dtype)
        reach = self.hyper.rcutfac * (radii[species[edges.center]] + radii[species[edges.neighbor]])
        near = (r_ij.detach().square().sum(dim=1) < reach.square()).nonzero()[:, 0]
        return near, Edges(edges.center[near], edges.neighbor[near]), reach[near], r_ij[near]

    def _without_lone_atom(self, components: Tensor) -> Tensor:
        """Take off the components of an isolated atom, if they are to be."""
        if not self.hyper.bzero:
            return components
        alone = [j + 1.0 for _, _, j in component_labels(self.twojmax)]
        return components - components.new_tensor(alone)

    def _points(
        self, species: Tensor, edges: Edges, r_ij: Tensor, reach: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Conjugate Cayley-Klein parameters a and b (complex), and weights, (E,) each."""
        r = torch.linalg.vector_norm(r_ij, dim=1)
        turn = math.pi * (r - self.hyper.rmin0) / (reach - self.hyper.rmin0)
        theta = self.hyper.rfac0 * turn
        direction = r_ij * (theta.sin() / r)[:, None]
        a = torch.complex(theta.cos(), direction[:, 2])
        b = torch.complex(direction[:, 1], direction[:, 0])
        weight = self.weights.to(r.dtype)[species[edges.neighbor]]
        if self.hyper.switch:
            weight = weight * torch.where(r > self.hyper.rmin0, 0.5 + 0.5 * turn.cos(), 1.0)
        return a, b, weight

    def regularized_weights(self) -> list[Tensor]:
        """All coefficients but the constants."""
        return [self.coefficients[:, 1:]]

    # -- LAMMPS' files ---------------------------------------------------------------------------

    @classmethod
    def from_lammps(cls, coeff: str | Path, param: str | Path) -> SNAP:
        """Read a .snapcoeff and a .snapparam file of LAMMPS' `pair_style snap`, in float64.

        Other terms that a potential is used with (often `ZBL`) are not in the files.

        Raises
        ------
        DataError
            If a file is not complete, or names what potstill does not have (`chemflag`,
            `bnormflag`, `wselfallflag`, `switchinnerflag`).
        """
        elements = _read_coefficients(Path(coeff))
        table = SpeciesTable.from_symbols(elements)
        rows = [elements[name] for name in table.names]
        model = cls(
            table,
            radii=[row.radius for row in rows],
            weights=[row.weight for row in rows],
            **_read_parameters(Path(param)),
        ).double()
        for name, row in zip(table.names, rows, strict=True):
            if len(row.coefficients) != model.n_coefficients:
                raise DataError(
                    f"{coeff} has {len(row.coefficients)} coefficients for {name}, but "
                    f"{param} asks for {model.n_coefficients}"
                )
        with torch.no_grad():
            values = torch.tensor([row.coefficients for row in rows], dtype=torch.float64)
            model.coefficients.copy_(values)
        return model

    def to_lammps(self, coeff: str | Path, param: str | Path) -> None:
        """Write the files that LAMMPS' `pair_style snap` reads; the inverse of `from_lammps`."""
        lines = ["# SNAP coefficients, written by potstill", ""]
        lines.append(f"{len(self.species_table)} {self.n_coefficients}")
        for s, row in enumerate(self.coefficients.detach().double().tolist()):
            radius, weight = float(self.radii[s]), float(self.weights[s])
            lines.append(f"{self.species_table.names[s]} {radius!r} {weight!r}")
            lines.extend(map(repr, row))
        Path(coeff).write_text("\n".join(lines) + "\n", encoding="utf-8")
        lines = ["# SNAP parameters, written by potstill", ""]
        for keyword, (argument, _) in _KEYWORDS.items():
            lines.append(f"{keyword} {+getattr(self.hyper, argument)!r}")  # True is written as 1
        Path(param).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _take(values: Tensor, slots: Tensor) -> Tensor:
    """Values (E,) laid out as (K, n) slots; without pairs there are no slots."""
    return values.index_select(0, slots.flatten()).view(slots.shape)


def _blocks(
    edges: Edges, n_local: int, size: int
) -> tuple[Tensor, Iterator[tuple[Tensor, Tensor]]]:
    """Atoms by falling number of neighbors, and of each block (K, n) pairs and which are used."""
    pair, used = edges.padded(n_local)
    n_neighbors = used.sum(dim=1)
    order = n_neighbors.argsort(descending=True, stable=True)

    def blocks() -> Iterator[tuple[Tensor, Tensor]]:
        for atoms in order.split(size):
            width = int(n_neighbors[atoms].max()) if len(atoms) else 0
            yield pair[atoms, :width].T, used[atoms, :width].T

    return order, blocks()


# -- LAMMPS' files -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Element:
    """What a .snapcoeff file says of one element."""

    radius: float
    weight: float
    coefficients: list[float]


def _read_coefficients(path: Path) -> dict[str, _Element]:
    """Elements by symbol."""
    rows = _rows(path)
    try:
        n_elements, n_coefficients = (int(word) for word in rows[0])
        blocks = rows[1:]
        if len(blocks) != n_elements * (n_coefficients + 1):
            raise ValueError
        elements = {}
        for k in range(n_elements):
            head, *own = blocks[k * (n_coefficients + 1) : (k + 1) * (n_coefficients + 1)]
            symbol, radius, weight = head
            values = [float(value) for (value,) in own]
            elements[symbol] = _Element(float(radius), float(weight), values)
    except (ValueError, IndexError) as error:
        raise DataError(
            f"{path} is not a complete .snapcoeff file: a line with the numbers of elements and of "
            "coefficients, then for each element its symbol, radius and weight, and one "
            "coefficient per line"
        ) from error
    return elements


def _read_parameters(path: Path) -> dict[str, Any]:
    """Keyword arguments of `SNAP` without radii and weights."""
    found: dict[str, float] = {}
    for words in _rows(path):
        known = {*_KEYWORDS, *_FIXED_KEYWORDS, *_IGNORED_KEYWORDS}
        if words[0] not in known:
            raise DataError(f"{path}: unknown keyword '{words[0]}'{suggest(words[0], known)}")
        try:
            (value,) = words[1:]
            found[words[0]] = float(value)
        except ValueError as error:
            raise DataError(f"{path}: '{' '.join(words)}' is not a keyword and a number") from error
    for name, only in _FIXED_KEYWORDS.items():
        if found.get(name, only) != only:
            raise DataError(f"{path}: potstill's SNAP has no {name} {found[name]:g}")
    for name in ("rcutfac", "twojmax"):
        if name not in found:
            raise DataError(f"{path} has no {name}")
    return {
        argument: kind(found[name]) for name, (argument, kind) in _KEYWORDS.items() if name in found
    }


def _rows(path: Path) -> list[list[str]]:
    """Words of the lines that are not empty, without comments."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    rows = [line.partition("#")[0].split() for line in text.splitlines()]
    return [row for row in rows if row]
