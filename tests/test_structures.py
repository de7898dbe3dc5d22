"""Batches of structures and properties: selecting, joining, and the way to ASE and back."""

import ase
import ase.build
import numpy as np
import pytest
import torch
from ase.constraints import FixAtoms
from ase.units import fs

from potstill.errors import DataError
from potstill.neighbors import build_neighbor_list, pair_vectors
from potstill.species import Species, SpeciesTable, merge_species_tables
from potstill.structures import Properties, Structures


def frames():
    """A crystal, a slab with fixed atoms, a molecule, one atom."""
    crystal = ase.build.bulk("NaCl", "rocksalt", a=5.6, cubic=True)
    crystal.info["config_type"] = "bulk"
    slab = ase.build.fcc111("Al", (2, 2, 3), vacuum=5.0)
    slab.set_constraint(FixAtoms(mask=slab.get_tags() == 3))
    slab.info["frame_id"] = "slab.xyz:0"
    molecule = ase.build.molecule("H2O")
    molecule.set_velocities(np.full((3, 3), 0.01))
    return [crystal, slab, molecule, ase.Atoms("Al", [(1.0, 2.0, 3.0)])]


def test_round_trip_to_ase():
    originals = frames()
    batch = Structures.from_ase(originals)
    assert batch.species_table.names == ("H", "O", "Na", "Al", "Cl")
    assert batch.n_systems == 4
    assert batch.n_atoms_per_system.tolist() == [8, 12, 3, 1]
    for before, after in zip(originals, batch.to_ase(), strict=True):
        assert np.array_equal(before.positions, after.positions)
        assert np.array_equal(before.numbers, after.numbers)
        assert np.array_equal(before.cell.array, after.cell.array)
        assert np.array_equal(before.pbc, after.pbc)
        assert np.array_equal(before.get_tags(), after.get_tags())
        assert after.get_velocities() == pytest.approx(before.get_velocities(), abs=1e-15)
        assert after.info.get("config_type") == before.info.get("config_type")
        assert after.info.get("frame_id") == before.info.get("frame_id")
    fixed = batch.to_ase()[1].constraints[0].index
    assert np.array_equal(fixed, originals[1].constraints[0].index)
    assert batch.velocities[-4].tolist() == pytest.approx([0.01 * fs] * 3)
    again = Structures.from_ase(batch.to_ase())
    assert again.fingerprints() == batch.fingerprints()


def test_charge_and_spin_keep_double_precision():
    atoms = ase.build.molecule("OH")
    atoms.info.update(charge=-1 / 3, spin=2)
    batch = Structures.from_ase(atoms)
    assert batch.charge.dtype == torch.float64
    assert batch.charge.item() == -1 / 3
    assert batch.to_ase()[0].info["charge"] == -1 / 3


def test_select_takes_order_repeats_masks_and_negative_indices():
    batch = Structures.from_ase(frames())
    picked = batch.select([3, 0, 3])
    assert picked.n_atoms_per_system.tolist() == [1, 8, 1]
    assert picked.group == ("", "bulk", "")
    assert torch.equal(picked.positions[1:9], batch.positions[:8])
    assert torch.equal(picked.cell[1], batch.cell[0])
    assert batch.select([-1]).fingerprints() == batch[3].fingerprints()
    mask = torch.tensor([False, True, True, False])
    assert batch.select(mask).fingerprints() == batch.select([1, 2]).fingerprints()
    assert batch.select([]).n_systems == 0
    with pytest.raises(IndexError):
        batch.select([4])
    with pytest.raises(IndexError):
        batch.select(torch.tensor([True]))
    with pytest.raises(IndexError):
        batch[4]


def test_concatenate_is_the_inverse_of_select():
    batch = Structures.from_ase(frames())
    parts = [batch.select([k]) for k in range(len(batch))]
    joined = Structures.concatenate(parts)
    assert joined.fingerprints() == batch.fingerprints()
    assert torch.equal(joined.system_index, batch.system_index)
    assert joined.group == batch.group


