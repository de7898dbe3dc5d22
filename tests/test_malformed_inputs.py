"""Malformed inputs: each gives one sentence that names the place, and harms nothing on disk.

Every case is run against a store that holds data already: whatever is wrong, the store is the same
afterwards, byte for byte.
"""

import gzip
import json
import re
import zipfile

import ase
import ase.build
import ase.io
import numpy as np
import pytest
import torch
from ase.calculators.singlepoint import SinglePointCalculator

from potstill.errors import PotstillError
from potstill.readers import KeyMap, Units, read
from potstill.store import LabeledStore
from potstill.structures import Properties, Structures


def good_frame(seed=0, pbc=True):
    atoms = ase.build.bulk("Cu", cubic=True)
    atoms.pbc = pbc
    atoms.rattle(0.05, seed=seed)
    forces = np.random.default_rng(seed).normal(size=(4, 3))
    atoms.calc = SinglePointCalculator(atoms, energy=-3.5, forces=forces)
    return atoms


def extxyz(folder, change=lambda atoms: None, edit=lambda text: text):
    """Two good frames, the second one changed; then the text edited."""
    frames = [good_frame(0), good_frame(1)]
    change(frames[1])
    ase.io.write(folder / "bad.extxyz", frames)
    path = folder / "bad.extxyz"
    path.write_text(edit(path.read_text()))
    return path


def archive(folder, **change):
    water = ase.build.molecule("H2O")
    held = {
        "R": np.stack([water.positions] * 3),
        "z": water.numbers,
        "E": np.zeros(3),
        "F": np.zeros((3, 3, 3)),
    }
    held = {name: value for name, value in {**held, **change}.items() if value is not None}
    np.savez(folder / "bad.npz", **held)
    return folder / "bad.npz"


def fitsnap(folder, **change):
    data = {
        "Positions": [[0, 0, 0]],
        "AtomTypes": ["Ta"],
        "Lattice": (3 * np.eye(3)).tolist(),
        "NumAtoms": 1,
        "Energy": -11.8,
        "Forces": [[0, 0, 0]],
    }
    (folder / "bad.json").write_text(json.dumps({"Dataset": {"Data": [{**data, **change}]}}))
    return folder / "bad.json"


def ani_h5(folder, **change):
    h5py = pytest.importorskip("h5py")
    held = {
        "species": [b"Al"],
        "coordinates": np.zeros((2, 1, 3)),
        "energies": np.zeros(2),
        **change,
    }
    with h5py.File(folder / "bad.h5", "w") as file:
        for name, value in held.items():
            if value is not None:
                file[f"group/{name}"] = value
    return folder / "bad.h5"


