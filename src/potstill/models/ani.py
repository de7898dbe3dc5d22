"""ANI: Behler and Parrinello's networks on atomic environment vectors, one model or an ensemble."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from potstill.errors import ModelError
from potstill.models.base import Edges, LocalOutput, Potential, TapSpec
from potstill.models.hyper import Hyperparameters
from potstill.species import SpeciesTable

# Angles enter as arccos(0.95 cos(theta)), which keeps their derivative finite at 0 and 180 degrees.
_COSINE_SCALE = 0.95


class ANIHyperparameters(Hyperparameters):
    """Hyper-parameters of ANI; the defaults are those of ANI-1x, with smaller networks.

    Parameters
    ----------
    radial_cutoff, angular_cutoff : float
        Å.
    eta_r : float
        Width of the radial Gaussians, 1/Å².
    shifts_r : sequence of float
        Centers of the radial Gaussians, Å.
    eta_a : float
        Width of the angular Gaussians, 1/Å².
    zeta : float
        Exponent of the angular term.
    shifts_a : sequence of float
        Centers of the angular Gaussians, Å.
    shifts_z : sequence of float
        Centers of the angular terms, radians.
    hidden_widths : sequence of int, or mapping of str to such
        Widths of the hidden layers, for all species or by the species' name.
    celu_alpha : float
        Parameter of the activation.
    n_members : int
        Number of networks per species whose mean is the energy.
    """

    radial_cutoff: float = Field(default=5.2, gt=0)
    angular_cutoff: float = Field(default=3.5, gt=0)
    eta_r: float = Field(default=16.0, gt=0)
    shifts_r: tuple[float, ...] = tuple(0.9 + 0.26875 * k for k in range(16))
    eta_a: float = Field(default=8.0, gt=0)
    zeta: float = Field(default=32.0, gt=0)
    shifts_a: tuple[float, ...] = (0.9, 1.55, 2.2, 2.85)
    shifts_z: tuple[float, ...] = tuple(math.pi * (k + 0.5) / 8 for k in range(8))
    hidden_widths: tuple[int, ...] | dict[str, tuple[int, ...]] = (64, 64, 48)
    celu_alpha: float = Field(default=0.1, gt=0)
    n_members: int = Field(default=1, ge=1)


class ANI(Potential):
    """Atomic environment vectors (AEV) and one feed-forward network per species.

    The AEV of atom i has a radial block per neighbor species and an angular block per unordered
    pair of neighbor species (Smith, Isayev, Roitberg, Chem. Sci. 8, 3192 (2017)):

        radial_i  = 1/4 Σ_j exp(-eta_r (r_ij - R_s)²) f(r_ij; radial_cutoff)

        angular_i = 2 Σ_j<k [(1 + cos(θ_jik - θ_s)) / 2]^zeta exp(-eta_a ((r_ij + r_ik)/2 - R_s)²)
                    f(r_ij; angular_cutoff) f(r_ik; angular_cutoff)

    with `f(r; R) = (cos(π r / R) + 1) / 2` and `θ = arccos(0.95 cos θ_jik)`. Networks give eV;
    the constant energies of the species are `SpeciesOffsets`' work.

    An ensemble is one model: its members share the AEV, and the atomic energy is their mean.

    Parameters
    ----------
    species_table : SpeciesTable
        The species, in the order of the AEV's blocks.
    *values, **named
        Fields of `ANIHyperparameters`, in their order or by name.

    Raises
    ------
    ModelError
        If a hyper-parameter is out of range or a species has no hidden widths.
    """

    kind = "ani"
    traceable = True
    compilable = True

    # Cast where they are used.
    exact_buffers = ("shifts_r", "shifts_a", "shifts_z")
    shifts_r: Tensor
    shifts_a: Tensor
    shifts_z: Tensor

    hyper_class = ANIHyperparameters
    hyper: ANIHyperparameters

    def __init__(self, species_table: SpeciesTable, *values: Any, **named: Any) -> None:
        p = ANIHyperparameters.of(*values, **named)
        widths_of = _widths_by_species(p.hidden_widths, species_table)
        p = p.model_copy(update={"hidden_widths": widths_of})
        super().__init__(species_table, max(p.radial_cutoff, p.angular_cutoff), p)
        self.hidden_widths = widths_of
        self.n_members = p.n_members
        for name in self.exact_buffers:
            # Not in the state dict: they are hyper-parameters.
            buffer = torch.tensor(getattr(p, name), dtype=torch.float64)
            self.register_buffer(name, buffer, persistent=False)
        self.networks = nn.ModuleList(
            EnsembleMLP((self.aev_width, *widths, 1), p.celu_alpha, p.n_members)
            for widths in self.hidden_widths.values()
        )

    @property
    def reach(self) -> float:
        """The cutoff."""
        return self.cutoff

    @property
    def aev_width(self) -> int:
        """Length of the atomic environment vector."""
        n, p = len(self.species_table), self.hyper
        n_r, n_a, n_z = len(p.shifts_r), len(p.shifts_a), len(p.shifts_z)
        return n * n_r + n * (n + 1) // 2 * n_a * n_z

    @property
    def taps(self) -> dict[str, TapSpec]:
        """The AEV, the members' energies, and hidden layers (members side by side).

        Hidden layers are there if all species have the same widths.
        """
        taps = {
            "aev": TapSpec("node_scalar", self.aev_width),
            "member_energies": TapSpec("node_scalar", self.n_members),
        }
        if len(set(self.hidden_widths.values())) == 1:
            for k, width in enumerate(next(iter(self.hidden_widths.values()))):
                taps[f"hidden_{k}"] = TapSpec("node_scalar", self.n_members * width)
        return taps

    @property
    def default_tap(self) -> str | None:
        """The last hidden layer, if all species have the same widths."""
        hidden = [name for name in self.taps if name.startswith("hidden_")]
        return hidden[-1] if hidden else None

    def forward(
        self, species: Tensor, edges: Edges, r_ij: Tensor, n_local: int, taps: Sequence[str] = ()
    ) -> LocalOutput:
        """(n_local,) mean over the members of the networks' energies."""
        return self._evaluate(self.prepare(species, edges, r_ij, n_local), r_ij, taps)

    def aev(self, species: Tensor, edges: Edges, r_ij: Tensor, n_local: int) -> Tensor:
        """(n_local, aev_width) atomic environment vectors.

        Radial blocks come first, by neighbor species; then angular blocks by pair of species (0,0),
        (0,1), ..., (1,1), ..., in each of which `shifts_z` runs fastest.
        """
        return self._aev(self.prepare(species, edges, r_ij, n_local), r_ij)

    def prepare(self, species: Tensor, edges: Edges, r_ij: Tensor, n_local: int) -> Indices:
        """Pairs within both cutoffs, the slots of the angular shells, and the atoms by species."""
        distance = torch.linalg.vector_norm(r_ij.detach(), dim=1).to(self.dtype)
        known = range(len(self.species_table))
        near = (distance < self.hyper.radial_cutoff).nonzero()[:, 0]
        row = edges.center[near] * len(known) + species[edges.neighbor[near]]
        close = (distance < self.hyper.angular_cutoff).nonzero()[:, 0]
        center, kind = edges.center[close], species[edges.neighbor[close]]
        shells = []
        for s in known:
            of_kind = (kind == s).nonzero()[:, 0]
            pair, used = Edges(center[of_kind], center[of_kind]).padded(n_local)
            shells.append(Shell(close[of_kind][pair], used))
        return Indices(
            near,
            row,
            tuple(shells),
            tuple(
                _slot_pairs(shells[a], shells[b], same=a == b)
                for a, b in _species_pairs(len(known))
            ),
            tuple((species[:n_local] == s).nonzero()[:, 0] for s in known),
        )

    def prepared_terms(self, prepared: Indices, r_ij: Tensor) -> Tensor:
        """As of the base class."""
        return self._evaluate(prepared, r_ij).atomic_energies.to(torch.float64).unsqueeze(1)

    def _evaluate(self, indices: Indices, r_ij: Tensor, taps: Sequence[str] = ()) -> LocalOutput:
        aev = self._aev(indices, r_ij)
        n_local = aev.shape[0]
        outputs = {name: aev.new_zeros(n_local, self.taps[name].width) for name in taps}
        energies = aev.new_zeros(n_local, self.n_members)
        for atoms, network in zip(indices.atoms, self.networks, strict=True):
            *hidden, member = network(aev[atoms])  # each (n, n_members * width)
            energies = energies.index_copy(0, atoms, member)
            for k, layer in enumerate(hidden):
                if f"hidden_{k}" in outputs:
                    outputs[f"hidden_{k}"] = outputs[f"hidden_{k}"].index_copy(0, atoms, layer)
        outputs |= {k: v for k, v in (("aev", aev), ("member_energies", energies)) if k in taps}
        return LocalOutput(energies.mean(dim=1), outputs)

    def _aev(self, indices: Indices, r_ij: Tensor) -> Tensor:
        """(n_local, aev_width) as of `aev`."""
        r_ij = r_ij.to(self.dtype)
        blocks = [self._radial(indices, r_ij)]
        shells = [_Neighbors(shell, r_ij, self.hyper.angular_cutoff) for shell in indices.shells]
        for (a, b), (j, k) in zip(_species_pairs(len(shells)), indices.slot_pairs, strict=True):
            blocks.append(self._angular(shells[a], shells[b], j, k))
        return torch.cat(blocks, dim=1)

    def _radial(self, indices: Indices, r_ij: Tensor) -> Tensor:
        """(n_local, n_species * n_r)."""
        n_local, n_species = indices.shells[0].pair.shape[0], len(self.species_table)
        r = torch.linalg.vector_norm(r_ij.index_select(0, indices.near), dim=1)
        shifts = self.shifts_r.to(r.dtype)
        terms = torch.exp(-self.hyper.eta_r * (r[:, None] - shifts).square())  # (E, n_r)
        terms = 0.25 * terms * _cutoff_function(r, self.hyper.radial_cutoff)[:, None]
        total = terms.new_zeros(n_local * n_species, terms.shape[1])
        total = total.index_add(0, indices.row, terms)
        return total.reshape(n_local, n_species * terms.shape[1])

    def _angular(self, first: _Neighbors, second: _Neighbors, j: Tensor, k: Tensor) -> Tensor:
        """(n_local, n_a * n_z) sum over P pairs of slots, j of one shell and k of the other."""
        cosine = (first.direction @ second.direction.transpose(1, 2)).flatten(1)  # (n, J * K)
        cosine = _COSINE_SCALE * cosine[:, j * second.distance.shape[1] + k]  # (n, P)
        sine = torch.sqrt(1.0 - cosine.square())
        # cos(theta - shift), without the arccos
        shifts_a, shifts_z = (x.to(cosine.dtype) for x in (self.shifts_a, self.shifts_z))
        along, across = torch.cos(shifts_z), torch.sin(shifts_z)
        aligned = cosine[..., None] * along + sine[..., None] * across
        angle = (0.5 + 0.5 * aligned).pow(self.hyper.zeta)  # (n, P, n_z)
        mean = 0.5 * (first.distance[:, j] + second.distance[:, k])
        weight = 2.0 * first.weight[:, j] * second.weight[:, k]  # (n, P), zero for unused slots
        gauss = torch.exp(-self.hyper.eta_a * (mean[..., None] - shifts_a).square())
        block = (weight[..., None] * gauss).transpose(1, 2) @ angle  # (n, n_a, n_z)
        return block.flatten(1)

    def regularized_weights(self) -> list[Tensor]:
        """Weights of all networks; biases of an ensemble are matrices too and are left out."""
        return [p for name, p in self.named_parameters() if ".weights." in name]

    def member(self, index: int) -> ANI:
        """Copy one network per species out of an ensemble, as a model of its own."""
        if not 0 <= index < self.n_members:
            raise ModelError(f"the ensemble has {self.n_members} members: there is no {index}")
        member = ANI(self.species_table, **(self.hyperparameters() | {"n_members": 1}))
        member = member.to(self.dtype)
        state = {name: value[index : index + 1] for name, value in self.state_dict().items()}
        member.load_state_dict(state)
        return member


