"""`potstill coarse ibi`: pair potentials from radial distributions, iteratively."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from potstill.checkpoint import save_potential
from potstill.coarse import Inversion, Iteration, Measured, invert
from potstill.deploy import deploy
from potstill.errors import ConfigError, DivergenceError
from potstill.evaluate.lammps_md import lammps_engine, run_replicas_in_lammps
from potstill.evaluate.pressure import pressure
from potstill.evaluate.rdf import radial_distributions
from potstill.models import PairPotential
from potstill.models.pair import PairHyperparameters
from potstill.sample.replicas import ReplicaSettings, run_replicas
from potstill.store import LabeledStore
from potstill.structures import Structures
from potstill.units import GPA, PRESSURE
from potstill.workflows.base import Display, Settings, claim_folder, potential_info


class IbiDynamics(Settings):
    """The dynamics of every iteration, at constant volume.

    Parameters
    ----------
    engine : {"replicas", "lammps"}
        Many replicas at a time in this process, or one after the other in LAMMPS, which is many
        times faster with pair potentials and needs the extra `lammps`.
    n_replicas : int
        Each starts from another frame of the reference.
    n_frames : int
        Frames of each replica.
    stride : float
        fs between frames.
    equilibration : float
        fs.
    timestep : float
        fs.
    thermostat_time : float
        fs, the inverse of Langevin's friction.
    """

    engine: Literal["replicas", "lammps"] = "replicas"
    n_replicas: int = Field(default=4, ge=1)
    n_frames: int = Field(default=50, ge=1)
    stride: float = Field(default=1000.0, gt=0)
    equilibration: float = Field(default=10_000.0, ge=0)
    timestep: float = Field(default=5.0, gt=0)
    thermostat_time: float = Field(default=1000.0, gt=0)


class IbiSettings(Settings):
    """How potentials are found.

    Parameters
    ----------
    model : PairHyperparameters
        Cutoff, up to which g(r) is matched, and knots of the splines.
    bin_width : float
        Of g(r), Å.
    n_iterations : int
        Simulations at most, the first with the potential of mean force.
    step : float
        Part of the full correction, kT ln(g / g_target).
    smoothing : float
        Length in Å below which potentials and corrections are smoothed.
    tolerance : float
        Relative error of g(r), the mean over the pairs, at which to stop.
    pressure : float, optional
        GPa; a linear ramp is added to the corrections to get there.
    dynamics : IbiDynamics
        The dynamics of every iteration.
    seed : int
        Of the dynamics.
    """

    model: PairHyperparameters = Field(default_factory=PairHyperparameters)
    bin_width: float = Field(default=0.1, gt=0)
    n_iterations: int = Field(default=20, ge=1)
    step: float = Field(default=0.5, gt=0, le=1)
    smoothing: float = Field(default=0.25, gt=0)
    tolerance: float = Field(default=0.0, ge=0)
    pressure: float | None = None
    dynamics: IbiDynamics = Field(default_factory=IbiDynamics)
    seed: int = 0


class IbiConfig(IbiSettings):
    """Settings of `potstill coarse ibi`, beside those of `IbiSettings`.

    Parameters
    ----------
    out : str
        The run folder.
    store : str
        Label store with the reference trajectory of the beads; labels are not used.
    temperature : float, optional
        K; by default that of the store.
    """

    out: str
    store: str
    temperature: float | None = Field(default=None, gt=0)


def invert_distributions(config: IbiConfig, display: Display | None = None) -> Iteration:
    """Find pair potentials with the g(r) of a trajectory.

    Called again it continues, with more iterations or a smaller tolerance if they are given.

    The run folder gets the potential of every iteration with its dynamics, `iterations.json` with
    the errors of g(r), and the potential of the smallest error (with a pressure to reach: the last
    one) as `best.pt` and, for LAMMPS, `best.table` and `best.in`. Returns its iteration.

    Raises
    ------
    ConfigError
        If nobody knows the temperature.
    DivergenceError
        If a replica breaks down.
    """
    display = display or Display()
    store = LabeledStore.open(config.store)
    temperature = config.temperature or store.info.get("temperature")
    if temperature is None:
        raise ConfigError(f"{config.store} does not state its temperature: give 'temperature'")
    frames = store.structures()
    folder = Path(config.out).absolute()
    claim_folder(folder, config, free=lambda key: key in ("n_iterations", "tolerance"))
    model = PairPotential(frames.species_table, **config.model.model_dump()).double()
    info = potential_info(frames)

    n_bins = round(model.cutoff / config.bin_width)

    def distributions(of: Structures) -> dict[str, np.ndarray]:
        found = radial_distributions(
            of, r_max=model.cutoff, n_bins=n_bins, pairs=list(model.kinds), n_blocks=1
        )
        return {pair: distribution.g for pair, distribution in found.items()}

    def simulate(model: PairPotential, checkpoint: Path) -> Measured:
        moved = _moved(frames, model, checkpoint, temperature, config)
        stress = model.predict(moved, properties=["stress"])["stress"]
        in_bar = pressure(moved, stress, temperature).pressure
        return Measured(distributions(moved), in_bar * PRESSURE["bar"] / GPA)

    def tell(iteration: Iteration) -> None:
        worst = max(iteration.error, key=lambda pair: iteration.error[pair])
        display.say(
            f"iteration {iteration.number}: g(r) differs by {iteration.mean_error:.4f} on average, "
            f"most, by {iteration.error[worst]:.4f}, of {worst}; {iteration.pressure:.4f} GPa"
        )

    edges = np.linspace(0.0, model.cutoff, n_bins + 1)
    problem = Inversion(
        r=0.5 * (edges[1:] + edges[:-1]),
        target=distributions(frames),
        temperature=temperature,
        step=config.step,
        smoothing=config.smoothing,
        pressure=config.pressure,
    )
    done = invert(
        problem,
        model,
        simulate,
        folder,
        n_iterations=config.n_iterations,
        tolerance=config.tolerance,
        info=info,
        tell=tell,
    )
    save_potential(folder / "best.pt", model, info)
    deploy(model, "lammps-table", folder, "best")
    return problem.best_of(done)


def _moved(
    frames: Structures, model: PairPotential, checkpoint: Path, temperature: float, c: IbiConfig
) -> Structures:
    """Frames of the dynamics of an iteration; kept in the folder of its checkpoint's name."""
    at = np.linspace(0, len(frames) - 1, c.dynamics.n_replicas).round().astype(int).tolist()
    folder = checkpoint.with_suffix("")
    common = c.dynamics.model_dump(exclude={"engine", "n_replicas"})
    settings = ReplicaSettings(temperature=temperature, seed=c.seed, **common)
    if c.dynamics.engine == "lammps":
        engine = lammps_engine(str(checkpoint), {}, folder)
        result = run_replicas_in_lammps(frames.select(at), engine, settings, folder)
    else:
        result = run_replicas(frames.select(at), model, settings, folder=folder)
    for k, breakdown in enumerate(result.breakdowns):
        if breakdown is not None:
            raise DivergenceError(
                f"replica {k} broke down after {breakdown.time:g} fs with {checkpoint.name} "
                f"({breakdown.reason}): choose a shorter timestep or a smaller step"
            )
    return result.frames.structures
