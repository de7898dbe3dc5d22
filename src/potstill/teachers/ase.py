"""Any ASE calculator as a teacher, GFN1-xTB and GFN2-xTB of tblite and all of LAMMPS among them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ase
import numpy as np
import torch
from ase.calculators.calculator import BaseCalculator, Calculator
from ase.stress import voigt_6_to_full_3x3_stress
from torch import Tensor

from potstill.errors import TeacherError, require, suggest
from potstill.isolation import WorkerCalculator
from potstill.lammps_library import LammpsPotential
from potstill.properties import ASE_NAMES, property_spec
from potstill.structures import Structures
from potstill.teachers.base import Teacher, TeacherInfo, fingerprint_of, stated, versions_of

#: What is stated of a teacher, and all arguments that describe one; others go to the factory.
STATED = ("name", "license", "licence", "citation", "level_of_theory")
DESCRIPTION = (*STATED, "conservative", "force_consistent")


class AseTeacher(Teacher):
    """A teacher that asks an ASE calculator, one frame at a time, each from a clean state.

    Parameters
    ----------
    calculator : ase calculator
        Its `implemented_properties` decide what the teacher gives.
    info : TeacherInfo
        Who it is; `conservative=False` for a model with direct forces.
    force_consistent : bool
        Label with ASE's `free_energy`, the one that forces derive from, where there is one.
    """

    def __init__(
        self, calculator: BaseCalculator, info: TeacherInfo, *, force_consistent: bool = True
    ) -> None:
        self.calculator = calculator
        self.info = info
        self.force_consistent = force_consistent
        self.properties = frozenset(
            name for name, key in ASE_NAMES.items() if key in calculator.implemented_properties
        )

    @classmethod
    def from_factory(cls, spec: str, args: Mapping[str, Any] | None = None) -> AseTeacher:
        """Call `factory(**args)` in a worker process, for the spec "module:factory".

        Parameters
        ----------
        spec : str
            "module:factory", as in "ase.calculators.emt:EMT".
        args : mapping, optional
            Arguments of the factory, and those named in `DESCRIPTION`. Files among them (a
            parameter file) enter the fingerprint with their content.

        Raises
        ------
        TeacherError
            If the module or the factory does not exist, refuses the arguments, or returns something
            else than an ASE calculator.
        """
        args = dict(args or {})
        about = {key: args.pop(key) for key in DESCRIPTION if key in args}
        name = str(about.get("name", spec.rpartition(":")[2]))
        conservative = bool(about.get("conservative", True))
        calculator = WorkerCalculator(spec, args, name, conservative=conservative)
        versions = versions_of(spec.partition(":")[0].partition(".")[0], "ase")
        contents = {key: _content(value) for key, value in args.items()}
        info = TeacherInfo(
            name=name,
            fingerprint=fingerprint_of("ase", spec, contents, versions),
            versions=versions,
            conservative=conservative,
            **stated(about),
        )
        consistent = bool(about.get("force_consistent", True))
        return cls(calculator, info, force_consistent=consistent)

    def compute(self, structures: Structures, properties: Sequence[str]) -> dict[str, Tensor]:
        """Ask the calculator."""
        return ask_ase_calculator(
            self.calculator, structures, properties, force_consistent=self.force_consistent
        )

    def ase_calculator(self) -> BaseCalculator:
        """Return the calculator itself."""
        return self.calculator


def ask_ase_calculator(
    calculator: BaseCalculator,
    structures: Structures,
    properties: Sequence[str],
    *,
    force_consistent: bool = True,
) -> dict[str, Tensor]:
    """Compute properties of a batch with an ASE calculator, one system at a time.

    The calculator is reset before each, so that answers do not depend on the order.

    Parameters
    ----------
    calculator : ase calculator
        Its raw results are taken: constraints do not zero forces.
    properties : sequence of str
        Names among `ASE_NAMES`.
    force_consistent : bool
        Take ASE's `free_energy` for the energy where the calculator has one: the energy that
        forces derive from.

    Returns
    -------
    dict of str to Tensor
        As `Teacher.compute`.
    """
    columns: dict[str, list[np.ndarray]] = {name: [] for name in properties}
    has_free_energy = "free_energy" in calculator.implemented_properties
    for atoms in structures.to_ase():
        if isinstance(calculator, Calculator):
            calculator.reset()
        for name in properties:
            spec = property_spec(name)
            if name == "stress" and not atoms.pbc.all():
                columns[name].append(np.full((1, 3, 3), np.nan))
                continue
            key = ASE_NAMES[name]
            if name == "energy" and force_consistent and has_free_energy:
                key = "free_energy"
            value = np.asarray(calculator.get_property(key, atoms), dtype=np.float64)
            if name == "stress" and value.shape != (3, 3):
                value = voigt_6_to_full_3x3_stress(value)
            rows = 1 if spec.level == "system" else len(atoms)
            columns[name].append(value.reshape(rows, *spec.shape))
    return {
        name: torch.from_numpy(np.concatenate(column))
        if column
        else torch.zeros(0, *property_spec(name).shape, dtype=torch.float64)
        for name, column in columns.items()
    }


def _content(value: Any) -> Any:
    """Hash of a file's content, if the value is the path of one; else the value."""
    if isinstance(value, str | Path):
        path = Path(value)
        try:
            if path.is_file():
                return hashlib.blake2b(path.read_bytes(), digest_size=12).hexdigest()
        except OSError:  # a string too long for a path, say
            pass
    return value if isinstance(value, str | int | float | bool | None) else repr(value)


