"""Liquid aluminium in LAMMPS: students and controls of a study beside ANI-Al.

    potstill study studies/teacher_student/al_triples.yaml --out runs/al_triples
    python studies/liquid/al.py runs/al_triples --work runs/al_lammps

The crystal is melted, and its liquid sampled at 1200 K, at the density at which the study sampled
ANI-Al (`measures/rdf-reference.json`). Two runs start from its last frame: one at constant energy
for diffusion, one at constant pressure for density. Everything is in `--work`; a run that is there
is not repeated. `--figure` and `--results` name the folder and file to publish into.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from ase.build import bulk

from potstill.checkpoint import load_potential
from potstill.evaluate.base import as_json
from potstill.evaluate.diffusion import density, diffusion
from potstill.evaluate.distributions import compare_distributions
from potstill.evaluate.lammps_md import lammps_engine, run_in_lammps
from potstill.evaluate.rdf import RadialDistribution, radial_distribution
from potstill.report.panels import LOOKS, Drawing, Panel, Series
from potstill.report.plots import write_figure
from potstill.sample.md import MDJob
from potstill.soundness import closest_pairs, fused
from potstill.structures import Structures
from potstill.units import BOLTZMANN, FS_IN_ASE_TIME

#: What the study gives ANI-Al, in Å, K and fs.
LATTICE_CONSTANT, MELTING_TEMPERATURE, TEMPERATURE = 4.05 * 1.04, 1500.0, 1200.0
TIMESTEP, STRIDE = 2.0, 40.0

LOOKED = {"reference": replace(LOOKS["reference"], label="ANI-Al")}
ROLES = {"student": "student", "control": "control_wf30"}


def jobs(production: float) -> dict[str, MDJob]:
    """The runs of one model, whose samples are `production` fs long."""
    common: dict[str, Any] = {"timestep": TIMESTEP, "stride": STRIDE}
    sampled = {**common, "n_frames": round(production / STRIDE), "temperature": TEMPERATURE}
    return {
        "melt": MDJob(n_frames=1, temperature=MELTING_TEMPERATURE, equilibration=4000.0, **common),
        "liquid": MDJob(equilibration=2000.0, **sampled),
        "energy": MDJob(equilibration=0.0, thermostat_time=None, **sampled),
        "pressure": MDJob(equilibration=2000.0, pressure=0.0, **sampled),
    }


def temperature(frames: Structures) -> float:
    """Mean kinetic temperature, K, of frames whose momentum is conserved."""
    twice = (frames.masses[:, None] * frames.velocities.square()).sum() / FS_IN_ASE_TIME**2
    return float(twice) / (3 * (frames.n_atoms - frames.n_systems) * BOLTZMANN)


def measure(
    checkpoint: Path, work: Path, repeat: int, production: float, seed: int, reference: Any
) -> dict[str, Any]:
    """Structure, diffusion and density of one model's liquid."""
    crystal = bulk("Al", "fcc", a=LATTICE_CONSTANT, cubic=True) * (repeat, repeat, repeat)
    engine = lammps_engine(str(checkpoint), {}, work)
    frames: dict[str, Structures] = {}
    starts = {"melt": None, "liquid": "melt", "energy": "liquid", "pressure": "liquid"}
    for number, (name, job) in enumerate(jobs(production).items()):
        before = starts[name]
        start = frames[before][-1] if before else Structures.from_ase(crystal)
        found = run_in_lammps(job, start, engine, seed=10 * seed + number, folder=work / name)
        frames[name] = found.structures
    trained = load_potential(checkpoint)[1]["trained_on"]["shortest_distances"]
    closest = closest_pairs(frames["liquid"])
    g = radial_distribution(frames["liquid"])
    moved = diffusion(frames["energy"], STRIDE)
    return {
        "rdf": g,
        "beside_reference": compare_distributions(g, reference),
        "closest": closest,
        "closest_in_training": trained,
        "fused": fused(closest, trained),
        "fixed_density": density(frames["liquid"]).density,
        "free_density": density(frames["pressure"]),
        "diffusion_1e-9_m2_per_s": [1e4 * moved.coefficient, 1e4 * moved.coefficient_error],
        "diffusion_exponent": moved.exponent,
        "diffusion_temperature": temperature(frames["energy"]),
    }


def drawing(shown: dict[str, RadialDistribution], reference: RadialDistribution) -> Drawing:
    """g(r) of models on the reference's, and their differences from it."""
    r = reference.r
    first = Series("reference", r, reference.g, y_spread=reference.error, kind="dots")
    lines = [Series(role, r, g.g, kind="line") for role, g in shown.items()]
    differences = [
        Series(role, r, g.g - reference.g, y_spread=np.hypot(g.error, reference.error), kind="line")
        for role, g in shown.items()
    ]
    panels = [
        Panel("r (Å)", "g(r)", [first, *lines], "Liquid Al at 1200 K", from_zero=True),
        Panel("r (Å)", "Difference in g(r)", differences, "Minus ANI-Al", zero_line=True),
    ]
    return Drawing("al_rdf_lammps", "Liquid aluminium in LAMMPS", "", panels)


def main() -> None:
    """Measure all models, draw the first seed's and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("study", type=Path, help="finished study")
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--size", default="medium")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--repeat", type=int, default=8, help="cubic cells along each axis")
    parser.add_argument("--production", type=float, default=10_000.0, help="fs")
    parser.add_argument("--results", type=Path, help="JSON file")
    parser.add_argument("--figure", type=Path, help="folder of al_rdf_lammps.png")
    options = parser.parse_args()
    stored = json.loads((options.study / "measures" / "rdf-reference.json").read_text())
    reference = RadialDistribution.from_json(stored["rdf"])
    found: dict[str, Any] = {}
    for seed in options.seeds:
        for role, strategy in ROLES.items():
            name = f"{strategy}-{options.size}-{seed}"
            found[f"{role}-{seed}"] = result = measure(
                options.study / name / "best.pt",
                options.work / name,
                options.repeat,
                options.production,
                seed,
                reference,
            )
            apart, free = result["beside_reference"], result["free_density"]
            print(
                f"{role} {seed}: g(r) {apart.integrated_absolute_error:.4f} Å from ANI-Al's (noise "
                f"{apart.expected_from_noise:.4f} Å), closest pair "
                f"{min(result['closest'].values()):.2f} Å, D "
                f"{result['diffusion_1e-9_m2_per_s'][0]:.2f} ± "
                f"{result['diffusion_1e-9_m2_per_s'][1]:.2f} 10⁻⁹ m²/s at "
                f"{result['diffusion_temperature']:.0f} K, density at zero pressure "
                f"{free.density:.3f} ± {free.error:.3f} g/cm³ {result['fused']}",
                flush=True,
            )
    if options.results:
        settings = {"n_atoms": 4 * options.repeat**3, "production_fs": options.production}
        text = json.dumps(as_json({"settings": settings, "models": found}), indent=1)
        options.results.write_text(text + "\n", encoding="utf-8")
    if options.figure:
        first = options.seeds[0]
        shown = {role: found[f"{role}-{first}"]["rdf"] for role in ROLES}
        image = write_figure(options.work, drawing(shown, reference), LOOKED).png
        shutil.copy(image, options.figure)


if __name__ == "__main__":
    main()
