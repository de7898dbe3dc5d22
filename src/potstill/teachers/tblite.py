"""GFN1-xTB and GFN2-xTB through tblite: semi-empirical quantum chemistry, offline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ase
from torch import Tensor

from potstill.errors import TeacherError, require, suggest
from potstill.properties import ASE_NAMES
from potstill.structures import Structures
from potstill.teachers.base import (
    Teacher,
    TeacherInfo,
    ask_ase_calculator,
    fingerprint_of,
    versions_of,
)

_CITATIONS = {
    "GFN1-xTB": "Grimme, Bannwarth, Shushkov, J. Chem. Theory Comput. 13, 1989 (2017), "
    "doi:10.1021/acs.jctc.7b00118",
    "GFN2-xTB": "Bannwarth, Ehlert, Grimme, J. Chem. Theory Comput. 15, 1652 (2019), "
    "doi:10.1021/acs.jctc.8b01176",
}


class TBLiteTeacher(Teacher):
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

    properties = frozenset(ASE_NAMES)

    def __init__(self, method: str = "GFN2-xTB", **settings: Any) -> None:
        if method not in _CITATIONS:
            raise TeacherError(f"unknown xTB method '{method}'; there are {', '.join(_CITATIONS)}")
        package = require("tblite.ase", extra="tblite", purpose="for the xTB teachers")
        known = set(package.TBLite.default_parameters) - {"method", "verbosity"}
        for name in settings:  # tblite ignores what it does not know
            if name not in known and not name.endswith("_solvation"):
                raise TeacherError(f"tblite has no setting '{name}'{suggest(name, known)}")
        try:
            self.calculator = package.TBLite(method=method, verbosity=0, **settings)
        except Exception as error:
            raise TeacherError(f"tblite refuses its settings {settings}: {error}") from error
        versions = versions_of("tblite")
        self.info = TeacherInfo(
            name=method.lower(),
            fingerprint=fingerprint_of("tblite", method, settings, versions),
            licence="LGPL-3.0-or-later",
            citation=_CITATIONS[method],
            level_of_theory=method,
            versions=versions,
        )

    def compute(self, structures: Structures, properties: Sequence[str]) -> dict[str, Tensor]:
        """Ask tblite one system at a time."""
        return ask_ase_calculator(
            self.calculator, structures, properties, prepare=self._set_charge_and_spin
        )

    def _set_charge_and_spin(self, atoms: ase.Atoms) -> None:
        self.calculator.set(
            charge=float(atoms.info.get("charge", 0.0)),
            multiplicity=round(atoms.info.get("spin", 1.0)),
        )
