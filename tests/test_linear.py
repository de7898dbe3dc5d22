"""SNAP: LAMMPS and its published potentials as oracle, symmetries of the expansion, files."""

import json
from pathlib import Path

import ase.build
import numpy as np
import pytest
import torch
from torch.func import functional_call, jvp

from lammps_engine import potentials_folder, run_lammps
from potstill.bispectrum import clebsch_gordan, component_labels
from potstill.errors import DataError, ModelError
from potstill.models import SNAP, Edges
from potstill.neighbors import build_neighbor_list, pair_vectors
from potstill.species import SpeciesTable
from potstill.structures import Structures
from potstill.testing import contract_structures

ALL = ["energy", "forces", "stress", "atomic_energies"]
GOLDEN = Path(__file__).parent / "golden" / "snap_lammps.json"


def crystal(symbols, a, seed):
    """A strained, shaken bcc cell of 16 atoms whose lattice LAMMPS takes as it is."""
    atoms = ase.build.bulk("Ta", cubic=True, a=a).repeat(2)
    strain = np.array([[0.02, 0.0, 0.0], [0.03, 0.01, 0.0], [-0.02, 0.015, 0.0]])
    atoms.set_cell(atoms.cell[:] @ (np.eye(3) + strain), scale_atoms=True)
    atoms.rattle(0.2, seed=seed)
    atoms.symbols[:] = [symbols[k % len(symbols)] for k in range(len(atoms))]
    atoms.wrap()
    return atoms


# -- LAMMPS --------------------------------------------------------------------------------------


def run_snap(atoms, elements, coeff, param, descriptors=""):
    """What `pair_style snap` gives, and components if they are asked for."""
    style = f"""pair_style snap
        pair_coeff * * {coeff} {param} {" ".join(elements)}"""
    if descriptors:
        style += f"\ncompute components all sna/atom {descriptors}"
    result = run_lammps(atoms, elements, style, ["components"] if descriptors else [])
    if descriptors:
        result["bispectrum"] = result.pop("components")
    return result


def assert_agrees(model, atoms, expected, tolerance):
    """All that LAMMPS gives, relative to the largest value of its kind (components: each)."""
    prediction = model.predict(Structures.from_ase(atoms), properties=ALL, taps=["bispectrum"])
    for name, value in expected.items():
        value = np.array(value)
        if name == "bispectrum":
            ours = prediction.features[name].numpy()
            np.testing.assert_allclose(ours, value, rtol=tolerance, atol=tolerance)
        else:
            ours = prediction[name].numpy()
            ours = ours[0] if name == "stress" else ours
            scale = np.abs(value).max()
            assert scale > 1e-3
            np.testing.assert_allclose(ours, value, rtol=0, atol=tolerance * scale)


def test_published_potentials_in_lammps():
    """All that LAMMPS brings: ten elements, linear and quadratic, 2J = 6 and 8."""
    refused, agreeing = [], []
    for coeff in sorted(potentials_folder().glob("*.snapcoeff")):
        param = coeff.with_name(coeff.name.replace("coeff", "param"))
        try:
            model = SNAP.from_lammps(coeff, param)
        except DataError as error:
            refused.append(str(error))
            continue
        elements = list(model.species_table.names)
        # Nearest neighbors at about 2.7 Å, 1.7 Å in carbon.
        atoms = crystal(elements, 2.0 if elements == ["C"] else 3.1, seed=1)
        assert_agrees(model, atoms, run_snap(atoms, elements, coeff, param), 1e-12)
        agreeing.append(coeff.name)
    assert len(agreeing) >= 17
    assert all("no chemflag 1" in message for message in refused)


