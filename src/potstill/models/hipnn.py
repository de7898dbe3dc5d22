"""HIP-NN with tensor sensitivities.

Lubbers, Smith, Barros, J. Chem. Phys. 148, 241715 (2018); Chigaev et al., J. Chem. Phys. 158,
184108 (2023). Hyper-parameters keep the names of the hippynn package, with which energies and
forces agree for equal weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple, Self, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from potstill.core import (
    HipnnParameters,
    HipnnShape,
    hipnn_md,
    hipnn_pass,
    weighted_energy,
)
from potstill.errors import suggest
from potstill.models.base import (
    Edges,
    LocalOutput,
    Potential,
    Regularizer,
    StartingData,
    TapSpec,
    refuse_ghosts,
)
from potstill.models.engines import NativeKernels
from potstill.models.hyper import Hyperparameters, Real
from potstill.species import SpeciesTable

#: Independent components of the tensors of rank 0, 1 and 2 (traceless and symmetric).
_N_COMPONENTS = (1, 3, 5)


def cosine_squared(r: Tensor, cutoff: float) -> Tensor:
    """cos²(pi r / 2 cutoff): continuous with its first derivative at the cutoff."""
    return torch.cos(r * (0.5 * math.pi / cutoff)).square()


def polynomial(r: Tensor, cutoff: float) -> Tensor:
    """1 - 10 x³ + 15 x⁴ - 6 x⁵: continuous with two derivatives at the cutoff."""
    x = (r / cutoff).clamp(max=1.0)
    return 1.0 - x**3 * (10.0 - 15.0 * x + 6.0 * x**2)


CUTOFF_FUNCTIONS = {"cosine_squared": cosine_squared, "polynomial": polynomial}


class Sensitivity(nn.Module):
    """Gaussians in inverse distance with trainable centers and widths, times a cutoff function.

    s_n(r) = exp(-(1/r - 1/mu_n)² sigma_n² / 2) f(r); mu_n start evenly spaced in 1/r from
    `dist_soft_max` to `dist_soft_min`, all sigma_n at 2 n_sensitivities dist_soft_min.
    """

    def __init__(self, p: HIPNNHyperparameters) -> None:
        super().__init__()
        self.cutoff = p.dist_hard_max
        self.cutoff_function = CUTOFF_FUNCTIONS[p.cutoff_function]
        n, low = p.n_sensitivities, p.dist_soft_min
        inverse = torch.linspace(1.0 / p.dist_soft_max, 1.0 / low, n)
        self.mu = nn.Parameter(1.0 / inverse)
        self.sigma = nn.Parameter(torch.full((n,), 2.0 * n * low))

    def forward(self, r: Tensor) -> Tensor:
        """(..., n_sensitivities) from (...) distances; zero from the cutoff on."""
        deviation = (1.0 / r.unsqueeze(-1) - 1.0 / self.mu) * self.sigma
        envelope = self.cutoff_function(r, self.cutoff) * (r < self.cutoff)
        return torch.exp(-0.5 * deviation.square()) * envelope.unsqueeze(-1)


def tensor_components(unit: Tensor, l_max: int) -> Tensor:
    """Tensors of a direction up to rank `l_max`, flattened side by side.

    Parameters
    ----------
    unit : Tensor
        (..., 3) unit vectors u.
    l_max : int
        0, 1 or 2.

    Returns
    -------
    Tensor
        (..., 1), (..., 4) or (..., 9): 1; u; and xx, xy, xz, yy, yz of u u - 1/3.
    """
    parts = [torch.ones_like(unit[..., :1])]
    if l_max >= 1:
        parts.append(unit)
    if l_max >= 2:
        x, y, z = unit.unbind(-1)
        third = (x * x + y * y + z * z) / 3.0
        parts.append(torch.stack([x * x - third, x * y, x * z, y * y - third, y * z], dim=-1))
    return torch.cat(parts, dim=-1)


class Interaction(nn.Module):
    """The interaction layer: Z' = V S Z + W Z + b, and the norms of its tensor counterparts.

    The same weights V serve every rank (weights are tied); each rank has one scale per feature.
    `unit_input` says that the only input feature is 1 on every atom, as one species' one-hot is.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        p: HIPNNHyperparameters,
        s: Sensitivity,
        *,
        unit_input: bool = False,
    ) -> None:
        super().__init__()
        self.l_max = p.l_max
        self.cusp_reg = p.cusp_reg
        self.unit_input = unit_input
        self.sensitivity = s
        self.int_weights = nn.Parameter(torch.empty(s.mu.shape[0], n_out, n_in))
        nn.init.xavier_normal_(self.int_weights)
        self.selfint = _linear(n_in, n_out)
        self.scales = nn.ParameterList([nn.Parameter(torch.randn(n_out)) for _ in range(p.l_max)])

    def forward(self, features: Tensor, geometry: _Geometry) -> Tensor:
        """(n_local, n_out) from (N, n_in) features of local atoms and ghosts."""
        environment = self._environment(features, geometry)  # (n_local, m, n_sens * n_in)
        weights = self.int_weights.permute(0, 2, 1).flatten(0, 1)  # (n_sens * n_in, n_out)
        scalar, *tensors = (environment @ weights).split(_N_COMPONENTS[: self.l_max + 1], dim=1)
        out = scalar[:, 0] + self.selfint(features[: scalar.shape[0]])
        for rank, (tensor, scale) in enumerate(zip(tensors, self.scales, strict=True), start=1):
            norm = torch.sqrt(_square_norm(tensor, rank) + self.cusp_reg)
            out = out + norm * scale
        return out

    def _environment(self, features: Tensor, geometry: _Geometry) -> Tensor:
        """Sum over neighbors of sensitivity x tensor x feature, as batched matrix products.

        Whichever of (tensor x feature) and (sensitivity x tensor) is narrower is spelled out per
        pair; the other factor comes in by the product.
        """
        sense = self.sensitivity(geometry.distance) * geometry.used  # (n, K, n_sens)
        n_local, width, n_sens = sense.shape
        tensor = geometry.tensor  # (n, K, m)
        m, n_in = tensor.shape[2], features.shape[1]
        if self.unit_input:
            return (sense.transpose(1, 2) @ tensor).transpose(1, 2)  # (n, m, n_sens)
        near = features.index_select(0, geometry.neighbor.flatten()).view(n_local, width, n_in)
        if n_in <= n_sens:
            pair = (tensor.unsqueeze(3) * near.unsqueeze(2)).flatten(2)  # (n, K, m * n_in)
            env = (sense.transpose(1, 2) @ pair).view(n_local, n_sens, m, n_in).transpose(1, 2)
        else:
            pair = (tensor.unsqueeze(3) * sense.unsqueeze(2)).flatten(2)  # (n, K, m * n_sens)
            env = (pair.transpose(1, 2) @ near).view(n_local, m, n_sens, n_in)
        return env.reshape(n_local, m, n_sens * n_in)

    def regularized_weights(self) -> list[Tensor]:
        """Interaction and self-interaction weights."""
        return [self.int_weights, self.selfint.weight]


