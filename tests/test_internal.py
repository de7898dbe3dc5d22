"""Internal coordinates of molecules: values, distributions, free energies, bonds that break."""

import json

import numpy as np
import pytest
import torch
from ase.build import molecule
from ase.io import write
from scipy.special import i0

from potstill.errors import ConfigError, DataError
from potstill.evaluate.distributions import compare_distributions
from potstill.evaluate.internal import (
    FreeEnergySurface,
    FreeEnergySurfaces,
    InternalDistributions,
    bin_edges,
    coordinate_values,
    free_energy_surface,
    internal_distribution,
)
from potstill.soundness import Skeleton
from potstill.species import Species, SpeciesTable
from potstill.structures import Structures
from potstill.workflows.evaluation import EvaluateConfig, evaluate

CHAIN = SpeciesTable(tuple(Species(name, 12.0) for name in "ABCD"))


def chains(positions, cell=0.0):
    """Frames (n, 4, 3) of four beads A, B, C, D; periodic with a cell."""
    n = len(positions)
    return Structures(
        positions=torch.from_numpy(positions.reshape(-1, 3).astype(float)),
        species=torch.arange(4).repeat(n),
        system_index=torch.arange(n).repeat_interleave(4),
        cell=(cell * torch.eye(3, dtype=torch.float64)).repeat(n, 1, 1),
        pbc=torch.full((n, 3), cell > 0.0),
        species_table=CHAIN,
    )


def twisted(dihedral, bond=1.5):
    """(n, 4, 3) chains with right angles and the given dihedrals in degrees."""
    t = np.radians(np.asarray(dihedral, dtype=float))
    zero, one = np.zeros_like(t), np.ones_like(t)
    a = np.stack([one, zero, zero], axis=1)
    b = np.stack([zero, zero, zero], axis=1)
    c = np.stack([zero, zero, one], axis=1)
    # Seen along b-c, d is turned clockwise from a by a positive dihedral.
    d = np.stack([np.cos(t), np.sin(t), one], axis=1)
    return bond * np.stack([a, b, c, d], axis=1)


# -- values ----------------------------------------------------------------------------------------


def test_coordinates_are_those_of_mdanalysis():
    distances = pytest.importorskip("MDAnalysis.lib.distances", exc_type=ImportError)
    x = 2.0 * np.random.default_rng(0).standard_normal((200, 4, 3))
    a, b, c, d = (np.ascontiguousarray(x[:, k], dtype=np.float32) for k in range(4))
    frames = chains(np.stack([a, b, c, d], axis=1))
    expected = {
        "AB": distances.calc_bonds(a, b),
        "ABC": np.degrees(distances.calc_angles(a, b, c)),
        "ABCD": np.degrees(distances.calc_dihedrals(a, b, c, d)),
    }
    for names, values in expected.items():
        np.testing.assert_allclose(coordinate_values(frames, names), values, atol=1e-3)
    with_numbers = coordinate_values(frames, (3, 2, 1, 0))  # read backward it is the same
    np.testing.assert_allclose(with_numbers, expected["ABCD"], atol=1e-3)


def test_dihedrals_have_the_sign_of_iupac_and_cross_boundaries():
    angles = np.array([-170.0, -60.0, 0.0, 60.0, 179.0])
    plain = coordinate_values(chains(twisted(angles)), "ABCD")
    np.testing.assert_allclose(plain, angles, atol=1e-9)
    wrapped = chains((twisted(angles) + 5.5) % 6.0, cell=6.0)
    for names in ("AB", "ABC", "ABCD"):
        np.testing.assert_allclose(
            coordinate_values(wrapped, names),
            coordinate_values(chains(twisted(angles)), names),
            atol=1e-9,
        )


