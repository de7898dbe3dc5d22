"""The ZBL repulsion as LAMMPS switches it."""

import ase.build
import numpy as np
import pytest

from lammps_engine import run_lammps
from potstill.errors import ModelError
from potstill.models import ZBL
from potstill.species import SpeciesTable
from potstill.structures import Structures

TABLE = SpeciesTable.from_symbols(["Be", "Ta"])


def test_lammps_switching_is_lammps():
    atoms = ase.build.bulk("Ta", cubic=True, a=3.0).repeat(2)
    atoms.symbols[::3] = "Be"
    atoms.rattle(0.2, seed=1)
    atoms.wrap()
    style = "pair_style zbl 2.5 4.0\n" + "\n".join(
        f"pair_coeff {i} {j} {zi} {zj}"
        for i, j, zi, zj in ((1, 1, 4.0, 4.0), (1, 2, 4.0, 73.0), (2, 2, 73.0, 73.0))
    )
    expected = run_lammps(atoms, ["Be", "Ta"], style)
    model = ZBL(TABLE, inner=2.5, cutoff=4.0, switching="lammps")
    names = ["atomic_energies", "forces", "stress"]
    found = model.predict(Structures.from_ase(atoms), properties=names)
    for name in names:
        value = np.array(expected[name])
        ours = found[name].numpy().reshape(value.shape)
        # LAMMPS has e² = 14.399645 eV Å; ASE's constants differ in the eighth digit.
        np.testing.assert_allclose(ours, value, rtol=0, atol=1e-7 * np.abs(value).max())


def test_both_switchings_end_at_the_cutoff_and_differ_inside():
    pair = {r: Structures.from_ase(ase.Atoms("Ta2", [[0, 0, 0], [r, 0, 0]])) for r in (1.2, 2.999)}
    energy = {
        (name, r): float(ZBL(TABLE, 1.5, 3.0, name).predict(s)["energy"][0])
        for name in ("factor", "lammps")
        for r, s in pair.items()
    }
    for name in ("factor", "lammps"):
        assert 0.0 < energy[name, 2.999] < 1e-6
    # One multiplies by one below `inner`, the other takes a constant off.
    assert energy["lammps", 1.2] < energy["factor", 1.2] - 1.0


def test_unknown_switching_is_refused():
    with pytest.raises(ModelError, match="'factor' or 'lammps', not 'none'"):
        ZBL(TABLE, 1.0, 2.0, "none")