class Residual(nn.Module):
    """x + W2 softplus(layer(x)) + b2, with a linear map of x where widths differ."""

    def __init__(self, layer: Interaction | nn.Linear, n_in: int, n_out: int) -> None:
        super().__init__()
        self.layer = layer
        self.res_layer = nn.Linear(n_out, n_out)
        self.adjust = nn.Linear(n_in, n_out, bias=False) if n_in != n_out else None

    def forward(self, features: Tensor, *geometry: _Geometry) -> Tensor:
        """(n, n_out) from (n, n_in), or from (N, n_in) of which the first n are local."""
        change = self.res_layer(nn.functional.softplus(self.layer(features, *geometry)))
        same = features[: change.shape[0]]
        return change + (same if self.adjust is None else self.adjust(same))

    def regularized_weights(self) -> list[Tensor]:
        """All matrices of the layer."""
        inner = self.layer
        weights = inner.regularized_weights() if isinstance(inner, Interaction) else [inner.weight]
        adjust = [] if self.adjust is None else [self.adjust.weight]
        return [self.res_layer.weight, *weights, *adjust]


class HIPNNHyperparameters(Hyperparameters):
    """Hyper-parameters of HIP-NN; the defaults are a small student for any elements.

    Parameters
    ----------
    n_features : int
        Width of every layer.
    n_sensitivities : int
        Radial functions per interaction layer.
    dist_soft_min : float
        First initial center of the radial functions, Å: about the shortest distance in the data.
    dist_soft_max : float
        Last initial center, Å, at most the cutoff.
    dist_hard_max : float
        Cutoff, Å.
    n_atom_layers : int
        Feed-forward layers after each interaction layer.
    n_interaction_layers : int
        Number of blocks.
    l_max : int
        Highest rank of the tensor sensitivities: 0, 1 or 2.
    cusp_reg : float
        Added under the square root of the tensors' norms: elastic constants and phonons need more
        than the 1e-6 of hippynn.
    cutoff_function : {"cosine_squared", "polynomial"}
        The former is the original; the latter has two continuous derivatives.

    Notes
    -----
    Where all of the first six are given, as they had to be before there were defaults, `l_max` is 1
    and `cusp_reg` 1e-6 by default, as then.
    """

    n_features: int = Field(default=32, ge=1)
    n_sensitivities: int = Field(default=20, ge=1)
    dist_soft_min: Real = 0.8
    dist_soft_max: Real = 4.5
    dist_hard_max: float = 5.5
    n_atom_layers: int = Field(default=2, ge=0)
    n_interaction_layers: int = Field(default=1, ge=1)
    l_max: int = 2
    cusp_reg: Real = Field(default=1e-2, ge=0)
    cutoff_function: str = "cosine_squared"

    @model_validator(mode="before")
    @classmethod
    def _as_before_there_were_defaults(cls, values: Any) -> Any:
        once_required = list(cls.model_fields)[:6]
        if isinstance(values, dict) and values.keys() >= set(once_required):
            return {"l_max": 1, "cusp_reg": 1e-6, **values}
        return values

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.l_max not in (0, 1, 2):
            raise ValueError(f"l_max must be 0, 1 or 2, not {self.l_max}")
        low, high, cutoff = self.dist_soft_min, self.dist_soft_max, self.dist_hard_max
        if not 0.0 < low < high <= cutoff:
            raise ValueError(
                "HIP-NN needs 0 < dist_soft_min < dist_soft_max <= dist_hard_max, "
                f"not {low}, {high}, {cutoff}"
            )
        if self.cutoff_function not in CUTOFF_FUNCTIONS:
            near = suggest(self.cutoff_function, CUTOFF_FUNCTIONS)
            raise ValueError(f"unknown cutoff function '{self.cutoff_function}'{near}")
        return self