class EnsembleMLP(nn.Module):
    """M feed-forward networks of the same widths, evaluated side by side on the same input."""

    def __init__(self, widths: Sequence[int], celu_alpha: float, n_members: int) -> None:
        super().__init__()
        self.activation = nn.CELU(celu_alpha)
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for n_in, n_out in pairwise(widths):
            bound = 1.0 / math.sqrt(n_in)
            self.weights.append(torch.empty(n_members, n_in, n_out).uniform_(-bound, bound))
            self.biases.append(torch.empty(n_members, 1, n_out).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> list[Tensor]:
        """All layers' outputs for (n, widths[0]) inputs: (n, M * width) each, members outer."""
        layers = []
        x = x.expand(self.weights[0].shape[0], *x.shape)  # (M, n, width)
        for k, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x, weight)
            if k < len(self.weights) - 1:
                x = self.activation(x)
            layers.append(x.transpose(0, 1).flatten(1))
        return layers


class Shell(NamedTuple):
    """Neighbors of one species within the angular cutoff, laid out as (n_local, width) slots."""

    pair: Tensor  # (n_local, width) int64, index of the pair in a slot; any pair in unused slots
    used: Tensor  # (n_local, width) bool


class Indices(NamedTuple):
    """Which pairs and atoms of a batch go where."""

    near: Tensor  # (R,) pairs within the radial cutoff
    row: Tensor  # (R,) rows of the radial block that they add to
    shells: tuple[Shell, ...]  # by neighbor species
    slot_pairs: tuple[tuple[Tensor, Tensor], ...]  # (P,) slots j and k of angles, by species
    atoms: tuple[Tensor, ...]  # local atoms by species


