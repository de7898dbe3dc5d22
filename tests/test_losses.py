"""Loss terms: the paper's error measure, schedules, absent labels, weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from potstill.distill import LossTerm, Schedule, required_signals
from potstill.distill.losses import LabelTerm
from potstill.distill.terms import Batch, check_signals
from potstill.errors import MissingLabelError
from potstill.neighbors import build_neighbor_list
from potstill.species import SpeciesTable
from potstill.structures import Properties, Structures


def _structures(sizes: list[int]) -> Structures:
    n = sum(sizes)
    return Structures(
        positions=torch.zeros(n, 3, dtype=torch.float64),
        species=torch.zeros(n, dtype=torch.int64),
        system_index=torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)),
        cell=torch.eye(3, dtype=torch.float64).repeat(len(sizes), 1, 1),
        pbc=torch.ones(len(sizes), 3, dtype=torch.bool),
        species_table=SpeciesTable.from_symbols(["Al"]),
    )


def _value(
    line: LossTerm, prediction: Properties, labels: Properties, s: Structures
) -> torch.Tensor:
    term = LabelTerm(line)
    batch = Batch(s, build_neighbor_list(s, 1.0), {line.source: labels})
    return term.value(term.sums(prediction.values, batch))


def _loss(line: LossTerm, prediction: Properties, labels: Properties, s: Structures) -> float:
    return float(_value(line, prediction, labels, s))


def test_rmse_plus_mae_of_energies_is_in_ev_per_configuration() -> None:
    s = _structures([2, 4])
    term = LossTerm(property="energy")
    prediction = Properties({"energy": torch.tensor([1.0, -2.0], dtype=torch.float64)})
    labels = Properties({"energy": torch.tensor([0.0, 2.0], dtype=torch.float64)})
    assert _loss(term, prediction, labels, s) == pytest.approx((17 / 2) ** 0.5 + 2.5)
    per_atom = LossTerm(property="energy", per_atom=True)
    assert _loss(per_atom, prediction, labels, s) == pytest.approx((1.25 / 2) ** 0.5 + 0.75)


def test_huber_is_quadratic_up_to_delta_and_linear_beyond() -> None:
    s = _structures([2, 4])
    prediction = Properties({"energy": torch.tensor([0.3, -2.0], dtype=torch.float64)})
    labels = Properties({"energy": torch.tensor([0.0, 2.0], dtype=torch.float64)})
    line = LossTerm(property="energy", error="huber", delta=0.5)
    expected = (0.5 * 0.3**2 + 0.5 * (4.0 - 0.25)) / 2
    assert _loss(line, prediction, labels, s) == pytest.approx(expected, rel=1e-14)
    per_atom = line.model_copy(update={"per_atom": True})
    expected = (0.5 * 0.15**2 + 0.5 * (1.0 - 0.25)) / 2
    assert _loss(per_atom, prediction, labels, s) == pytest.approx(expected, rel=1e-14)
    weighted = replace(labels, weights={"energy": torch.tensor([3.0, 1.0]).double()})
    expected = (3 * 0.5 * 0.3**2 + 0.5 * (4.0 - 0.25)) / 4
    assert _loss(line, prediction, weighted, s) == pytest.approx(expected, rel=1e-14)


def test_huber_is_that_of_torch_over_all_components() -> None:
    s = _structures([1, 3])
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    line = LossTerm(property="forces", error="huber", delta=0.7)
    expected = torch.nn.functional.huber_loss(a, b, delta=0.7)
    found = _loss(line, Properties({"forces": a}), Properties({"forces": b}), s)
    assert found == pytest.approx(float(expected), rel=1e-14)


def test_l2mae_is_the_mean_length_of_the_error_vectors() -> None:
    s = replace(_structures([1, 2]), fixed=torch.tensor([True, False, False]))
    forces = torch.tensor([[9.0, 0.0, 0.0], [3.0, 4.0, 0.0], [0.0, 0.0, 1.0]]).double()
    prediction = Properties({"forces": torch.zeros(3, 3, dtype=torch.float64)})
    line = LossTerm(property="forces", error="l2mae")
    assert _loss(line, prediction, Properties({"forces": forces}), s) == pytest.approx(15 / 3)
    free = line.model_copy(update={"free_atoms": True})
    assert _loss(free, prediction, Properties({"forces": forces}), s) == pytest.approx(6 / 2)
    atoms = Properties({"forces": forces}, weights={"forces": torch.tensor([0.0, 3.0, 1.0])})
    assert _loss(line, prediction, atoms, s) == pytest.approx((3 * 5 + 1) / 4)
    spread = Properties({"forces": forces, "forces_std": torch.full((3, 3), 0.1).double()})
    uncertain = line.model_copy(update={"spread": "forces_std"})
    assert _loss(uncertain, prediction, spread, s) == pytest.approx(15 / 3)
    # Where the error vanishes, so does its gradient.
    perfect = forces.clone().requires_grad_(True)
    value = _value(line, Properties({"forces": perfect}), Properties({"forces": forces}), s)
    (gradient,) = torch.autograd.grad(value, perfect)
    assert float(value.detach()) == 0.0
    assert torch.equal(gradient, torch.zeros(3, 3, dtype=torch.float64))
    with pytest.raises(ValidationError, match="l2mae is for vectors"):
        LossTerm(property="stress", error="l2mae")


def test_a_property_that_no_potential_predicts_is_refused() -> None:
    with pytest.raises(ValidationError, match="a loss can use energy, forces, stress"):
        LossTerm(property="charges")
    with pytest.raises(ValidationError, match="did you mean 'forces'"):
        LossTerm(property="force")


def test_force_error_runs_over_components_of_present_systems_only() -> None:
    s = _structures([1, 2])
    forces = torch.arange(9, dtype=torch.float64).reshape(3, 3)
    labels = forces.clone()
    labels[0] += 3.0
    labels[1:] = torch.nan
    present = {"forces": torch.tensor([True, False])}
    term = LossTerm(property="forces")
    value = _loss(term, Properties({"forces": forces}), Properties({"forces": labels}, present), s)
    assert value == pytest.approx(6.0)


def test_forces_of_fixed_atoms_can_be_left_out() -> None:
    s = replace(_structures([1, 2]), fixed=torch.tensor([True, False, False]))
    prediction = Properties({"forces": torch.zeros(3, 3, dtype=torch.float64)})
    labels = Properties({"forces": torch.tensor([[9.0], [1.0], [3.0]]).expand(3, 3).double()})
    assert _loss(LossTerm(property="forces", error="mae"), prediction, labels, s) == 13 / 3
    free = LossTerm(property="forces", error="mae", free_atoms=True)
    assert _loss(free, prediction, labels, s) == 2.0
    assert _loss(free, prediction, labels, replace(s, fixed=None)) == 13 / 3


def test_zero_error_and_no_label_give_zero_loss_and_finite_gradients() -> None:
    s = _structures([1, 1])
    energy = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    term = LossTerm(property="energy")
    absent = {"energy": torch.zeros(2, dtype=torch.bool)}
    for labels in (
        Properties({"energy": energy.detach().clone()}),
        Properties({"energy": torch.full((2,), torch.nan, dtype=torch.float64)}, absent),
    ):
        loss = _value(term, Properties({"energy": energy}), labels, s)
        assert float(loss.detach()) == 0.0
        (gradient,) = torch.autograd.grad(loss, energy)
        assert torch.equal(gradient, torch.zeros(2, dtype=torch.float64))


def test_a_spread_lowers_the_weight_of_uncertain_atoms() -> None:
    s = _structures([2])
    term = LossTerm(property="atomic_energies", spread="atomic_energies_std", spread_scale=0.1)
    prediction = Properties({"atomic_energies": torch.tensor([1.0, 1.0], dtype=torch.float64)})
    labels = Properties(
        {
            "atomic_energies": torch.tensor([0.0, 1.0], dtype=torch.float64),
            "atomic_energies_std": torch.tensor([0.1, 0.0], dtype=torch.float64),
        }
    )
    share = 0.5 / 1.5  # the uncertain atom weighs one half, the other one
    assert _loss(term, prediction, labels, s) == pytest.approx(share**0.5 + share)


def test_stored_weights_of_frames_count() -> None:
    s = _structures([1, 1])
    term = LossTerm(property="energy", error="mae")
    prediction = Properties({"energy": torch.tensor([1.0, 3.0], dtype=torch.float64)})
    weights = {"energy": torch.tensor([3.0, 1.0], dtype=torch.float64)}
    labels = Properties({"energy": torch.zeros(2, dtype=torch.float64)}, weights=weights)
    assert _loss(term, prediction, labels, s) == pytest.approx(6.0 / 4.0)


def test_the_schedule_of_table_1() -> None:
    forces = Schedule(epochs=(1, 200, 250, 300, 350, 400), values=(75, 63, 51, 39, 27, 15))
    assert [forces.at(e) for e in (1, 199, 200, 399, 400, 1000)] == [75, 75, 63, 27, 15, 15]
    assert forces.end == 400
    assert forces.compressed(0.25).epochs == (1, 50, 62, 75, 88, 100)
    linear = Schedule(epochs=(1, 11), values=(0.0, 1.0), interpolation="linear")
    assert linear.at(6) == pytest.approx(0.5)
    with pytest.raises(ValidationError, match="start at 1"):
        Schedule(epochs=(5, 10), values=(1.0, 2.0))


def test_needs_follow_from_the_terms_that_ever_weigh() -> None:
    terms = [
        LossTerm(property="energy"),
        LossTerm(property="forces", weight=0.0),
        LossTerm(
            property="atomic_energies",
            source="teacher",
            weight=Schedule(epochs=(1, 5), values=(0.0, 1.0)),
            spread="atomic_energies_std",
        ),
    ]
    assert required_signals(terms) == {
        "reference": {"energy"},
        "teacher": {"atomic_energies", "atomic_energies_std"},
    }


def test_a_label_that_the_loss_asks_for_and_that_is_absent_is_refused_by_name() -> None:
    energy = Properties({"energy": torch.zeros(1, dtype=torch.float64)})
    with pytest.raises(MissingLabelError, match="needs labels from 'teacher'"):
        check_signals([LossTerm(property="energy", source="teacher")], {"reference": energy}, "x")
    with pytest.raises(MissingLabelError, match="needs 'forces' from 'reference'"):
        check_signals([LossTerm(property="forces")], {"reference": energy}, "x")
    nowhere = Properties(
        {"forces": torch.full((1, 3), torch.nan)}, {"forces": torch.zeros(1, dtype=torch.bool)}
    )
    with pytest.raises(MissingLabelError, match="needs 'forces'"):
        check_signals([LossTerm(property="forces")], {"reference": nowhere}, "x")
