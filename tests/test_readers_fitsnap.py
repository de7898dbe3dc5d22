"""FitSNAP's JSON, and the check of the unit of stress against -dE/dV."""

import json

import numpy as np
import pytest
import torch
from ase.units import Bohr, GPa, Hartree, bar

from data import data_path
from potstill.errors import ConfigError, DataError
from potstill.readers import (
    DataWarning,
    Units,
    check_stress_unit,
    read,
    split_by_blocks,
    split_by_group,
    split_by_seed,
    split_from_file,
    write_split,
)

K, V0 = 0.8, 16.0  # eV/Å³ and Å³ of a model crystal with E = K (V - V0)² / (2 V0)


def write_scan(folder, group="Volume_BCC", unit=bar, lengths=(2.3, 2.4, 2.5, 2.6, 2.7), **extra):
    """A volume scan of a crystal whose pressure is known, written with a stress in `unit`."""
    (folder / group).mkdir(parents=True)
    for a in lengths:
        volume = a**3
        pressure = -K * (volume - V0) / V0
        data = {
            "Positions": [[0, 0, 0], [a / 2, a / 2, a / 2]],
            "AtomTypes": ["Ta", "Ta"],
            "Lattice": (a * np.eye(3)).tolist(),
            "NumAtoms": 2,
            "Energy": K * (volume - V0) ** 2 / (2 * V0),
            "Forces": np.zeros((2, 3)).tolist(),
            "Stress": (pressure / unit * np.eye(3)).tolist(),
        }
        styles = {"StressStyle": "bar", "EnergyStyle": "electronvolt", **extra}
        text = json.dumps({"Dataset": {"Data": [data], **styles}})
        (folder / group / f"scan_{a}.json").write_text("# a comment of any form\n" + text)


def test_folders_are_groups_and_stress_is_compression_in_bar(tmp_path):
    write_scan(tmp_path)
    write_scan(tmp_path, "Volume_FCC", lengths=(2.5, 2.55))
    structures, labels = read(tmp_path, require=("energy", "forces", "stress"))
    assert structures.group == ("Volume_BCC",) * 5 + ("Volume_FCC",) * 2
    assert structures.frame_id[0] == "Volume_BCC/scan_2.3.json:0"
    assert structures.pbc.all()
    expected = K * (structures.volume - V0) / V0  # dE/dV: positive in tension
    assert torch.allclose(labels["stress"][:, 0, 0], expected)
    assert torch.allclose(labels["stress"][:, 0, 1], torch.zeros(7, dtype=torch.float64))


def test_a_wrong_unit_is_refused_with_the_one_that_fits(tmp_path):
    write_scan(tmp_path, unit=0.1 * GPa)  # kilobar, though the files say bar
    with pytest.raises(DataError, match=r"group 'Volume_BCC': stress in bar.*stress='kB'"):
        read(tmp_path)
    _, labels = read(tmp_path, units=Units(stress="kB"))
    assert labels["stress"][0, 0, 0].item() == pytest.approx(K * (2.3**3 - V0) / V0)
    with pytest.warns(DataWarning, match="stress in GPa"):
        read(tmp_path, units=Units(stress="GPa"))


def test_a_wrong_sign_is_refused(tmp_path):
    write_scan(tmp_path, unit=-bar)
    with pytest.raises(DataError, match="positive_stress='tension'"):
        read(tmp_path)
    _, labels = read(tmp_path, units=Units(positive_stress="tension"))
    assert labels["stress"][0, 0, 0] < 0


def test_stress_that_fits_no_unit_is_reported(tmp_path):
    write_scan(tmp_path, unit=bar / 0.03)
    with pytest.warns(DataWarning, match="fits no known unit"):
        read(tmp_path)


@pytest.mark.parametrize("unit", ["eV/A^3", "GPa", "kB", "bar"])
def test_check_finds_any_unit(tmp_path, unit):
    from potstill.units import pressure_factor

    write_scan(tmp_path, unit=pressure_factor(unit))
    structures, labels = read(tmp_path, units=Units(stress=unit))
    # Pretend that the numbers had been taken for bar in tension.
    wrong = labels["stress"] * (-pressure_factor("bar") / pressure_factor(unit))
    labels.values["stress"] = wrong
    (check,) = check_stress_unit(structures, labels, "bar", "tension")
    assert check.unit == unit
    assert check.positive_stress == "compression"
    assert check.n_pairs == 4


def test_sets_without_a_scan_are_not_judged(tmp_path):
    write_scan(tmp_path, lengths=(2.5,), unit=GPa)
    structures, labels = read(tmp_path)
    assert check_stress_unit(structures, labels) == []


def test_styles_of_units(tmp_path):
    write_scan(tmp_path, EnergyStyle="hartree", PositionsStyle="bohr", LatticeStyle="bohr")
    # Neither energies nor cells were written in these units, which the scan notices.
    with pytest.warns(DataWarning, match="fits no known unit"):
        structures, labels = read(tmp_path)
    assert structures.cell[0, 0, 0].item() == pytest.approx(2.3 * Bohr)
    assert labels["energy"][0].item() == pytest.approx(K * (2.3**3 - V0) ** 2 / (2 * V0) * Hartree)
    write_scan(tmp_path / "mixed", PositionsStyle="bohr", LatticeStyle="angstrom")
    with pytest.raises(DataError, match="lattice in Angstrom and positions in Bohr"):
        read(tmp_path / "mixed")
    write_scan(tmp_path / "other", StressStyle="furlong")
    with pytest.raises(DataError, match="StressStyle is 'furlong'"):
        read(tmp_path / "other")


