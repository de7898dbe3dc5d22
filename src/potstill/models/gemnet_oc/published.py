"""Weights of the published GemNet-OC (Open Catalyst Project) for our modules."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from potstill.errors import ModelError
from potstill.models.gemnet_oc.model import GemNetOC

#: Patterns of published names and our names for them, all applied in this order.
_NAMES = (
    (r"^(module\.)+", ""),
    (r"\.linear\.weight$", ".weight"),
    (r"\.scale_factor$", ".scale"),
    (r"\.dense_mlp\.", ".layers."),
    # shared bases
    (r"^atom_emb\.embeddings", "species_embedding"),
    (r"^edge_emb", "edge_embedding"),
    (r"^mlp_rbf_h", "bases.atom_update"),
    (r"^mlp_rbf_out", "bases.output"),
    (r"^mlp_rbf_aint", "bases.atom_atom"),
    (r"^mlp_rbf_(t|q|ae|ea)int", r"bases.\1_radial"),
    (r"^mlp_sbf_qint", "bases.quad"),
    (r"^mlp_cbf_qint", "bases.quad_middle"),
    (r"^mlp_cbf_(t|ae|ea)int", r"bases.\1"),
    (r"^bases\.t(_radial|\.)", r"bases.edge_edge\1"),
    (r"^bases\.q(_radial)", r"bases.quad\1"),
    (r"^bases\.ae(_radial|\.)", r"bases.atom_edge\1"),
    (r"^bases\.ea(_radial|\.)", r"bases.edge_atom\1"),
    # interaction blocks
    (r"^int_blocks", "blocks"),
    (r"\.dense_ca\.", ".skip."),
    (r"\.trip_interaction", ".edge_edge"),
    (r"\.(quad|atom_edge|edge_atom)_interaction", r".\1"),
    (r"\.atom_interaction", ".atom_atom"),
    (r"\.dense_(ba|db)", ".dense"),
    (r"\.mlp_rbf", ".radial"),
    (r"\.scale_rbf\.", ".scale_radial."),
    (r"\.mlp_[cs]bf\.bilinear", ".bilinear.dense"),
    (r"\.mlp_cbf", ".middle"),
    (r"\.scale_cbf\.", ".scale_middle."),
    (r"\.scale_(rbf|cbf|sbf)_sum", ".scale_sum"),
    (r"\.down_projection", ".down"),
    (r"\.edge_atom\.up_projection_ca", ".edge_atom.up"),
    (r"\.up_projection_ca", ".up.along"),
    (r"\.up_projection_ac", ".up.against"),
    (r"\.up_projection", ".up"),
    (r"\.layers_(before|after)_skip", r".\1_skip"),
    (r"\.atom_emb_layers", ".atom_layers"),
    (r"\.concat_layer", ".mix"),
    (r"\.residual_m", ".after_mix"),
    (r"\.atom_update\.dense_rbf", ".atom_update.radial"),
    # output blocks, which hold an atom update
    (r"^out_blocks\.(\d+)\.dense_rbf\.", r"outputs.\1.atom_update.radial."),
    (r"^out_blocks\.(\d+)\.scale_sum", r"outputs.\1.atom_update.scale_sum"),
    (r"^out_blocks\.(\d+)\.layers", r"outputs.\1.atom_update.layers"),
    (r"^out_blocks", "outputs"),
    (r"\.seq_energy2", ".after_atom"),
    (r"\.seq_forces", ".edge_layers"),
    (r"\.scale_rbf_F", ".scale_edge"),
    (r"\.dense_rbf_F", ".edge_radial"),
    # readout
    (r"^out_mlp_E", "energy_layers"),
    (r"^out_mlp_F", "force_layers"),
    (r"^out_energy", "energy"),
    (r"^out_forces", "force"),
)

#: Centers of Gaussians, which are no weights, and a second name of output blocks' layers.
_SUPERFLUOUS = re.compile(r"\.rbf\.offset$|\.seq_energy_pre\.")


def load_published_weights(model: GemNetOC, state: Mapping[str, Tensor]) -> None:
    """Take over a state dict of the Open Catalyst Project's `gemnet_oc` (up to fairchem 1).

    The model then gives that code's energies and forces wherever no cap on the main graph binds and
    up to the regularization of dihedral angles: that code keeps, of the pairs that only one end
    chooses, those that the later of the atoms has chosen. It also normalizes energies and forces
    outside of the model.

    Parameters
    ----------
    model : GemNetOC
        With the hyper-parameters of that model; its species are chemical elements.
    state : mapping of str to Tensor
        Weights and scale factors, by published name.

    Raises
    ------
    ModelError
        If weights are missing or too many, shapes differ, or a species is no element.
    """
    numbers = model.species_table.atomic_numbers
    if bool((numbers < 1).any()):
        raise ModelError("published GemNet-OC weights are for chemical elements, not for beads")
    s = model.hyper
    angular = {"quad": s.num_spherical**2}
    found = {}
    for published, value in state.items():
        if _SUPERFLUOUS.search(published):
            continue
        name = published
        for pattern, replacement in _NAMES:
            name = re.sub(pattern, replacement, name)
        name = _split_layers(name, narrows=s.emb_size_atom != s.emb_size_edge)
        if name == "species_embedding.weight":
            value = value[numbers - 1]
        elif value.ndim == 3:
            # (radial, angular, width), but used as (radial, width, angular).
            n_angular = angular.get(name.split(".")[1], s.num_spherical)
            value = value.reshape(s.num_radial, -1, n_angular).transpose(0, 1).flatten(1)
        found[name] = value
    try:
        model.load_state_dict(found)
    except RuntimeError as error:
        raise ModelError(f"these weights do not fit the model: {error}") from None


def _split_layers(name: str, *, narrows: bool) -> str:
    """Name the layers of atom updates and readouts, which are numbered from a dense layer on."""
    where = re.fullmatch(
        r"(.*(?:atom_update|energy_layers|force_layers))(\.layers)?\.(\d+)(.*)", name
    )
    if where is None:
        return name
    start, of_update, number, rest = where[1], where[2], int(where[3]), where[4]
    if not of_update:
        return name if number == 0 else f"{start}.1.{number - 1}{rest}"
    if not narrows:
        return name
    return f"{start}.narrow{rest}" if number == 0 else f"{start}.layers.{number - 1}{rest}"
