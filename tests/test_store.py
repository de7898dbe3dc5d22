"""The labeled store: what goes in comes out, whenever and in whatever pieces it was written."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ase
import ase.build
import numpy as np
import pytest
import torch

import potstill.store
from potstill.errors import DataError, StoreError
from potstill.species import Species, SpeciesTable
from potstill.store import LabeledStore, record
from potstill.structures import Properties, Structures
from store_maker import fill


def frames(n=6):
    made = []
    for k in range(n):
        atoms = ase.build.bulk("Al", cubic=k % 2 == 0)
        atoms.positions += np.random.default_rng(k).normal(0, 0.05, atoms.positions.shape)
        atoms.info.update(frame_id=f"a.xyz:{k}", config_type="flüssig" if k % 2 else "")
        made.append(atoms)
    return made


def random_labels(structures, seed=0, names=("energy", "forces", "stress")):
    generator = torch.Generator().manual_seed(seed)
    n, s = structures.n_atoms, structures.n_systems
    shapes = {"energy": (s,), "forces": (n, 3), "stress": (s, 3, 3), "atomic_energies": (n,)}
    return Properties(
        {k: torch.randn(shapes[k], generator=generator, dtype=torch.float64) for k in names}
    )


@pytest.fixture
def batch():
    return Structures.from_ase(frames())


def assert_same_structures(one, other):
    for name, value in vars(one).items():
        expected = getattr(other, name)
        if isinstance(value, torch.Tensor):
            assert value.dtype == expected.dtype, name
            assert torch.equal(value.nan_to_num(7), expected.nan_to_num(7)), name
        else:
            assert value == expected, name


def assert_same_labels(one, other, structures):
    assert set(one.names) == set(other.names)
    for name in one.names:
        assert torch.equal(one[name].nan_to_num(9), other[name].nan_to_num(9)), name
        n = structures.n_systems
        assert torch.equal(one.presence(name, n), other.presence(name, n)), name
        assert torch.equal(
            one.row_weights(name, structures), other.row_weights(name, structures)
        ), name


def test_round_trip(tmp_path, batch):
    labels = random_labels(batch)
    store = LabeledStore.create(tmp_path / "s", info={"license": "CC0", "seed": 3})
    assert store.append(batch, labels) == 6
    for again in (store, LabeledStore.open(tmp_path / "s")):
        assert (again.n_systems, again.n_atoms) == (6, 15)
        assert_same_structures(again.structures(), batch)
        assert_same_labels(again.labels("reference"), labels, batch)
        assert again.sources == ("reference",)
        info = again.source_info("reference")
        assert info["license"] == "CC0"
        assert info["units"] == {"energy": "eV", "forces": "eV/Å", "stress": "eV/Å³"}
        again.verify()
    assert_same_structures(store.structures(2, 5), batch.select([2, 3, 4]))
    part = labels.select(batch.rows([2, 3, 4]))
    assert_same_labels(store.labels("reference", 2, 5), part, batch.select([2, 3, 4]))


def test_all_optional_fields(tmp_path):
    water = ase.build.molecule("H2O")
    water.info.update(charge=-1, spin=2)
    water.set_tags([1, 2, 3])
    water.set_velocities(np.ones((3, 3)))
    water.set_constraint(ase.constraints.FixAtoms([1]))
    batch = Structures.from_ase(water)
    store = LabeledStore.create(tmp_path / "s")
    store.append(batch)
    assert_same_structures(store.structures(), batch)
    assert store.sources == ()
    assert store.labels("reference").names == ()
    # Frames that lack the fields, before and after, get the neutral values.
    plain = Structures.from_ase(ase.build.molecule("O2"))
    other = LabeledStore.create(tmp_path / "t")
    for part in (plain, batch, plain):
        other.append(part)
    assert_same_structures(other.structures(), Structures.concatenate([plain, batch, plain]))
    other.verify()


def test_an_empty_store(tmp_path):
    table = SpeciesTable.from_symbols(["Si", "O"])
    store = LabeledStore.create(tmp_path / "s", table)
    assert store.structures().n_systems == 0
    assert store.structures().species_table == table
    assert store.labels("reference").names == ()
    assert store.append(Structures.from_ase([], table=table)) == 0
    store.verify()
    store.begin_labels("t", {"fingerprint": "x"})
    assert store.n_labeled("t") == 0
    assert store.labels("t").names == ()


@pytest.mark.parametrize("chunks", [[6], [1] * 6, [2, 3, 1]])
def test_the_fingerprint_does_not_depend_on_the_pieces(tmp_path, batch, chunks):
    labels = random_labels(batch)
    whole = LabeledStore.create(tmp_path / "whole")
    whole.append(batch, labels)
    pieces = LabeledStore.create(tmp_path / "pieces")
    start = 0
    for size in chunks:
        part = range(start, start + size)
        pieces.append(batch.select(part), labels.select(batch.rows(part)))
        start += size
    for store in (whole, pieces):
        store.begin_labels("t", {"fingerprint": "x"})
    whole.write_labels("t", 0, labels, batch, [{"system": 2, "reason": "no"}])
    start = 0
    for size in chunks:
        part = range(start, start + size)
        failed = [{"system": 2 - start, "reason": "no"}] if 2 in part else []
        pieces.write_labels("t", start, labels.select(batch.rows(part)), batch.select(part), failed)
        start += size
    assert whole.fingerprint() == pieces.fingerprint()
    assert_same_structures(whole.structures(), pieces.structures())
    for source in ("reference", "t"):
        assert_same_labels(whole.labels(source), pieces.labels(source), batch)
    assert whole.failures("t") == pieces.failures("t")
    changed = Properties({**labels.values, "energy": labels["energy"] + 1e-9})
    other = LabeledStore.create(tmp_path / "other")
    other.append(batch, changed)
    assert other.fingerprint() != whole.fingerprint()


def test_partial_labels_and_weights(tmp_path, batch):
    labels = random_labels(batch)
    labels.values["stress"][1] = torch.nan
    present = {"stress": torch.tensor([True, False, True, True, True, True])}
    weights = {"energy": torch.arange(6.0).double(), "forces": torch.arange(15.0).double()}
    labels = Properties(labels.values, present, weights)
    store = LabeledStore.create(tmp_path / "s")
    plain = random_labels(batch, 1, ("energy",))
    store.append(batch, plain)
    store.append(batch, labels)
    store.append(batch)
    store.append(batch, random_labels(batch, 2, ("atomic_energies",)))
    read = store.labels("reference")
    assert read.presence("energy", 24).tolist() == [True] * 12 + [False] * 12
    assert read.presence("stress", 24).tolist() == [False] * 6 + [True, False] + [True] * 4 + (
        [False] * 12
    )
    assert read.presence("atomic_energies", 24).tolist() == [False] * 18 + [True] * 6
    assert read["forces"][15:30].equal(labels["forces"])
    assert read["forces"][:15].isnan().all()
    assert read["forces"][30:].isnan().all()
    assert read.weights["energy"].tolist() == [1.0] * 6 + list(range(6)) + [1.0] * 12
    assert read.weights["forces"].shape == (60,)
    assert_same_labels(store.labels("reference", 6, 12), _with_all(labels, batch), batch)
    store.verify()


def _with_all(labels, batch):
    values = {**labels.values, "atomic_energies": torch.full((15,), torch.nan).double()}
    nobody = torch.zeros(6, dtype=torch.bool)
    return Properties(values, {**labels.present, "atomic_energies": nobody}, labels.weights)


def test_species_grow_without_renumbering_what_is_on_disk(tmp_path):
    store = LabeledStore.create(tmp_path / "s")
    parts = [Structures.from_ase(ase.build.bulk(symbol)) for symbol in ("W", "Al", "Cu")]
    for part in parts:
        store.append(part)
    assert store.species_table.names == ("Al", "Cu", "W")
    assert_same_structures(store.structures(), Structures.concatenate(parts))


def test_a_fixed_species_table(tmp_path, batch):
    store = LabeledStore.create(tmp_path / "s", SpeciesTable.from_symbols(["Al", "Li"]))
    store.append(batch)
    assert store.structures().species_table.names == ("Li", "Al")
    with pytest.raises(DataError, match="holds Cu, which is not among the species Li, Al"):
        store.append(Structures.from_ase(ase.build.bulk("Cu")))
    heavy = SpeciesTable((Species("Al", 99.0, 13),))
    with pytest.raises(DataError, match="'Al' has another mass"):
        store.append(Structures(**{**vars(batch), "species_table": heavy}))
    assert store.n_systems == 6
    store.verify()


def test_skip_existing(tmp_path, batch):
    labels = random_labels(batch)
    store = LabeledStore.create(tmp_path / "s")
    store.append(batch.select([0, 1, 4]), labels.select(batch.rows([0, 1, 4])))
    assert store.append(batch, labels, skip_existing=True) == 3
    assert store.append(batch, labels, skip_existing=True) == 0
    order = [0, 1, 4, 2, 3, 5]
    assert_same_structures(store.structures(), batch.select(order))
    assert_same_labels(
        store.labels("reference"), labels.select(batch.rows(order)), batch.select(order)
    )
    assert store.append(batch, labels) == 6, "without skipping, twice is twice"


def test_labels_of_a_teacher(tmp_path, batch):
    store = LabeledStore.create(tmp_path / "s")
    store.append(batch)
    info = {"fingerprint": "x", "license": "MIT", "citation": "a paper", "versions": {"b": "1"}}
    store.begin_labels("t", info)
    store.begin_labels("u", {"fingerprint": "y"})
    labels = random_labels(batch)
    first = batch.select([0, 1, 2, 3])
    store.write_labels(
        "t",
        0,
        labels.select(batch.rows([0, 1, 2, 3])),
        first,
        [{"system": 1, "reason": "diverged"}],
    )
    assert (store.n_labeled("t"), store.n_labeled("u")) == (4, 0)
    assert store.sources == ("t", "u")
    assert store.source_info("t")["citation"] == "a paper"
    assert store.source_info("t")["fingerprint"] == "x"
    read = store.labels("t")
    assert read.presence("forces", 6).tolist() == [True, False, True, True, False, False]
    assert read["energy"].isnan().tolist() == [False, True, False, False, True, True]
    assert store.failures("t") == [{"system": 1, "frame_id": "a.xyz:1", "reason": "diverged"}]
    # Again, and overlapping: what is done stays, the rest is added.
    store.write_labels("t", 0, random_labels(first, 7), first)
    store.write_labels("t", 2, labels.select(batch.rows([2, 3, 4, 5])), batch.select([2, 3, 4, 5]))
    assert store.n_labeled("t") == 6
    done = store.labels("t").select(batch.rows([0, 2, 3, 4, 5]))
    expected = labels.select(batch.rows([0, 2, 3, 4, 5]))
    assert_same_labels(done, expected, batch.select([0, 2, 3, 4, 5]))
    assert len(store.failures("t")) == 1
    # Structures that come later are not labeled yet.
    store.append(batch.select([0]))
    assert store.n_labeled("t") == 6
    assert not store.labels("t").presence("energy", 7)[6]
    assert store.labels("t")["forces"].shape == (19, 3)
    store.verify()


class Killed(BaseException):
    """Stands for a kill -9 at a chosen place."""


def crash_points(monkeypatch, path, action, nth):
    """Run an action on a fresh handle and stop it at its n-th write to disk; False if it ended."""
    count = 0

    def counted(function):
        def call(*arguments, **keywords):
            nonlocal count
            count += 1
            if count == nth:
                raise Killed
            return function(*arguments, **keywords)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(record.zarr.Array, "resize", counted(record.zarr.Array.resize))
        setter = record.zarr.Array.__setitem__
        patch.setattr(record.zarr.Array, "__setitem__", counted(setter))
        patch.setattr(record.zarr.Group, "create_array", counted(_create_array))
        patch.setattr(os, "replace", counted(os.replace))
        try:
            action(LabeledStore.open(path, "a"))
        except Killed:
            return True
    return False


_create_array = record.zarr.Group.create_array


@pytest.mark.parametrize("what", ["append", "labels"])
def test_a_crash_at_any_write_loses_and_repeats_nothing(tmp_path, batch, monkeypatch, what):
    monkeypatch.setattr(record, "_CHUNK_BYTES", 64)  # so that arrays must grow, too
    labels = random_labels(batch)
    first, second = [0, 1, 2], [3, 4, 5]

    def append(store):
        part = batch.select(second)
        store.append(part, labels.select(batch.rows(second)), skip_existing=True)

    def label(store):
        store.write_labels("t", 3, labels.select(batch.rows(second)), batch.select(second))

    action = append if what == "append" else label
    store = LabeledStore.create(tmp_path / "start")
    if what == "append":
        store.append(batch.select(first), random_labels(batch.select(first), 1, ("energy",)))
    else:
        store.append(batch)
        store.begin_labels("t", {"fingerprint": "x"})
        store.write_labels("t", 0, labels.select(batch.rows(first)), batch.select(first))
    before = store.fingerprint()
    shutil.copytree(tmp_path / "start", tmp_path / "undisturbed")
    action(LabeledStore.open(tmp_path / "undisturbed", "a"))
    undisturbed = LabeledStore.open(tmp_path / "undisturbed")
    nth = -1
    while True:
        nth += 2  # every other write, to save time
        path = tmp_path / str(nth)
        shutil.copytree(tmp_path / "start", path)
        crashed = crash_points(monkeypatch, path, action, nth)
        store = LabeledStore.open(path)
        store.verify()
        assert store.fingerprint() == (before if crashed else undisturbed.fingerprint())
        action(LabeledStore.open(path, "a"))
        resumed = LabeledStore.open(path)
        resumed.verify()
        assert resumed.fingerprint() == undisturbed.fingerprint()
        assert _files(path) == _files(tmp_path / "undisturbed")
        if not crashed:
            break
    assert nth > 20, "there are many places to crash at"


def test_rows_that_a_crash_left_are_never_read(tmp_path, batch, monkeypatch):
    """The next write need not have the columns that the killed one had."""
    store = LabeledStore.create(tmp_path / "s")
    part = batch.select([0, 1])
    store.append(part, random_labels(part))
    with monkeypatch.context() as patch:
        patch.setattr(potstill.store, "write_record", _killed)
        with pytest.raises(Killed):
            store.append(part, random_labels(part))
    store = LabeledStore.open(tmp_path / "s", "a")
    nobody = Structures(**{**vars(part), "frame_id": None, "group": None})
    store.append(nobody)
    assert store.labels("reference").presence("energy", 4).tolist() == [True, True, False, False]
    store.append(part, random_labels(part))
    labels = store.labels("reference")
    assert labels.presence("energy", 6).tolist() == [True, True, False, False, True, True]
    assert labels["energy"][2:4].isnan().all()
    assert store.structures().frame_id == ("a.xyz:0", "a.xyz:1", "", "", "a.xyz:0", "a.xyz:1")
    store.verify()


def _killed(*arguments):
    raise Killed


def test_the_cost_of_a_chunk_does_not_grow_with_the_store(tmp_path, monkeypatch):
    """Rows read and bytes written per chunk of labels, of which every frame fails."""
    batch = Structures.from_ase(frames(8))
    store = LabeledStore.create(tmp_path / "s")
    for _ in range(25):
        store.append(batch, skip_existing=False)
    store.begin_labels("t", {"fingerprint": "x"})
    rows, read = [], record.Columns.read
    failed = [{"system": s, "reason": "it did not converge"} for s in range(8)]

    def counted(self, state, name, start, stop):
        rows.append(stop - start)
        return read(self, state, name, start, stop)

    monkeypatch.setattr(record.Columns, "read", counted)
    costs: list[tuple[int, int]] = []
    for k in range(25):
        rows.clear()
        part = store.structures(8 * k, 8 * k + 8)
        store.write_labels("t", 8 * k, random_labels(part), part, failed)
        assert store.append(batch, skip_existing=True) == 0
        size = (tmp_path / "s" / "commit.json").stat().st_size
        costs.append((sum(rows), size))
    assert max(rows for rows, _ in costs[1:]) <= costs[1][0] + 3, (
        "the first chunk has no row before"
    )
    assert max(size for _, size in costs) < costs[0][1] + 100
    assert len(store.failures("t")) == 200
    assert store.failures("t")[-1] == {"system": 199, "frame_id": "a.xyz:7"} | {
        "reason": "it did not converge"
    }


@pytest.mark.parametrize("mode", ["r", "a"])
def test_a_store_of_format_1_is_read_and_added_to(tmp_path, mode):
    shutil.unpack_archive(Path(__file__).with_name("golden") / "store_v1.zip", tmp_path)
    before = _files(tmp_path / "store")
    store = LabeledStore.open(tmp_path / "store", mode)
    store.verify()
    new = LabeledStore.create(tmp_path / "new", info={"seed": 1})
    fill(new, 0, 2)
    fill(new, 2, 4)
    assert_same_store(store, new)
    if mode == "r":
        assert _files(tmp_path / "store") == before, "reading leaves it as it is"
        return
    for other in (store, new):
        fill(other, 4, 6)
    assert_same_store(store, new)
    assert_same_store(LabeledStore.open(tmp_path / "store"), new)
    assert not (tmp_path / "store" / "structures" / "n_atoms").exists()


def assert_same_store(one, other):
    assert one.fingerprint() == other.fingerprint()
    structures = one.structures()
    assert_same_structures(structures, other.structures())
    assert_same_structures(one.structures(1, 3), other.structures(1, 3))
    for source in ("reference", "t"):
        assert_same_labels(one.labels(source), other.labels(source), structures)
        assert one.failures(source) == other.failures(source)
    for tap in ("atom", "pair"):
        for start in (0, 2):
            found, expected = one.features("t", tap, start), other.features("t", tap, start)
            assert found.values.equal(expected.values)
            if tap == "pair":
                assert found.graph.center.equal(expected.graph.center)
                assert found.graph.neighbor.equal(expected.graph.neighbor)
                assert found.graph.n_pairs_per_system.equal(expected.graph.n_pairs_per_system)


def _files(path):
    """Names and contents of all arrays, so that nothing is left over from a crash."""
    return {
        p.relative_to(path): p.read_bytes()
        for p in path.rglob("*")
        if p.is_file() and p.name not in ("commit.json", "commit.json.new", ".lock")
    }


def test_an_error_within_a_write_leaves_the_handle_usable(tmp_path, batch, monkeypatch):
    store = LabeledStore.create(tmp_path / "s")
    store.append(batch.select([0, 1]))

    def broken(*arguments):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(potstill.store, "write_record", broken)
        with pytest.raises(OSError, match="no space"):
            store.append(batch.select([2, 3]))
    assert store.n_systems == 2
    store.append(batch.select([4]))
    assert_same_structures(store.structures(), batch.select([0, 1, 4]))
    store.verify()


def test_handles_see_what_others_wrote_before_they_write(tmp_path, batch):
    one = LabeledStore.create(tmp_path / "s")
    two = LabeledStore.open(tmp_path / "s", "a")
    one.append(batch.select([0, 1]))
    assert two.append(batch.select([0, 1, 2]), skip_existing=True) == 1
    one.append(batch.select([3]))
    assert_same_structures(one.structures(), batch.select([0, 1, 2, 3]))
    assert LabeledStore.open(tmp_path / "s").fingerprint() == one.fingerprint()


def test_concurrent_writers_take_turns(tmp_path, batch):
    LabeledStore.create(tmp_path / "s")

    def append(k):
        for _ in range(3):
            LabeledStore.open(tmp_path / "s", "a").append(batch.select([k]))

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(append, range(3)))
    store = LabeledStore.open(tmp_path / "s")
    assert sorted(store.structures().frame_id) == [f"a.xyz:{k}" for k in range(3) for _ in range(3)]
    store.verify()


def test_damage_is_found(tmp_path, batch):
    store = LabeledStore.create(tmp_path / "s")
    store.append(batch, random_labels(batch))
    (chunk,) = (tmp_path / "s" / "labels/reference/values/energy/c").glob("*")
    good = chunk.read_bytes()
    other = LabeledStore.create(tmp_path / "t")
    other.append(batch, random_labels(batch, 5))
    chunk.write_bytes((tmp_path / "t/labels/reference/values/energy/c/0").read_bytes())
    with pytest.raises(StoreError, match="the labels 'reference' are not those written"):
        LabeledStore.open(tmp_path / "s").verify()
    chunk.write_bytes(good)
    LabeledStore.open(tmp_path / "s").verify()


def test_the_record_is_small_and_says_what_it_is(tmp_path, batch):
    store = LabeledStore.create(tmp_path / "s")
    for _ in range(5):
        store.append(batch, random_labels(batch))
    written = json.loads((tmp_path / "s" / "commit.json").read_text())
    assert written["format"] == "potstill labelled store"
    assert written["version"] == 2
    assert (tmp_path / "s" / "commit.json").stat().st_size < 4000
