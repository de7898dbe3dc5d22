"""Hyper-parameters of GemNet-OC."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from potstill.models.hyper import Hyperparameters, Real


class GemNetOCSettings(Hyperparameters):
    """Hyper-parameters, under their names in the original; the defaults are those of OC20.

    Parameters
    ----------
    num_spherical, num_radial : int
        Angular and radial basis functions.
    num_blocks : int
        Interaction blocks.
    emb_size_atom, emb_size_edge : int
        Widths of the embeddings of atoms and edges.
    emb_size_trip_in, emb_size_trip_out, emb_size_quad_in, emb_size_quad_out : int
        Widths before and after the bilinear layers of triplets (also those of atoms and edges) and
        quadruplets.
    emb_size_aint_in, emb_size_aint_out : int
        Likewise of the interaction between atoms.
    emb_size_rbf, emb_size_cbf, emb_size_sbf : int
        Widths of the down-projected radial, circular and spherical bases.
    num_before_skip, num_after_skip, num_concat : int
        Residual layers of edges before and after the skip connection, and after the atoms'
        embeddings have been mixed in.
    num_atom, num_output_afteratom : int
        Residual layers of atom updates and output blocks, and of output blocks after the atom's
        embedding has been added.
    num_atom_emb_layers, num_global_out_layers : int
        Residual layers of atoms in each block, and before the last linear layer.
    cutoff, cutoff_qint, cutoff_aeaint, cutoff_aint : float
        Å; of the main graph, of the middle edge of quadruplets, of the interactions between atoms
        and edges, and between atoms. The last is the largest.
    max_neighbors, max_neighbors_qint, max_neighbors_aeaint, max_neighbors_aint : int or None
        How many nearest neighbors each graph keeps; None keeps all. Where a cap binds, energy and
        forces jump as neighbors change places.
    rbf, cbf, sbf : str
        "gaussian", "spherical_harmonics" and "legendre_outer".
    envelope_exponent : int
        p of the polynomial envelope.
    quad_interaction, atom_edge_interaction, edge_atom_interaction, atom_interaction : bool
        Which interactions there are beside triplets.
    qint_tags : sequence of int
        The middle edge of quadruplets has an atom of these tags at one end. Systems without tags
        have quadruplets everywhere.
    direct_forces : bool
        Predict forces from edges, instead of differentiating the energy.
    dihedral_reg : float
        Added to sin² of the angles of a quadruplet where a dihedral angle is formed: on a line it
        is undefined, and the original is discontinuous.
    """

    num_spherical: int = Field(default=7, ge=2)
    num_radial: int = Field(default=128, ge=2)
    num_blocks: int = Field(default=4, ge=1)
    emb_size_atom: int = Field(default=256, ge=2)
    emb_size_edge: int = Field(default=512, ge=2)
    emb_size_trip_in: int = Field(default=64, ge=2)
    emb_size_trip_out: int = Field(default=64, ge=2)
    emb_size_quad_in: int = Field(default=32, ge=2)
    emb_size_quad_out: int = Field(default=32, ge=2)
    emb_size_aint_in: int = Field(default=64, ge=2)
    emb_size_aint_out: int = Field(default=64, ge=2)
    emb_size_rbf: int = Field(default=16, ge=2)
    emb_size_cbf: int = Field(default=16, ge=2)
    emb_size_sbf: int = Field(default=32, ge=2)
    num_before_skip: int = Field(default=2, ge=0)
    num_after_skip: int = Field(default=2, ge=0)
    num_concat: int = Field(default=1, ge=0)
    num_atom: int = Field(default=3, ge=0)
    num_output_afteratom: int = Field(default=3, ge=0)
    num_atom_emb_layers: int = Field(default=2, ge=0)
    num_global_out_layers: int = Field(default=2, ge=0)
    cutoff: Real = Field(default=12.0, gt=0)
    cutoff_qint: Real = Field(default=12.0, gt=0)
    cutoff_aeaint: Real = Field(default=12.0, gt=0)
    cutoff_aint: Real = Field(default=12.0, gt=0)
    max_neighbors: int | None = Field(default=30, ge=1)
    max_neighbors_qint: int | None = Field(default=8, ge=1)
    max_neighbors_aeaint: int | None = Field(default=20, ge=1)
    max_neighbors_aint: int | None = Field(default=1000, ge=1)
    rbf: Literal["gaussian"] = "gaussian"
    cbf: Literal["spherical_harmonics"] = "spherical_harmonics"
    sbf: Literal["legendre_outer"] = "legendre_outer"
    envelope_exponent: int = Field(default=5, ge=1)
    quad_interaction: bool = True
    atom_edge_interaction: bool = True
    edge_atom_interaction: bool = True
    atom_interaction: bool = True
    qint_tags: tuple[int, ...] = (1, 2)
    direct_forces: bool = True
    dihedral_reg: Real = Field(default=1e-4, gt=0)

    @model_validator(mode="after")
    def _the_last_graph_reaches_farthest(self) -> Self:
        most = self.max_neighbors_aint
        for suffix in ("", "_qint", "_aeaint"):
            name = f"cutoff{suffix}"
            if getattr(self, name) > self.cutoff_aint:
                raise ValueError(f"GemNet-OC's {name} must be at most cutoff_aint")
            name = f"max_neighbors{suffix}"
            cap = getattr(self, name)
            if most is not None and (cap is None or cap > most):
                raise ValueError(
                    f"GemNet-OC's {name} ({cap or 'no cap'}) exceeds max_neighbors_aint ({most}): "
                    "raise that, or set it to null"
                )
        return self


#: Hyper-parameters of Ekström Kelvinius et al., Table 7: OC20, its small student, and COLL.
PRESETS: dict[str, dict[str, Any]] = {
    "gemnet_oc": {},
    "gemnet_oc_small": {"num_blocks": 3, "emb_size_atom": 128, "emb_size_edge": 256},
    "gemnet_oc_coll": {"emb_size_atom": 128, "emb_size_edge": 256},
}
