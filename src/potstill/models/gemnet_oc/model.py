"""GemNet-OC as a potential, and the fit of its scale factors."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import BrokenBarrierError
from typing import Any

import torch
from torch import Tensor, nn

from potstill.models.base import (
    Edges,
    LocalOutput,
    Potential,
    StartingData,
    TapSpec,
    refuse_ghosts,
)
from potstill.models.gemnet_oc.bases import SharedBases
from potstill.models.gemnet_oc.graphs import Graphs, build_graphs
from potstill.models.gemnet_oc.interactions import EdgeEmbedding, InteractionBlock, OutputBlock
from potstill.models.gemnet_oc.layers import Dense, ScaleFactor, residuals
from potstill.models.gemnet_oc.settings import GemNetOCSettings
from potstill.neighbors import build_neighbor_list
from potstill.species import SpeciesTable
from potstill.structures import NeighborList, Structures

#: Tap with the numbers of the pairs whose embeddings the other edge taps hold.
EDGES = "edges"


class GemNetOC(Potential):
    """GemNet-OC: directional message passing between edges and atoms.

    Gasteiger et al., *GemNet-OC: Developing Graph Neural Networks for Large and Diverse Molecular
    Simulation Datasets*, TMLR (2022).

    Parameters
    ----------
    species_table : SpeciesTable
        Species, each with an embedding.
    **hyperparameters
        Fields of `GemNetOCSettings`; the defaults are the model of OC20, `PRESETS` has others.

    Notes
    -----
    The cutoff of the potential is `cutoff_aint`, the largest.

    Where caps bind, the energy jumps as neighbors change places; with all `max_neighbors` None, it
    is twice continuously differentiable. Direct forces are no derivative of the energy.

    Taps, k = 0 being the embedding and k > 0 block k: `interaction_k` and `interaction_k.edge` are
    the embeddings of atoms and edges, `output_k` (and, with direct forces, `output_k.edge`) what
    their output block makes of them, `final` (and `final.edge`) the input of the last linear layer.
    Edge taps have one row per edge of the main graph; the tap `edges`, (M, 1) int64, says which of
    the given pairs these are.
    """

    kind = "gemnet_oc"

    hyper_class = GemNetOCSettings
    hyper: GemNetOCSettings

    def __init__(self, species_table: SpeciesTable, **hyperparameters: Any) -> None:
        s = GemNetOCSettings.of(**hyperparameters)
        super().__init__(species_table, s.cutoff_aint, s)
        self.direct_forces = s.direct_forces
        self.bases = SharedBases(s)
        self.species_embedding = nn.Embedding(len(species_table), s.emb_size_atom)
        bound = 3.0**0.5  # of unit variance
        nn.init.uniform_(self.species_embedding.weight, -bound, bound)
        self.edge_embedding = EdgeEmbedding(s.num_radial, s)
        self.blocks = nn.ModuleList(InteractionBlock(s) for _ in range(s.num_blocks))
        self.outputs = nn.ModuleList(OutputBlock(s) for _ in range(s.num_blocks + 1))
        self.energy_layers = _readout(s.emb_size_atom, s)
        self.energy = Dense(s.emb_size_atom, 1, activate=False)
        if s.direct_forces:
            self.force_layers = _readout(s.emb_size_edge, s)
            self.force = Dense(s.emb_size_edge, 1, activate=False)

    @property
    def taps(self) -> dict[str, TapSpec]:
        """Embeddings and outputs of all blocks; see the class."""
        s = self.hyper
        atom = TapSpec("node_scalar", s.emb_size_atom)
        edge = TapSpec("edge_scalar", s.emb_size_edge)
        taps = {"final": atom, EDGES: TapSpec("edge_scalar", 1)}
        for k in range(s.num_blocks + 1):
            taps |= {f"interaction_{k}": atom, f"interaction_{k}.edge": edge, f"output_{k}": atom}
            if s.direct_forces:
                taps[f"output_{k}.edge"] = edge
        return taps | ({"final.edge": edge} if s.direct_forces else {})

    @property
    def default_tap(self) -> str:
        """The input of the last linear layer."""
        return "final"

    def forward(
        self, species: Tensor, edges: Edges, r_ij: Tensor, n_local: int, taps: Sequence[str] = ()
    ) -> LocalOutput:
        """(n_local,) atomic energies, and forces where they are direct.

        Ghosts are refused, and pairs that are given in one direction only.
        """
        refuse_ghosts("GemNet-OC", species, n_local)
        graphs = build_graphs(edges, r_ij, n_local, self.hyper)
        r_ij = r_ij.to(self.dtype)
        bases = self.bases(graphs, r_ij)
        tapped: dict[str, Tensor] = {EDGES: graphs.main.pair.unsqueeze(1)}
        h = self.species_embedding(species)
        m = self.edge_embedding(h, bases.main, graphs)
        of_atoms, of_edges = [], []
        for k, output in enumerate(self.outputs):
            if k > 0:
                h, m = self.blocks[k - 1](h, m, bases, graphs)
            atom, edge = output(h, m, bases.output, graphs)
            of_atoms.append(atom)
            tapped |= {f"interaction_{k}": h, f"interaction_{k}.edge": m, f"output_{k}": atom}
            if edge is not None:
                of_edges.append(edge)
                tapped[f"output_{k}.edge"] = edge
        final = self.energy_layers(torch.cat(of_atoms, dim=1))
        tapped["final"] = final
        energies = self.energy(final)[:, 0]
        forces = None
        if self.direct_forces:
            tapped["final.edge"] = self.force_layers(torch.cat(of_edges, dim=1))
            forces = self._forces(tapped["final.edge"], graphs, r_ij)
        return LocalOutput(energies, {name: tapped[name] for name in taps}, forces)

    def _forces(self, of_edges: Tensor, graphs: Graphs, r_ij: Tensor) -> Tensor:
        """(N, 3) eV/Å: each edge pushes its center away from the neighbor, or pulls."""
        main = graphs.main
        push = -self.force(of_edges) * nn.functional.normalize(r_ij[main.pair], dim=1)
        return push.new_zeros(main.n_atoms, 3).index_add(0, main.center, push)

    def initialize_from(self, data: StartingData) -> None:
        """Fit the scale factors to the batches."""
        fit_scale_factors(self, data.batches)

    def scale_factors(self) -> dict[str, ScaleFactor]:
        """The scale factors by name, in no particular order."""
        return {n: m for n, m in self.named_modules() if isinstance(m, ScaleFactor)}


def fit_scale_factors(model: GemNetOC, batches: Sequence[Structures]) -> dict[str, float]:
    """Set the scale factors so that results have the variance of what they were made from.

    As in the original: one factor after the other in the order in which they are used, each from
    the variances over rows, averaged over features and over all batches. To be done once, with
    fresh weights. It takes one pass over all batches, whose intermediate results are in memory
    together.

    Parameters
    ----------
    model : GemNetOC
        Its scale factors are overwritten.
    batches : sequence of Structures
        Some of the training data.

    Returns
    -------
    dict of str to float
        The factors that were fitted, by name. Others have met no variance (there is no quadruplet,
        say) and are 1.

    Raises
    ------
    DataError
        If a structure holds a species that the model does not know.
    """
    if not batches:
        return {}
    inputs = [(batch, build_neighbor_list(batch, model.cutoff)) for batch in batches]
    fit = _ScaleFit(model, len(inputs))
    for factor in fit.names:
        factor.scale.fill_(1.0)
        factor.observer = fit.observe
    try:
        with ThreadPoolExecutor(len(inputs)) as pool:
            passes = [pool.submit(fit.run, k, *each) for k, each in enumerate(inputs)]
    finally:
        for factor in fit.names:
            factor.observer = None
    errors = [error for error in (done.exception() for done in passes) if error is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, BrokenBarrierError)):
        raise error
    return fit.fitted


class _ScaleFit:
    """Passes of all batches side by side, which meet at every scale factor and set it together."""

    def __init__(self, model: GemNetOC, n_batches: int) -> None:
        self.model = model
        self.names = {factor: name for name, factor in model.scale_factors().items()}
        self.fitted: dict[str, float] = {}
        self._batch = threading.local()
        self._variances = [(0.0, 0.0)] * n_batches
        self._factor: ScaleFactor | None = None
        self._meeting = threading.Barrier(n_batches, self._settle)

    def run(self, batch: int, structures: Structures, neighbors: NeighborList) -> None:
        """Send a batch through the model."""
        self._batch.number = batch
        try:
            self.model.predict(structures, neighbors, ["energy"])
        except BaseException:
            self._meeting.abort()  # nobody waits for this batch
            raise

    def observe(self, factor: ScaleFactor, value: Tensor, reference: Tensor) -> None:
        """Note the variances of a batch and wait for the others."""
        before = after = 0.0
        if min(len(value), len(reference)) > 1:
            before = float(reference.var(dim=0).mean()) * len(value)
            after = float(value.var(dim=0).mean()) * len(value)
        self._variances[self._batch.number] = (before, after)
        self._factor = factor
        self._meeting.wait()

    def _settle(self) -> None:
        before, after = (sum(column) for column in zip(*self._variances, strict=True))
        if before > 0.0 and after > 0.0:
            assert self._factor is not None
            scale = (before / after) ** 0.5
            self.fitted[self.names[self._factor]] = scale
            self._factor.scale.fill_(scale)


def _readout(width: int, settings: GemNetOCSettings) -> nn.Sequential:
    """A dense layer of all blocks' outputs side by side, then residual layers."""
    n_in = width * (settings.num_blocks + 1)
    return nn.Sequential(Dense(n_in, width), residuals(settings.num_global_out_layers, width))