# -- LAMMPS ---------------------------------------------------------------------------------------


class LammpsTeacher(AseTeacher):
    """A pair style of LAMMPS: energy, atomic energies, forces and stress, in a worker process.

    Parameters
    ----------
    **args
        The fields of `potstill.lammps_library.LammpsPotential`, where a string stands for a list of
        one, and `name`, `license`, `citation` and `level_of_theory`. The contents of the files that
        the pair commands name enter the fingerprint.

    Raises
    ------
    TeacherError
        If an argument is wrong, or LAMMPS refuses the potential.
    OptionalDependencyError
        If there is no LAMMPS for this Python.
    """

    def __init__(self, **args: Any) -> None:
        about = {key: args.pop(key) for key in STATED if key in args}
        self.potential = potential = LammpsPotential.from_args(args)
        name = str(about.get("name", potential.pair_style.split()[0].replace("/", "-")))
        factory = "potstill.lammps_library:LammpsCalculator"
        try:
            calculator = WorkerCalculator(factory, asdict(potential), name)
        except TeacherError as error:
            raise TeacherError(str(error).replace(factory, "lammps")) from None
        words = str(potential)
        contents = []
        for file in potential.files:
            # Where a file lies is no part of the potential.
            words = words.replace(f'"{file}"', file.name).replace(str(file), file.name)
            contents.append(hashlib.blake2b(file.read_bytes(), digest_size=12).hexdigest())
        versions = versions_of("lammps")
        info = TeacherInfo(
            name=name,
            fingerprint=fingerprint_of("lammps", words, contents, versions),
            versions=versions,
            conservative=True,
            **stated(about),
        )
        super().__init__(calculator, info)


# -- xTB -------------------------------------------------------------------------------------------

_CITATIONS = {
    "GFN1-xTB": "Grimme, Bannwarth, Shushkov, J. Chem. Theory Comput. 13, 1989 (2017), "
    "doi:10.1021/acs.jctc.7b00118",
    "GFN2-xTB": "Bannwarth, Ehlert, Grimme, J. Chem. Theory Comput. 15, 1652 (2019), "
    "doi:10.1021/acs.jctc.8b01176",
}


class TBLiteTeacher(AseTeacher):
    """xTB with energies, forces, stress, atom-partitioned energies, charges and dipole.

    A system's `charge` and `spin_multiplicity` are used where given, else neutral singlets.
    Frames whose self-consistent cycle does not converge fail.

    Parameters
    ----------
    method : str
        "GFN2-xTB" or "GFN1-xTB".
    **settings
        Of tblite's ASE calculator, such as `accuracy` or `electronic_temperature`.
    """

    def __init__(self, method: str = "GFN2-xTB", **settings: Any) -> None:
        if method not in _CITATIONS:
            raise TeacherError(f"unknown xTB method '{method}'; there are {', '.join(_CITATIONS)}")
        package = require("tblite.ase", extra="tblite", purpose="for the xTB teachers")
        known = set(package.TBLite.default_parameters) - {"method", "verbosity"}
        for name in settings:  # tblite ignores what it does not know
            if name not in known and not name.endswith("_solvation"):
                raise TeacherError(f"tblite has no setting '{name}'{suggest(name, known)}")
        # Without its cache, tblite forgets the density of the frame before when it is reset.
        arguments = {"method": method, "verbosity": 0, "cache_api": False, **settings}
        calculator = WorkerCalculator(
            "tblite.ase:TBLite", arguments, method.lower(), settings_of=_charge_and_spin
        )
        versions = versions_of("tblite")
        info = TeacherInfo(
            name=method.lower(),
            fingerprint=fingerprint_of("tblite", method, settings, versions),
            license="LGPL-3.0-or-later",
            citation=_CITATIONS[method],
            level_of_theory=method,
            versions=versions,
        )
        super().__init__(calculator, info)


def _charge_and_spin(atoms: ase.Atoms) -> dict[str, Any]:
    return {
        "charge": float(atoms.info.get("charge", 0.0)),
        "multiplicity": round(atoms.info.get("spin", 1.0)),
    }
