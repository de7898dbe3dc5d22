"""The table of properties; what a new row costs stands in test_growth.py."""

from __future__ import annotations

import pytest

from potstill.errors import ConfigError
from potstill.properties import ASE_NAMES, LEARNABLE, PROPERTIES, property_spec


def test_without_its_row_it_is_unknown() -> None:
    with pytest.raises(ConfigError, match="unknown property 'moments'"):
        property_spec("moments")


def test_what_rows_say_is_what_the_package_goes_by() -> None:
    assert LEARNABLE == ("energy", "forces", "stress", "atomic_energies")
    assert {n for n, spec in PROPERTIES.items() if spec.derivative} == {"forces", "stress"}
    assert ASE_NAMES["atomic_energies"] == "energies"
    assert [n for n in PROPERTIES if n.endswith("_std")] == [f"{n}_std" for n in LEARNABLE]
