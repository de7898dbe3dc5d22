"""Hyper-parameters of GemNet-OC."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from potstill.errors import ModelError

#: What the basis functions may be: those of Gasteiger et al.'s final model.
_BASES = {"rbf": "gaussian", "cbf": "spherical_harmonics", "sbf": "legendre_outer"}


@dataclass(frozen=True)
class GemNetOCSettings:
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

    Raises
    ------
    ModelError
        If a value is out of range.
    """

    num_spherical: int = 7
    num_radial: int = 128
    num_blocks: int = 4
    emb_size_atom: int = 256
    emb_size_edge: int = 512
    emb_size_trip_in: int = 64
    emb_size_trip_out: int = 64
    emb_size_quad_in: int = 32
    emb_size_quad_out: int = 32
    emb_size_aint_in: int = 64
    emb_size_aint_out: int = 64
    emb_size_rbf: int = 16
    emb_size_cbf: int = 16
    emb_size_sbf: int = 32
    num_before_skip: int = 2
    num_after_skip: int = 2
    num_concat: int = 1
    num_atom: int = 3
    num_output_afteratom: int = 3
    num_atom_emb_layers: int = 2
    num_global_out_layers: int = 2
    cutoff: float = 12.0
    cutoff_qint: float = 12.0
    cutoff_aeaint: float = 12.0
    cutoff_aint: float = 12.0
    max_neighbors: int | None = 30
    max_neighbors_qint: int | None = 8
    max_neighbors_aeaint: int | None = 20
    max_neighbors_aint: int | None = 1000
    rbf: str = "gaussian"
    cbf: str = "spherical_harmonics"
    sbf: str = "legendre_outer"
    envelope_exponent: int = 5
    quad_interaction: bool = True
    atom_edge_interaction: bool = True
    edge_atom_interaction: bool = True
    atom_interaction: bool = True
    qint_tags: tuple[int, ...] = (1, 2)
    direct_forces: bool = True
    dihedral_reg: float = 1e-4

    def __post_init__(self) -> None:
        object.__setattr__(self, "qint_tags", tuple(self.qint_tags))
        for name, basis in _BASES.items():
            if getattr(self, name) != basis:
                raise ModelError(f"GemNet-OC's {name} is '{basis}', not '{getattr(self, name)}'")
        sizes = [f.name for f in fields(self) if f.name.startswith("emb_size_")]
        for name in (*sizes, "num_spherical", "num_radial"):
            if getattr(self, name) < 2:
                raise ModelError(f"GemNet-OC's {name} must be at least 2")
        for f in fields(self):
            if f.name.startswith("num_") and getattr(self, f.name) < 0:
                raise ModelError(f"GemNet-OC's {f.name} must not be negative")
        if min(self.num_blocks, self.envelope_exponent) < 1 or not self.dihedral_reg > 0:
            raise ModelError(
                "GemNet-OC needs a positive dihedral_reg, and num_blocks and envelope_exponent of "
                "at least 1"
            )
        self._check_reach()

    def _check_reach(self) -> None:
        most = self.max_neighbors_aint
        for suffix in ("", "_qint", "_aeaint"):
            name = f"cutoff{suffix}"
            if not 0.0 < getattr(self, name) <= self.cutoff_aint:
                raise ModelError(f"GemNet-OC's {name} must be positive and at most cutoff_aint")
            name = f"max_neighbors{suffix}"
            cap = getattr(self, name)
            if cap is not None and cap < 1:
                raise ModelError(f"GemNet-OC's {name} must be at least 1, or null for no cap")
            if most is not None and (cap is None or cap > most):
                raise ModelError(
                    f"GemNet-OC's {name} ({cap or 'no cap'}) exceeds max_neighbors_aint ({most}): "
                    "raise that, or set it to null"
                )


#: Hyper-parameters of Ekström Kelvinius et al., Table 7: OC20, its small student, and COLL.
PRESETS: dict[str, dict[str, Any]] = {
    "gemnet_oc": {},
    "gemnet_oc_small": {"num_blocks": 3, "emb_size_atom": 128, "emb_size_edge": 256},
    "gemnet_oc_coll": {"emb_size_atom": 128, "emb_size_edge": 256},
}
