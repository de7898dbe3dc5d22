"""Loss terms: the paper's error measure, schedules, absent labels, weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from potstill.distill import LossTerm, Schedule, required_signals
from potstill.distill.losses import check_signals, error_measure, error_sums
from potstill.errors import MissingLabelError
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


def _loss(term: LossTerm, prediction: Properties, labels: Properties, s: Structures) -> float:
    return float(error_measure(term.error, error_sums(term, prediction, labels, s).stacked()))


def test_rmse_plus_mae_of_energies_is_in_ev_per_configuration() -> None:
    s = _structures([2, 4])
    term = LossTerm(property="energy")
    prediction = Properties({"energy": torch.tensor([1.0, -2.0], dtype=torch.float64)})
    labels = Properties({"energy": torch.tensor([0.0, 2.0], dtype=torch.float64)})
    assert _loss(term, prediction, labels, s) == pytest.approx((17 / 2) ** 0.5 + 2.5)
    per_atom = LossTerm(property="energy", per_atom=True)
    assert _loss(per_atom, prediction, labels, s) == pytest.approx((1.25 / 2) ** 0.5 + 0.75)


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
        sums = error_sums(term, Properties({"energy": energy}), labels, s).stacked()
        loss = error_measure("rmse+mae", sums)
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
    with pytest.raises(MissingLabelError, match="asks for labels from 'teacher'"):
        check_signals([LossTerm(property="energy", source="teacher")], {"reference": energy}, "x")
    with pytest.raises(MissingLabelError, match="asks for 'forces' from 'reference'"):
        check_signals([LossTerm(property="forces")], {"reference": energy}, "x")
    nowhere = Properties(
        {"forces": torch.full((1, 3), torch.nan)}, {"forces": torch.zeros(1, dtype=torch.bool)}
    )
    with pytest.raises(MissingLabelError, match="asks for 'forces'"):
        check_signals([LossTerm(property="forces")], {"reference": nowhere}, "x")