class HIPNN(Potential):
    """Hierarchically interacting particle neural network with tensor sensitivities.

    Parameters
    ----------
    species_table : SpeciesTable
        Species, one-hot encoded.
    *values, **named
        Fields of `HIPNNHyperparameters`, in their order or by name.

    Notes
    -----
    The energy of an atom is the sum of E0 (a trainable energy per species) and one linear term per
    block. The tap `hierarchical_energies` returns the terms one by one, for `hierarchicality`.
    """

    kind = "hipnn"
    compilable = True
    has_native_kernels = True
    hyper_class = HIPNNHyperparameters
    hyper: HIPNNHyperparameters

    def __init__(self, species_table: SpeciesTable, *values: Any, **named: Any) -> None:
        p = HIPNNHyperparameters.of(*values, **named)
        super().__init__(species_table, p.dist_hard_max, p)
        n_features = p.n_features
        n_species = len(species_table)
        widths = [n_species] + [n_features] * p.n_interaction_layers
        self.blocks = nn.ModuleList()
        for b, n_in in enumerate(widths[:-1]):
            unit_input = b == 0 and n_species == 1
            interaction = Interaction(n_in, n_features, p, Sensitivity(p), unit_input=unit_input)
            layers = [Residual(interaction, n_in, n_features)]
            for _ in range(p.n_atom_layers):
                layers.append(Residual(_linear(n_features, n_features), n_features, n_features))
            self.blocks.append(nn.ModuleList(layers))
        self.energy_layers = nn.ModuleList(
            nn.Linear(width, 1, bias=k > 0) for k, width in enumerate(widths)
        )

    @property
    def taps(self) -> dict[str, TapSpec]:
        """`interaction_b` and `block_b` per block b, and `hierarchical_energies`."""
        taps = {
            "hierarchical_energies": TapSpec("node_scalar", self.hyper.n_interaction_layers + 1)
        }
        for b in range(self.hyper.n_interaction_layers):
            taps[f"interaction_{b}"] = TapSpec("node_scalar", self.hyper.n_features)
            taps[f"block_{b}"] = TapSpec("node_scalar", self.hyper.n_features)
        return taps

    @property
    def default_tap(self) -> str:
        """What the last energy layer reads."""
        return f"block_{self.hyper.n_interaction_layers - 1}"

    def forward(
        self, species: Tensor, edges: Edges, r_ij: Tensor, n_local: int, taps: Sequence[str] = ()
    ) -> LocalOutput:
        """(n_local,) atomic energies in float64, summed over the hierarchy.

        Ghosts are refused where there are several interaction layers, between which their features
        would have to come from their owners.
        """
        return self._evaluate(self.prepare(species, edges, r_ij, n_local), r_ij, taps)

    def prepare(self, species: Tensor, edges: Edges, r_ij: Tensor, n_local: int) -> Indices:
        """The slots of every atom's neighbors."""
        if self.hyper.n_interaction_layers > 1:
            refuse_ghosts("HIP-NN", species, n_local)
        pair, used = edges.padded(n_local)
        return Indices(species, pair, edges.neighbor[pair] if edges.n_pairs else pair, used)

    def prepared_terms(self, prepared: Indices, r_ij: Tensor) -> Tensor:
        """As of the base class: the energies of the hierarchy."""
        return self._evaluate(prepared, r_ij).float64_terms

    def _evaluate(self, indices: Indices, r_ij: Tensor, taps: Sequence[str] = ()) -> LocalOutput:
        n_local = indices.pair.shape[0]
        geometry = _Geometry(indices, r_ij.to(self.dtype), self.hyper.l_max)
        features = nn.functional.one_hot(indices.species, len(self.species_table)).to(self.dtype)
        tapped: dict[str, Tensor] = {}
        terms = [self.energy_layers[0](features[:n_local])]  # (n_local, 1) each
        for b, (interaction, *atom_layers) in enumerate(self._layers()):
            features = interaction(features, geometry)
            tapped[f"interaction_{b}"] = features
            for layer in atom_layers:
                features = layer(features)
            tapped[f"block_{b}"] = features
            terms.append(self.energy_layers[b + 1](features))
        hierarchy = torch.cat(terms, dim=1)
        tapped["hierarchical_energies"] = hierarchy
        # E0 can be hundreds of eV: the hierarchy is summed in float64 whatever the network's dtype.
        atomic = hierarchy.to(torch.float64).sum(dim=1)
        return LocalOutput(atomic, {name: tapped[name] for name in taps}, terms=hierarchy)

    @property
    def n_terms(self) -> int:
        """E0 and one term per block."""
        return self.hyper.n_interaction_layers + 1

    def native_kernels(self) -> NativeKernels:
        """Those of `potstill.core`."""
        p = self.native_parameters()
        return NativeKernels(
            p.dtype, partial(hipnn_pass, p), partial(weighted_energy, p), partial(hipnn_md, p)
        )

    def native_parameters(self) -> HipnnParameters:
        """Shape and parameters for the kernels of `potstill.core`, in the order of `parameters()`.

        Raises
        ------
        ModelError
            If the parameters are not on the CPU, in float32 or float64.
        """
        p = self.hyper
        shape = _interned(
            HipnnShape(
                n_species=len(self.species_table),
                n_features=p.n_features,
                n_sensitivities=p.n_sensitivities,
                l_max=p.l_max,
                n_interaction_layers=p.n_interaction_layers,
                n_atom_layers=p.n_atom_layers,
                cutoff=self.cutoff,
                cusp_reg=p.cusp_reg,
                cutoff_function=p.cutoff_function,
            )
        )
        return HipnnParameters(shape, tuple(self.parameters()))

    def regularized_weights(self) -> list[Tensor]:
        """Interaction and atom layers, without biases and without the energy layers.

        The same choice as hippynn's `LPReg` on the network.
        """
        return [
            w for block in self._layers() for layer in block for w in layer.regularized_weights()
        ]

    def _layers(self) -> list[list[Residual]]:
        """The layers of each block: the interaction layer, then the atom layers."""
        return [list(cast(Iterable[Residual], block)) for block in self.blocks]

    def initialize_from(self, data: StartingData) -> None:
        """Start with the fitted energies of the species as E0, and small corrections."""
        self.initialize_energy_layers(data.offsets)

    def regularizers(self) -> dict[str, Regularizer]:
        """`hierarchicality`: later terms should be smaller than earlier ones."""
        return {"hierarchicality": hierarchicality}

    @torch.no_grad()
    def initialize_energy_layers(self, e0: Tensor, decay_factor: float = 1e-2) -> None:
        """Set E0 and scale the later energy layers down, so that training starts near the fit.

        Parameters
        ----------
        e0 : Tensor
            (n_species,) eV per atom, from a linear fit to the training energies.
        decay_factor : float
            Energy layer n is multiplied by decay_factor^(2^(n-1)), as hippynn does.
        """
        first, *later = cast(Iterable[nn.Linear], self.energy_layers)
        first.weight.copy_(e0.to(self.dtype).reshape(1, -1))
        for layer in later:
            layer.weight.mul_(decay_factor)
            layer.bias.mul_(decay_factor)
            decay_factor *= decay_factor


