"""`potstill fit`: a linear model (SNAP, pair potentials) by least squares, for ASE and LAMMPS."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from potstill.checkpoint import save_potential
from potstill.deploy import deploy
from potstill.errors import DataError, suggest
from potstill.evaluate.errors import evaluate_errors
from potstill.models import SNAP, ZBL, PairPotential, Potential, SumPotential
from potstill.models.linear import SNAPHyperparameters
from potstill.models.pair import PairHyperparameters
from potstill.train import LinearFit, fit_linear
from potstill.train.initialize import stored_prior
from potstill.workflows.base import Display, Settings, claim_folder, potential_info, write_json
from potstill.workflows.data import DataSettings, load_parts
from potstill.workflows.training import show_errors

#: Weights of labels that are there: squared they are near the inverse of the variances wanted.
_WEIGHTS = {"energy": 100.0, "forces": 1.0, "stress": 50.0}


_Ridge = Annotated[float, Field(ge=0)]


class SNAPModel(SNAPHyperparameters):
    """SNAP.

    Parameters
    ----------
    kind : {"snap"}
        May be left out.
    """

    kind: Literal["snap"] = "snap"


class PairModel(PairHyperparameters):
    """A pair potential.

    Parameters
    ----------
    kind : {"pair"}
        What tells it from SNAP.
    """

    kind: Literal["pair"]


def _kind_of(value: Any) -> str:
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    return "PairModel" if kind == "pair" else "SNAPModel"


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
    model : SNAPModel or PairModel
        Hyper-parameters of SNAP, or with `kind: pair` of the pair potential.
    weights : dict, optional
        Factor of the rows of each property (energy per atom, forces, stress): a number, or one per
        group of structures. By default 100, 1 and 50 for the labels that the data have, and forces
        alone for pair potentials.
    prior : {"none", "zbl"} or str, optional
        Short-range repulsion, or what a checkpoint (`prior.pt`) holds, such as bonds of beads:
        subtracted from the labels and part of the saved model. By default ZBL for SNAP, and none
        for pair potentials, which have a repulsion of their own.
    ridge : float or tuple of float
        Penalty on the squares of the coefficients, or on the third derivatives of pair potentials.
        Of several the one with the least residual of the validation set is taken.
    """

    out: str
    data: DataSettings
    source: str = "reference"
    model: Annotated[
        Annotated[SNAPModel, Tag("SNAPModel")] | Annotated[PairModel, Tag("PairModel")],
        Discriminator(_kind_of),
    ] = Field(default_factory=SNAPModel)
    weights: dict[str, float | dict[str, float]] | None = None
    prior: Literal["none", "zbl"] | Annotated[str, Field(pattern=r"\.pt$")] | None = None
    ridge: _Ridge | Annotated[tuple[_Ridge, ...], Field(min_length=1)] = 0.0


def fit(config: FitConfig, display: Display | None = None) -> LinearFit:
    """Fit a linear model and show its errors.

    The run folder gets `config.yaml`, `best.pt`, `errors.json` and the files of LAMMPS:
    `best.snapcoeff` and `best.snapparam`, or `best.table`, and `best.in` with the commands that use
    them; `potstill export` writes what has another prior.

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
    of_pairs = isinstance(config.model, PairModel)
    usual_weights = {"forces": 1.0} if of_pairs else _WEIGHTS
    weights = config.weights or {k: w for k, w in usual_weights.items() if k in targets}
    claim_folder(folder, config)
    kind = PairPotential if of_pairs else SNAP
    model = kind(structures.species_table, **config.model.model_dump(exclude={"kind"})).double()
    prior: Potential | None = None
    if config.prior not in (None, "none", "zbl"):
        prior = stored_prior(str(config.prior), structures.species_table)
    elif config.prior == "zbl" or (config.prior is None and not of_pairs):
        usual = ZBL.for_species(structures.species_table)
        prior = ZBL(structures.species_table, usual.inner, usual.cutoff, "lammps").double()
    unseen = parts["validation"]
    with display.task(f"fitting {model.coefficients.numel()} coefficients"):
        found = fit_linear(
            model,
            structures,
            targets,
            weights=weights,
            baseline=prior,
            ridge=config.ridge,
            validation=None
            if isinstance(config.ridge, float)
            else (unseen.structures, unseen.labels[config.source]),
        )
    if isinstance(model, PairPotential):
        model.continue_inward(model.first_distances(structures))
    components: dict[str, Potential] = {"network": model}
    potential = SumPotential(components if prior is None else {"prior": prior, **components})
    info = potential_info(structures, teacher=sources.get(config.source))
    save_potential(folder / "best.pt", potential, info)
    if prior is None or (isinstance(prior, ZBL) and not of_pairs):
        deploy(potential, "lammps-table" if of_pairs else "lammps-snap", folder, "best")
    channel = "reference" if config.source == "reference" else "teacher"
    reports = {
        name: evaluate_errors(potential, part.structures, {channel: part.labels[config.source]})
        for name, part in parts.items()
    }
    write_json(folder / "errors.json", {name: report.to_json() for name, report in reports.items()})
    show_errors(display, "errors", {name: report.own for name, report in reports.items()})
    return found