def test_atoms_that_are_not_clear_are_refused():
    frames = chains(twisted([0.0, 10.0]))
    with pytest.raises(ConfigError, match="frames hold no E"):
        coordinate_values(frames, ("A", "E"))
    with pytest.raises(ConfigError, match="no atom 4: the frames have 0 to 3"):
        coordinate_values(frames, (0, 4))
    water = Structures.from_ase([molecule("H2O")])
    with pytest.raises(ConfigError, match="2 atoms of a frame are called H: give the number"):
        coordinate_values(water, ("H", "O"))
    assert coordinate_values(water, (1, 0, 2)) == pytest.approx([104.0], abs=1.0)
    with pytest.raises(DataError, match="same atoms in the same order"):
        coordinate_values(Structures.from_ase([molecule("H2O"), molecule("CO")]), (0, 1))


# -- known torsion potentials ----------------------------------------------------------------------

KAPPA = 1.2


def drawn(seed, n=40_000, center=60.0):
    """Dihedrals of the potential -KAPPA kT cos(x - center), degrees: von Mises' distribution."""
    rng = np.random.default_rng(seed)
    x = np.degrees(rng.vonmises(np.radians(center), KAPPA, n))
    return (x + 180.0) % 360.0 - 180.0


def test_free_energy_is_the_torsion_potential():
    x, y = drawn(0), drawn(1, center=-90.0)
    found = free_energy_surface("x, y", x, y, n_bins=18, kT=2.5, unit="kJ/mol")
    away = [1.0 - np.cos(np.radians(found.angle - center)) for center in (60.0, -90.0)]
    exact = 2.5 * KAPPA * (away[0][:, None] + away[1])
    near = exact < 5.0  # well sampled
    error = (found.free_energy - exact)[near]
    assert np.abs(error - error.mean()).max() < 1.0
    assert error.std() < 0.25
    assert float(found.density.mean()) == pytest.approx(1.0)
    # The stated errors are those of independent samples: σ² = p (1 - p) / n.
    n, size = len(x), 18**2
    expected = np.sqrt(found.density / size / n) * size
    assert (found.error[near] / expected[near]).mean() == pytest.approx(1.0, abs=0.1)


def test_distribution_of_a_torsion_is_that_of_boltzmann():
    found = internal_distribution("x", drawn(2), bin_edges(drawn(2), "dihedral", 36), "dihedral")
    exact = np.exp(KAPPA * np.cos(np.radians(found.value - 60.0))) / (360.0 * i0(KAPPA))
    assert np.abs(found.density - exact).max() < 4.5 * found.error.max()
    assert np.abs((found.density - exact) * found.measure).sum() < 0.03
    again = internal_distribution("x", drawn(3), bin_edges(drawn(2), "dihedral", 36), "dihedral")
    assert not compare_distributions(found, again).clear
    other = internal_distribution("x", drawn(3, center=80.0), bin_edges(drawn(2), "dihedral", 36),
                                  "dihedral")  # fmt: skip
    assert compare_distributions(found, other).clear


def test_populations_go_round_the_circle_and_images_have_both_signs():
    x, y = np.array([-150.0, -60.0, 170.0, 60.0]), np.array([175.0, -40.0, -170.0, 45.0])
    regions = {"around": ((-180, 180), (150, -150)), "left": ((0, 180), (0, 180))}
    found = free_energy_surface("x, y", x, y, n_bins=4, n_blocks=2, regions=regions)
    assert found.populations == pytest.approx({"around": 0.5, "left": 0.25})
    # Blocks of two frames hold 1/2 and 1/2, and 0 and 1/2.
    assert found.population_errors == pytest.approx({"around": 0.0, "left": 0.25})
    both = free_energy_surface(
        "x, y", x, y, n_bins=4, n_blocks=2, regions=regions, mirror_images=True
    )
    np.testing.assert_allclose(both.density, both.density[::-1, ::-1])
    assert both.populations["left"] == pytest.approx(0.25)  # (60, 45), and the image of (-60, -40)
    copy = FreeEnergySurface.from_json(json.loads(json.dumps(both.to_json(), allow_nan=False)))
    np.testing.assert_allclose(copy.blocks, both.blocks, rtol=1e-3)
    assert np.isnan(copy.free_energy[both.density == 0.0]).all()


