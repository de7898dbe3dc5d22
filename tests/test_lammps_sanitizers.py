"""The plugin's own code under the address and undefined-behavior sanitizers."""

import os
import shutil
import subprocess

import pytest
import torch

from potstill.deploy import deploy
from potstill.deploy.lammps_build import build_plugin
from potstill.errors import ModelError
from potstill.workflows.lammps_check import LammpsRun
from students import assert_close, crystal, in_ase, student


@pytest.fixture(scope="module")
def sanitized(lammps, tmp_path_factory):
    """The plugin, compiled with sanitizers that end the run where they find something."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    asked = ["g++", "-print-file-name=libasan.so"]
    library = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(library):
        pytest.skip("g++ has no libasan.so")
    folder = tmp_path_factory.mktemp("sanitized")
    compiler = folder / "g++"
    options = "-g1 -fsanitize=address,undefined -fno-sanitize-recover=all"
    compiler.write_text(f'#!/bin/sh\nexec {shutil.which("g++")} {options} "$@"\n')
    compiler.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setenv("CXX", str(compiler))
        plugin = build_plugin(lammps)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LD_PRELOAD", library)
        patch.setenv("ASAN_OPTIONS", "detect_leaks=0")  # MPI keeps what it has until the end
        yield plugin


_RUN = """\
units metal
atom_style atomic
newton NEWTON
read_data structure.data
PAIR
velocity all create 600.0 1
compute energies all pe/atom
compute virials all centroid/stress/atom NULL virial
compute stresses all stress/atom NULL
fix 1 all npt temp 600.0 600.0 0.1 iso 0.0 0.0 1.0
dump 1 all custom 10 dump.txt id c_energies c_stresses[1]
timestep 0.001
neigh_modify every 1 delay 0
run 40
minimize 0 1e-4 5 20
"""


@pytest.mark.slow
@pytest.mark.parametrize("n_ranks", [1, 2])
@pytest.mark.parametrize(
    ("newton", "n_layers", "dtype"),
    [("on", 2, torch.float32), ("off", 2, torch.float64), ("off", 1, torch.float32)],
)
def test_sanitizers_find_nothing_in_the_plugin(
    lammps, sanitized, tmp_path, n_ranks, newton, n_layers, dtype
):
    potential = student("Al", "Cu", dtype=dtype, n_interaction_layers=n_layers)
    file = deploy(potential, "lammps", tmp_path, "m")[0]
    run = LammpsRun(lammps, sanitized, file, ["Al", "Cu"], tmp_path / "run", n_ranks, newton=newton)
    atoms = crystal("Al", "Cu")
    assert_close(
        run.static(atoms), in_ase(potential, atoms), 1e-10 if dtype == torch.float64 else 1e-4
    )
    script = _RUN if n_layers == 1 else _RUN.replace("centroid/stress", "stress")
    assert "Loop time" in run.output(script)


@pytest.mark.slow
def test_sanitizers_find_nothing_where_a_file_is_faulty(lammps, sanitized, tmp_path):
    file = deploy(student("Al", "Cu"), "lammps", tmp_path, "m")[0]
    content = file.read_bytes()
    run = LammpsRun(lammps, sanitized, file, ["Al", "Cu"], tmp_path / "run", 2)
    for spoiled in (
        b"",
        content[:7],
        content[:40],
        content[:-8],
        b"\xff" * 64,
        content[:200] + b"\xff" * 9 + content[209:],
    ):
        file.write_bytes(spoiled)
        with pytest.raises(ModelError, match=r"The model file .* cannot be used"):
            run.static(crystal("Al", "Cu"))
