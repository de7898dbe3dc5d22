"""How potentials are computed: kernels of a foreign model, and derivatives in every mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from torch import Tensor

from potstill import core
from potstill.calculators import PotstillCalculator
from potstill.checkpoint import save_potential
from potstill.core import CompactNeighbors, MdResult, PairPrior, PassResult
from potstill.errors import DataError, ModelError
from potstill.models import (
    HIPNN,
    SNAP,
    ZBL,
    Edges,
    LocalOutput,
    PaiNN,
    Potential,
    SchNet,
    SpeciesOffsets,
    SumPotential,
)
from potstill.models.engines import NativeKernels
from potstill.species import SpeciesTable
from potstill.structures import Structures
from potstill.teachers import PotentialTeacher
from potstill.testing import CONTRACT

AL = SpeciesTable.from_symbols(["Al"])
CUTOFF = 4.0


# -- a second native model, outside of the package -----------------------------------------------


class NumpyKernels:
    """E_i = k Σ_j (1 - r²/R²)³, computed by numpy in place of C++."""

    def __init__(self, strength: Tensor, calls: list[str]) -> None:
        self.strength, self.calls = strength, calls

    def first_order(self, species: Tensor, neighbors: CompactNeighbors, r_ij: Tensor) -> PassResult:
        self.calls.append("first_order")
        center = np.repeat(np.arange(neighbors.n_local), np.diff(neighbors.row_ptr.numpy()))
        r = r_ij.double().numpy()
        inside = np.clip(1.0 - (r**2).sum(axis=1) / CUTOFF**2, 0.0, None)
        k = float(self.strength.detach())
        terms = np.zeros((neighbors.n_local, 1))
        np.add.at(terms[:, 0], center, k * inside**3)
        gradient = -6.0 * k / CUTOFF**2 * inside[:, None] ** 2 * r
        return PassResult(torch.from_numpy(terms), torch.from_numpy(gradient), None)

    def weighted_energy(
        self, species: Tensor, neighbors: CompactNeighbors, r_ij: Tensor, weights: Tensor
    ) -> Tensor:
        terms = self.first_order(species, neighbors, r_ij).terms
        self.calls.append("weighted_energy")
        per_unit = (weights * terms).sum() / self.strength.detach()
        return per_unit * self.strength

    def dynamics(
        self,
        species: Tensor,
        neighbors: CompactNeighbors,
        positions: Tensor,
        cell: Tensor,
        *,
        prior: PairPrior | None,
        virial: bool,
        n_threads: int = 1,
    ) -> MdResult:
        assert prior is None
        system = structure_of(species, positions, cell)
        r_ij = core.compact_pair_vectors(system, neighbors, torch.float64)
        found = self.first_order(species, neighbors, r_ij)
        self.calls.append("dynamics")
        assert found.gradient is not None
        forces, total = core.compact_forces(system, neighbors, r_ij, found.gradient)
        return MdResult(found.terms[:, 0], forces, total[0] if virial else None)


def structure_of(species: Tensor, positions: Tensor, cell: Tensor) -> Structures:
    return Structures(
        positions=positions,
        species=species,
        system_index=torch.zeros_like(species),
        cell=cell[None],
        pbc=torch.ones(1, 3, dtype=torch.bool),
        species_table=AL,
    )


class Springs(Potential):
    """The same in torch operations."""

    kind = "springs"
    has_native_kernels = True

    def __init__(self, species_table: SpeciesTable) -> None:
        super().__init__(species_table, CUTOFF)
        self.strength = torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
        self.calls: list[str] = []

    def hyperparameters(self) -> dict[str, Any]:
        return {}

    def forward(
        self, species: Tensor, edges: Edges, r_ij: Tensor, n_local: int, taps: Sequence[str] = ()
    ) -> LocalOutput:
        self.calls.append("forward")
        inside = (1.0 - r_ij.to(self.dtype).square().sum(dim=1) / CUTOFF**2).clamp(min=0.0)
        return LocalOutput(edges.sum_to_centers(self.strength * inside**3, n_local))

    def native_kernels(self) -> NativeKernels:
        own = NumpyKernels(self.strength, self.calls)
        return NativeKernels(self.dtype, own.first_order, own.weighted_energy, own.dynamics)


def shaken_crystal() -> Atoms:
    atoms = bulk("Al", cubic=True) * (2, 1, 1)
    atoms.rattle(0.2, seed=4)
    return atoms


@pytest.mark.skipif(not core.available(), reason="pairs are packed by the compiled core")
def test_kernels_of_a_model_outside_the_package_serve_it_everywhere() -> None:
    springs = Springs(AL)
    CONTRACT["first_order_passes"](springs)
    CONTRACT["forces_are_the_gradient"](springs)
    CONTRACT["stress_is_the_strain_derivative"](springs)
    springs.calls.clear()
    structures = Structures.from_ase(shaken_crystal())
    native = springs.predict(structures, properties=("energy", "forces", "stress"))
    assert springs.calls == ["first_order"]
    springs.use_core("torch")
    expected = springs.predict(structures, properties=("energy", "forces", "stress"))
    assert springs.calls == ["first_order", "forward"]
    for name in ("energy", "forces", "stress"):
        torch.testing.assert_close(native[name], expected[name], rtol=1e-12, atol=1e-14)

    springs.use_core("native")
    whole = SumPotential({"offsets": SpeciesOffsets(AL, [-3.0]), "network": springs})
    springs.calls.clear()
    atoms = shaken_crystal()
    atoms.calc = PotstillCalculator(whole)
    assert atoms.get_potential_energy() == pytest.approx(float(expected["energy"]) - 24.0)
    np.testing.assert_allclose(atoms.get_forces(), expected["forces"], atol=1e-12)
    assert springs.calls == ["first_order", "dynamics"]


def test_parts_without_a_network_are_no_native_call() -> None:
    zbl = ZBL(AL, 1.0, 2.9)
    atoms = shaken_crystal()
    atoms.calc = PotstillCalculator(zbl)
    expected = zbl.predict(Structures.from_ase(atoms))["forces"]
    np.testing.assert_allclose(atoms.get_forces(), expected, atol=1e-12)


# -- modes ---------------------------------------------------------------------------------------

POTENTIALS: dict[str, Callable[[], Potential]] = {
    "hipnn": lambda: HIPNN(AL, 4, 4, 1.6, 4.0, 4.5, 1),
    "schnet": lambda: SchNet(AL, 4, 4, 2, 6, 4.0),
    "painn": lambda: PaiNN(AL, 4, 2, 5, 4.0),
    "painn-direct": lambda: PaiNN(AL, 4, 2, 5, 4.0, direct_forces=True),
    "snap": lambda: SNAP(AL, twojmax=2, rcutfac=4.0),
    "sum": lambda: SumPotential({"prior": ZBL(AL, 1.0, 2.9), "network": SchNet(AL, 4, 4, 1, 6)}),
}

MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", POTENTIALS)
def test_results_do_not_depend_on_the_caller_s_mode(name: str, mode: str) -> None:
    torch.manual_seed(2)
    potential = POTENTIALS[name]()
    potential.use_core("torch")
    structures = Structures.from_ase(shaken_crystal())
    names = ("energy", "forces") if potential.direct_forces else ("energy", "forces", "stress")
    taps = tuple(potential.taps)
    expected = potential.predict(structures, properties=names, taps=taps)
    assert float(expected["forces"].abs().max()) > 1e-4
    ones = torch.ones(structures.n_atoms, 3, dtype=torch.float64)
    ones[0] = 3.0
    with MODES[mode]():
        atoms = shaken_crystal()
        atoms.calc = PotstillCalculator(potential, core="torch")
        forces = atoms.get_forces()
        own = Structures.from_ase(shaken_crystal())  # its tensors are made in this mode
        found = potential.predict(own, properties=names, taps=taps)
        labels = PotentialTeacher(potential).compute(own, names)
    np.testing.assert_allclose(forces, expected["forces"], rtol=1e-5, atol=1e-6)
    for key in names:
        assert torch.equal(found[key], expected[key])
        torch.testing.assert_close(labels[key], expected[key], rtol=1e-5, atol=1e-6)
    for tap in taps:
        assert torch.equal(found.features[tap], expected.features[tap])
    if not potential.direct_forces:
        product = potential.hessian_vector_product(structures, ones)
        with MODES[mode]():
            assert torch.equal(potential.hessian_vector_product(structures, ones), product)


def test_a_checkpoint_may_be_loaded_in_inference_mode(tmp_path: Path) -> None:
    save_potential(tmp_path / "model.pt", POTENTIALS["schnet"]().double(), {})
    with torch.inference_mode():
        atoms = shaken_crystal()
        atoms.calc = PotstillCalculator(tmp_path / "model.pt")
        assert np.abs(atoms.get_forces()).max() > 1e-4


def test_weights_made_in_inference_mode_are_refused() -> None:
    with torch.inference_mode():
        potential = SchNet(AL, 4, 4, 1, 6, 4.0)
    with pytest.raises(ModelError, match="inference_mode"):
        potential.predict(Structures.from_ase(shaken_crystal()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", POTENTIALS)
def test_half_precision_is_refused(name: str, dtype: torch.dtype) -> None:
    potential = POTENTIALS[name]().to(dtype)
    atoms = shaken_crystal()
    sentence = f"is in {str(dtype).removeprefix('torch.')}"
    for properties in (("energy",), ("forces",)):
        with pytest.raises(ModelError, match=sentence):
            potential.predict(Structures.from_ase(atoms), properties=properties)
    atoms.calc = PotstillCalculator(potential)
    with pytest.raises(ModelError, match=sentence):
        atoms.get_potential_energy()
    with pytest.raises(ModelError, match=sentence):
        PotentialTeacher(potential).compute(Structures.from_ase(shaken_crystal()), ["energy"])


# -- two atoms at one place ------------------------------------------------------------------------


@pytest.mark.parametrize("core_name", ["torch", "auto"])
@pytest.mark.parametrize("name", [*POTENTIALS, "zbl"])
def test_atoms_at_one_place_are_named(name: str, core_name: str) -> None:
    potential = ZBL(AL, 1.0, 2.9) if name == "zbl" else POTENTIALS[name]()
    potential.use_core(core_name)
    atoms = shaken_crystal()
    atoms.positions[5] = atoms.positions[2] + atoms.cell[0]  # by way of a periodic image
    sentence = r"atoms 2 \(Al\) and 5 \(Al\) are at the same position"
    for properties in (("energy",), ("forces",)):
        with pytest.raises(DataError, match=sentence):
            potential.predict(Structures.from_ase([shaken_crystal(), atoms]), properties=properties)
    atoms.calc = PotstillCalculator(potential)
    with pytest.raises(DataError, match=sentence):
        atoms.get_forces()


def test_atoms_that_meet_while_a_list_is_reused_are_named() -> None:
    atoms = molecule("H2O")
    table = SpeciesTable.from_symbols(["H", "O"])
    atoms.calc = PotstillCalculator(SchNet(table, 4, 4, 1, 6, 4.0), skin=3.0)
    atoms.get_forces()
    atoms.positions[1] = atoms.positions[0]
    with pytest.raises(DataError, match=r"atoms 0 .* and 1 .* are at the same position"):
        atoms.get_forces()
    assert atoms.calc.n_neighbor_lists == 1