def test_what_lies_beyond_the_bins_counts_at_their_ends():
    edges = bin_edges(np.array([1.0, 1.4]), "distance", 12)
    assert (edges[0], edges[-1]) == pytest.approx((0.9, 1.5))
    found = internal_distribution("r", np.array([0.2, 1.21, 7.0, 9.0]), edges, "distance")
    share = found.density * found.measure
    assert share[[0, -1]] == pytest.approx([0.25, 0.5])
    assert share.sum() == pytest.approx(1.0)


# -- the evaluations -------------------------------------------------------------------------------


def trajectories(folder, **angles):
    """A file of chains for each name."""
    for name, own in angles.items():
        frames = chains(twisted(own))
        write(folder / f"{name}.xyz", frames.to_ase(), format="extxyz")
    return {name: str(folder / f"{name}.xyz") for name in angles}


def test_trajectories_of_molecules_are_compared(tmp_path):
    files = trajectories(
        tmp_path, reference=drawn(5, 800), student=drawn(6, 800), control=drawn(7, 800, -60.0)
    )
    turns = {"x": ["A", "B", "C", "D"], "y": ["D", "C", "B", "A"]}
    tests = {
        "internal": {"coordinates": {"x": turns["x"], "ABC": ["A", "B", "C"]}, "n_bins": 24},
        "free_energy": {"dihedrals": turns, "regions": {"plus": [[0, 180], [-180, 180]]}},
    }
    found = evaluate(EvaluateConfig(trajectories=files, tests=tests, out=str(tmp_path / "out")))
    parts = found.of("internal", InternalDistributions)["student"].parts
    assert parts["ABC"].value[parts["ABC"].density > 0.0] == pytest.approx([90.0], abs=0.1)
    surfaces = {m: f.parts["x, y"] for m, f in found.of("free_energy", FreeEnergySurfaces).items()}
    share = {m: s.populations["plus"] for m, s in surfaces.items()}
    assert share["student"] == pytest.approx(share["reference"], abs=0.1)
    assert share["control"] < 0.5 < share["student"]
    differences = {m: compare_distributions(s, surfaces["reference"]) for m, s in surfaces.items()}
    assert not differences["student"].clear
    assert differences["control"].clear
    for name in ("internal", "free_energy"):
        assert (tmp_path / "out" / f"{name}.png").stat().st_size > 10_000
    assert "plus (%)" in (tmp_path / "out" / "populations.csv").read_text()


def test_evaluations_that_cannot_apply_say_so(tmp_path):
    files = trajectories(tmp_path, reference=drawn(5, 20))

    def ask(**tests):
        evaluate(EvaluateConfig(trajectories=files, tests=tests, out=str(tmp_path / "out")))

    for name in ("rdf", "adf", "pressure", "diffusion"):
        with pytest.raises(ConfigError, match=f"'{name}' needs .* periodic along all three axes"):
            ask(**{name: {}})
    with pytest.raises(ConfigError, match="'internal' needs 'coordinates' to look at"):
        ask(internal={})
    with pytest.raises(ConfigError, match="'free_energy' needs two 'dihedrals'"):
        ask(free_energy={"dihedrals": {"x": ["A", "B", "C", "D"]}})


# -- bonds that break ------------------------------------------------------------------------------


def test_bonds_of_a_reference_break_where_they_are_stretched():
    skeleton = Skeleton.of(chains(twisted(drawn(8, 100))))
    assert set(map(frozenset, skeleton.bonds)) == {frozenset({k, k + 1}) for k in range(3)}
    assert skeleton.longest == pytest.approx([1.5] * 3)
    torn = twisted([120.0])
    assert skeleton.symptom(chains(1.3 * torn)) == ""
    torn[0, 3] *= 1.8
    assert "the bond C-D broke: 3." in skeleton.symptom(chains(torn))


def test_what_moves_freely_is_no_bond():
    x = twisted(drawn(9, 50))
    x[:, 3] += np.linspace(0.0, 20.0, 50)[:, None]
    skeleton = Skeleton.of(chains(x))
    assert set(map(frozenset, skeleton.bonds)) == {frozenset({0, 1}), frozenset({1, 2})}
    far = x[:1].copy()
    far[0, 3] += 50.0
    assert skeleton.symptom(chains(far)) == ""