def hierarchicality(terms: Tensor) -> Tensor:
    """(n_atoms,) sum over n of E_n² / (E_n² + E_(n-1)²) from (n_atoms, n_terms) energies.

    Lubbers et al. 2018, Eq. 10. It is zero, with zero gradient, where both terms vanish. It
    depends on the zero of energy, since E_0 does.
    """
    square = terms.square()
    later, earlier = square[:, 1:], square[:, :-1]
    total = later + earlier
    return (later / torch.where(total > 0, total, 1.0)).sum(dim=1)


class Indices(NamedTuple):
    """Species, and the slots of every atom's K neighbors.

    Parameters
    ----------
    species : Tensor
        (N,) int64, local atoms first.
    pair, neighbor : Tensor
        (n_local, K) int64, the pair in a slot and the atom at its other end; any in unused slots.
    used : Tensor
        (n_local, K) bool.
    """

    species: Tensor
    pair: Tensor
    neighbor: Tensor
    used: Tensor


class _Geometry:
    """Padded pair geometry that all interaction layers share."""

    def __init__(self, indices: Indices, r_ij: Tensor, l_max: int) -> None:
        pair = indices.pair  # (n_local, K)
        self.used = indices.used.unsqueeze(2)
        self.neighbor = indices.neighbor
        vector = r_ij.index_select(0, pair.flatten()).view(*pair.shape, 3)
        self.distance = torch.linalg.vector_norm(vector, dim=2)  # (n_local, K)
        self.tensor = tensor_components(vector / self.distance.unsqueeze(2), l_max)


def _square_norm(tensor: Tensor, rank: int) -> Tensor:
    """Squared Frobenius norm over dim 1 of a vector or of five components of a rank-2 tensor.

    With zz = -xx - yy: xx² + yy² + zz² + 2(xy² + xz² + yz²) = 2(sum of squares + xx yy).
    """
    squares = tensor.square().sum(dim=1)
    return squares if rank == 1 else 2.0 * (squares + tensor[:, 0] * tensor[:, 3])


@lru_cache(maxsize=64)
def _interned(shape: HipnnShape) -> HipnnShape:
    """The first of all equal shapes: what is derived from it is derived once."""
    return shape


def _linear(n_in: int, n_out: int) -> nn.Linear:
    layer = nn.Linear(n_in, n_out)
    nn.init.xavier_normal_(layer.weight)
    return layer