class _Neighbors:
    """What the angular terms need of a shell."""

    def __init__(self, shell: Shell, r_ij: Tensor, cutoff: float) -> None:
        vector = r_ij.index_select(0, shell.pair.flatten()).view(*shell.pair.shape, 3)
        self.distance = torch.linalg.vector_norm(vector, dim=2)  # (n_local, width)
        self.direction = vector / self.distance[..., None]
        self.weight = _cutoff_function(self.distance, cutoff) * shell.used


def _species_pairs(n: int) -> list[tuple[int, int]]:
    """Unordered pairs of species in the order of the AEV's blocks."""
    return [(a, b) for a in range(n) for b in range(a, n)]


def _slot_pairs(first: Shell, second: Shell, *, same: bool) -> tuple[Tensor, Tensor]:
    """Slots (j, k): all combinations of two shells, or j < k within one."""
    width, other, device = first.pair.shape[1], second.pair.shape[1], first.pair.device
    if same:
        j, k = torch.triu_indices(width, width, 1, device=device)
        return j, k
    j = torch.arange(width, device=device).repeat_interleave(other)
    return j, torch.arange(other, device=device).repeat(width)


def _cutoff_function(r: Tensor, cutoff: float) -> Tensor:
    """(cos(pi r / cutoff) + 1) / 2, for distances below the cutoff."""
    return 0.5 + 0.5 * torch.cos(r * (math.pi / cutoff))


def _widths_by_species(
    widths: Sequence[int] | Mapping[str, Sequence[int]], table: SpeciesTable
) -> dict[str, tuple[int, ...]]:
    by_name = widths if isinstance(widths, Mapping) else dict.fromkeys(table.names, widths)
    missing = [name for name in table.names if name not in by_name]
    if missing:
        raise ModelError(f"hidden_widths has no entry for {', '.join(missing)}")
    return {name: tuple(int(w) for w in by_name[name]) for name in table.names}
