"""The energy zero, fitted again to the trained network."""

from __future__ import annotations

from pathlib import Path

import torch

from potstill.checkpoint import load_potential, save_potential
from potstill.models import SpeciesOffsets, SumPotential
from potstill.train.data import TrainingSet, fit_offsets
from potstill.train.settings import TrainSettings
from potstill.train.validation import EVALUATION_ATOMS


@torch.no_grad()
def refit_energy_zero(best: Path, data: TrainingSet, settings: TrainSettings) -> None:
    """Add the mean energy errors per species to the offsets of a saved potential, in place.

    Steps of Adam move the energies of all atoms together, by as much as the network's own error of
    an energy per atom. Here the species' energies are solved for instead, by least squares of the
    errors per atom of the training set. The file's `training.energy_shift` holds them, eV; a
    file that has it is left as it is.

    Parameters
    ----------
    best : Path
        A student, written by the training loop.
    data : TrainingSet
        Training set, less the offsets and the prior that training started from.
    """
    potential, info = load_potential(best)
    if "energy_shift" in info["training"]:
        return
    assert isinstance(potential, SumPotential)
    network, offsets = potential["network"], potential["offsets"]
    assert isinstance(offsets, SpeciesOffsets)
    sources = (t.source for t in settings.label_terms if t.property == "energy" and t.ever_active)
    reference = data.labels[next(sources)]["energy"].to(torch.float64).cpu()
    predicted = torch.zeros_like(reference)
    for systems in data.structures.batches(EVALUATION_ATOMS):
        structures = data.structures.select(systems)
        predicted[systems] = network.predict(structures, properties=("energy",))["energy"].double()
    shift, _ = fit_offsets(data.structures, reference - predicted, per_atom=True)
    offsets.offsets += shift
    names = potential.species_table.names
    info["training"]["energy_shift"] = dict(zip(names, shift.tolist(), strict=True))
    save_potential(best, potential, info)
