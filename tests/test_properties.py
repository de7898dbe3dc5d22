"""The table of properties: a new one is one row, and labels, store, metrics of labels follow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from potstill.errors import ConfigError, DataError
from potstill.label import label_store
from potstill.properties import ASE_NAMES, LEARNABLE, PROPERTIES, PropertySpec, property_spec
from potstill.store import LabeledStore
from potstill.structures import Properties, Structures
from potstill.teachers.base import Teacher, TeacherInfo
from test_train import emt_set

MOMENTS = PropertySpec("moments", "atom", (3,), "μB", ase="magmoms")


class Spins(Teacher):
    """Gives a moment along each atom's position."""

    info = TeacherInfo("spins", "f00")
    properties = frozenset({"moments"})

    def compute(self, structures: Structures, properties: Sequence[str]) -> dict[str, Tensor]:
        return {"moments": 2.0 * structures.positions}


def test_a_new_property_is_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PROPERTIES, "moments", MOMENTS)
    structures = emt_set(3).structures
    store = LabeledStore.create(tmp_path / "labels.zarr")
    store.append(structures)
    assert label_store(store, Spins(), ["moments"]).n_labeled == 3
    found = LabeledStore.open(tmp_path / "labels.zarr").labels("spins")
    assert torch.equal(found["moments"], 2.0 * structures.positions)
    parts = [found.select(structures.rows([k])) for k in range(3)]
    joined = Properties.concatenate(parts, [structures.select([k]) for k in range(3)])
    assert torch.equal(joined["moments"], found["moments"])
    with pytest.raises(DataError, match="one row per atom"):
        Properties({"moments": torch.zeros(4)})


def test_without_its_row_it_is_unknown() -> None:
    with pytest.raises(ConfigError, match="unknown property 'moments'"):
        property_spec("moments")


def test_what_rows_say_is_what_the_package_goes_by() -> None:
    assert LEARNABLE == ("energy", "forces", "stress", "atomic_energies")
    assert {n for n, spec in PROPERTIES.items() if spec.derivative} == {"forces", "stress"}
    assert ASE_NAMES["atomic_energies"] == "energies"
    assert [n for n in PROPERTIES if n.endswith("_std")] == [f"{n}_std" for n in LEARNABLE]
