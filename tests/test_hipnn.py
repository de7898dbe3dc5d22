"""HIP-NN's own conventions, beyond the contract of every model."""

from __future__ import annotations

import json

import pytest
import torch
from ase.build import bulk

from potstill.errors import ModelError
from potstill.models import HIPNN
from potstill.models.base import StartingData
from potstill.models.hipnn import CUTOFF_FUNCTIONS, hierarchicality
from potstill.species import SpeciesTable
from potstill.structures import Structures

AL = SpeciesTable.from_symbols(["Al"])


def test_sensitivities_start_between_the_soft_distances() -> None:
    model = HIPNN(AL, 4, 10, 1.5, 7.0, 7.5, 1)
    sensitivity = model.blocks[0][0].layer.sensitivity.requires_grad_(False)
    assert float(sensitivity.mu.max()) == pytest.approx(7.0, rel=1e-6)
    assert float(sensitivity.mu.min()) == pytest.approx(1.5, rel=1e-6)
    assert sensitivity.sigma.tolist() == pytest.approx([2 * 10 * 1.5] * 10)
    steps = (1.0 / sensitivity.mu).diff()
    assert float(steps.std()) < 1e-6 * float(steps.mean().abs()) + 1e-7


@pytest.mark.parametrize(("name", "n_smooth"), [("cosine_squared", 1), ("polynomial", 2)])
def test_cutoff_functions_end_as_smoothly_as_they_say(name: str, n_smooth: int) -> None:
    r = torch.tensor([5.0], dtype=torch.float64, requires_grad=True)
    value = CUTOFF_FUNCTIONS[name](r, 5.0)
    derivatives = [float(value.detach())]
    for _ in range(n_smooth):
        (value,) = torch.autograd.grad(value.sum(), r, create_graph=True)
        derivatives.append(float(value.detach()))
    assert derivatives == pytest.approx([0.0] * (n_smooth + 1), abs=1e-12)
    assert float(CUTOFF_FUNCTIONS[name](torch.zeros(1), 5.0)) == pytest.approx(1.0)


def test_hierarchicality_is_zero_where_both_terms_vanish() -> None:
    terms = torch.tensor([[0.0, 0.0], [3.0, 4.0]], dtype=torch.float64, requires_grad=True)
    value = hierarchicality(terms)
    assert value.tolist() == pytest.approx([0.0, 16.0 / 25.0])
    (gradient,) = torch.autograd.grad(value.sum(), terms)
    assert torch.isfinite(gradient).all()


def test_energy_layers_start_near_the_linear_fit() -> None:
    torch.manual_seed(1)
    model = HIPNN(AL, 6, 5, 1.6, 4.0, 4.5, 1, n_interaction_layers=2)
    before = [layer.weight.detach().clone() for layer in model.energy_layers]
    model.initialize_from(StartingData(torch.tensor([-3.7]), ()))
    assert model.energy_layers[0].weight.item() == pytest.approx(-3.7)
    for k, scale in ((1, 1e-2), (2, 1e-4)):
        torch.testing.assert_close(model.energy_layers[k].weight.detach(), before[k] * scale)
    crystal = Structures.from_ase(bulk("Al", cubic=True))
    energy = model.predict(crystal, properties=("energy",))["energy"]
    assert float(energy) / 4 == pytest.approx(-3.7, abs=0.1)


def test_bad_hyper_parameters_are_refused() -> None:
    with pytest.raises(ModelError, match="l_max must be"):
        HIPNN(AL, 4, 4, 1.5, 4.0, 5.0, 1, l_max=3)
    with pytest.raises(ModelError, match="dist_soft_min < dist_soft_max"):
        HIPNN(AL, 4, 4, 4.5, 4.0, 5.0, 1)
    with pytest.raises(ModelError, match="did you mean 'polynomial'"):
        HIPNN(AL, 4, 4, 1.5, 4.0, 5.0, 1, cutoff_function="polynomail")
    with pytest.raises(ModelError, match="'n_feature'; did you mean 'n_features'"):
        HIPNN(AL, n_feature=4)
    with pytest.raises(ModelError, match=r"n_features: .* greater than or equal to 1 \(it is 0\)"):
        HIPNN(AL, 0)
    with pytest.raises(ModelError, match=r"too many .*: n_features"):
        HIPNN(AL, 4, n_features=4)


def test_defaults_are_a_small_student_and_complete_configs_keep_the_old_ones() -> None:
    small = HIPNN(AL)
    assert (small.hyper.invariants, small.hyper.cutoff_function) == ("smooth", "polynomial")
    assert HIPNN(AL, invariants="norms").hyper.cusp_reg == 1e-2
    old = HIPNN(AL, 4, 4, 1.5, 4.0, 5.0, 1)
    assert (old.hyper.invariants, old.hyper.cutoff_function) == ("norms", "cosine_squared")
    assert (old.hyper.l_max, old.hyper.cusp_reg) == (1, 1e-6)
    for model in (small, old):
        assert HIPNN(AL, **model.hyperparameters()).hyper == model.hyper
    assert "invariants" not in old.hyperparameters()  # fingerprints of old potentials stay


def test_integers_stay_integers_where_fingerprints_hashed_them() -> None:
    old = HIPNN(AL, 4, 4, 1, 4, 5, 1).hyperparameters()
    assert json.dumps([old["dist_soft_min"], old["dist_soft_max"]]) == "[1, 4]"
    assert json.dumps(old["dist_hard_max"]) == "5.0"
