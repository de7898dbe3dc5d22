"""Teachers in worker processes: crashes, exits, changed directories, damaged state."""

import copy
import gc
import os
import pickle

import numpy as np
import psutil
import pytest
import torch
from ase.build import bulk, molecule
from ase.calculators.lj import LennardJones

import misbehaving
from potstill.errors import TeacherError
from potstill.isolation import FrameError, WorkerCalculator
from potstill.sample import run_md
from potstill.structures import Structures
from potstill.teachers import make_teacher
from potstill.teachers.ase import AseTeacher
from potstill.teachers.base import TeacherInfo

#: Frames 1 and 3 are those on which the calculators misbehave.
FRAMES = (4, 3, 4, 3, 2)

HOW = {
    "segfault": "its process was killed by signal 11 (SIGSEGV)",
    "fortran": "its process ended with exit code 3: Fortran runtime error: Index out of bounds",
    "exit": "it called sys.exit('no license')",
    "raise_": "not converged",
}


def frames():
    rng = np.random.default_rng(0)
    found = []
    for n in FRAMES:
        atoms = bulk("Cu", cubic=True, a=3.7)[:n]
        atoms.rattle(0.1, rng=rng)
        found.append(atoms)
    return found


def workers():
    return [p for p in psutil.Process().children() if "worker.py" in " ".join(p.cmdline())]


@pytest.mark.filterwarnings("ignore:Misbehaving. out of range")
@pytest.mark.parametrize("how", HOW)
def test_a_frame_that_ends_the_calculator_is_listed_and_the_others_are_done(how):
    home = os.getcwd()
    teacher = make_teacher("misbehaving:Misbehaving", {"how": how})
    structures = Structures.from_ase(frames())
    labels, failures = teacher.label(structures, ["energy", "forces", "stress"])
    assert [failure.system for failure in failures] == [1, 3]
    for failure in failures:
        assert failure.reason.startswith(HOW[how])
    # What comes after a failure is what an undisturbed calculator gives.
    plain = AseTeacher(LennardJones(sigma=2.3, epsilon=0.2, rc=5.0), TeacherInfo("lj", "x"))
    expected, _ = plain.label(structures.select([0, 2, 4]), ["energy", "forces", "stress"])
    found = labels.select(structures.rows([0, 2, 4]))
    for name in ("energy", "forces", "stress"):
        assert torch.equal(found[name], expected[name])
    assert os.getcwd() == home


def test_teachers_of_this_process_are_as_safe_from_exits_and_directories(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for how in ("exit", "raise_"):
        teacher = AseTeacher(misbehaving.Misbehaving(how), TeacherInfo("own", "x"))
        with pytest.warns(UserWarning, match="out of range"):
            _, failures = teacher.label(Structures.from_ase(frames()), ["energy"])
        assert [failure.reason for failure in failures] == [HOW[how]] * 2
        assert os.getcwd() == str(tmp_path)


def test_a_factory_beside_the_user_is_found_and_its_files_too(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "own_teacher.py").write_text(
        "from ase.calculators.lj import LennardJones\n"
        "def make(file):\n    return LennardJones(epsilon=float(open(file).read()))\n"
    )
    (tmp_path / "mine" / "epsilon.txt").write_text("0.25")
    monkeypatch.chdir(tmp_path / "mine")
    teacher = make_teacher("own_teacher:make", {"file": "epsilon.txt"})
    pair = molecule("H2")
    pair.set_distance(0, 1, 2.0 ** (1 / 6))
    labels, failures = teacher.label(Structures.from_ase(pair), ["energy"])
    assert not failures
    assert float(labels["energy"][0]) == pytest.approx(-0.25, abs=0.01)


def test_what_cannot_be_made_is_said_in_a_sentence():
    with pytest.raises(
        TeacherError, match="could not be created: its process ended with exit code 7"
    ):
        make_teacher("misbehaving:deadly")
    with pytest.raises(TeacherError, match="cannot be passed to its process"):
        make_teacher("misbehaving:Misbehaving", {"how": lambda: None})


@pytest.mark.filterwarnings("ignore:Misbehaving. out of range")
def test_a_teacher_that_only_dies_is_given_up():
    teacher = make_teacher("misbehaving:Misbehaving", {"how": "segfault"})
    hopeless = Structures.from_ase([frames()[1]] * 8)
    with pytest.raises(TeacherError, match=r"failed 6 times and never answered: .*SIGSEGV"):
        teacher.label(hopeless, ["energy"])


def test_workers_end_with_their_calculators():
    gc.collect()
    before = len(workers())
    calculator = WorkerCalculator("ase.calculators.lj:LennardJones", {}, "lj")
    assert len(workers()) == before + 1
    del calculator
    gc.collect()
    assert len(workers()) == before


def test_a_copy_has_a_process_of_its_own():
    calculator = WorkerCalculator(
        "ase.calculators.lj:LennardJones", {"sigma": 2.3}, "lj", conservative=False
    )
    atoms = frames()[0]
    energy = calculator.get_property("energy", atoms)
    for other in (copy.deepcopy(calculator), pickle.loads(pickle.dumps(calculator))):
        other.reset()
        assert other.get_property("energy", atoms) == energy
        assert not other.conservative


@pytest.mark.filterwarnings("ignore:Misbehaving. out of range")
def test_dynamics_survive_a_crash_of_a_worn_out_process_and_name_one_of_a_frame():
    calculator = make_teacher("misbehaving:Misbehaving", {"how": "segfault"}).ase_calculator()
    start = Structures.from_ase(bulk("Cu", cubic=True, a=3.7))
    settings = {"temperature": 100.0, "n_frames": 2, "seed": 0, "stride": 4.0, "equilibration": 0.0}
    undisturbed = run_md(start, calculator, **settings)
    (worker,) = (p for p in workers() if p.pid == calculator._worker._process.pid)
    killed = []

    def kill(done, total):
        if not killed:
            killed.append(worker)
            worker.kill()

    again = run_md(start, calculator, progress=kill, **settings)
    assert killed
    assert torch.equal(again.structures.positions, undisturbed.structures.positions)
    with pytest.raises(FrameError, match=r"'Misbehaving' failed on a frame: .*SIGSEGV"):
        run_md(Structures.from_ase(frames()[1]), calculator, **settings)


def test_xtb_starts_every_frame_afresh():
    """Neither the frame before nor a failure of it changes a bit of an answer."""
    pytest.importorskip("tblite", reason="the package tblite is not installed")
    rng = np.random.default_rng(1)
    good = []
    for _ in range(2):
        good.append(molecule("H2O"))
        good[-1].rattle(0.1, rng=rng)
    broken = molecule("H2O")
    broken.positions[1] = broken.positions[0]
    teacher = make_teacher("gfn1-xtb", {"max_iterations": 30})
    mixed, failures = teacher.label(
        Structures.from_ase([good[0], broken, good[1], broken, good[0]]), ["energy", "forces"]
    )
    assert [failure.system for failure in failures] == [1, 3]
    reverse, failures = teacher.label(Structures.from_ase(good[::-1]), ["energy", "forces"])
    assert not failures
    assert torch.equal(mixed["energy"][[2, 0]], reverse["energy"])
    assert mixed["energy"][4] == mixed["energy"][0]
    assert torch.equal(mixed["forces"][6:9], reverse["forces"][:3])