@pytest.mark.parametrize(
    "changes",
    [
        dict(twojmax=6, rcutfac=4.67637),
        dict(twojmax=5, rcutfac=4.2, bzero=False, rfac0=0.9, rmin0=0.7),
        dict(twojmax=3, rcutfac=2.9, switch=False, radii=[0.7, 0.6], weights=[0.8, -0.3]),
        dict(twojmax=8, rcutfac=4.8, radii=[0.45, 0.5], weights=[1.0, 0.6], quadratic=True),
    ],
)
def test_components_and_written_files_in_lammps(tmp_path, changes):
    """`compute sna/atom`, and LAMMPS gets the same energies from the files that we write."""
    torch.manual_seed(3)
    table = SpeciesTable.from_symbols(["Al", "Ta"])
    model = SNAP(table, **changes).double()
    coeff, param = tmp_path / "a.snapcoeff", tmp_path / "a.snapparam"
    model.to_lammps(coeff, param)
    h = model.hyperparameters()
    words = [h["rcutfac"], h["rfac0"], h["twojmax"], *h["radii"], *h["weights"]]
    words += ["rmin0", h["rmin0"], "bzeroflag", int(h["bzero"]), "switchflag", int(h["switch"])]
    atoms = crystal(["Al", "Ta"], 3.3, seed=2)
    elements = list(table.names)
    expected = run_snap(atoms, elements, coeff, param, " ".join(map(str, words)))
    assert_agrees(model, atoms, expected, 1e-10)


def golden_cases():
    """Model, structure and what LAMMPS gave for them."""
    for case in json.loads(GOLDEN.read_text(encoding="utf-8"))["cases"]:
        model = SNAP(SpeciesTable.from_symbols(case["species"]), **case["hyperparameters"]).double()
        with torch.no_grad():
            model.coefficients.copy_(torch.tensor(case["coefficients"], dtype=torch.float64))
        atoms = ase.Atoms(case["symbols"], positions=case["positions"], cell=case["cell"], pbc=True)
        yield model, atoms, case["expected"]


def test_stored_results_of_lammps():
    """The published Ta06A, and two species with quadratic terms, without LAMMPS at hand."""
    for model, atoms, expected in golden_cases():
        assert_agrees(model, atoms, expected, 1e-11)


def test_lammps_still_gives_the_stored_results(tmp_path):
    coeff, param = tmp_path / "a.snapcoeff", tmp_path / "a.snapparam"
    for model, atoms, expected in golden_cases():
        model.to_lammps(coeff, param)
        found = run_snap(atoms, list(model.species_table.names), coeff, param)
        for name, value in found.items():
            np.testing.assert_allclose(value, expected[name], rtol=1e-9, atol=1e-9)


# -- the expansion -------------------------------------------------------------------------------


def test_clebsch_gordan_coefficients():
    # Two halves to one and to zero.
    root = 0.5**0.5
    triplet, singlet = clebsch_gordan(1, 1, 2), clebsch_gordan(1, 1, 0)
    expected = torch.tensor([[[1.0, 0, 0], [0, root, 0]], [[0, root, 0], [0, 0, 1.0]]])
    torch.testing.assert_close(triplet, expected.double())
    torch.testing.assert_close(singlet[..., 0], torch.tensor([[0.0, -root], [root, 0.0]]).double())
    # All couplings of two momenta together are an orthogonal matrix.
    for j1, j2 in ((5, 2), (4, 4), (8, 7), (3, 0)):
        parts = [clebsch_gordan(j1, j2, j) for j in range(abs(j1 - j2), j1 + j2 + 1, 2)]
        whole = torch.cat(parts, dim=2).flatten(0, 1)
        torch.testing.assert_close(whole @ whole.T, torch.eye(len(whole)).double())


def test_number_of_components():
    assert [len(component_labels(j)) for j in (0, 2, 4, 6, 8)] == [1, 5, 14, 30, 55]
    assert component_labels(2) == ((0, 0, 0), (1, 0, 1), (1, 1, 2), (2, 0, 2), (2, 2, 2))


