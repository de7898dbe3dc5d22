"""OC20, COLL and ASE databases in LMDB files, written as their publishers write them."""

import importlib.util
import json
import pickle
import sys
import types
import zlib
from pathlib import Path

import ase
import ase.io
import numpy as np
import pytest
import torch
from ase.build import add_adsorbate, fcc111, molecule
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms
from ase.db.row import AtomsRow
from ase.io.jsonio import encode

from data import data_path
from potstill.errors import DataError, MissingLabelError
from potstill.readers import KeyMap, read

lmdb = pytest.importorskip("lmdb")
GOLDEN = Path(__file__).parent / "golden"


# -- writers -------------------------------------------------------------------------------------


@pytest.fixture(params=[1, 2], ids=["pyg1", "pyg2"])
def graph(request, monkeypatch):
    """A stand-in for torch_geometric's Data whose pickles have the layout of that version."""
    data, storage = (
        types.ModuleType(f"torch_geometric.data.{name}") for name in ("data", "storage")
    )
    for module in (types.ModuleType("torch_geometric"), types.ModuleType("torch_geometric.data")):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for module in (data, storage):
        monkeypatch.setitem(sys.modules, module.__name__, module)

    def define(module, name):
        made = type(name, (), {"__module__": module.__name__, "__qualname__": name})
        setattr(module, name, made)
        return made

    Data, GlobalStorage = define(data, "Data"), define(storage, "GlobalStorage")
    attributes = define(data, "DataEdgeAttr"), define(data, "DataTensorAttr")

    def make(**values):
        one = Data()
        if request.param == 1:
            vars(one).update(dict.fromkeys(("x", "edge_index", "edge_attr", "normal"), None))
            vars(one).update(values)
            return one
        store = GlobalStorage()
        vars(store).update(_mapping=values, _parent=one)
        vars(one).update(_edge_attr_cls=attributes[0], _tensor_attr_cls=attributes[1], _store=store)
        return one

    return make


def surface(seed: int) -> ase.Atoms:
    """Cu(111) with CO: fixed bottom layer, tags as in OC20, EMT's energy and forces."""
    atoms = fcc111("Cu", (2, 2, 3), vacuum=6.0, periodic=True)
    layers = atoms.get_tags()
    add_adsorbate(atoms, molecule("CO"), 1.5, "ontop")
    atoms.set_tags(np.r_[np.where(layers == 1, 1, 0), 2, 2])
    atoms.set_constraint(FixAtoms(mask=np.r_[layers == 3, False, False]))
    atoms.rattle(0.02, seed=seed)
    atoms.calc = EMT()
    return atoms


def s2ef_values(atoms: ase.Atoms, sid: int, fid: int) -> dict:
    """Attributes of a graph as OC20's preprocessing sets them."""
    fixed = torch.zeros(len(atoms))
    fixed[atoms.constraints[0].index] = 1
    return {
        "cell": torch.tensor(atoms.cell.array, dtype=torch.float32).view(1, 3, 3),
        "pos": torch.tensor(atoms.positions, dtype=torch.float32),
        "atomic_numbers": torch.tensor(atoms.numbers, dtype=torch.float32),
        "natoms": len(atoms),
        "y": atoms.get_potential_energy(),
        "force": torch.tensor(atoms.get_forces(apply_constraint=False), dtype=torch.float32),
        "fixed": fixed,
        "tags": torch.tensor(atoms.get_tags()),
        "sid": sid,
        "fid": fid,
        "y_relaxed": -1.25,
    }


def write_lmdb(path: Path, entries: dict[str, bytes]) -> Path:
    database = lmdb.open(str(path), map_size=2**24, subdir=False, meminit=False, map_async=True)
    with database.begin(write=True) as transaction:
        for key, value in entries.items():
            transaction.put(key.encode("ascii"), value)
    database.close()
    return path


def write_graphs(path: Path, graphs: list, *, length: bool = True) -> Path:
    entries = {str(k): pickle.dumps(graph, protocol=-1) for k, graph in enumerate(graphs)}
    if length:
        entries["length"] = pickle.dumps(len(graphs), protocol=-1)
    return write_lmdb(path, entries)


def write_aselmdb(path: Path, frames: list[ase.Atoms], dumps=encode, **values) -> Path:
    """Rows as the LMDB backend of ASE writes them, or fairchem's with plain JSON."""
    entries = {}
    for id_, atoms in enumerate(frames, start=1):
        row = AtomsRow(atoms)
        row.ctime = 0.0
        kept = {k: row[k] for k in vars(row) if k[0] != "_" and k not in (*row._keys, "id")}
        constraints = [c.todict() for c in row.get("constraints") or []]
        kept |= {"cell": np.asarray(kept["cell"]), "constraints": constraints, "mtime": 0.0}
        entries[str(id_)] = zlib.compress(dumps({**kept, **values}).encode())
    entries["nextid"] = zlib.compress(json.dumps(len(frames) + 1).encode())
    return write_lmdb(path, entries)


