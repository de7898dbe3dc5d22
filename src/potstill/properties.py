"""The table of properties: what potstill can predict, label and train on."""

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
    name : str
        The field's name for it.
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
    """

    name: str
    level: Level
    shape: tuple[int, ...]
    unit: str
    extensive: bool = False
    parity: int = 1


_SIGNALS = (
    PropertySpec("energy", "system", (), "eV", extensive=True),
    PropertySpec("forces", "atom", (3,), "eV/Å", parity=-1),
    PropertySpec("stress", "system", (3, 3), "eV/Å³"),
    PropertySpec("atomic_energies", "atom", (), "eV"),
    PropertySpec("charges", "atom", (), "e"),
    PropertySpec("dipole", "system", (3,), "e·Å", extensive=True, parity=-1),
)

#: Spreads over a committee are properties too, so that they can be stored and used as weights.
_SPREADS = tuple(
    PropertySpec(f"{spec.name}_std", spec.level, spec.shape, spec.unit, spec.extensive)
    for spec in _SIGNALS[:4]
)

PROPERTIES: dict[str, PropertySpec] = {spec.name: spec for spec in _SIGNALS + _SPREADS}


def property_spec(name: str) -> PropertySpec:
    """Look a property up by name, or raise `ConfigError` with a suggestion."""
    if name not in PROPERTIES:
        raise ConfigError(f"unknown property '{name}'{suggest(name, PROPERTIES)}")
    return PROPERTIES[name]
