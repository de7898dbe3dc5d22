"""`potstill epsilon`: which epsilon suits central differences for a model, data and precision."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from pydantic import Field

from potstill.checkpoint import load_potential
from potstill.distill import LossTerm
from potstill.distill.terms import check_signals
from potstill.files import write_atomically
from potstill.ragged import draw
from potstill.report.panels import Drawing, Look, Panel, Series
from potstill.report.plots import Figure, write_figure
from potstill.report.tables import Table
from potstill.train import TrainingSet, TrainSettings
from potstill.train.epsilon import EpsilonScan, scan_epsilon
from potstill.train.initialize import initial_student
from potstill.workflows.base import Display, Settings, claim_folder, write_json
from potstill.workflows.data import DataSettings, load_parts


class EpsilonConfig(Settings):
    """Settings of `potstill epsilon`; a config of `potstill train` without stages is one.

    Parameters
    ----------
    out : str
        Folder for the results.
    data : DataSettings
        Data as for `train`; structures are drawn from the training set.
    train : TrainSettings
        Settings of the training, of which model, loss, precision and `force_gradient.folded` count.
    initial : str, optional
        Checkpoint to examine; an untrained model by default.
    loss : {"quadratic", "training"}
        The loss of the paper, half the squared force error of each structure, or that of `train`.
    epsilons : tuple of float, optional
        Displacements to try; half decades by default.
    n_structures : int
        Number of structures to draw.
    exact : bool
        Compare gradients with backpropagation in float64, which takes most of the time.
    """

    out: str
    data: DataSettings
    train: TrainSettings = Field(default_factory=TrainSettings)
    initial: str | None = None
    loss: Literal["quadratic", "training"] = "quadratic"
    epsilons: tuple[float, ...] | None = None
    n_structures: int = Field(default=16, ge=1)
    exact: bool = True


def find_epsilon(config: EpsilonConfig, display: Display | None = None) -> EpsilonScan:
    """Scan, and write `epsilon.json`, `epsilon.csv` and the plot `epsilon_scan.png` and `.svg`.

    Raises
    ------
    MissingLabelError
        If a label that the loss asks for is absent.
    """
    display = display or Display()
    folder = Path(config.out)
    parts, _ = load_parts(config.data)
    initial = None if config.initial is None else load_potential(config.initial)[0]
    data = parts["train"]
    if initial is not None:
        data = data.with_species_table(initial.species_table)
    quadratic = config.loss == "quadratic"
    terms = (LossTerm(property="forces"),) if quadratic else config.train.label_terms
    check_signals(terms, data.labels, "training set")
    claim_folder(folder, config)
    student, data = initial_student(config.train, data, initial)
    drawn = _labeled(data, terms, config.n_structures, config.train.seed)
    with display.task("epsilon", len(drawn)) as task:
        scan = scan_epsilon(
            student["network"],
            drawn,
            config.train,
            loss=config.loss,
            epsilons=config.epsilons,
            exact=config.exact,
            on_point=task.update,
        )
    write_json(folder / "epsilon.json", scan.to_json())
    write_atomically(folder / "epsilon.csv", scan_table(scan).csv())
    plot_scan(folder, scan)
    return scan


def scan_table(scan: EpsilonScan) -> Table:
    """The errors by epsilon."""
    gradient = scan.gradient or (None,) * len(scan.epsilons)
    rows = tuple(zip(scan.epsilons, scan.proxy, gradient, strict=True))
    columns = ("epsilon", "error of the proxy", "error of the gradient")
    return Table("epsilon", "Errors of central differences", columns, rows)


def plot_scan(folder: Path, scan: EpsilonScan) -> Figure:
    """Draw both errors against epsilon: crosses and circles, as in the paper's Fig. 1."""
    proxy = "Eq. 14" if scan.loss == "quadratic" else "slope of the energy"
    looks = {
        "proxy": Look(f"proxy ({proxy})", "#D55E00", "X"),
        "gradient": Look("gradient (Eq. 11)", "#0072B2", "o"),
        "backpropagation": Look("backpropagation in this precision", "#222222", "*", ":"),
    }
    series = [_points("proxy", scan.epsilons, scan.proxy)]
    if scan.gradient is not None:
        series.append(_points("gradient", scan.epsilons, scan.gradient))
    if scan.backpropagation:
        series.append(Series("backpropagation", [], [scan.backpropagation], kind="level"))
    panel = Panel(
        "epsilon", "relative error", series, f"{scan.precision}, {scan.loss} loss", "log", "log"
    )
    caption = (
        f"Errors of central differences over {scan.n_structures} structures; the proxy recommends "
        f"epsilon = {scan.recommended:.1e}."
    )
    drawing = Drawing("epsilon_scan", "Choice of epsilon", caption, [panel], height=3.8)
    return write_figure(folder, drawing, looks)


def _points(name: str, x: tuple[float, ...], y: tuple[float, ...]) -> Series:
    """Zeros, which have no place on a logarithmic axis, are left out."""
    kept = [(a, b) for a, b in zip(x, y, strict=True) if b > 0]
    return Series(name, [a for a, _ in kept], [b for _, b in kept], joined=True)


def _labeled(
    data: TrainingSet, terms: tuple[LossTerm, ...], n_structures: int, seed: int
) -> TrainingSet:
    """Some structures that have a label of the loss."""
    labeled = torch.zeros(len(data), dtype=torch.bool)
    for term in terms:
        labeled |= data.labels[term.source].presence(term.property, len(data))
    systems = labeled.nonzero()[:, 0]
    return data.select(systems[draw(len(systems), n_structures, seed)])