# -- what is read --------------------------------------------------------------------------------


def test_a_folder_of_shards_gives_all_fields(tmp_path, graph):
    frames = [surface(seed) for seed in range(5)]
    graphs = [graph(**s2ef_values(f, sid=10 + k // 2, fid=k)) for k, f in enumerate(frames)]
    write_graphs(tmp_path / "data.0000.lmdb", graphs[:2])
    write_graphs(tmp_path / "data.0001.lmdb", graphs[2:], length=False)
    structures, labels = read(tmp_path, require=("energy", "forces"))
    offsets = structures.atom_offsets.tolist()
    for k, atoms in enumerate(frames):
        rows = slice(offsets[k], offsets[k + 1])
        np.testing.assert_allclose(structures.positions[rows], atoms.positions, atol=1e-6)
        np.testing.assert_array_equal(structures.atomic_numbers[rows], atoms.numbers)
        np.testing.assert_allclose(structures.cell[k], atoms.cell.array, atol=1e-6)
        np.testing.assert_array_equal(structures.tags[rows], atoms.get_tags())
        fixed = np.isin(np.arange(len(atoms)), atoms.constraints[0].index)
        np.testing.assert_array_equal(structures.fixed[rows], fixed)
        raw = atoms.get_forces(apply_constraint=False)
        np.testing.assert_allclose(labels["forces"][rows], raw, atol=1e-6)
        assert float(labels["energy"][k]) == pytest.approx(atoms.get_potential_energy())
    assert bool(structures.pbc.all())
    assert structures.group == ("random10", "random10", "random11", "random11", "random12")
    assert structures.frame_id[3] == "data.0001.lmdb:1 frame3"
    some = read(tmp_path, index="1:4:2")[0]
    assert some.frame_id == (structures.frame_id[1], structures.frame_id[3])


def test_the_relaxed_energy_is_read_where_it_is_named(tmp_path, graph):
    path = write_graphs(tmp_path / "a.lmdb", [graph(**s2ef_values(surface(0), 1, 2))])
    assert float(read(path, keys=KeyMap(energy="y_relaxed"))[1]["energy"]) == -1.25


@pytest.mark.parametrize("cell", [None, torch.eye(3).view(1, 3, 3), torch.zeros(3, 3)])
def test_a_molecule_without_a_cell_is_not_periodic(tmp_path, graph, cell):
    water = molecule("H2O")
    values = {
        "pos": torch.tensor(water.positions),
        "atomic_numbers": torch.tensor(water.numbers),
        "natoms": torch.tensor([3]),
        "y": torch.tensor([-10.0]),
        "force": torch.zeros(3, 3),
    }
    values |= {} if cell is None else {"cell": cell}
    structures, labels = read(write_graphs(tmp_path / "coll.lmdb", [graph(**values)]))
    assert not bool(structures.pbc.any())
    assert not bool(structures.cell.any())
    assert structures.fixed is None
    assert float(labels["energy"]) == -10.0
    boxed = {**values, "cell": 100.0 * torch.eye(3), "pbc": torch.tensor([[True, True, False]])}
    structures, _ = read(write_graphs(tmp_path / "boxed.lmdb", [graph(**boxed)]))
    assert structures.pbc.tolist() == [[True, True, False]]


def test_coll_as_extended_xyz(tmp_path):
    """COLL holds total and atomization energies side by side; the paper learns the latter."""
    frames = []
    for name in ("H2O", "CH4"):
        atoms = molecule(name)
        atoms.info |= {"energy": -2000.0, "atomization_energy": -10.0}
        atoms.arrays["forces"] = np.ones((len(atoms), 3))
        frames.append(atoms)
    ase.io.write(tmp_path / "coll_v1.2_AE_val.xyz", frames, format="extxyz")
    path = tmp_path / "coll_v1.2_AE_val.xyz"
    assert read(path)[1]["energy"].tolist() == [-2000.0, -2000.0]
    structures, labels = read(path, keys=KeyMap(energy="atomization_energy"))
    assert labels["energy"].tolist() == [-10.0, -10.0]
    assert labels["forces"].shape == (structures.n_atoms, 3)


@pytest.mark.parametrize("version", [1, 2])
def test_pickles_of_torch_geometric_itself(tmp_path, version):
    """Written by tests/golden/make_oc20_graphs.py with torch_geometric 1.7.2 and 2.8.1."""
    stored = (GOLDEN / f"oc20_pyg{version}.pkl").read_bytes()
    path = write_lmdb(tmp_path / "a.lmdb", {"0": stored, "length": pickle.dumps(1, protocol=-1)})
    structures, labels = read(path, require=("energy", "forces"))
    assert structures.atomic_numbers.tolist() == [1, 8, 1]
    assert structures.fixed.tolist() == [True, False, False]
    assert structures.tags.tolist() == [0, 1, 2]
    assert structures.group == ("random5",)
    assert float(labels["energy"]) == -1.5
    expected = [[0.0, 0.5, 1.0], [1.5, 2.0, 2.5], [3.0, 3.5, 4.0]]
    assert labels["forces"].tolist() == expected


@pytest.mark.parametrize("dumps", [encode, lambda row: json.dumps(_plain(row))])
@pytest.mark.parametrize("name", ["a.aselmdb", "a.lmdb"])
def test_ase_databases_in_lmdb(tmp_path, dumps, name):
    frames = [surface(seed) for seed in range(3)]
    for atoms in frames:
        atoms.get_forces()
    path = write_aselmdb(tmp_path / name, frames, dumps, data={"sid": 3}, key_value_pairs={})
    database = lmdb.open(str(path), subdir=False, map_size=2**24)
    with database.begin(write=True) as transaction:
        transaction.delete(b"2")
        transaction.put(b"deleted_ids", zlib.compress(b"[2]"))
    database.close()
    structures, labels = read(path, keys=KeyMap(group="sid"))
    assert structures.frame_id == (f"{name}:1", f"{name}:3")
    assert structures.group == ("3", "3")
    n = len(frames[0])
    np.testing.assert_allclose(structures.positions[n:], frames[2].positions)
    np.testing.assert_array_equal(structures.tags[n:], frames[2].get_tags())
    raw = frames[2].get_forces(apply_constraint=False)
    np.testing.assert_allclose(labels["forces"][n:], raw, atol=1e-12)
    assert int(structures.fixed.sum()) == 2 * len(frames[0].constraints[0].index)


def _plain(value):
    """What JSON holds without any markers of ASE's."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    return [_plain(v) for v in value] if isinstance(value, list) else value


@pytest.mark.data
def test_a_real_relaxation_survives_the_way_through_lmdb(tmp_path, graph):
    path = data_path("oc20-traj/train_24_systems.extxyz.gz")
    structures, labels = read(path, index="::400", require=("energy", "forces"))
    graphs = []
    for k, atoms in enumerate(structures.to_ase()):
        one = labels.select(structures.rows([k]))
        values = {"sid": 1, "fid": k, "natoms": len(atoms), "y": float(one["energy"])}
        values |= {"pos": torch.tensor(atoms.positions), "force": one["forces"]}
        values |= {"atomic_numbers": torch.tensor(atoms.numbers, dtype=torch.uint8)}
        values |= {"cell": torch.tensor(atoms.cell.array).view(1, 3, 3)}
        values |= {"fixed": structures.select([k]).fixed.float()}
        graphs.append(graph(**values))
    again, read_labels = read(write_graphs(tmp_path / "a.lmdb", graphs))
    torch.testing.assert_close(again.positions, structures.positions)
    torch.testing.assert_close(read_labels["forces"], labels["forces"])
    assert torch.equal(again.fixed, structures.fixed)
    assert len(again.species_table) > 10


# -- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pos": None}, "frame 1 has no 'pos'"),
        ({"force": None}, "frame 1 has no 'forces'"),
        ({"force": torch.zeros(3, 3)}, r"frame 1: 'forces' has shape \(3, 3\)"),
        ({"force": torch.full((14, 3), torch.nan)}, "frame 1: 'forces' holds NaN"),
        ({"pos": torch.zeros(13, 3)}, "frame 1: 'pos' has shape"),
        ({"natoms": 3}, "'natoms' is 3 for 14 atomic numbers"),
        ({"atomic_numbers": torch.full((14,), 1.5)}, "frame 1: 'atomic_numbers' does not hold"),
        ({"fixed": torch.zeros(2)}, r"frame 1: 'fixed' has shape \(2,\)"),
        ({"cell": torch.zeros(2, 3)}, "frame 1: 'cell' has shape"),
        ({"energy": 1.0}, "frame 1 holds 'y', 'energy'"),
        ({"hook": Path("a")}, "frame 1 asks for pathlib"),
    ],
)
def test_bad_graphs_are_refused(tmp_path, graph, change, message):
    good, bad = (s2ef_values(surface(seed), 1, seed) for seed in (0, 1))
    bad = {k: v for k, v in {**bad, **change}.items() if v is not None}
    path = write_graphs(tmp_path / "a.lmdb", [graph(**good), graph(**bad)])
    with pytest.raises((DataError, MissingLabelError), match=message) as caught:
        read(path, require=("energy", "forces"))
    assert "a.lmdb" in str(caught.value)


class Attack:
    """Runs code when it is unpickled the ordinary way."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_foreign_code_never_runs(tmp_path, graph):
    mark = tmp_path / "mark"
    attack = pickle.dumps(Attack(mark), protocol=-1)
    pickle.loads(attack)
    assert mark.exists(), "the attack itself works"
    mark.unlink()
    values = s2ef_values(surface(0), 1, 1)
    inner = {**values, "y": Attack(mark)}
    for entries in (
        {"0": attack},
        {"0": pickle.dumps(graph(**inner), protocol=-1)},
        {"0": pickle.dumps(graph(**values), protocol=-1), "length": attack},
        {"0": _tensor_with(attack)},
    ):
        path = write_lmdb(tmp_path / "a.lmdb", entries)
        with pytest.raises(DataError, match=r"a\.lmdb, (frame 0|key 'length')"):
            read(path)
        assert not mark.exists()
        path.unlink()


def _tensor_with(attack: bytes) -> bytes:
    """A pickled tensor whose storage is another pickle, which torch would load in turn."""

    class Storage:
        def __reduce__(self):
            return torch.storage._load_from_bytes, (attack,)

    return pickle.dumps(Storage(), protocol=-1)


def test_what_a_pickle_names_cannot_be_changed(tmp_path):
    """BUILD sets attributes of whatever is on the stack: not of anything that stays."""
    for name in ("ctorch._utils\n_rebuild_tensor_v2\n", "ccollections\nOrderedDict\n"):
        data = name.encode() + b"(N}Vmark\nI1\nst\x94b."
        with pytest.raises(DataError, match="frame 0"):
            read(write_lmdb(tmp_path / f"{len(name)}.lmdb", {"0": data}))
    from potstill.readers.oc20 import GraphObject, load_graph

    load_graph(b"ctorch_geometric.data\nData\n(N}Vmark\nI1\nst\x94b.", "here")
    assert not hasattr(GraphObject, "mark")


def test_damaged_files_are_refused(tmp_path, graph):
    stored = pickle.dumps(graph(**s2ef_values(surface(0), 1, 1)), protocol=-1)
    length = pickle.dumps(2, protocol=-1)
    cases = {
        "truncated": ({"0": stored, "1": stored[: len(stored) // 2], "length": length}, "frame 1"),
        "missing": ({"0": stored, "2": stored, "length": length}, "frame 1 is not there"),
        "number": ({"0": pickle.dumps(3)}, "frame 0 holds a int, not a graph"),
        "size": ({"0": stored, "length": pickle.dumps(-1)}, "'length' holds -1"),
    }
    for name, (entries, message) in cases.items():
        with pytest.raises(DataError, match=message):
            read(write_lmdb(tmp_path / f"{name}.lmdb", entries))
    (tmp_path / "text.lmdb").write_text("no database" * 2000)
    with pytest.raises(DataError, match="not a readable LMDB file"):
        read(tmp_path / "text.lmdb")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no \*\.lmdb files"):
        read(tmp_path / "empty", format="oc20")


def test_damaged_ase_databases_are_refused(tmp_path):
    atoms = surface(0)
    good = write_aselmdb(tmp_path / "a.aselmdb", [atoms])
    database = lmdb.open(str(good), subdir=False, map_size=2**24)
    with database.begin(write=True) as transaction:
        row = transaction.get(b"1")
        transaction.put(b"2", row[: len(row) // 2])
        transaction.put(b"nextid", zlib.compress(b"3"))
    database.close()
    with pytest.raises(DataError, match=r"a\.aselmdb, row 2 cannot be unpacked"):
        read(good)
    with pytest.raises(DataError, match="row 1 is not a row of ASE"):
        read(write_lmdb(tmp_path / "b.lmdb", _rows(b'{"energy": 1}')))
    with pytest.raises(DataError, match="row 1 is missing"):
        read(write_lmdb(tmp_path / "c.lmdb", {"nextid": zlib.compress(b"2")}))


def _rows(row: bytes) -> dict[str, bytes]:
    return {"1": zlib.compress(row), "nextid": zlib.compress(b"2")}


def test_no_torch_geometric_is_needed():
    assert importlib.util.find_spec("torch_geometric") is None or "torch_geometric" not in (
        sys.modules
    )