@pytest.mark.data
def test_original_files_agree_with_the_converted_set():
    structures, labels = read(data_path("ta-snap/json"))
    converted, expected = read(data_path("ta-snap/ta_snap.extxyz.gz"))
    assert structures.n_systems == 24
    assert len(set(structures.group)) == 12
    # Energies alone are not unique in the elastic groups.
    there = torch.stack([expected["energy"], converted.volume], dim=1)
    same = [
        int((there - torch.stack([e, v])).abs().sum(1).argmin())
        for e, v in zip(labels["energy"], structures.volume, strict=True)
    ]
    other = converted.select(same)
    assert other.group == structures.group
    assert torch.allclose(other.cell, structures.cell, atol=1e-5)
    assert torch.allclose(other.positions, structures.positions, atol=1e-5)
    for name in ("forces", "stress"):
        found = expected.select(converted.rows(same))[name]
        assert torch.allclose(found, labels[name], rtol=1e-5, atol=1e-6)


@pytest.mark.data
def test_published_volume_scans_fit_their_stress():
    structures, labels = read(data_path("ta-snap/ta_snap.extxyz.gz"))
    checks = {c.group: c for c in check_stress_unit(structures, labels)}
    assert set(checks) == {"Volume_A15", "Volume_BCC", "Volume_FCC"}
    for check in checks.values():
        assert check.unit == "eV/A^3"
        assert check.ratio == pytest.approx(1.0, abs=0.03)
        assert check.n_pairs > 15


# -- splits ---------------------------------------------------------------------------------------


def test_split_by_blocks_keeps_neighbors_together():
    fractions = {"train": 0.6, "validation": 0.2, "test": 0.2}
    parts = split_by_blocks(103, 10, fractions, 1)
    assert sorted(torch.cat(list(parts.values())).tolist()) == list(range(103))
    block = torch.arange(103).tensor_split(10)
    place = {k: b for b, own in enumerate(block) for k in own.tolist()}
    blocks = [{place[k] for k in own.tolist()} for own in parts.values()]
    assert [len(own) for own in blocks] == [6, 2, 2]  # whole blocks: none is in two parts
    other = split_by_blocks(103, 10, fractions, 2)
    assert any(not torch.equal(parts[name], other[name]) for name in parts)
    with pytest.raises(ConfigError, match="5 frames cannot be split into 10 blocks"):
        split_by_blocks(5, 10, fractions, 0)


def test_split_by_seed():
    fractions = {"train": 0.8, "validation": 0.1, "test": 0.1}
    first, again, other = (split_by_seed(103, fractions, seed) for seed in (1, 1, 2))
    assert torch.cat(list(first.values())).sort().values.tolist() == list(range(103))
    assert [len(part) for part in first.values()] == [83, 10, 10]
    assert all(torch.equal(first[name], again[name]) for name in fractions)
    assert not torch.equal(first["test"], other["test"])
    assert [len(p) for p in split_by_seed(3, fractions, 0).values()] == [1, 1, 1]
    with pytest.raises(ConfigError, match="sum to one"):
        split_by_seed(10, {"train": 0.5}, 0)
    with pytest.raises(ConfigError, match="2 systems cannot be split into 3 parts"):
        split_by_seed(2, fractions, 0)


def test_split_by_group():
    groups = ["bulk", "Surface_100", "Surface_110", "liquid", "bulk"]
    parts = split_by_group(groups, {"test": ["Surface*"], "validation": ["liquid"]})
    assert {name: part.tolist() for name, part in parts.items()} == {
        "train": [0, 4],
        "test": [1, 2],
        "validation": [3],
    }
    with pytest.raises(ConfigError, match="no group is called 'liqiud'; did you mean 'liquid'"):
        split_by_group(groups, {"test": ["liqiud"]})
    with pytest.raises(ConfigError, match="claimed by 'a' and by 'b'"):
        split_by_group(groups, {"a": ["bulk"], "b": ["b*"]})


def test_split_from_file(tmp_path):
    parts = split_by_seed(20, {"train": 0.5, "test": 0.5}, 0)
    write_split(tmp_path / "split.json", parts)
    again = split_from_file(tmp_path / "split.json", 20)
    assert all(torch.equal(parts[name], again[name]) for name in parts)
    with pytest.raises(DataError, match=r"is not in 0\.\.9"):
        split_from_file(tmp_path / "split.json", 10)
    (tmp_path / "split.json").write_text('{"train": [1, 2], "test": [2]}')
    with pytest.raises(DataError, match="index 2 is in 'train' and in 'test'"):
        split_from_file(tmp_path / "split.json", 10)
    (tmp_path / "split.json").write_text("[1, 2")
    with pytest.raises(DataError, match="not a split"):
        split_from_file(tmp_path / "split.json", 10)
