"""`potstill fit`: a linear model (SNAP) by least squares, for ASE and for LAMMPS."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from potstill.checkpoint import save_potential
from potstill.deploy import deploy
from potstill.errors import DataError, suggest
from potstill.evaluate.errors import evaluate_errors
from potstill.models import SNAP, ZBL, Potential, SumPotential
from potstill.models.linear import SNAPHyperparameters
from potstill.train import LinearFit, fit_linear
from potstill.workflows.base import Display, Settings, claim_folder, potential_info, write_json
from potstill.workflows.data import DataSettings, load_parts
from potstill.workflows.training import show_errors

#: Weights of labels that are there: squared they are near the inverse of the variances wanted.
_WEIGHTS = {"energy": 100.0, "forces": 1.0, "stress": 50.0}


class FitConfig(Settings):
    """Settings of `potstill fit`.

    Parameters
    ----------
    out : str
        The run folder.
    data : DataSettings
        Training, validation and test sets, as for `train`.
    source : str
        Labels to fit: `reference`, or the name of a teacher.
    model : SNAPHyperparameters
        Hyper-parameters of SNAP.
    weights : dict, optional
        Factor of the rows of each property (energy per atom, forces, stress): a number, or one per
        group of structures. By default 100, 1 and 50 for the labels that the data have.
    prior : {"none", "zbl"}
        Short-range repulsion, subtracted from the labels and part of the saved model.
    ridge : float
        Penalty on the squares of the coefficients.
    """

    out: str
    data: DataSettings
    source: str = "reference"
    model: SNAPHyperparameters = Field(default_factory=SNAPHyperparameters)
    weights: dict[str, float | dict[str, float]] | None = None
    prior: Literal["none", "zbl"] = "zbl"
    ridge: float = Field(default=0.0, ge=0)


def fit(config: FitConfig, display: Display | None = None) -> LinearFit:
    """Fit a linear model and show its errors.

    The run folder gets `config.yaml`, `best.pt`, `errors.json` and the files of LAMMPS:
    `best.snapcoeff`, `best.snapparam` and `best.in` with the commands that use them.

    Raises
    ------
    DataError
        If the source has no labels, or nothing has a weight above zero.
    """
    display = display or Display()
    folder = Path(config.out).absolute()
    parts, sources = load_parts(config.data)
    labels = parts["train"].labels
    if config.source not in labels:
        raise DataError(f"no labels of '{config.source}'{suggest(config.source, labels)}")
    structures, targets = parts["train"].structures, labels[config.source]
    weights = config.weights or {k: w for k, w in _WEIGHTS.items() if k in targets}
    claim_folder(folder, config)
    model = SNAP(structures.species_table, **config.model.model_dump()).double()
    prior = None
    if config.prior == "zbl":
        usual = ZBL.for_species(structures.species_table)
        prior = ZBL(structures.species_table, usual.inner, usual.cutoff, "lammps").double()
    with display.task(f"fitting {model.coefficients.numel()} coefficients"):
        found = fit_linear(
            model, structures, targets, weights=weights, baseline=prior, ridge=config.ridge
        )
    components: dict[str, Potential] = {"network": model}
    potential = SumPotential(components if prior is None else {"prior": prior, **components})
    info = potential_info(structures, teacher=sources.get(config.source))
    save_potential(folder / "best.pt", potential, info)
    deploy(potential, "lammps-snap", folder, "best")
    channel = "reference" if config.source == "reference" else "teacher"
    reports = {
        name: evaluate_errors(potential, part.structures, {channel: part.labels[config.source]})
        for name, part in parts.items()
    }
    write_json(folder / "errors.json", {name: report.to_json() for name, report in reports.items()})
    show_errors(display, "errors", {name: report.own for name, report in reports.items()})
    return found
