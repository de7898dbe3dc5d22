"""Models of other packages: named in configs, trained, saved and read by `module:Class`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from ase.build import bulk
from ase.calculators.emt import EMT

from foreign_model import Springs
from potstill.checkpoint import load_potential, potential_fingerprint, save_potential
from potstill.config import load_config
from potstill.errors import ConfigError, ModelError
from potstill.models import HIPNN, MODELS, SpeciesOffsets, SumPotential, build_model, model_class
from potstill.models.hyper import Hyperparameters
from potstill.species import SpeciesTable
from potstill.structures import Properties, Structures
from potstill.testing import CONTRACT
from potstill.train.data import TrainingSet
from potstill.train.initialize import initial_student
from potstill.train.loop import train
from potstill.train.settings import EnergySettings, ModelSettings, TrainSettings
from potstill.workflows.training import TrainConfig

CU = SpeciesTable.from_symbols(["Cu"])


def labeled_copper(n: int = 6) -> TrainingSet:
    frames, energies, forces = [], [], []
    for seed in range(n):
        atoms = bulk("Cu", cubic=True)
        atoms.rattle(0.05, seed=seed)
        atoms.calc = EMT()
        energies.append(atoms.get_potential_energy() - 4 * 7.5)
        forces.append(torch.from_numpy(atoms.get_forces()))
        frames.append(atoms)
    energy = torch.tensor(energies, dtype=torch.float64)
    labels = {"reference": Properties({"energy": energy, "forces": torch.cat(forces)})}
    return TrainingSet(Structures.from_ase(frames), labels)


@pytest.mark.parametrize("check", ["first_order_passes", "save_and_load", "single_precision"])
def test_contract(check: str) -> None:
    CONTRACT[check](Springs(CU).double())


def test_a_model_is_trained_and_read_by_module_and_class(tmp_path: Path) -> None:
    settings = TrainSettings(
        model=ModelSettings(kind="foreign_model:Springs", hyperparameters={"cutoff": 3.5}),
        energy=EnergySettings(zero="none"),
        epochs=2,
        batch_size=2,
        early_stopping=None,
    )
    data = labeled_copper()
    student, _ = initial_student(settings, data)
    network = student["network"]
    assert isinstance(network, Springs)
    mean = data.labels["reference"]["energy"].mean() / 4
    assert network.zero.item() == pytest.approx(float(mean), rel=1e-4)  # by `initialize_from`

    result = train(settings, data, data, tmp_path / "run")
    loaded, _ = load_potential(result.best)
    assert isinstance(loaded, SumPotential)
    assert isinstance(loaded["network"], Springs)
    assert loaded["network"].cutoff == 3.5
    assert loaded.hyperparameters()["components"]["network"]["kind"] == "foreign_model:Springs"


def test_a_checkpoint_whose_model_is_gone_says_so(tmp_path: Path) -> None:
    class Local(Springs):
        pass

    parts = {"offsets": SpeciesOffsets(CU, [-3.0]), "network": Local(CU)}
    save_potential(tmp_path / "model.pt", SumPotential(parts), {})
    with pytest.raises(ModelError, match=r"'test_foreign_models:.*Local' cannot be imported"):
        load_potential(tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("{kind: hipn}", "unknown kind of model 'hipn'; did you mean 'hipnn'"),
        (
            "{kind: hipnn, hyperparameters: {n_feature: 8}}",
            "'n_feature'; did you mean 'n_features'",
        ),
        (
            "{hyperparameters: {invariants: norms, l_max: 3}}",
            "model 'hipnn': l_max must be 0, 1 or 2 with norms, not 3",
        ),
        ("{kind: schnet, hyperparameters: {cutoff: -1}}", "cutoff: .*greater than 0"),
        ("{kind: zbl}", "model 'zbl': missing a required argument: 'inner'"),
        ("{kind: 'foreign_model:Spring'}", "'foreign_model:Spring' cannot be imported"),
        ("{kind: 'foreign_model:SpeciesTable'}", "not a subclass of potstill.models.Potential"),
        (
            "{kind: 'foreign_model:Springs', hyperparameters: {stiffnes: 2}}",
            "'stiffnes'; did you mean 'stiffness'",
        ),
    ],
)
def test_what_is_wrong_with_a_model_is_said_with_the_config(
    tmp_path: Path, model: str, sentence: str
) -> None:
    path = tmp_path / "train.yaml"
    # No such data: they are not read before the model is checked.
    path.write_text(f"data: {{files: [{{path: absent.extxyz}}]}}\ntrain: {{model: {model}}}\n")
    with pytest.raises(ConfigError, match=rf"train.yaml: 'train.model': .*{sentence}"):
        load_config(path, TrainConfig)


@pytest.mark.parametrize("kind", sorted(set(MODELS) - {"zbl", "repulsion", "bonds", "offsets"}))
def test_every_network_is_built_from_its_documented_defaults(kind: str) -> None:
    hyper_class = model_class(kind).hyper_class
    assert hyper_class is not None
    assert hyper_class is not Hyperparameters
    documented = hyper_class.__doc__ or ""
    for name, field in hyper_class.model_fields.items():
        assert not field.is_required(), f"{kind}: {name} has no default"
        assert name in documented, f"{kind}: {name} has no documentation"
    ModelSettings(kind=kind)
    if kind != "gemnet_oc":  # forty million weights
        model = build_model(kind, CU, {})
        again = build_model(kind, CU, model.hyperparameters())
        assert potential_fingerprint(again) is not None
        assert again.hyper == model.hyper


def test_fingerprints_are_those_that_label_stores_hold() -> None:
    torch.manual_seed(5)
    network = HIPNN(CU, 4, 4, 1, 4, 5, 1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(0.5)
    assert potential_fingerprint(network) == "2eb18307c44470b03464e486"


def test_the_example_of_the_documentation_keeps_the_contract() -> None:
    page = Path(__file__).resolve().parents[1] / "docs" / "models.md"
    (example,) = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    made: dict[str, Any] = {"__name__": "my_module"}
    exec(example, made)  # what the page tells readers to write
    springs = made["Springs"](CU, stiffness=0.5)
    CONTRACT["forces_are_the_gradient"](springs)
    CONTRACT["continuity"](springs)
    assert springs.spec == "my_module:Springs"
    assert springs.hyperparameters() == {"stiffness": 0.5}
