"""Small students with random weights, a crystal, its results, and ways to spoil a model file."""

import struct
import zlib

import numpy as np
import torch
from ase.build import bulk

from potstill.calculators import PotstillCalculator
from potstill.models import HIPNN, ZBL, SpeciesOffsets, SumPotential
from potstill.species import SpeciesTable


def student(*elements, dtype=torch.float64, zbl=True, **hyperparameters):
    """A small student with random weights."""
    table = SpeciesTable.from_symbols(elements)
    sizes = {"n_features": 6, "n_sensitivities": 5, "n_atom_layers": 1, "l_max": 2}
    distances = {"dist_soft_min": 1.6, "dist_soft_max": 4.0, "dist_hard_max": 4.5}
    torch.manual_seed(len(elements))
    parts = {
        "offsets": SpeciesOffsets(table, [-3.0 - k for k in range(len(elements))]),
        "network": HIPNN(table, **sizes | distances | hyperparameters).to(dtype),
    }
    return SumPotential(parts | ({"prior": ZBL(table, 1.0, 2.8)} if zbl else {}))


def crystal(*elements, seed=0):
    """A triclinic box, shorter than the cutoff along one axis."""
    atoms = bulk("Cu", cubic=True) * (1, 2, 2)
    atoms.symbols[:] = [elements[k % len(elements)] for k in range(len(atoms))]
    atoms.set_cell([[3.7, 0.0, 0.0], [0.9, 7.1, 0.0], [-0.6, 1.2, 7.4]], scale_atoms=True)
    atoms.rattle(0.12, seed=seed)
    return atoms


def in_ase(potential, atoms):
    atoms = atoms.copy()
    atoms.calc = PotstillCalculator(potential)
    return {
        "energies": atoms.get_potential_energies(),
        "forces": atoms.get_forces(),
        "stress": atoms.get_stress(voigt=False),
    }


def assert_close(found, expected, tolerance=1e-11):
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=0, atol=tolerance, err_msg=name)


def with_sum(content):
    """The content with a right checksum, whatever it holds."""
    at = content.index(b'"checksum":"') + 12
    content = content[:at] + b"00000000" + content[at + 8 :]
    return content[:at] + b"%08x" % zlib.crc32(content) + content[at + 8 :]


def edited(content, old, new):
    """Replace text in the header, which keeps its length by spaces at its end."""
    (length,) = struct.unpack("<Q", content[:8])
    header = content[8 : 8 + length].replace(old, new)
    assert header != content[8 : 8 + length]
    return with_sum(struct.pack("<Q", len(header)) + header + content[8 + length :])


FAULTS = {
    "empty": (lambda c: b"", "no model file"),
    "cut short": (lambda c: c[:-9], "damaged"),
    "only a part of the header": (lambda c: c[:200], "part of one"),
    "another format": (lambda c: b"PK\3\4" + c, "no model file"),
    "one bit": (lambda c: c[:-40] + bytes([c[-40] ^ 4]) + c[-39:], "damaged"),
    "newer": (
        lambda c: edited(c, b'"format_version":"1"', b'"format_version":"3"'),
        "format version 3",
    ),
    "other units": (lambda c: edited(c, b"angstrom, eV", b"bohr, hartree"), "units"),
    "other network": (lambda c: edited(c, b'\\"hipnn\\", ', b'\\"mace\\", '), "mace"),
    "other sizes": (lambda c: edited(c, b'n_features\\": 6', b'n_features\\": 7'), "sizes"),
    "nonsense": (lambda c: edited(c, b'l_max\\": 2', b'l_max\\": 9'), "out of range"),
}