def test_concatenate_merges_species_and_fills_optional_fields():
    crystal, slab, molecule, atom = (Structures.from_ase(a) for a in frames())
    joined = Structures.concatenate([slab, molecule, crystal, atom])
    assert joined.species_table.names == ("H", "O", "Na", "Al", "Cl")
    assert joined.fixed.sum() == 4
    assert not joined.fixed[12:].any()
    assert joined.tags[12:].tolist() == [0] * 12
    # Velocities that nobody gave are unknown, not zero.
    assert joined.velocities[12:15].isfinite().all()
    assert joined.velocities[15:].isnan().all()
    assert not joined.to_ase()[2].has("momenta")
    assert joined.frame_id == ("slab.xyz:0", "", "", "")
    assert [len(a) for a in joined.to_ase()] == [12, 3, 8, 1]
    with pytest.raises(DataError, match="empty list"):
        Structures.concatenate([])


def test_batches_respect_the_atom_budget():
    cells = [ase.build.bulk("Cu", cubic=True).repeat((1, 1, n)) for n in (1, 2, 3)]
    structures = Structures.from_ase(cells * 2)  # 4, 8, 12, 4, 8, 12 atoms

    def cut(*arguments):
        return [batch.tolist() for batch in structures.batches(*arguments)]

    assert cut(12) == [[0, 1], [2], [3, 4], [5]]
    assert cut(1) == [[k] for k in range(6)]
    assert cut(10**6) == [list(range(6))]
    assert cut(16, torch.tensor([5, 3, 0, 2])) == [[5, 3], [0, 2]]
    assert structures.select([]).batches(10) == []


def test_an_empty_batch_and_a_system_without_atoms():
    empty = Structures.from_ase([], table=SpeciesTable.from_symbols(["Si"]))
    assert (empty.n_systems, empty.n_atoms) == (0, 0)
    assert empty.to_ase() == []
    assert empty.fingerprints() == []
    assert empty.composition().shape == (0, 1)
    vacuum = Structures.from_ase([ase.Atoms(), ase.Atoms("Si")])
    assert vacuum.n_atoms_per_system.tolist() == [0, 1]
    assert vacuum.select([1, 0]).n_atoms_per_system.tolist() == [1, 0]
    assert build_neighbor_list(vacuum, 3.0).n_pairs_per_system.tolist() == [0, 0]
    assert Structures.concatenate([empty, vacuum]).n_systems == 2


def test_one_atom_keeps_all_ranks():
    atom = Structures.from_ase(ase.Atoms("Mo", cell=[3, 3, 3], pbc=True))
    assert atom.positions.shape == (1, 3)
    assert atom.cell.shape == (1, 3, 3)
    assert atom.composition().shape == (1, 1)
    assert atom.volume.tolist() == pytest.approx([27.0])


def test_fingerprints_see_what_matters_and_nothing_else():
    batch = Structures.from_ase(ase.build.bulk("Al"))
    (original,) = batch.fingerprints()
    wider = SpeciesTable.from_symbols(["H", "Al", "W"])
    assert batch.with_species_table(wider).fingerprints() == [original]
    for change in (
        {"positions": batch.positions + 1e-6},
        {"cell": batch.cell * 1.0001},
        {"pbc": ~batch.pbc},
        {"species_table": SpeciesTable.from_symbols(["Si"])},
    ):
        changed = Structures(**{**vars(batch), **change})
        assert changed.fingerprints() != [original]


def test_unknown_species_are_named_with_their_frame():
    batch = Structures.from_ase(frames())
    with pytest.raises(DataError, match=r"slab\.xyz:0 holds Al, which is not among"):
        batch.select([1]).with_species_table(SpeciesTable.from_symbols(["H", "O"]))


def test_beads_keep_their_names_and_masses_through_ase(tmp_path):
    table = SpeciesTable((Species("H", 1.008, 1), Species("head", 72.0), Species("tail", 56.5)))
    one = Structures(
        positions=torch.arange(15.0, dtype=torch.float64).reshape(5, 3),
        species=torch.tensor([0, 2, 1, 2, 1]),
        system_index=torch.tensor([0, 0, 0, 1, 1]),
        cell=10.0 * torch.eye(3, dtype=torch.float64).expand(2, 3, 3),
        pbc=torch.ones(2, 3, dtype=torch.bool),
        species_table=table,
    )
    assert Structures.from_ase(one.to_ase(), table=table).species.equal(one.species)
    ase.io.write(tmp_path / "beads.xyz", one.to_ase())
    again = Structures.from_ase(ase.io.read(tmp_path / "beads.xyz", ":"))
    assert again.species_table.names == ("H", "tail", "head")
    assert again.masses.equal(one.masses)
    assert [again.species_table.names[k] for k in again.species] == [
        table.names[k] for k in one.species
    ]
    with pytest.raises(DataError, match="holds tail, which is not among the species H, head"):
        Structures.from_ase(one.to_ase(), table=SpeciesTable(table.entries[:2]))


