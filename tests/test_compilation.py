"""Compiled training: the gradients of the eager code, one compilation for batches of all sizes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo import lookup_backend

from potstill.errors import ConfigError
from potstill.models import Potential
from potstill.species import SpeciesTable
from potstill.structures import Structures
from potstill.train import TrainingSet, TrainSettings, train
from potstill.train.compilation import CompiledPasses, compiler_state, network_passes
from potstill.train.devices import default_fabric
from potstill.train.force_gradient import ForceGradient, NetworkPasses
from potstill.train.objective import BatchLoss
from potstill.train.settings import (
    ForceGradientSettings,
    RegularizationSettings,
)
from potstill.train.signals import bind_terms
from test_force_gradient import BACKPROPAGATION, EVERYTHING, ani, distance, hipnn, partly_labelled
from test_train import assert_same_weights, emt_set, run_on_two_ranks, settings, weights

MODELS = {"ani": ani, "hipnn": hipnn}


class Counter:
    """A backend that counts what it compiles; without C++, it takes seconds."""

    def __init__(self, name: str) -> None:
        self.inner = lookup_backend(name)
        self.calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.inner(*args, **kwargs)


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Replace the backend of `torch.compile`."""
    torch._dynamo.reset()
    whole = torch.compile

    def replace(backend: Any) -> None:
        monkeypatch.setattr(torch, "compile", partial(whole, backend=backend))

    return replace


def gradient_by(module: NetworkPasses, data: TrainingSet, systems: list[int]) -> Tensor:
    """The gradient of a loss of everything on some systems, flat over all parameters."""
    network, fabric = module.network, default_fabric()
    data = data.with_species_table(network.species_table).with_neighbors(network.cutoff)
    batch = data.batch(torch.tensor(systems))
    run = TrainSettings(
        loss=EVERYTHING, regularization=RegularizationSettings(hierarchicality=0.3, l2=0.01)
    )
    objective = BatchLoss(bind_terms(run, network), 1, batch, fabric)
    network.zero_grad(set_to_none=True)
    found = ForceGradient(BACKPROPAGATION, network)(module, batch, objective.wanted, objective)
    found.backward(fabric, fabric.setup_module(module))
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


def smooth(table: SpeciesTable) -> Potential:
    return hipnn(table, l_max=2, invariants="smooth", n_channels=3, n_triples=2)


@pytest.mark.parametrize("make", [ani, smooth])
def test_one_compilation_serves_batches_of_all_sizes(make: Callable, use: Callable) -> None:
    counter = Counter("aot_eager")
    use(counter)
    data = partly_labelled()
    network = make(data.structures.species_table)
    compiled, eager = CompiledPasses(network), NetworkPasses(network)
    for systems in ([0, 1, 2, 3], [0, 1], [3, 2, 1, 1, 0, 1], [1, 3, 0]):
        found = gradient_by(compiled, data, systems)
        assert distance(found, gradient_by(eager, data, systems)) < 1e-10
    assert counter.calls == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_generated_code_gives_the_gradients_of_eager_code(name: str, use: Callable) -> None:
    counter = Counter("inductor")
    use(counter)
    data = partly_labelled()
    network = MODELS[name](data.structures.species_table)
    said: list[str] = []
    compiled, eager = CompiledPasses(network, said.append), NetworkPasses(network)
    for systems in ([0, 1, 2, 3], [0, 1], [3, 2, 1, 1, 0, 1], [1, 3, 0]):
        found = gradient_by(compiled, data, systems)
        assert distance(found, gradient_by(eager, data, systems)) < 1e-10
    assert counter.calls <= 2  # the generator may choose other code for larger batches
    assert compiled.works
    assert len(said) == 2


def test_odd_batches_are_left_to_eager_code(use: Callable) -> None:
    """Without gold, with one atom of it, without pairs: nothing is compiled for them."""
    counter = Counter("eager")
    use(counter)
    data = emt_set(3)
    network = ani(data.structures.species_table)
    copper = Structures.from_ase([a[1:] for a in data.structures.to_ase()])
    without = TrainingSet(
        copper, {k: network_labels(network, copper) for k in ("reference", "teacher")}
    )
    compiled = CompiledPasses(network)
    for odd, systems in ((data, [0]), (without, [0, 1])):
        found = gradient_by(compiled, odd, systems)
        assert torch.equal(found, gradient_by(NetworkPasses(network), odd, systems))
    assert counter.calls == 0
    gradient_by(compiled, data, [0, 1])
    assert counter.calls == 1