def test_an_isolated_atom_has_the_components_that_bzero_takes_off():
    table = SpeciesTable.from_symbols(["Ta"])
    atom = Structures.from_ase(ase.Atoms("Ta"))
    plain = SNAP(table, twojmax=4, rcutfac=4.0, bzero=False).double()
    components = plain.predict(atom, taps=["bispectrum"]).features["bispectrum"][0]
    expected = torch.tensor([j + 1.0 for _, _, j in component_labels(4)]).double()
    torch.testing.assert_close(components, expected)
    shifted = SNAP(table, twojmax=4, rcutfac=4.0, bzero=True).double()
    components = shifted.predict(atom, taps=["bispectrum"]).features["bispectrum"][0]
    torch.testing.assert_close(components, torch.zeros(14).double())


def test_blocks_of_atoms_do_not_matter(monkeypatch):
    model = small_model()
    structures = contract_structures(model)
    whole = model.predict(structures, properties=ALL)
    monkeypatch.setattr("potstill.models.linear._BLOCK", 5)
    blocks = model.predict(structures, properties=ALL)
    for name in ALL:
        torch.testing.assert_close(
            blocks[name], whole[name], rtol=1e-12, atol=1e-12, equal_nan=True
        )


def small_model():
    torch.manual_seed(5)
    return SNAP(SpeciesTable.from_symbols(["Al", "Ta"]), twojmax=4, rcutfac=4.0).double()


# -- derivatives ---------------------------------------------------------------------------------


@pytest.mark.parametrize("switch", [True, False])
@pytest.mark.parametrize("twojmax", [1, 3, 4])
def test_slopes_of_the_components_are_those_of_backward_passes(twojmax, switch, monkeypatch):
    monkeypatch.setattr("potstill.models.linear._SLOPE_BLOCK", 5)
    table = SpeciesTable.from_symbols(["Al", "Ta"])
    model = SNAP(
        table, twojmax=twojmax, rcutfac=4.0, radii=[0.45, 0.5], weights=[1.0, 0.7], switch=switch
    ).double()
    structures = contract_structures(model)
    neighbors = build_neighbor_list(structures, model.cutoff)
    edges = Edges(neighbors.center, neighbors.neighbor)
    r_ij = pair_vectors(structures, neighbors).requires_grad_(True)
    expected = model.bispectrum(structures.species, edges, r_ij, structures.n_atoms)
    components, slopes = model.bispectrum_slopes(
        structures.species, edges, r_ij.detach(), structures.n_atoms
    )
    torch.testing.assert_close(components, expected.detach(), rtol=1e-12, atol=1e-12)
    for k, column in enumerate(expected.unbind(1)):
        by_hand = torch.autograd.grad(column.sum(), r_ij, retain_graph=True)[0]
        torch.testing.assert_close(slopes[:, :, k], by_hand, rtol=1e-10, atol=1e-10)


def test_forward_over_reverse_gives_the_gradient_of_a_force_loss():
    """d/dt of dE/dcoefficients along the force errors, against backpropagation done twice."""
    model = small_model()
    structures = contract_structures(model).select([0])
    neighbors = build_neighbor_list(structures, model.cutoff)
    edges = Edges(neighbors.center, neighbors.neighbor)
    r_ij = pair_vectors(structures, neighbors)
    forces = model.predict(structures, neighbors, create_graph=True)["forces"]
    (expected,) = torch.autograd.grad(0.5 * forces.square().sum(), model.coefficients)
    g = forces.detach()

    def gradient(r_ij):
        def energy(coefficients):
            arguments = (structures.species, edges, r_ij, structures.n_atoms)
            output = functional_call(model, {"coefficients": coefficients}, arguments)
            return output.atomic_energies.sum()

        return torch.func.grad(energy)(model.coefficients.detach())

    _, change = jvp(gradient, (r_ij,), (g[edges.neighbor] - g[edges.center],))
    torch.testing.assert_close(-change, expected, rtol=1e-11, atol=1e-11 * expected.abs().max())