def test_beads_come_after_elements():
    beads = SpeciesTable((Species("backbone", 57.0), Species("Al", 26.98, 13)))
    merged = merge_species_tables([beads, SpeciesTable.from_symbols(["H"])])
    assert merged.names == ("H", "Al", "backbone")
    assert merged.atomic_numbers.tolist() == [1, 13, -1]
    assert SpeciesTable.from_json(merged.to_json()) == merged


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": torch.zeros(1, 3)}, "positions must have shape"),
        ({"species": torch.tensor([7])}, "species index 7"),
        ({"system_index": torch.tensor([1])}, "system_index"),
        ({"tags": torch.zeros(2, dtype=torch.int64)}, "tags has 2 rows for 1 atoms"),
        ({"group": ("a", "b")}, "group has 2 entries for 1 systems"),
    ],
)
def test_contradictions_are_refused(change, message):
    batch = Structures.from_ase(ase.Atoms("Al"))
    with pytest.raises(DataError, match=message):
        Structures(**{**vars(batch), **change})


# -- properties -----------------------------------------------------------------------------------


def labelled(weight=None):
    batch = Structures.from_ase(frames())
    values = {
        "energy": torch.arange(4, dtype=torch.float64),
        "forces": torch.randn(24, 3, dtype=torch.float64),
    }
    present = {"energy": torch.tensor([True, True, False, True])}
    return batch, Properties(values, present, {} if weight is None else {"forces": weight})


def test_properties_select_follows_structures():
    batch, labels = labelled()
    part = labels.select(batch.rows([3, 1]))
    assert part["energy"].tolist() == [3.0, 1.0]
    assert torch.equal(part["forces"], torch.cat([labels["forces"][23:], labels["forces"][8:20]]))
    assert labels.select(batch.rows([2])).presence("energy", 1).tolist() == [False]
    assert part.presence("stress", 2).tolist() == [False, False]


def test_properties_concatenate_marks_what_a_part_lacks():
    batch, labels = labelled()
    only_energy = Properties({"energy": torch.zeros(4, dtype=torch.float64)})
    joined = Properties.concatenate([labels, only_energy], [batch, batch])
    assert joined["forces"].shape == (48, 3)
    assert joined["forces"][24:].isnan().all()
    assert joined.presence("forces", 8).tolist() == [True] * 4 + [False] * 4


@pytest.mark.parametrize("rows", ["systems", "atoms"])
def test_weights_per_system_and_per_atom_mix(rows):
    weight = torch.arange(1.0, 5.0) if rows == "systems" else torch.arange(24.0)
    batch, labels = labelled(weight.double())
    _, plain = labelled()
    joined = Properties.concatenate([labels, plain], [batch, batch])
    expected = weight.double()[batch.system_index] if rows == "systems" else weight.double()
    assert torch.equal(joined.weights["forces"][:24], expected)
    assert torch.equal(joined.weights["forces"][24:], torch.ones(24, dtype=torch.float64))
    assert torch.equal(
        labels.select(batch.rows([1, 2])).row_weights("forces", batch.select([1, 2])),
        expected[8:23],
    )


def test_wrong_shapes_and_names_are_refused():
    with pytest.raises(DataError, match="forces has shape"):
        Properties({"forces": torch.zeros(3)})
    with pytest.raises(DataError, match="'stress' is missing; there are energy"):
        Properties({"energy": torch.zeros(1)})["stress"]


def test_neighbor_lists_select_with_their_structures():
    batch = Structures.from_ase(frames())
    whole = build_neighbor_list(batch, 4.0)
    order = [2, 0, 3]
    part, own = batch.select(order), build_neighbor_list(batch.select(order), 4.0)
    picked = whole.select(batch.rows(order))
    assert picked.n_pairs_per_system.tolist() == own.n_pairs_per_system.tolist()
    for system in range(len(part)):
        mine = part.system_index[picked.center] == system
        distance = pair_vectors(part, picked).norm(dim=1)
        expected = pair_vectors(part, own).norm(dim=1)[part.system_index[own.center] == system]
        assert torch.allclose(distance[mine].sort().values, expected.sort().values)
