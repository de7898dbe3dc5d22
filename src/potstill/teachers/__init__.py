"""Teachers: sources of labels. `TEACHERS` is the explicit table of those with a name."""

from __future__ import annotations

import glob
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from potstill.errors import TeacherError, suggest
from potstill.models import Potential
from potstill.teachers.ani_al import INFO as _ANI_AL_INFO
from potstill.teachers.ani_al import load_ani_al as load_ani_al
from potstill.teachers.ase import AseTeacher as AseTeacher
from potstill.teachers.ase import LammpsTeacher as LammpsTeacher
from potstill.teachers.ase import TBLiteTeacher as TBLiteTeacher
from potstill.teachers.base import Failure as Failure
from potstill.teachers.base import Teacher as Teacher
from potstill.teachers.base import TeacherInfo as TeacherInfo
from potstill.teachers.chgnet import CHGNetTeacher as CHGNetTeacher
from potstill.teachers.committee import CommitteeTeacher as CommitteeTeacher
from potstill.teachers.potential import PotentialTeacher as PotentialTeacher
from potstill.teachers.potential import describe_potential, ensemble_members
from potstill.teachers.residual import Residual as Residual
from potstill.teachers.residual import check_derivatives as check_derivatives
from potstill.teachers.residual import nonconservative_residual as nonconservative_residual


def teacher_from_potential(potential: Potential, info: TeacherInfo) -> Teacher:
    """Make a teacher of a potential; an ensemble within one model gives its spread, too."""
    whole = PotentialTeacher(potential, info)
    members = ensemble_members(potential)
    if not members:
        return whole
    return CommitteeTeacher(
        [PotentialTeacher(member) for member in members], info.name, whole=whole, info=info
    )


def ani_al_teacher(path: str | Path) -> Teacher:
    """Make the ANI-Al ensemble a teacher; `path` as in `load_ani_al`."""
    potential = load_ani_al(path)
    return teacher_from_potential(potential, describe_potential(potential, "ani-al", _ANI_AL_INFO))


TEACHERS: dict[str, Callable[..., Teacher]] = {
    "chgnet": CHGNetTeacher,
    "gfn1-xtb": lambda **settings: TBLiteTeacher("GFN1-xTB", **settings),
    "gfn2-xtb": lambda **settings: TBLiteTeacher("GFN2-xTB", **settings),
    "ani-al": ani_al_teacher,
    "lammps": LammpsTeacher,
}


def make_teacher(spec: str, args: Mapping[str, Any] | None = None) -> Teacher:
    """Make a teacher from what a user writes on the command line or in a config.

    Parameters
    ----------
    spec : str
        A name in `TEACHERS`; the path of a potstill checkpoint (`*.pt`); several such paths with
        commas between, or a pattern with `*` (a committee); or "module:factory" for a function
        that returns an ASE calculator.
    args : mapping, optional
        Keyword arguments: of the named teacher; of the factory, with `name`, `license`, `citation`,
        `level_of_theory`, `conservative` and `force_consistent` taken out. Checkpoints take `name`
        only.

    Raises
    ------
    TeacherError
        If nothing matches, or an argument is wrong.
    """
    args = dict(args or {})
    if spec in TEACHERS:
        try:
            return TEACHERS[spec](**args)
        except TypeError as error:
            raise TeacherError(f"teacher '{spec}': {error}") from error
    paths = _checkpoints(spec)
    if paths:
        return _from_checkpoints(paths, args)
    if ":" in spec:
        return AseTeacher.from_factory(spec, args)
    raise TeacherError(
        f"no teacher '{spec}'{suggest(spec, TEACHERS)}; or give a checkpoint (*.pt) that exists, "
        "or module:factory for an ASE calculator"
    )


def _checkpoints(spec: str) -> list[Path]:
    """Paths that a spec names, or an empty list if it does not name checkpoints."""
    parts = spec.split(",")
    paths = [Path(path) for part in parts for path in sorted(glob.glob(part)) or [part]]
    missing = [p for p in paths if not p.is_file()]
    if not missing:
        return paths
    if any(p.suffix == ".pt" for p in paths):
        raise TeacherError(f"{missing[0]}: no such checkpoint")
    return []


def _from_checkpoints(paths: list[Path], args: dict[str, Any]) -> Teacher:
    name = args.pop("name", None)
    if args:
        raise TeacherError(f"a checkpoint takes no teacher argument '{next(iter(args))}'")
    if len(paths) > 1:
        members = [PotentialTeacher.from_checkpoint(path) for path in paths]
        return CommitteeTeacher(members, name or "committee")
    teacher = PotentialTeacher.from_checkpoint(paths[0])
    return teacher_from_potential(
        teacher.potential, replace(teacher.info, name=name or teacher.name)
    )
