"""The energy zero, fitted again to the trained network, or chosen where no label tells of it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from potstill.checkpoint import load_potential, save_potential
from potstill.models import Potential, SpeciesOffsets, SumPotential
from potstill.train.data import TrainingSet, fit_offsets
from potstill.train.settings import TrainSettings
from potstill.train.validation import EVALUATION_ATOMS


def energies_are_free(settings: TrainSettings, data: TrainingSet) -> bool:
    """Whether a run asks for a fitted zero, and no label that it learns from tells of energies.

    So it is with coarse-grained beads, of which only mean forces are known: to the energies of each
    species any constant may be added.
    """
    learned = {term.property for term in settings.label_terms if term.ever_active}
    scored = data.labels.get(settings.score.source)
    return (
        settings.energy.zero == "least_squares"
        and learned.isdisjoint(("energy", "atomic_energies"))
        and (scored is None or "energy" not in scored)
    )


@torch.no_grad()
def refit_energy_zero(best: Path, data: TrainingSet, settings: TrainSettings) -> None:
    """Add the mean energy errors per species to the offsets of a saved potential, in place.

    Steps of Adam move the energies of all atoms together, by as much as the network's own error of
    an energy per atom. Here the species' energies are solved for instead, by least squares of the
    errors per atom of the training set. The file's `training.energy_shift` holds them, eV; a
    file that has it is left as it is.

    Where `energies_are_free` the mean energy of each species over the training set becomes zero:
    the arbitrary constants of two such runs, the members of a committee, are then the same.

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
    offsets = potential["offsets"]
    assert isinstance(offsets, SpeciesOffsets)
    if energies_are_free(settings, data):
        shift = -_mean_energies(potential, data)
    else:
        shift = _mean_errors(potential["network"], data, settings)
    offsets.offsets += shift
    names = potential.species_table.names
    info["training"]["energy_shift"] = dict(zip(names, shift.tolist(), strict=True))
    save_potential(best, potential, info)


def _mean_errors(network: Potential, data: TrainingSet, settings: TrainSettings) -> Tensor:
    """(n_species,) eV, of the energies per atom."""
    sources = (t.source for t in settings.label_terms if t.property == "energy" and t.ever_active)
    reference = data.labels[next(sources)]["energy"].to(torch.float64).cpu()
    predicted = torch.zeros_like(reference)
    for systems in data.structures.batches(EVALUATION_ATOMS):
        structures = data.structures.select(systems)
        predicted[systems] = network.predict(structures, properties=("energy",))["energy"].double()
    return fit_offsets(data.structures, reference - predicted, per_atom=True)[0]


def _mean_energies(potential: Potential, data: TrainingSet) -> Tensor:
    """(n_species,) eV: mean atomic energies of the species that occur, zero for others."""
    sums, counts = torch.zeros(2, len(potential.species_table), dtype=torch.float64)
    for systems in data.structures.batches(EVALUATION_ATOMS):
        structures = data.structures.select(systems)
        found = potential.predict(structures, properties=("atomic_energies",))["atomic_energies"]
        sums.index_add_(0, structures.species, found.double())
        counts += torch.bincount(structures.species, minlength=len(counts))
    return sums / counts.clamp(min=1.0)