def network_labels(network: Potential, structures: Structures) -> Any:
    names = ("energy", "forces", "stress", "atomic_energies")
    structures = structures.with_species_table(network.species_table)
    return MODELS["hipnn"](network.species_table).predict(structures, properties=names).properties


def test_training_goes_on_where_compiling_fails(use: Callable) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("no compiler is here\nand more")

    use(broken)
    data = partly_labelled()
    network = MODELS["hipnn"](data.structures.species_table)
    compiled = CompiledPasses(network)
    expected = gradient_by(NetworkPasses(network), data, [0, 1])
    with pytest.warns(UserWarning, match="continues without it: no compiler is here$"):
        found = gradient_by(compiled, data, [0, 1])
    assert torch.equal(found, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        assert torch.equal(gradient_by(compiled, data, [0, 1]), expected)


def test_networks_do_not_use_up_the_compilations_of_one_another(use: Callable) -> None:
    counter = Counter("eager")
    use(counter)
    data = partly_labelled()
    table = data.structures.species_table
    with torch._dynamo.config.patch(recompile_limit=1):
        for features in (4, 5):
            network = hipnn(table, n_features=features, l_max=0)
            gradient_by(CompiledPasses(network), data, [0, 1])
    assert counter.calls == 2


def test_a_missing_compiler_is_named() -> None:
    from torch._inductor import config

    with config.patch({"cpp.cxx": ("no-such-compiler",)}):
        state = compiler_state()
    assert state.startswith("no compiler")


def test_what_cannot_be_compiled_is_refused_or_said(tmp_path: Path) -> None:
    table = emt_set(1).structures.species_table
    network = MODELS["hipnn"](table)
    exact = ForceGradient(ForceGradientSettings(method="forward_over_reverse"), network)
    with pytest.raises(ConfigError, match="not for forward_over_reverse"):
        network_passes(network, exact, compiled=True)
    said: list[str] = []
    automatic = ForceGradient(ForceGradientSettings(), network)
    passes = network_passes(network, automatic, compiled=True, say=said.append)
    native = network.uses_native
    assert isinstance(passes, CompiledPasses) != native
    assert said == ["nothing is compiled: hipnn runs on native kernels"] * native
    network.use_core("torch")
    automatic = ForceGradient(ForceGradientSettings(), network)
    assert isinstance(network_passes(network, automatic, compiled=True), CompiledPasses)
    network.compilable = False
    with pytest.raises(ConfigError, match="hipnn cannot be compiled"):
        network_passes(network, automatic, compiled=True)


def compiled_settings(**changes: object) -> TrainSettings:
    """As of the tests of training, with a compiled network."""
    return settings(core="torch", compile=True, **{"epochs": 2, **changes})


def test_compiled_training_and_its_resumption_give_the_same_weights(
    tmp_path: Path, use: Callable
) -> None:
    use("eager")
    data, held_out = emt_set(9), emt_set(3, seed=9)  # the last step of an epoch is one frame
    eager = train(settings(core="torch", epochs=2), data, held_out, tmp_path / "eager")
    whole = train(compiled_settings(), data, held_out, tmp_path / "whole")

    def interrupt(record: dict) -> None:
        if record["epoch"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(compiled_settings(), data, held_out, tmp_path / "parts", on_epoch=interrupt)
    resumed = train(compiled_settings(), data, held_out, tmp_path / "parts")
    assert_same_weights(resumed.best, whole.best)
    expected = weights(eager.best)
    for name, value in weights(whole.best).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-11)


@pytest.mark.slow
def test_two_ranks_compile_too(tmp_path: Path) -> None:
    script = (
        "from functools import partial\n"
        "torch.compile = partial(torch.compile, backend='eager')\n"
        "from test_compilation import compiled_settings, emt_set, train\n"
        "train(compiled_settings(epochs=1), emt_set(9), emt_set(3, seed=9), sys.argv[2])\n"
    )
    run_on_two_ranks(script, tmp_path)
    one = train(settings(core="torch", epochs=1), emt_set(9), emt_set(3, seed=9), tmp_path / "one")
    second = weights(tmp_path / "two/best.pt")
    for name, value in weights(one.best).items():
        torch.testing.assert_close(value, second[name], rtol=1e-9, atol=1e-11)
