"""Files of potentials: round trip, versions, damage."""

from __future__ import annotations

import base64
import gzip
import json
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from ase.build import molecule

from potstill import checkpoint
from potstill.checkpoint import load_potential, potential_fingerprint, save_potential
from potstill.errors import ModelError
from potstill.files import write_atomically
from potstill.models import HIPNN, ZBL, SpeciesOffsets, SumPotential
from potstill.models.base import StartingData
from potstill.species import SpeciesTable
from potstill.structures import Structures

#: By format version; `golden/make_checkpoints.py` wrote them with the potstill of their time.
GOLDEN = json.loads(Path(__file__).with_name("golden").joinpath("checkpoints.json").read_text())


def _potential(seed: int = 0, **named: Any) -> SumPotential:
    table = SpeciesTable.from_symbols("CHO")
    torch.manual_seed(seed)
    network = HIPNN(table, 4, 5, 0.8, 3.5, 4.0, 1, **named)
    offsets = SpeciesOffsets(table, [-13.6, -1029.0, -2041.0])
    return SumPotential({"offsets": offsets, "prior": ZBL(table, 0.6, 0.9), "network": network})


@pytest.mark.parametrize("named", [{}, {"invariants": "smooth", "n_channels": 3}])
def test_what_is_loaded_predicts_what_was_saved(tmp_path: Path, named: dict) -> None:
    structures = Structures.from_ase([molecule("CH3CH2OH"), molecule("H2O")])
    potential = _potential(**named)
    batch = structures.with_species_table(potential.species_table)
    potential["network"].initialize_from(StartingData(torch.zeros(3), (batch,)))
    save_potential(tmp_path / "model.pt", potential, {"seed": 3})
    loaded, info = load_potential(tmp_path / "model.pt")
    assert info == {"seed": 3}
    assert loaded["network"].dtype == torch.float32
    names = ("energy", "forces", "atomic_energies")
    before, after = (p.predict(structures, properties=names) for p in (potential, loaded))
    for name in names:
        assert torch.equal(before[name], after[name])
    assert potential_fingerprint(loaded) == potential_fingerprint(potential)
    assert potential_fingerprint(_potential(seed=1, **named)) != potential_fingerprint(potential)
    if named:  # what the sums are multiplied with is part of the model
        whitened = potential["network"].blocks[0][0].layer
        assert torch.equal(loaded["network"].blocks[0][0].layer.whitening, whitened.whitening)
        whitened.whitening.mul_(2.0)
        assert potential_fingerprint(loaded) != potential_fingerprint(potential)


def test_offsets_stay_in_float64_when_a_model_is_cast() -> None:
    potential = _potential().to(torch.float32)
    assert potential["offsets"].dtype == torch.float64
    assert float(potential["offsets"].offsets[2]) == -2041.0


def test_a_file_of_a_newer_potstill_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    save_potential(path, _potential(), {})
    payload = torch.load(path, weights_only=True)
    payload["potstill_format"] = checkpoint.FORMAT_VERSION + 1
    torch.save(payload, path)
    with pytest.raises(ModelError, match="newer potstill"):
        load_potential(path)


def test_an_older_file_goes_through_the_upgrades(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.pt"
    save_potential(path, _potential(), {})
    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", checkpoint.FORMAT_VERSION + 1)
    upgraded = []

    def upgrade(payload: dict) -> dict:
        upgraded.append(payload["potstill_format"])
        return {**payload, "potstill_format": payload["potstill_format"] + 1}

    monkeypatch.setitem(checkpoint.UPGRADES, checkpoint.FORMAT_VERSION - 1, upgrade)
    load_potential(path)
    assert upgraded == [checkpoint.FORMAT_VERSION - 1]


@pytest.mark.parametrize("content", [b"", b"not a model", b"PK\x03\x04 half a zip"])
def test_damaged_and_foreign_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="not a potstill file"):
        load_potential(path)
    with pytest.raises(ModelError, match="no such file"):
        load_potential(tmp_path / "absent.pt")


def test_a_pickled_object_is_never_loaded(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"potstill_format": 1, "object": Path("x")}, path)
    with pytest.raises(ModelError, match="not a potstill file"):
        load_potential(path)


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, lambda file: file.write(b"old"))

    def fail(file: object) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    plain = tmp_path / "plain"
    plain.write_bytes(b"")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


@pytest.mark.parametrize("version", sorted(GOLDEN))
def test_files_of_every_format_version_are_read_as_they_were_meant(
    tmp_path: Path, version: str
) -> None:
    entry = GOLDEN[version]
    path = tmp_path / "old.pt"
    path.write_bytes(gzip.decompress(base64.b64decode(entry["file"])))
    potential, info = load_potential(path)
    assert info == {"seed": 3}
    # Labels of stores carry this: it must not change with potstill.
    assert potential_fingerprint(potential) == entry["fingerprint"]
    potential.use_core("torch")
    prediction = potential.predict(Structures.from_ase(molecule("CH3CH2OH")))
    # Processors differ in the last digits of exponentials and sums.
    assert float(prediction["energy"]) == pytest.approx(entry["energy"], rel=1e-10)
    expected = torch.tensor(entry["forces"], dtype=torch.float64)
    torch.testing.assert_close(prediction["forces"], expected, rtol=1e-5, atol=1e-7)


def test_there_is_a_file_of_every_format_version() -> None:
    assert set(GOLDEN) == {str(v) for v in range(1, checkpoint.FORMAT_VERSION + 1)}