def put(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


TYPED = """2
Lattice="4 0 0 0 4 0 0 0 4" Properties=type:I:1:pos:R:3
1 0 0 0
2 2 2 0
"""

DUMP = """ITEM: TIMESTEP
0
ITEM: NUMBER OF ATOMS
2
ITEM: BOX BOUNDS pp pp pp
0 4
0 4
0 4
ITEM: ATOMS id type x y z fx fy fz
1 1 0 0 0 0.5 0 0
2 2 2 2 0 -0.5 0 0
"""


def drop_label(atoms):
    atoms.calc = None


def set_label(name, value):
    def change(atoms):
        atoms.calc.results[name] = value(atoms) if callable(value) else value

    return change


def with_nan(atoms):
    forces = atoms.calc.results["forces"].copy()
    forces[2, 1] = np.nan
    return forces


def move_together(atoms):
    atoms.positions[3] = atoms.positions[0] + (0.0, 0.1, 0.0)


def move_together_through_the_wall(atoms):
    atoms.positions[3] = atoms.positions[0] + atoms.cell.array[2] + (0.0, 0.1, 0.0)


def zero_vector(atoms):
    atoms.cell[1] = 0.0


def flat_cell(atoms):
    atoms.cell[2] = atoms.cell[0] + atoms.cell[1]


def open_slab_with_stress(atoms):
    atoms.pbc = (True, True, False)
    atoms.calc.results["stress"] = np.zeros(6)


def stress_of_frame_0(text):
    return text.replace("energy=-3.5", 'energy=-3.5 stress="1 0 0 0 1 0 0 0 1"', 1)


def nan_position(atoms):
    atoms.positions[1, 2] = np.nan


def force_column(text):
    return text.replace(":forces:R:3", ":dft_force:R:3")


def repeat_key(text):
    return text.replace("energy=-3.5", "energy=-3.5 energy=-3.6")


def repeat_column(text):
    return text.replace("pos:R:3:forces:R:3", "pos:R:3:pos:R:3")


def packed(folder, text):
    return put(folder, "bad.xyz.gz", gzip.compress(text.encode())[:-20])


def zip_twice(folder):
    path = archive(folder)
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(path, "a") as file:
        file.writestr("E.npy", b"")
    return path


def scan_in_kilobar(folder):
    for a in (3.0, 3.1, 3.2):
        # dE/dV = 0.01 eV/Å³ throughout, written in kilobar into a file that says bar.
        stress = (-0.01 * 1602.1766 * np.eye(3)).tolist()
        path = folder / "Volume" / f"{a}.json"
        path.parent.mkdir(exist_ok=True)
        data = {
            "Positions": [[0, 0, 0]],
            "AtomTypes": ["Ta"],
            "Lattice": (a * np.eye(3)).tolist(),
            "Energy": 0.01 * a**3,
            "Stress": stress,
        }
        path.write_text(json.dumps({"Dataset": {"Data": [data], "StressStyle": "bar"}}))
    return folder / "Volume"


EF = {"require": ("energy", "forces")}
LABELS_ON_ONE = r"frame 1 has no 'energy', which other frames have \(1 of 2 frames lack it\)"

#: name: (file, arguments of `read`, what the sentence must say)
FILES = {
    "no such file": (lambda f: f / "bad.xyz", {}, "bad.xyz does not exist"),
    "empty file": (lambda f: put(f, "bad.xyz", ""), {}, "bad.xyz is empty"),
    "unknown format": (extxyz, {"format": "extxzy"}, "unknown format.*did you mean 'extxyz'"),
    "a file of no format": (lambda f: put(f, "bad.foo", "hello"), {}, "bad.foo cannot be read by"),
    "labels absent": (
        lambda f: put(f, "bad.xyz", "1\n\nCu 0 0 0\n"),
        EF,
        "frame 0 has no 'energy'; it holds no labels at all",
    ),
    "partly labeled, not meant": (lambda f: extxyz(f, drop_label), EF, LABELS_ON_ONE),
    "partly labeled, nothing asked": (lambda f: extxyz(f, drop_label), {}, LABELS_ON_ONE),
    "forces under another name": (
        lambda f: extxyz(f, edit=force_column),
        EF,
        "frame 0 has no 'forces'; did you mean 'dft_force'",
    ),
    "wrong name in the key map": (
        lambda f: extxyz(f, edit=force_column),
        {"keys": KeyMap(forces="dft_forces")},
        "has no 'dft_forces'; did you mean 'dft_force'",
    ),
    "NaN in forces": (
        lambda f: extxyz(f, set_label("forces", with_nan)),
        EF,
        "bad.extxyz, frame 1: 'forces' holds NaN",
    ),
    "infinite energy": (
        lambda f: extxyz(f, set_label("energy", np.inf)),
        {},
        "frame 1: 'energy' holds NaN or infinite",
    ),
    "NaN in positions": (lambda f: extxyz(f, nan_position), {}, "frame 1: 'positions' hold NaN"),
    "an element outside the list": (
        extxyz,
        {"species": ["Ag", "Au"]},
        "frame 0 holds Cu, which is not among the species Ag, Au",
    ),
    "not an element in the list": (extxyz, {"species": ["Cu", "Qq"]}, "'Qq' is not a chemical"),
    "not an element in the file": (
        lambda f: extxyz(f, edit=lambda text: text.replace("Cu  ", "Qq  ")),
        {},
        "frame 0 cannot be parsed.*Qq",
    ),
    "overlapping atoms": (
        lambda f: extxyz(f, move_together),
        {},
        "frame 1: atoms 0 and 3 are 0.100 Å apart",
    ),
    "overlap with an image": (
        lambda f: extxyz(f, move_together_through_the_wall),
        {},
        "frame 1: atoms 0 and 3 are 0.100 Å apart",
    ),
    "periodic along a zero vector": (
        lambda f: extxyz(f, zero_vector),
        {},
        "frame 1: periodic along lattice vector 2, which is zero",
    ),
    "dependent lattice vectors": (lambda f: extxyz(f, flat_cell), {}, "linearly dependent"),
    "stress of a slab among others": (
        lambda f: extxyz(f, open_slab_with_stress, stress_of_frame_0),
        {},
        "frame 1 has no 'stress' that means anything, because it is not periodic along all three "
        r"lattice vectors, which other frames have \(1 of 2 frames lack it\): allow partly",
    ),
    "stress of a slab that is asked for": (
        lambda f: extxyz(f, open_slab_with_stress),
        {"index": "1:", "require": ("stress",)},
        "frame 1 has no 'stress' that means anything, because it is not periodic",
    ),
    "six numbers of a stress in no known order": (
        lambda f: archive(f, stress=np.zeros((3, 6)), cell=9 * np.eye(3)),
        {},
        r"'stress' has six numbers: state their order, as in Units\(stress_order='xx yy",
    ),
    "an order of stress with a number twice": (
        extxyz,
        {"units": Units(stress_order="xx yy zz xy yz yx")},
        "stress_order 'xx yy zz xy yz yx' is not an order of xx, yy, zz, yz, xz and xy",
    ),
    "elements in a column of another name": (
        lambda f: extxyz(f, edit=lambda text: text.replace("species:S", "element:S")),
        {},
        r"frame 0 has no column 'species' .* it has element: .* KeyMap\(species='element'\)",
    ),
    "types in place of elements": (
        lambda f: put(f, "bad.xyz", TYPED),
        {},
        r"it has type: name the right one, as in KeyMap\(species='type', types='Al Cu'\)",
    ),
    "fewer elements than types": (
        lambda f: put(f, "bad.xyz", TYPED),
        {"keys": KeyMap(species="type", types="Al")},
        "column 'type': types 1 to 2 for the 1 elements of 'Al'",
    ),
    "a column of elements that is not there": (
        extxyz,
        {"keys": KeyMap(species="element")},
        "frame 0 has no column 'element' of symbols or numbers; it has none such",
    ),
    "a LAMMPS dump of numeric types": (
        lambda f: put(f, "bad.lammpstrj", DUMP),
        {},
        r"gives atom types by number.* KeyMap\(types='Al Cu'\) .*keys: {types: Al Cu}",
    ),
    "a LAMMPS dump with more types than elements": (
        lambda f: put(f, "bad.lammpstrj", DUMP),
        {"keys": KeyMap(types="Al")},
        "types 1 to 2 for the 1 elements of 'Al'",
    ),
    "types that are no elements": (
        lambda f: put(f, "bad.lammpstrj", DUMP),
        {"keys": KeyMap(types="Al bulk")},
        "'bulk' is not a chemical symbol",
    ),
    "last frame cut off": (
        lambda f: extxyz(f, edit=lambda text: "\n".join(text.split("\n")[:-3])),
        {},
        "frame 1 is cut off: it announces 4 atoms and has 2",
    ),
    "last line cut off": (
        lambda f: extxyz(f, edit=lambda text: text[:-40]),
        {},
        "frame 1 cannot be parsed",
    ),
    "no number of atoms": (
        lambda f: extxyz(f, edit=lambda text: "comment\n" + text),
        {},
        "frame 0: line 1 is 'comment', not the number of atoms",
    ),
    "frame without atoms": (
        lambda f: put(f, "bad.xyz", "0\nenergy=1\n"),
        {},
        "frame 0 holds no atoms",
    ),
    "a key twice": (lambda f: extxyz(f, edit=repeat_key), {}, "frame 0 has the key 'energy' twice"),
    "a column twice": (
        lambda f: extxyz(f, edit=repeat_column),
        {},
        "frame 0 has the key 'pos' twice",
    ),
    "packed file cut off": (
        lambda f: packed(f, "1\n\nCu 0 0 0\n" * 99),
        {},
        "bad.xyz.gz cannot be read",
    ),
    "index beyond the end": (extxyz, {"index": "7:"}, "bad.extxyz holds no frames, or none at"),
    "unknown unit": (
        extxyz,
        {"units": Units(energy="Hartrees")},
        "unknown energy unit 'Hartrees'; did you mean 'Hartree'",
    ),
    "unknown property": (extxyz, {"require": ("force",)}, "unknown property 'force'.*'forces'"),
    "not a database": (lambda f: put(f, "bad.db", "x" * 100), {}, "bad.db is not an ASE database"),
    "archive cut off": (
        lambda f: put(f, "cut.npz", archive(f).read_bytes()[:300]),
        {},
        "cut.npz is not a readable NumPy archive",
    ),
    "archive with a key twice": (zip_twice, {}, "has the key 'E' twice"),
    "archive with pickles": (
        lambda f: archive(f, E=np.array([{}, 1, 2], dtype=object)),
        {},
        "not a readable NumPy archive.*pickle",
    ),
    "two candidates for one label": (
        lambda f: archive(f, energies=np.zeros(3)),
        {},
        "holds 'energies', 'E', which could all be 'energy'",
    ),
    "forces of another shape": (
        lambda f: archive(f, F=np.zeros((3, 2, 3))),
        {},
        r"frame 0: 'forces' has shape \(2, 3\), not \(3, 3\)",
    ),
    "labels of fewer frames": (
        lambda f: archive(f, E=np.zeros(2)),
        {},
        r"'energy' has shape \(2,\) for 3 frames",
    ),
    "positions of another shape": (
        lambda f: archive(f, R=np.zeros((3, 3))),
        {},
        r"'positions' has shape \(3, 3\)",
    ),
    "no atomic numbers": (lambda f: archive(f, z=None), {}, "has no 'nuclear_charges' or 'z'"),
    "atomic number zero": (
        lambda f: archive(f, z=np.array([8, 1, 0])),
        {},
        "frame 0: 0 is not the atomic number of a chemical element",
    ),
    "units not stated": (
        lambda f: archive(f, E=None, pbe=np.zeros(3)),
        {"keys": KeyMap(energy="pbe")},
        "does not say its unit of energy",
    ),
    "HDF5 cut off": (
        lambda f: put(f, "cut.h5", ani_h5(f).read_bytes()[:500]),
        {},
        "cut.h5 is not a readable HDF5 file",
    ),
    "HDF5 without coordinates": (
        lambda f: ani_h5(f, coordinates=None),
        {},
        "bad.h5 has no group with 'coordinates'",
    ),
    "HDF5 with too many species": (
        lambda f: ani_h5(f, species=[b"Al", b"Al"]),
        {},
        "group 'group': 2 species for 1 atoms",
    ),
    "HDF5 with partial NaN": (
        lambda f: ani_h5(f, forces=np.array([[[0, 0, 0]], [[0, np.nan, 0]]])),
        {"allow_partial": True},
        "group 'group', frame 1: 'forces' holds NaN",
    ),
    "JSON cut off": (
        lambda f: put(f, "bad.json", fitsnap(f).read_text()[:-30]),
        {},
        "bad.json is not complete JSON",
    ),
    "JSON with a key twice": (
        lambda f: put(f, "bad.json", '{"Dataset": {"Data": [], "Data": []}}'),
        {},
        "bad.json has the key 'Data' twice",
    ),
    "JSON with a wrong count": (lambda f: fitsnap(f, NumAtoms=2), {}, "NumAtoms is 2 for 1 Atom"),
    "JSON with a ragged array": (
        lambda f: fitsnap(f, Forces=[[0, 0]]),
        {},
        r"'forces' has shape \(1, 2\), not \(1, 3\)",
    ),
    "JSON with text for numbers": (
        lambda f: fitsnap(f, Energy="low"),
        {},
        "'energy' does not hold plain numbers",
    ),
    "stress in another unit than stated": (
        scan_in_kilobar,
        {},
        r"group 'Volume': stress in bar is 0\.001 times -dE/dV.*stress='kB'",
    ),
    "folder without JSON": (lambda f: f, {}, "holds no JSON files"),
}

assert len(FILES) >= 15


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """An existing output with structures, reference labels and half of a teacher's labels.

    One for all tests: none may change it.
    """
    frames = [good_frame(k) for k in range(4)]
    structures = Structures.from_ase(frames)
    store = LabeledStore.create(
        tmp_path_factory.mktemp("out") / "kept.store", info={"license": "CC0"}
    )
    energy = torch.arange(4, dtype=torch.float64)
    store.append(structures, Properties({"energy": energy}))
    store.begin_labels("teacher", {"fingerprint": "abc", "properties": ["energy"]})
    half = structures.select([0, 1])
    store.write_labels("teacher", 0, Properties({"energy": energy[:2]}), half)
    return store


def snapshot(store):
    return {p: p.read_bytes() for p in store.path.rglob("*") if p.is_file()}


def assert_one_sentence(error, pattern):
    text = str(error)
    assert re.search(pattern, text), text
    assert "\n" not in text
    assert len(text.split(". ")) == 1, text
    assert len(re.sub(r"/\S*/", "", text)) < 300, text


@pytest.mark.parametrize("name", FILES)
def test_malformed_files(tmp_path, store, name):
    make, arguments, pattern = FILES[name]
    folder = tmp_path / "in"
    folder.mkdir()
    path = make(folder)
    before = snapshot(store)
    with pytest.raises(PotstillError) as caught:
        store.append(*read(path, **arguments))
    assert_one_sentence(caught.value, pattern)
    assert snapshot(store) == before


def other_structures():
    return Structures.from_ase([good_frame(8), good_frame(9)])


def two_energies(value=0.0):
    return Properties({"energy": torch.full((2,), value, dtype=torch.float64)})


def newer(store):
    record = json.loads((store.path / "commit.json").read_text())
    other = store.path.parent / "newer.store"
    other.mkdir()
    (other / "commit.json").write_text(json.dumps({**record, "version": 99}))
    return LabeledStore.open(other, "a")


def damaged(store):
    other = store.path.parent / "damaged.store"
    other.mkdir()
    (other / "commit.json").write_text((store.path / "commit.json").read_text()[:50])
    return LabeledStore.open(other)


#: name: (what is done with the store, what the sentence must say)
STORES = {
    "a store that exists": (lambda s: LabeledStore.create(s.path), "kept.store exists already"),
    "no store": (lambda s: LabeledStore.open(s.path / "x"), "there is no store at"),
    "another folder": (lambda s: LabeledStore.open(s.path.parent), "is not a store"),
    "a damaged record": (damaged, "damaged.store is not a store"),
    "a newer format": (newer, "format version 99, this potstill reads up to 2"),
    "an unknown mode": (lambda s: LabeledStore.open(s.path, "w"), "mode 'r' or 'a', not 'w'"),
    "writing a store opened to read": (
        lambda s: LabeledStore.open(s.path).append(other_structures()),
        "was opened for reading",
    ),
    "another teacher under the same name": (
        lambda s: s.begin_labels("teacher", {"fingerprint": "xyz", "properties": ["energy"]}),
        "holds 'teacher' of a different teacher",
    ),
    "other properties under the same name": (
        lambda s: s.begin_labels("teacher", {"fingerprint": "abc", "properties": ["forces"]}),
        "started with the properties",
    ),
    "a teacher called reference": (
        lambda s: s.begin_labels("reference", {"fingerprint": "x"}),
        "'reference' is the name of the reference labels",
    ),
    "a name that is a path": (
        lambda s: s.begin_labels("../teacher", {"fingerprint": "x"}),
        "cannot name a label set",
    ),
    "a teacher without a fingerprint": (
        lambda s: s.begin_labels("new", {}),
        "need the teacher's fingerprint",
    ),
    "facts that are not JSON": (
        lambda s: s.begin_labels("new", {"fingerprint": "x", "seed": object()}),
        "cannot be written as JSON",
    ),
    "labels that leave a gap": (
        lambda s: s.write_labels("teacher", 3, two_energies(), other_structures()),
        "frame 2 comes next, not frame 3",
    ),
    "labels of other structures": (
        lambda s: s.write_labels("teacher", 2, two_energies(), other_structures()),
        "are not frames 2 to 3",
    ),
    "labels that nobody began": (
        lambda s: s.write_labels("techer", 0, two_energies(), other_structures()),
        "no labels 'techer'; did you mean 'teacher'",
    ),
    "labels for fewer frames": (
        lambda s: s.append(other_structures(), two_energies().select(other_structures().rows([0]))),
        "'energy' has 1 rows for 2 systems",
    ),
    "NaN labels that claim to be there": (
        lambda s: s.append(other_structures(), two_energies(np.nan)),
        "frame 0: 'energy' is not finite",
    ),
    "frames that are not there": (lambda s: s.structures(3, 9), r"has frames 0\.\.4, not 3\.\.9"),
}


@pytest.mark.parametrize("name", STORES)
def test_misuse_of_stores(store, name):
    action, pattern = STORES[name]
    before = snapshot(store)
    with pytest.raises(PotstillError) as caught:
        action(store)
    assert_one_sentence(caught.value, pattern)
    assert snapshot(store) == before
    store.verify()
