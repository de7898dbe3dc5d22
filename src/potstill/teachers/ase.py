"""Any ASE calculator as a teacher."""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ase.calculators.calculator import BaseCalculator
from torch import Tensor

from potstill.errors import TeacherError
from potstill.properties import ASE_NAMES
from potstill.structures import Structures
from potstill.teachers.base import (
    Teacher,
    TeacherInfo,
    ask_ase_calculator,
    fingerprint_of,
    versions_of,
)

#: Arguments that describe the teacher; all others go to the factory.
DESCRIPTION = (
    "name",
    "licence",
    "citation",
    "level_of_theory",
    "conservative",
    "force_consistent",
)

# Atomic energies must sum to the energy: absolute, eV, and relative (single precision).
_SUM_ABSOLUTE = 1e-5
_SUM_RELATIVE = 1e-6


class AseTeacher(Teacher):
    """A teacher that asks an ASE calculator, one frame at a time.

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
        """Call `factory(**args)` in `module`, for the spec "module:factory".

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
        calculator = _call_factory(spec, args)
        package = spec.partition(":")[0].partition(".")[0]
        versions = versions_of(package, "ase")
        info = TeacherInfo(
            name=str(about.get("name", spec.rpartition(":")[2])),
            fingerprint=fingerprint_of(
                "ase", spec, {k: _content(v) for k, v in args.items()}, versions
            ),
            licence=str(about.get("licence", "unknown")),
            citation=str(about.get("citation", "unknown")),
            level_of_theory=str(about.get("level_of_theory", "unknown")),
            versions=versions,
            conservative=bool(about.get("conservative", True)),
        )
        consistent = bool(about.get("force_consistent", True))
        return cls(calculator, info, force_consistent=consistent)

    def compute(self, structures: Structures, properties: Sequence[str]) -> dict[str, Tensor]:
        """Ask the calculator, and check that atomic energies sum to the energy."""
        wanted = set(properties)
        if "atomic_energies" in wanted:
            wanted.add("energy")
        result = ask_ase_calculator(
            self.calculator,
            structures,
            sorted(wanted),
            force_consistent=self.force_consistent,
        )
        if "atomic_energies" in wanted:
            self._check_sum(result, structures)
        return {name: result[name] for name in properties}

    def ase_calculator(self) -> BaseCalculator:
        """Return the calculator itself."""
        return self.calculator

    def _check_sum(self, result: dict[str, Tensor], structures: Structures) -> None:
        energy = result["energy"]
        total = energy.new_zeros(structures.n_systems)
        total = total.index_add(0, structures.system_index, result["atomic_energies"])
        excess = (total - energy).abs() - _SUM_RELATIVE * energy.abs() - _SUM_ABSOLUTE
        for s in (excess > 0).nonzero()[:, 0].tolist():
            raise TeacherError(
                f"the energies per atom of the teacher '{self.name}' sum to {total[s]:.6f} eV, but "
                f"its energy of {structures.name_of(s)} is {energy[s]:.6f} eV: they cannot serve "
                "as atomic_energies"
            )


def _call_factory(spec: str, args: dict[str, Any]) -> BaseCalculator:
    module_name, _, factory_name = spec.partition(":")
    try:
        factory = importlib.import_module(module_name)
        for part in factory_name.split("."):
            factory = getattr(factory, part)
    except (ImportError, AttributeError) as error:
        raise TeacherError(f"teacher '{spec}': {error}") from error
    try:
        calculator = factory(**args)  # type: ignore[operator]
    except Exception as error:
        raise TeacherError(f"teacher '{spec}' could not be made: {error}") from error
    if inspect.isclass(calculator) or not hasattr(calculator, "implemented_properties"):
        raise TeacherError(
            f"teacher '{spec}' returned {type(calculator).__name__}, not an ASE calculator"
        )
    return calculator


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
