"""The table of properties: what potstill can predict, label and train on.

A new property is one row here, and a model or a teacher that gives it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from potstill.errors import ConfigError, suggest

Level = Literal["system", "atom"]


@dataclass(frozen=True)
class PropertySpec:
    """One row of the table of properties.

    Parameters
    ----------
    level : {"system", "atom"}
        Whether there is one value per system or one per atom.
    shape : tuple of int
        Shape of one value; the full array is (S, *shape) or (N, *shape).
    unit : str
        Unit inside potstill.
    extensive : bool
        Whether it grows with the number of atoms.
    parity : int
        +1 if a value is unchanged by inversion of space, -1 if it changes sign.
    ase : str, optional
        Its key among the results of ASE's calculators.
    derivative : bool
        Whether it is a derivative of the energy.
    learnable : bool
        Whether a potential predicts it, so that a loss may compare it with labels.
    """

    name: str
    level: Level
    shape: tuple[int, ...]
    unit: str
    extensive: bool = False
    parity: int = 1
    ase: str | None = None
    derivative: bool = False
    learnable: bool = False

    @property
    def per_atom(self) -> bool:
        """Whether there is one value per atom rather than per system."""
        return self.level == "atom"


_SIGNALS = (
    PropertySpec("energy", "system", (), "eV", extensive=True, ase="energy", learnable=True),
    PropertySpec(
        "forces", "atom", (3,), "eV/Å", parity=-1, ase="forces", derivative=True, learnable=True
    ),
    PropertySpec(
        "stress", "system", (3, 3), "eV/Å³", ase="stress", derivative=True, learnable=True
    ),
    PropertySpec("atomic_energies", "atom", (), "eV", ase="energies", learnable=True),
    PropertySpec("charges", "atom", (), "e", ase="charges"),
    PropertySpec("dipole", "system", (3,), "e·Å", extensive=True, parity=-1, ase="dipole"),
)

#: Spreads over a committee are properties too, so that they can be stored and used as weights.
_SPREADS = tuple(
    PropertySpec(f"{spec.name}_std", spec.level, spec.shape, spec.unit, spec.extensive)
    for spec in _SIGNALS
    if spec.learnable
)

PROPERTIES: dict[str, PropertySpec] = {spec.name: spec for spec in _SIGNALS + _SPREADS}

#: What potentials predict and students learn, in the order in which it is asked for.
LEARNABLE = tuple(spec.name for spec in _SIGNALS if spec.learnable)

#: Keys of ASE's results by property.
ASE_NAMES = {spec.name: spec.ase for spec in _SIGNALS if spec.ase is not None}


def property_spec(name: str) -> PropertySpec:
    """Look a property up by name, or raise `ConfigError` with a suggestion."""
    if name not in PROPERTIES:
        raise ConfigError(f"unknown property '{name}'{suggest(name, PROPERTIES)}")
    return PROPERTIES[name]