def test_training_after_inference_mode():
    table = SpeciesTable.from_symbols(["Cu"])
    model = SNAP(table, twojmax=7, rcutfac=4.0).double()  # not met elsewhere: nothing is cached
    structures = contract_structures(model)
    with torch.inference_mode():
        model(
            torch.zeros(2, dtype=torch.int64),
            Edges(torch.tensor([0]), torch.tensor([1])),
            torch.tensor([[2.0, 0.0, 0.0]], dtype=torch.float64),
            1,
        )
    model.predict(structures, create_graph=True)["forces"].square().sum().backward()
    assert float(model.coefficients.grad.abs().max()) > 0.0


# -- files and settings --------------------------------------------------------------------------


def test_written_files_are_read_back_exactly(tmp_path):
    torch.manual_seed(6)
    table = SpeciesTable.from_symbols(["Al", "Ta"])
    settings = dict(twojmax=3, rcutfac=4.1, radii=[0.51, 0.47], weights=[1.0, 0.3], rmin0=0.2)
    model = SNAP(table, **settings, rfac0=0.97, switch=False, bzero=False, quadratic=True).double()
    model.to_lammps(tmp_path / "c", tmp_path / "p")
    again = SNAP.from_lammps(tmp_path / "c", tmp_path / "p")
    assert again.hyperparameters() == model.hyperparameters()
    assert again.species_table == table
    assert torch.equal(again.coefficients, model.coefficients)


COEFF = "# comment\n\n1 3\nTa 0.5 1\n-1.5\n0.25 # B[0]\n0.125\n"
PARAM = "rcutfac 4.0\ntwojmax 1\n"


def test_defaults_of_the_parameter_file(tmp_path):
    (tmp_path / "c").write_text(COEFF)
    (tmp_path / "p").write_text(PARAM + "chunksize 100 # of no concern\nchemflag 0\n")
    model = SNAP.from_lammps(tmp_path / "c", tmp_path / "p")
    assert model.coefficients.tolist() == [[-1.5, 0.25, 0.125]]
    assert (
        model.hyperparameters()
        == SNAP(model.species_table, twojmax=1, rcutfac=4.0).hyperparameters()
    )
    p = model.hyper
    assert (p.rfac0, p.rmin0, p.switch, p.bzero) == (
        0.99363,
        0.0,
        True,
        True,
    )


@pytest.mark.parametrize(
    ("coeff", "param", "message"),
    [
        ("1 3\nTa 0.5 1\n-1.5\n0.25\n", PARAM, "not a complete"),
        ("", PARAM, "not a complete"),
        (COEFF.replace("1 3", "1 2").replace("0.125\n", ""), PARAM, "2 coefficients for Ta, but"),
        (COEFF.replace("Ta", "Xy"), PARAM, "'Xy' is not a chemical symbol"),
        (COEFF, PARAM + "chemflag 1\n", "no chemflag 1"),
        (COEFF, PARAM + "rfac 0.9\n", "did you mean 'rfac0'"),
        (COEFF, PARAM + "rfac0 much\n", "not a keyword and a number"),
        (COEFF, "twojmax 1\n", "no rcutfac"),
    ],
)
def test_broken_files_are_refused(tmp_path, coeff, param, message):
    (tmp_path / "c").write_text(coeff)
    (tmp_path / "p").write_text(param)
    with pytest.raises(DataError, match=message):
        SNAP.from_lammps(tmp_path / "c", tmp_path / "p")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"radii": [0.5]}, "each of 2 species"),
        ({"rcutfac": -1.0}, "rcutfac: .* greater than 0"),
        ({"twojmax": -2}, "twojmax: .* equal to 0"),
        ({"rfac0": 1.2}, "rfac0"),
        ({"rmin0": 4.0}, "rmin0"),
    ],
)
def test_wrong_hyperparameters_are_refused(changes, message):
    table = SpeciesTable.from_symbols(["Al", "Ta"])
    with pytest.raises(ModelError, match=message):
        SNAP(table, **(dict(twojmax=2, rcutfac=4.0) | changes))
