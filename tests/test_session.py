"""The package in a Python session: what it offers, and the jobs with plain arguments."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.io import write

import potstill
from data import rattled_copper
from potstill.errors import DataError, TeacherError


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_imports_nothing_else():
    code = "import potstill, sys; dir(potstill); print({'torch', 'ase', 'numpy'} & {*sys.modules})"
    assert run(code) == "set()"


def test_the_table_is_what_type_checkers_see():
    tree = ast.parse(Path(potstill.__file__).read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        alias.asname or alias.name: f"{line.module}:{alias.name}"
        for line in block.body
        for alias in line.names
    }
    assert seen == potstill._NAMES
    assert set(potstill.__all__) == {"__version__", *seen}
    assert set(potstill.__all__) <= set(dir(potstill))
    assert Path(potstill.__file__).with_name("py.typed").is_file()
    for name in potstill.__all__:
        assert getattr(potstill, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        potstill.trian  # noqa: B018


@pytest.mark.parametrize("before", ["", "import potstill.train.loop; "])
def test_jobs_are_modules_that_can_be_called(before):
    code = f"{before}import potstill, sys\n"
    code += "assert potstill.train is sys.modules['potstill.train']\n"
    code += "import potstill.train.loop; from potstill.label import label_store\n"
    code += "for job in potstill._JOBS: assert callable(getattr(potstill, job)), job\n"
    code += "try: potstill.train((1, 2), 'x')\nexcept TypeError as error: print(error)"
    assert "has no len" in run(code)


def test_labels_that_fail_are_counted(monkeypatch):
    class Shy(EMT):
        def calculate(self, atoms=None, *args, **kwargs):
            if atoms.positions[0, 0] > 100.0:
                raise RuntimeError("out of sight")
            super().calculate(atoms, *args, **kwargs)

    frames = rattled_copper(12, 0.05)
    frames[3].positions += 200.0
    with pytest.warns(UserWarning, match=r"fails on 1 of 12 structures.*out of sight"):
        data = potstill.label(frames, Shy())
    assert len(data.train) + len(data.validation) + len(data.test) == 11
    assert data.teacher["name"] == data.source == "Shy"
    with pytest.raises(TeacherError, match="fails on 1 of 1"):
        potstill.label(frames[3], Shy())
    with pytest.raises(DataError, match="too few"):
        potstill.label(frames[:5], EMT(), split={"train": 1.0, "validation": 0.0, "test": 0.0})


def test_own_data_are_read_trained_on_and_run(tmp_path):
    write(tmp_path / "dft.extxyz", rattled_copper(12, 0.1))
    data = potstill.read(tmp_path / "dft.extxyz")
    model = {
        "hyperparameters": {"n_features": 4, "n_sensitivities": 4, "dist_soft_min": 1.8}
        | {"dist_soft_max": 4.0, "dist_hard_max": 4.5, "n_atom_layers": 1}
    }
    result = potstill.train(data, tmp_path / "run", epochs=2, model=model)
    assert potstill.evaluate(result.best, data)["forces_n"] > 0
    potential, info = potstill.load(result.best)
    assert info["teacher"] is None
    atoms = bulk("Cu", cubic=True)
    frames = potstill.md(potential, atoms, temperature=300, duration=0.1, equilibration=0.05)
    assert len(frames) == 2
    kept = potstill.md(result.best, atoms, out=tmp_path / "md", duration=0.1, equilibration=0.05)
    assert len(kept) == 2
    assert (tmp_path / "md" / "trajectory.extxyz").is_file()
    with pytest.raises(DataError, match="starts from one structure"):
        potstill.md(potential, [atoms, atoms])


def test_distill_takes_settings_as_the_command_does(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("potstill.session.run_distill", lambda config, _: asked.append(config))
    potstill.distill("chgnet", "Cu.xyz", tmp_path / "run", budget="5min", temperature="300:600")
    assert (asked[0].budget, asked[0].temperature) == (300.0, (300.0, 600.0))
    with pytest.raises(potstill.PotstillError, match="did you mean 'budget'"):
        potstill.distill("chgnet", bugdet="5min")
