"""The labelled store: what goes in comes out, whenever and in whatever pieces it was written."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import ase
import ase.build
import numpy as np
import pytest
import torch

import potstill.store as store_module
from potstill.errors import DataError, StoreError
from potstill.species import Species, SpeciesTable
from potstill.store import LabelledStore
from potstill.structures import Properties, Structures


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
    store = LabelledStore.create(tmp_path / "s", info={"licence": "CC0", "seed": 3})
    assert store.append(batch, labels) == 6
    for again in (store, LabelledStore.open(tmp_path / "s")):
        assert (again.n_systems, again.n_atoms) == (6, 15)
        assert_same_structures(again.structures(), batch)
        assert_same_labels(again.labels("reference"), labels, batch)
        assert again.sources == ("reference",)
        info = again.source_info("reference")
        assert info["licence"] == "CC0"
        assert info["units"] == {"energy": "eV", "forces": "eV/Å", "stress": "eV/Å³"}
        again.verify()
    assert_same_structures(store.structures(2, 5), batch.select([2, 3, 4]))
    part = labels.select([2, 3, 4], batch)
    assert_same_labels(store.labels("reference", 2, 5), part, batch.select([2, 3, 4]))


def test_all_optional_fields(tmp_path):
    water = ase.build.molecule("H2O")
    water.info.update(charge=-1, spin=2)
    water.set_tags([1, 2, 3])
    water.set_velocities(np.ones((3, 3)))
    water.set_constraint(ase.constraints.FixAtoms([1]))
    batch = Structures.from_ase(water)
    store = LabelledStore.create(tmp_path / "s")
    store.append(batch)
    assert_same_structures(store.structures(), batch)
    assert store.sources == ()
    assert store.labels("reference").names == ()
    # Frames that lack the fields, before and after, get the neutral values.
    plain = Structures.from_ase(ase.build.molecule("O2"))
    other = LabelledStore.create(tmp_path / "t")
    for part in (plain, batch, plain):
        other.append(part)
    assert_same_structures(other.structures(), Structures.concatenate([plain, batch, plain]))
    other.verify()


def test_an_empty_store(tmp_path):
    table = SpeciesTable.from_symbols(["Si", "O"])
    store = LabelledStore.create(tmp_path / "s", table)
    assert store.structures().n_systems == 0
    assert store.structures().species_table == table
    assert store.labels("reference").names == ()
    assert store.append(Structures.from_ase([], table=table)) == 0
    store.verify()
    store.begin_labels("t", {"fingerprint": "x"})
    assert store.n_labelled("t") == 0
    assert store.labels("t").names == ()


@pytest.mark.parametrize("chunks", [[6], [1] * 6, [2, 3, 1]])
def test_the_fingerprint_does_not_depend_on_the_pieces(tmp_path, batch, chunks):
    labels = random_labels(batch)
    whole = LabelledStore.create(tmp_path / "whole")
    whole.append(batch, labels)
    pieces = LabelledStore.create(tmp_path / "pieces")
    start = 0
    for size in chunks:
        part = range(start, start + size)
        pieces.append(batch.select(part), labels.select(part, batch))
        start += size
    for store in (whole, pieces):
        store.begin_labels("t", {"fingerprint": "x"})
    whole.write_labels("t", 0, labels, batch, [{"system": 2, "reason": "no"}])
    start = 0
    for size in chunks:
        part = range(start, start + size)
        failed = [{"system": 2 - start, "reason": "no"}] if 2 in part else []
        pieces.write_labels("t", start, labels.select(part, batch), batch.select(part), failed)
        start += size
    assert whole.fingerprint() == pieces.fingerprint()
    assert_same_structures(whole.structures(), pieces.structures())
    for source in ("reference", "t"):
        assert_same_labels(whole.labels(source), pieces.labels(source), batch)
    assert whole.failures("t") == pieces.failures("t")
    changed = Properties({**labels.values, "energy": labels["energy"] + 1e-9})
    other = LabelledStore.create(tmp_path / "other")
    other.append(batch, changed)
    assert other.fingerprint() != whole.fingerprint()


def test_partial_labels_and_weights(tmp_path, batch):
    labels = random_labels(batch)
    labels.values["stress"][1] = torch.nan
    present = {"stress": torch.tensor([True, False, True, True, True, True])}
    weights = {"energy": torch.arange(6.0).double(), "forces": torch.arange(15.0).double()}
    labels = Properties(labels.values, present, weights)
    store = LabelledStore.create(tmp_path / "s")
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
    store = LabelledStore.create(tmp_path / "s")
    parts = [Structures.from_ase(ase.build.bulk(symbol)) for symbol in ("W", "Al", "Cu")]
    for part in parts:
        store.append(part)
    assert store.species_table.names == ("Al", "Cu", "W")
    assert_same_structures(store.structures(), Structures.concatenate(parts))


def test_a_fixed_species_table(tmp_path, batch):
    store = LabelledStore.create(tmp_path / "s", SpeciesTable.from_symbols(["Al", "Li"]))
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
    store = LabelledStore.create(tmp_path / "s")
    store.append(batch.select([0, 1, 4]), labels.select([0, 1, 4], batch))
    assert store.append(batch, labels, skip_existing=True) == 3
    assert store.append(batch, labels, skip_existing=True) == 0
    order = [0, 1, 4, 2, 3, 5]
    assert_same_structures(store.structures(), batch.select(order))
    assert_same_labels(store.labels("reference"), labels.select(order, batch), batch.select(order))
    assert store.append(batch, labels) == 6, "without skipping, twice is twice"


def test_labels_of_a_teacher(tmp_path, batch):
    store = LabelledStore.create(tmp_path / "s")
    store.append(batch)
    info = {"fingerprint": "x", "licence": "MIT", "citation": "a paper", "versions": {"b": "1"}}
    store.begin_labels("t", info)
    store.begin_labels("u", {"fingerprint": "y"})
    labels = random_labels(batch)
    first = batch.select([0, 1, 2, 3])
    store.write_labels(
        "t", 0, labels.select([0, 1, 2, 3], batch), first, [{"system": 1, "reason": "diverged"}]
    )
    assert (store.n_labelled("t"), store.n_labelled("u")) == (4, 0)
    assert store.sources == ("t", "u")
    assert store.source_info("t")["citation"] == "a paper"
    assert store.source_info("t")["fingerprint"] == "x"
    read = store.labels("t")
    assert read.presence("forces", 6).tolist() == [True, False, True, True, False, False]
    assert read["energy"].isnan().tolist() == [False, True, False, False, True, True]
    assert store.failures("t") == [{"system": 1, "frame_id": "a.xyz:1", "reason": "diverged"}]
    # Again, and overlapping: what is done stays, the rest is added.
    store.write_labels("t", 0, random_labels(first, 7), first)
    store.write_labels("t", 2, labels.select([2, 3, 4, 5], batch), batch.select([2, 3, 4, 5]))
    assert store.n_labelled("t") == 6
    done = store.labels("t").select([0, 2, 3, 4, 5], batch)
    expected = labels.select([0, 2, 3, 4, 5], batch)
    assert_same_labels(done, expected, batch.select([0, 2, 3, 4, 5]))
    assert len(store.failures("t")) == 1
    # Structures that come later are not labelled yet.
    store.append(batch.select([0]))
    assert store.n_labelled("t") == 6
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
        patch.setattr(store_module.zarr.Array, "resize", counted(store_module.zarr.Array.resize))
        setter = store_module.zarr.Array.__setitem__
        patch.setattr(store_module.zarr.Array, "__setitem__", counted(setter))
        patch.setattr(store_module.zarr.Group, "create_array", counted(_create_array))
        patch.setattr(store_module.os, "replace", counted(os.replace))
        try:
            action(LabelledStore.open(path, "a"))
        except Killed:
            return True
    return False


_create_array = store_module.zarr.Group.create_array


@pytest.mark.parametrize("what", ["append", "labels"])
def test_a_crash_at_any_write_loses_and_repeats_nothing(tmp_path, batch, monkeypatch, what):
    labels = random_labels(batch)
    first, second = [0, 1, 2], [3, 4, 5]

    def append(store):
        part = batch.select(second)
        store.append(part, labels.select(second, batch), skip_existing=True)

    def label(store):
        store.write_labels("t", 3, labels.select(second, batch), batch.select(second))

    action = append if what == "append" else label
    store = LabelledStore.create(tmp_path / "start")
    if what == "append":
        store.append(batch.select(first), random_labels(batch.select(first), 1, ("energy",)))
    else:
        store.append(batch)
        store.begin_labels("t", {"fingerprint": "x"})
        store.write_labels("t", 0, labels.select(first, batch), batch.select(first))
    before = store.fingerprint()
    shutil.copytree(tmp_path / "start", tmp_path / "undisturbed")
    action(LabelledStore.open(tmp_path / "undisturbed", "a"))
    undisturbed = LabelledStore.open(tmp_path / "undisturbed")
    nth = -1
    while True:
        nth += 2  # every other write, to save time
        path = tmp_path / str(nth)
        shutil.copytree(tmp_path / "start", path)
        crashed = crash_points(monkeypatch, path, action, nth)
        store = LabelledStore.open(path)
        store.verify()
        assert store.fingerprint() == (before if crashed else undisturbed.fingerprint())
        action(LabelledStore.open(path, "a"))
        resumed = LabelledStore.open(path)
        resumed.verify()
        assert resumed.fingerprint() == undisturbed.fingerprint()
        assert _files(path) == _files(tmp_path / "undisturbed")
        if not crashed:
            break
    assert nth > 16, "there are many places to crash at"


def _files(path):
    """Names and contents of all arrays, so that nothing is left over from a crash."""
    return {
        p.relative_to(path): p.read_bytes()
        for p in path.rglob("*")
        if p.is_file() and p.name not in ("commit.json", "commit.json.new", ".lock")
    }


def test_an_error_within_a_write_leaves_the_handle_usable(tmp_path, batch, monkeypatch):
    store = LabelledStore.create(tmp_path / "s")
    store.append(batch.select([0, 1]))

    def broken(*arguments):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store_module, "_write_commit", broken)
        with pytest.raises(OSError, match="no space"):
            store.append(batch.select([2, 3]))
    assert store.n_systems == 2
    store.append(batch.select([4]))
    assert_same_structures(store.structures(), batch.select([0, 1, 4]))
    store.verify()


def test_handles_see_what_others_wrote_before_they_write(tmp_path, batch):
    one = LabelledStore.create(tmp_path / "s")
    two = LabelledStore.open(tmp_path / "s", "a")
    one.append(batch.select([0, 1]))
    assert two.append(batch.select([0, 1, 2]), skip_existing=True) == 1
    one.append(batch.select([3]))
    assert_same_structures(one.structures(), batch.select([0, 1, 2, 3]))
    assert LabelledStore.open(tmp_path / "s").fingerprint() == one.fingerprint()


def test_concurrent_writers_take_turns(tmp_path, batch):
    LabelledStore.create(tmp_path / "s")

    def append(k):
        for _ in range(3):
            LabelledStore.open(tmp_path / "s", "a").append(batch.select([k]))

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(append, range(3)))
    store = LabelledStore.open(tmp_path / "s")
    assert sorted(store.structures().frame_id) == [f"a.xyz:{k}" for k in range(3) for _ in range(3)]
    store.verify()


def test_damage_is_found(tmp_path, batch):
    store = LabelledStore.create(tmp_path / "s")
    store.append(batch, random_labels(batch))
    (chunk,) = (tmp_path / "s" / "labels/reference/values/energy/c").glob("*")
    good = chunk.read_bytes()
    other = LabelledStore.create(tmp_path / "t")
    other.append(batch, random_labels(batch, 5))
    chunk.write_bytes((tmp_path / "t/labels/reference/values/energy/c/0").read_bytes())
    with pytest.raises(StoreError, match="the labels 'reference' are not those written"):
        LabelledStore.open(tmp_path / "s").verify()
    chunk.write_bytes(good)
    LabelledStore.open(tmp_path / "s").verify()


def test_the_record_is_small_and_says_what_it_is(tmp_path, batch):
    store = LabelledStore.create(tmp_path / "s")
    for _ in range(5):
        store.append(batch, random_labels(batch))
    record = json.loads((tmp_path / "s" / "commit.json").read_text())
    assert record["format"] == "potstill labelled store"
    assert record["version"] == 1
    assert (tmp_path / "s" / "commit.json").stat().st_size < 4000
