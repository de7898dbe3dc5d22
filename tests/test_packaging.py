"""What stands around the code agrees with it: versions, extras, documentation, targets."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from ruamel.yaml import YAML

import potstill

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "potstill"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]

#: Import names that differ from the names of their distributions.
DISTRIBUTIONS = {"lightning_fabric": "lightning-fabric", "ruamel": "ruamel.yaml"}

#: Packages that only some users have: they come in through `errors.require` alone.
OPTIONAL = {"chgnet", "h5py", "lammps", "lmdb", "phonopy", "tblite", "tensorboard", "hippynn"} | {
    "metatomic-torch",
    "torch-sim-atomistic",
}


def source_trees() -> dict[str, ast.Module]:
    return {
        str(path.relative_to(SOURCE)): ast.parse(path.read_text(encoding="utf-8"))
        for path in SOURCE.rglob("*.py")
    }


def requirement_names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[<>=!~; ]", text)[0].lower() for text in requirements}


# -- versions and dependencies -----------------------------------------------------------------


def test_one_version_everywhere():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## \[(\d[^\]]*)\]", changelog, re.MULTILINE)
    assert newest is not None
    assert newest[1] == potstill.__version__
    citation = YAML(typ="safe").load(ROOT / "CITATION.cff")
    assert citation["version"] == potstill.__version__
    assert citation["license"] == PROJECT["license"]


def test_extras_named_in_require_exist():
    extras = set(PROJECT["optional-dependencies"])
    named = {
        (file, keyword.value.value)
        for file, tree in source_trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "require"
        for keyword in node.keywords
        if keyword.arg == "extra" and isinstance(keyword.value, ast.Constant)
    }
    assert {(file, extra) for file, extra in named if extra not in extras} == set()


def test_imported_packages_are_dependencies():
    declared = requirement_names(PROJECT["dependencies"])
    foreign = {}
    for file, tree in source_trees().items():
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            for name in names:
                top = name.split(".")[0]
                if top in sys.stdlib_module_names or top == "potstill":
                    continue
                if DISTRIBUTIONS.get(top, top) not in declared:
                    foreign.setdefault(top, set()).add(file)
    # Optional packages are imported by `require(...)`, which says which extra brings them.
    assert foreign == {}


def test_optional_packages_are_no_dependencies():
    assert OPTIONAL & requirement_names(PROJECT["dependencies"]) == set()


def test_dev_pulls_in_what_tests_and_docs_need():
    (own,) = [
        text for text in PROJECT["optional-dependencies"]["dev"] if text.startswith("potstill[")
    ]
    included = own.removeprefix("potstill[").rstrip("]").split(",")
    assert set(included) <= set(PROJECT["optional-dependencies"])


def test_the_papers_that_the_methods_come_from_are_cited():
    references = YAML(typ="safe").load(ROOT / "CITATION.cff")["references"]
    cited = {(entry["authors"][0]["family-names"], entry["title"]) for entry in references}
    wanted = [
        ("Matin", "Teacher-student training"),
        ("Ekström Kelvinius", "Accelerating Molecular Graph Neural Networks"),
        ("Ekström Kelvinius", "(Extended Abstract)"),
        ("Smith", "Simple and efficient algorithms"),
        ("Olowookere", "Knowledge Distillation of Noisy Force Labels"),
    ]
    for author, words in wanted:
        assert any(name == author and words in title for name, title in cited), words


def test_released_wheels_are_for_the_declared_versions_of_python():
    built = PYPROJECT["tool"]["cibuildwheel"]["build"]
    declared = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    assert [f"cp{version.replace('.', '')}-*" for version in declared] == built
    assert PROJECT["requires-python"] == f">={declared[0]}"


@pytest.mark.parametrize("name", ["tests.yml", "wheels.yml"])
def test_workflows_call_what_there_is(name):
    file = ROOT / ".github" / "workflows" / name
    if not file.is_file():
        pytest.skip("a source distribution carries no workflows")
    jobs = YAML(typ="safe").load(file)["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    words = [word for command in commands for word in command.split()]
    paths = [word for word in words if word.startswith((".ci/", "tests/"))]
    assert paths
    assert [path for path in paths if not (ROOT / path).exists()] == []
    extras = re.findall(r"\.\[(\w+)\]", "\n".join(commands))
    assert set(extras) <= set(PROJECT["optional-dependencies"])


# -- documentation -----------------------------------------------------------------------------


def nav_files(entries: list) -> list[str]:
    """Files of a mkdocs nav, in order, at whatever depth."""
    files = []
    for entry in entries:
        target = next(iter(entry.values())) if isinstance(entry, dict) else entry
        files.extend(nav_files(target) if isinstance(target, list) else [target])
    return files


def test_navigation_and_docs_folder_agree():
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    # Values with Python tags configure extensions; the navigation has none.
    config = re.sub(r"!!python/\S+", "", config)
    listed = nav_files(YAML(typ="safe").load(config)["nav"])
    there = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert set(listed) == there
    assert len(listed) == len(set(listed))


def test_every_module_is_in_the_api_reference():
    documented = set()
    for path in (ROOT / "docs" / "api").glob("*.md"):
        documented |= set(re.findall(r"^::: ([\w.]+)$", path.read_text("utf-8"), re.MULTILINE))
    modules = {
        "potstill." + ".".join(path.relative_to(SOURCE).with_suffix("").parts)
        for path in SOURCE.rglob("*.py")
        if not path.stem.startswith("_") and path.parent.name != "cli"  # has its own page
    }
    # Packages' own pages are optional: most only gather their modules.
    missing = modules - documented
    assert missing == set(), "add them to a page in docs/api"
    packages = {
        "potstill." + ".".join(path.parent.relative_to(SOURCE).parts)
        for path in SOURCE.rglob("__init__.py")
    }
    assert documented - modules - packages == set(), "these no longer exist"


def test_links_in_top_level_files_lead_somewhere():
    broken = []
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        for target in re.findall(r"\]\(([^)#]+)", (ROOT / name).read_text(encoding="utf-8")):
            if not target.startswith("http") and not (ROOT / target).exists():
                broken.append(f"{name}: {target}")
    assert broken == []


def make_targets() -> set[str]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))


@pytest.mark.parametrize(
    "name", ["README.md", "CONTRIBUTING.md", ".ci/run", ".pre-commit-config.yaml"]
)
def test_make_targets_that_are_named_exist(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    named = set(re.findall(r"\bmake ([a-z][a-z-]*)", text))
    if name != ".pre-commit-config.yaml":
        assert named
    assert named - make_targets() == set()


def test_make_help_lists_all_targets():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    listed = set(re.findall(r'@echo "make ([a-z-]+)', makefile))
    assert listed == make_targets() - {"help"}


BINARY = {".npz", ".pkl", ".png", ".svg", ".gz", ".pt", ".h5", ".db", ".so", ".zip"}


def test_no_absolute_paths():
    # Written in two halves, so that this file does not find itself.
    absolute = re.compile(r"(?<![\w.:/}~<])/" + r"(home|root|work|Users|opt|tmp|mnt)/\w")
    found = []
    for path in project_files():
        if path.suffix in BINARY:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if absolute.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}")
    assert found == []


def project_files() -> list[Path]:
    """Files that belong to the project: nothing built, no environments, no runs."""
    folders = ("src", "tests", "docs", "studies", "benchmarks", ".ci")
    # In a worktree of git's, .git is a file.
    files = [path for path in ROOT.iterdir() if path.is_file() and path.name != ".git"]
    for folder in folders:
        files.extend(path for path in (ROOT / folder).rglob("*") if path.is_file())
    return [path for path in files if "__pycache__" not in path.parts]


# -- the wheel ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_wheel_from_the_sdist_holds_the_whole_package(tmp_path):
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    result = subprocess.run(build, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (sdist,), (wheel,) = tmp_path.glob("*.tar.gz"), tmp_path.glob("*.whl")
    # Without a compiler there is a wheel as well: the same files, and no extension module.
    compiled = [f"potstill/{name}" for name in extension_modules(wheel)]
    with zipfile.ZipFile(wheel) as archive:
        library = {name for name in archive.namelist() if name.startswith(LIBRARY)}
    assert bool(library) == bool(compiled)
    if compiled:
        wanted = {"potstill/core/lib/libpotstill_core.a", "potstill/core/include/potstill_core.h"}
        wanted |= {f"potstill/core/lammps/{p.name}" for p in (ROOT / "core" / "lammps").iterdir()}
        assert wanted <= library
    assert wheel.name.endswith("-none-any.whl") != bool(compiled)
    assert bool(compiled) == (shutil.which("c++") is not None)
    expected = {
        f"potstill/{path.relative_to(SOURCE)}"
        for path in SOURCE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".so"
    }
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("potstill/")}
        (metadata,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
        assert f"\nVersion: {potstill.__version__}\n" in archive.read(metadata).decode()
    assert packed == expected | set(compiled) | library
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "CHANGELOG.md", "CMakeLists.txt"} <= names
    assert {f"core/{path.name}" for path in (ROOT / "core").iterdir() if path.is_file()} <= names
    folders = [ROOT / "core" / "src", ROOT / "core" / "lammps"]
    sources = {str(path.relative_to(ROOT)) for folder in folders for path in folder.iterdir()}
    assert sources <= names


@pytest.mark.slow
def test_without_a_compiler_the_install_succeeds_and_says_so(tmp_path):
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(tmp_path),
    ]
    setting = f"-Cbuild-dir={tmp_path / 'build'}"
    environment = {**os.environ, "CXX": "/bin/false", "CC": "/bin/false"}
    result = subprocess.run(
        [*command, setting, str(ROOT)], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "installed without them and uses PyTorch kernels" in result.stdout + result.stderr
    assert "COULD NOT BE COMPILED" in result.stdout + result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-none-any.whl")
    assert extension_modules(wheel) == []
    environment["POTSTILL_REQUIRE_NATIVE"] = "1"
    setting = f"-Cbuild-dir={tmp_path / 'required'}"
    result = subprocess.run(
        [*command, setting, str(ROOT)], env=environment, capture_output=True, text=True
    )
    assert result.returncode != 0
    assert "POTSTILL_REQUIRE_NATIVE is set" in result.stdout + result.stderr


#: What engines link, and the pair style for LAMMPS, beside the extension module.
LIBRARY = ("potstill/core/lib/", "potstill/core/include/", "potstill/core/lammps/")


def extension_modules(wheel: Path) -> list[str]:
    """Compiled modules of a wheel, below the package."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name.removeprefix("potstill/") for name in archive.namelist()]
    return [name for name in names if name.startswith("core/_native.")]
