"""How a mapping is written down: beads as selections of atoms within residues."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Selection(_Settings):
    """Atoms of residues; those of one residue make one bead.

    Parameters
    ----------
    residue : str, optional
        Name of the residue; all residues by default.
    atoms : tuple of str, optional
        Names of atoms, each of which every such residue must have; a name that several atoms of a
        residue share means all of them. All atoms by default.
    select : str, optional
        A selection of MDAnalysis, such as `bonded name C`, within what the other keys select.
    """

    residue: str | None = None
    atoms: tuple[str, ...] | None = Field(default=None, min_length=1)
    select: str | None = None

    @model_validator(mode="after")
    def _not_empty(self) -> Selection:
        if not self.model_dump(exclude_none=True):
            raise ValueError("give a residue, atoms or a selection")
        return self


class Residue(_Settings):
    """Names of atoms where no topology file tells them.

    Parameters
    ----------
    name : str
        Name of the residue.
    atoms : tuple of str
        Names of its atoms, in the order of the trajectory.
    count : int
        How many of it follow one another.
    """

    name: str
    atoms: tuple[str, ...] = Field(min_length=1)
    count: int = Field(default=1, ge=1)


class MappingSettings(_Settings):
    """What becomes a bead, and how forces are mapped.

    Parameters
    ----------
    beads : dict of str to tuple of Selection
        Kinds of beads by name: a selection, or a list of them where a residue has several such
        beads.
    mapped : bool
        The trajectory holds beads already, named as its atoms: they are taken as they are.
    exclude : tuple of Selection
        Atoms that are left out on purpose; all others must be in one bead.
    center : {"mass", "geometry"}
        Position of a bead: center of mass, or mean of the atoms' positions.
    force_map : {"optimal", "sum"}
        Force on a bead: the linear combination of its molecule's forces with the least noise, or
        the plain sum over its atoms.
    ridge : float
        Pulls the optimal map toward the plain sum, relative to the mean variance of atomic forces;
        for molecules with more atoms than the trajectory can average over.
    constraint_tolerance : float
        Distances that fluctuate by less than this, relative to their mean, are taken as constrained
        in the simulation; 0 if there are no constraints.
    """

    beads: dict[str, tuple[Selection, ...]] = Field(default_factory=dict)
    mapped: bool = False
    exclude: tuple[Selection, ...] = ()
    center: Literal["mass", "geometry"] = "mass"
    force_map: Literal["optimal", "sum"] = "optimal"
    ridge: float = Field(default=0.0, ge=0.0)
    constraint_tolerance: float = Field(default=1e-3, ge=0.0, lt=0.02)

    @field_validator("beads", mode="before")
    @classmethod
    def _one_selection_is_enough(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: v if isinstance(v, list | tuple) else [v] for name, v in value.items()}

    @field_validator("exclude", mode="before")
    @classmethod
    def _one_is_enough(cls, value: Any) -> Any:
        return value if isinstance(value, list | tuple) else [value]

    @model_validator(mode="after")
    def _beads_or_mapped(self) -> MappingSettings:
        if bool(self.beads) == self.mapped:
            raise ValueError("give either 'beads' or 'mapped'")
        return self
