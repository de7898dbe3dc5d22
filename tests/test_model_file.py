"""Model files: what is written in Python and read by the core is the same potential."""

import json
import struct
import zlib

import numpy as np
import pytest
import torch

from potstill.calculators import PotstillCalculator
from potstill.core import available, build_compact_neighbors
from potstill.core.model_file import ModelFile
from potstill.deploy import deploy
from potstill.deploy.lammps import why_not_native
from potstill.errors import ModelError
from potstill.models import HIPNN, SNAP, ZBL, SpeciesOffsets, SumPotential
from potstill.species import SpeciesTable
from potstill.structures import Structures
from students import FAULTS, crystal, student

pytestmark = pytest.mark.skipif(not available(), reason="needs the native core")


def evaluate(file, potential, atoms, **options):
    structures = Structures.from_ase(atoms, table=potential.species_table)
    pairs = build_compact_neighbors(structures, file.cutoff)
    inputs = (structures.species, pairs, structures.positions, structures.cell[0])
    return file.evaluate(*inputs, **options)


MODELS = {
    "norms": {"elements": ("Al",), "cusp_reg": 0.01},
    "two layers": {"elements": ("Al", "Cu"), "n_interaction_layers": 2},
    "smooth": {"elements": ("Al", "Ni", "Cu"), "invariants": "smooth", "l_max": 3, "n_triples": 2},
    "float32": {"elements": ("Al", "Cu"), "dtype": torch.float32},
    "no prior": {"elements": ("Al",), "zbl": False, "cutoff_function": "polynomial"},
}


@pytest.mark.parametrize("name", MODELS)
def test_a_file_has_the_energies_of_the_calculator(name, tmp_path):
    options = dict(MODELS[name])
    elements = options.pop("elements")
    potential = student(*elements, **options)
    path, _ = deploy(potential, "lammps", tmp_path, "m", {"seed": 7})
    file = ModelFile(path)
    assert file.species == elements
    assert file.cutoff == potential.cutoff
    assert file.n_layers == options.get("n_interaction_layers", 1)
    assert file.dtype == options.get("dtype", torch.float64)
    assert file.provenance["info"] == {"seed": 7}
    atoms = crystal(*elements)
    atoms.calc = PotstillCalculator(potential)
    found = evaluate(file, potential, atoms)
    tolerance = 1e-12 if file.dtype == torch.float64 else 1e-5
    close = {"rtol": 0.0, "atol": tolerance}
    np.testing.assert_allclose(found.energies, atoms.get_potential_energies(), **close)
    np.testing.assert_allclose(found.forces, atoms.get_forces(), **close)
    stress = atoms.get_stress(voigt=False) * atoms.get_volume()
    np.testing.assert_allclose(0.5 * (found.virial + found.virial.T), stress, **close)


def test_virials_by_atoms_add_up_and_are_slopes(tmp_path):
    potential = student("Al", "Cu")
    path, _ = deploy(potential, "lammps", tmp_path, "m")
    atoms = crystal("Al", "Cu")
    found = evaluate(ModelFile(path), potential, atoms, atom_virials=True)
    for parts in (found.center_virials, found.neighbor_virials):
        torch.testing.assert_close(parts.sum(0), found.virial, rtol=0, atol=1e-11)
    assert not torch.allclose(found.center_virials, found.neighbor_virials[: len(atoms)])
    # That of a center is the slope of its own energy by a strain of all vectors.
    strain, step = torch.eye(3, dtype=torch.float64), 1e-5
    energies = []
    for by in (step, -step):
        strained = atoms.copy()
        strain[0, 1] = by
        strained.set_cell(atoms.cell.array @ strain.numpy(), scale_atoms=True)
        energies.append(evaluate(ModelFile(path), potential, strained).energies)
    slope = (energies[0] - energies[1]) / (2.0 * step)
    torch.testing.assert_close(found.center_virials[:, 0, 1], slope, rtol=0, atol=1e-7)


def test_the_format_is_plain_safetensors(tmp_path):
    """As docs/lammps.md describes it, read with nothing but the standard library and numpy."""
    potential = student("Al", "Cu", dtype=torch.float32)
    path, _ = deploy(potential, "lammps", tmp_path, "m")
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    metadata = header.pop("__metadata__")
    assert all(isinstance(text, str) for text in metadata.values())
    model = json.loads(metadata["model"])
    assert model["species"] == ["Al", "Cu"]
    assert model["precision"] == "float32"
    zeros = content.replace(metadata["checksum"].encode(), b"00000000", 1)
    assert f"{zlib.crc32(zeros):08x}" == metadata["checksum"]
    arrays = {}
    for name, tensor in header.items():
        first, last = tensor["data_offsets"]
        kind = {"F32": "<f4", "F64": "<f8"}[tensor["dtype"]]
        data = content[8 + length + first : 8 + length + last]
        arrays[name] = np.frombuffer(data, kind).reshape(tensor["shape"])
    assert set(arrays) == {"parameters", "offsets", "zbl.charge"}
    flat = potential["network"].native_parameters().flat()
    np.testing.assert_array_equal(arrays["parameters"], flat)
    assert arrays["offsets"].tolist() == [-3.0, -4.0]
    assert arrays["zbl.charge"].tolist() == [13.0, 29.0]


@pytest.mark.parametrize("name", FAULTS)
def test_a_file_with_a_fault_is_refused_in_a_sentence(name, tmp_path):
    damage, words = FAULTS[name]
    path, _ = deploy(student("Al"), "lammps", tmp_path, "m")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ModelError, match=words) as caught:
        ModelFile(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(ModelError, match="cannot be read"):
        ModelFile(tmp_path / "none.potstill")


def test_potentials_with_other_parts_are_not_for_the_core(tmp_path):
    table = SpeciesTable.from_symbols(["W"])
    snap = SNAP(table, twojmax=2, rcutfac=3.5, radii=[0.5], weights=[1.0])
    network = HIPNN(table, 4, 4, 1.6, 4.0, 4.5, 1)
    assert why_not_native(network) is None
    for potential, words in [
        (snap, "not snap"),
        (SumPotential({"network": network, "more": HIPNN(table, 4, 4, 1.6, 4.0, 4.5, 1)}), "hipnn"),
        (SumPotential({"network": network, "prior": ZBL(table, 1.0, 2.0, "lammps")}), "switch"),
        (SpeciesOffsets(table, [1.0]), "not offsets"),
    ]:
        assert words in why_not_native(potential)
        assert deploy(potential, "lammps", tmp_path, "w")[0].name == "w.pt"
    for potential in (network.half(), snap.half()):
        with pytest.raises(ModelError, match="float32 or float64"):
            deploy(potential, "lammps", tmp_path / "none")
    assert list((tmp_path / "none").iterdir()) == []
