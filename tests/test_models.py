"""Every model keeps the contract; the contract finds models that do not."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from potstill.contract import contract_structures
from potstill.errors import ModelError
from potstill.models import (
    ANI,
    HIPNN,
    MODELS,
    SNAP,
    ZBL,
    Bonds,
    Edges,
    GemNetOC,
    LocalOutput,
    PaiNN,
    PairPotential,
    PairRepulsion,
    Potential,
    SchNet,
    SpeciesOffsets,
    SumPotential,
    TapSpec,
)
from potstill.models.tracing import traced
from potstill.neighbors import build_neighbor_list, pair_vectors
from potstill.species import Species, SpeciesTable
from potstill.testing import CONTRACT

ONE = SpeciesTable.from_symbols(["Al"])
TWO = SpeciesTable.from_symbols(["Mg", "O"])
BEADS = SpeciesTable((Species("W", 72.0), Species("C1", 72.0)))


def hipnn(table: SpeciesTable = TWO, **changes: Any) -> HIPNN:
    torch.manual_seed(11)
    hyperparameters: dict[str, Any] = dict(
        n_features=6,
        n_sensitivities=5,
        dist_soft_min=1.4,
        dist_soft_max=3.6,
        dist_hard_max=4.0,
        n_atom_layers=1,
        cusp_reg=1e-3,
    )
    return HIPNN(table, **(hyperparameters | changes)).double()


def smooth(table: SpeciesTable = TWO, **changes: Any) -> HIPNN:
    sizes = dict(invariants="smooth", cutoff_function="polynomial", n_channels=4, n_triples=2)
    return hipnn(table, **(sizes | changes))


def ani(table: SpeciesTable = TWO, **changes: Any) -> ANI:
    torch.manual_seed(12)
    hyperparameters: dict[str, Any] = dict(
        radial_cutoff=4.0,
        angular_cutoff=3.1,
        eta_r=3.0,
        shifts_r=[1.2, 2.0, 2.8],
        eta_a=2.0,
        zeta=6.0,
        shifts_a=[1.5, 2.5],
        shifts_z=[0.4, 1.6, 2.7],
        hidden_widths=[7, 5],
    )
    return ANI(table, **(hyperparameters | changes)).double()


def gemnet_oc(table: SpeciesTable = TWO, **changes: Any) -> GemNetOC:
    torch.manual_seed(14)
    sizes = ("trip_in", "trip_out", "quad_in", "quad_out", "aint_in", "aint_out")
    numbers = ("before_skip", "after_skip", "concat", "atom", "output_afteratom", "blocks")
    caps = ("max_neighbors", "max_neighbors_qint", "max_neighbors_aeaint", "max_neighbors_aint")
    hyperparameters: dict[str, Any] = dict(
        {f"emb_size_{name}": 4 for name in (*sizes, "rbf", "cbf", "sbf")},
        **{f"num_{name}": 1 for name in (*numbers, "atom_emb_layers", "global_out_layers")},
        **dict.fromkeys(caps),
        emb_size_atom=6,
        emb_size_edge=8,
        num_spherical=3,
        num_radial=6,
        cutoff=4.0,
        cutoff_qint=2.8,
        cutoff_aeaint=3.3,
        cutoff_aint=4.0,
        direct_forces=False,
    )
    model = GemNetOC(table, **(hyperparameters | changes)).double()
    for factor in model.scale_factors().values():
        factor.scale.fill_(2.0)  # so that every interaction is felt
    return model


def snap(table: SpeciesTable = TWO, **changes: Any) -> SNAP:
    torch.manual_seed(13)
    hyperparameters: dict[str, Any] = dict(twojmax=4, rcutfac=4.0)
    if len(table) == 2:
        # The cutoff function has no second derivative at the cutoff: these radii keep the pairs of
        # the contract's structures away from it.
        hyperparameters |= dict(radii=[0.5, 0.4], weights=[1.0, 0.7])
    model = SNAP(table, **(hyperparameters | changes)).double()
    # Components are tens to hundreds: energies of a few eV, as of a trained model.
    scale = 1e-4 if model.quadratic else 0.02
    with torch.no_grad():
        model.coefficients.mul_(scale)
        model.coefficients[:, 0] = torch.arange(1.0, len(table) + 1.0)
    return model


def pair(table: SpeciesTable = TWO, **changes: Any) -> PairPotential:
    torch.manual_seed(16)
    model = PairPotential(table, **(dict(cutoff=4.0, spacing=0.5) | changes)).double()
    with torch.no_grad():
        model.coefficients.copy_(torch.randn_like(model.coefficients))
    return model


def schnet(table: SpeciesTable = TWO, **changes: Any) -> Potential:
    torch.manual_seed(14)
    hyperparameters: dict[str, Any] = dict(
        hidden_channels=6, num_filters=5, num_interactions=2, num_gaussians=7, cutoff=4.0
    )
    return shaken(SchNet(table, **(hyperparameters | changes)))


def painn(table: SpeciesTable = TWO, **changes: Any) -> Potential:
    torch.manual_seed(15)
    hyperparameters: dict[str, Any] = dict(hidden_channels=6, num_layers=2, num_rbf=5, cutoff=4.0)
    return shaken(PaiNN(table, **(hyperparameters | changes)))


def shaken(model: Potential) -> Potential:
    """Biases that are zero at the start hide faults: move all parameters a little."""
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def student() -> SumPotential:
    return SumPotential(
        {
            "offsets": SpeciesOffsets(TWO, [-1234.5, -430.25]),
            "prior": ZBL(TWO, inner=1.0, cutoff=2.8),
            "network": hipnn(),
        }
    )


#: A new model enters the contract by a line here.
TABLE: dict[str, Callable[[], Potential]] = {
    **{
        f"hipnn-l{l_max}-i{n}": lambda l_max=l_max, n=n: hipnn(l_max=l_max, n_interaction_layers=n)
        for l_max in (0, 1, 2)
        for n in (1, 2, 3)
    },
    "hipnn-one-species": lambda: hipnn(ONE, l_max=2, n_interaction_layers=2),
    "hipnn-one-feature": lambda: hipnn(n_features=1, n_interaction_layers=2),
    "hipnn-polynomial": lambda: hipnn(cutoff_function="polynomial"),
    "hipnn-beads": lambda: hipnn(BEADS),
    **{
        f"hipnn-smooth{n_species}-l{l_max}-i{n}": lambda n_species=n_species, l_max=l_max, n=n: (
            smooth(TWO if n_species == 2 else ONE, l_max=l_max, n_interaction_layers=n)
        )
        for n_species, l_max, n in ((1, 4, 1), (2, 4, 1), (1, 4, 2), (2, 4, 2), (2, 0, 1))
    },
    "ani-one-species": lambda: ani(ONE),
    "ani-two-species": ani,
    "ani-ensemble": lambda: ani(hidden_widths={"Mg": [7], "O": [6, 4]}, n_members=3),
    "ani-beads": lambda: ani(BEADS),
    "ani-wide-angles": lambda: ani(angular_cutoff=4.0, radial_cutoff=3.5),
    "gemnet-oc": gemnet_oc,
    "snap-one-species": lambda: snap(ONE, twojmax=5, bzero=False),
    "snap-two-species": snap,
    "snap-quadratic": lambda: snap(quadratic=True, twojmax=3),
    "pair-two-species": pair,
    "pair-beads": lambda: pair(BEADS, spacing=0.3),
    "snap-beads": lambda: snap(BEADS, rmin0=0.6, rfac0=0.9),
    "schnet": schnet,
    "schnet-one-layer": lambda: schnet(ONE, num_interactions=1),
    **{
        f"painn-{variant}{'-direct' * direct}": lambda v=variant, d=direct: painn(
            variant=v, direct_forces=d
        )
        for variant in ("original", "ocp")
        for direct in (False, True)
    },
    "painn-one-layer": lambda: painn(ONE, num_layers=1),
    "painn-capped": lambda: painn(
        BEADS, max_neighbors=9, direct_forces=True, variant="ocp", num_layers=1
    ),
    "repulsion": lambda: PairRepulsion(BEADS, [[0.02, 0.05], [0.05, 0.0]], [[3.0, 2.5], [2.5, 0]]),
    "bonds": lambda: Bonds(
        BEADS,
        [(("W", "C1"), 1.8, 0.7, 2.2, 3.0), (("C1", "C1"), 2.0, 0.4, 2.3, 2.8)],
        [(("W", "C1", "W"), -0.3, 0.5), (("W", "C1", "C1"), 0.2, 0.8)],
    ),
    "zbl": lambda: ZBL(TWO, inner=1.5, cutoff=3.0),
    "zbl-lammps": lambda: ZBL(TWO, inner=1.5, cutoff=3.0, switching="lammps"),
    "offsets": lambda: SpeciesOffsets(TWO, [-3.0, 5.0]),
    "sum": student,
    "sum-of-direct-forces": lambda: SumPotential(
        {"offsets": SpeciesOffsets(TWO, [-3.0, 5.0]), "network": painn(direct_forces=True)}
    ),
    "sum-of-ani": lambda: SumPotential({"prior": ZBL(TWO, 0.5, 1.2), "network": ani()}),
}


@pytest.mark.parametrize("check", CONTRACT)
@pytest.mark.parametrize("model", TABLE)
def test_contract(model: str, check: str) -> None:
    CONTRACT[check](TABLE[model]())


@pytest.mark.parametrize("model", TABLE)
def test_traces_are_right_for_other_structures(model: str) -> None:
    """Larger and smaller ones, without pairs too; with and without gradients, in any order."""
    potential = TABLE[model]()
    if not potential.traceable:
        with pytest.raises(ModelError, match="cannot be written as TorchScript"):
            traced(potential)
        return
    energies = traced(potential)
    systems = contract_structures(potential)
    for number, cutoff in ((0, 1.0), (3, 1.0), (1, 1e-3), (2, 1.0), (1, 1.0)):
        structures = systems[number]
        pairs = build_neighbor_list(structures, cutoff * potential.cutoff)
        edges, r_ij = Edges(pairs.center, pairs.neighbor), pair_vectors(structures, pairs)
        for gradient in (False, True, True):
            found_at = r_ij.clone().requires_grad_(gradient)
            expected_at = r_ij.clone().requires_grad_(gradient)
            found = energies(structures.species, pairs.center, pairs.neighbor, found_at)
            output = potential(structures.species, edges, expected_at, structures.n_atoms)
            expected = output.atomic_energies.detach()
            torch.testing.assert_close(found.detach(), expected, rtol=0, atol=1e-11)
            if gradient and output.atomic_energies.requires_grad and len(r_ij):
                slopes = [
                    torch.autograd.grad(total.sum(), at, materialize_grads=True)[0]
                    for total, at in ((found, found_at), (output.atomic_energies, expected_at))
                ]
                torch.testing.assert_close(*slopes, rtol=0, atol=1e-11)


def test_every_kind_of_model_is_in_the_table() -> None:
    assert {make().kind for make in TABLE.values()} >= set(MODELS)


def test_who_accepts_ghosts() -> None:
    refusing = set()
    for name, make in TABLE.items():
        potential = make()
        species = torch.zeros(2, dtype=torch.int64)
        edges = Edges(torch.tensor([0]), torch.tensor([1]))
        r_ij = torch.tensor([[2.0, 0.0, 0.0]], dtype=torch.float64)
        try:
            energies = potential(species, edges, r_ij, 1).atomic_energies
            assert energies.shape == (1,)
        except ModelError:
            refusing.add(name)
    assert refusing == {
        "hipnn-one-species",
        "hipnn-one-feature",
        *(name for name in TABLE if name.startswith(("schnet", "painn", "sum-of-direct"))),
        "gemnet-oc",
        *(f"hipnn-l{l_max}-i{n}" for l_max in (0, 1, 2) for n in (2, 3)),
        *(f"hipnn-smooth{n_species}-l4-i2" for n_species in (1, 2)),
    } - {"schnet-one-layer", "painn-one-layer"}


# -- does the contract find anything? ------------------------------------------------------------


class Pairs(Potential):
    """A pair potential with one planted fault."""

    kind = "pairs"

    def __init__(self, fault: str = "") -> None:
        super().__init__(TWO, cutoff=4.0)
        self.fault = fault
        self.strength = torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    @property
    def taps(self) -> dict[str, TapSpec]:
        return {"density": TapSpec("node_scalar", 2 if self.fault == "tap" else 1)}

    @property
    def reach(self) -> float:
        return 2.0 if self.fault == "farther" else 4.0

    def hyperparameters(self) -> dict[str, Any]:
        return {}

    def forward(
        self, species: Tensor, edges: Edges, r_ij: Tensor, n_local: int, taps: Sequence[str] = ()
    ) -> LocalOutput:
        if self.fault == "axis":
            r_ij = r_ij * torch.tensor([1.0, 1.0, 1.01], dtype=r_ij.dtype)
        r = torch.linalg.vector_norm(r_ij.to(self.strength.dtype), dim=1)
        reach = 4.0 if self.fault != "reach" else 9.0
        inside = r < reach
        x = (r / 4.0).clamp(max=1.0 if self.fault != "reach" else 9.0)
        switch = (1.0 - x**2) ** 3 if self.fault != "jump" else 1.0 - 0.9 * x**2
        pair = self.strength * torch.exp(-r) * switch * inside
        if self.fault == "detached":
            pair = pair * r.detach()
        if self.fault == "stranger":
            pair = pair * (1.0 + 0.1 * species.sum())  # reaches into other systems
        energy = pair.new_zeros(n_local).index_add(0, edges.center, pair)
        if self.fault == "index":
            energy = energy * (1.0 + 0.1 * torch.arange(n_local))
        if self.fault == "frozen":
            energy = energy * self.strength.detach()
        return LocalOutput(energy, {"density": energy[:, None]} if taps else {})


FAULTS = {
    "": set(),
    "axis": {"rotation_and_reflection"},
    "reach": {"longer_lists_change_nothing"},
    "farther": {"reach"},
    "jump": {"continuity"},
    "detached": {"forces_are_the_gradient", "stress_is_the_strain_derivative"},
    "stranger": {"batched_equals_single", "extensivity"},
    "index": {"permutation", "extensivity"},
    "frozen": {"force_losses_can_be_trained"},
    "tap": {"taps"},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_contract_finds_planted_faults(fault: str) -> None:
    broken = set()
    for name, check in CONTRACT.items():
        if name == "save_and_load":  # `Pairs` is in no table of kinds
            continue
        try:
            check(Pairs(fault))
        except AssertionError:
            broken.add(name)
    if not fault:
        assert not broken
    assert FAULTS[fault] <= broken


def test_contract_structures_hold_every_species_and_many_images() -> None:
    potential = ani()
    structures = contract_structures(potential)
    assert structures.n_systems == 4
    assert set(structures.species[structures.system_index == 0].tolist()) == {0, 1}
    heights = structures.volume[0] / torch.linalg.vector_norm(
        torch.linalg.cross(structures.cell[0], structures.cell[0].roll(-1, 0)), dim=1
    )
    assert float(heights.min()) < 2.0 * potential.cutoff
