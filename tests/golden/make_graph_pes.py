"""Make graph_pes.json: energies and derivatives of SchNet and PaiNN by graph-pes 1.0.2.

In an environment of its own, since graph-pes pins other packages::

    python -m venv peer
    peer/bin/pip install -c constraints.txt graph-pes==1.0.2
    peer/bin/python tests/golden/make_graph_pes.py

Weights are drawn from seeds by the names and shapes of potstill's parameters, so that none are
stored. Where graph-pes composes other parts than potstill, its own parts are put together as in
potstill: its cosine envelope on the filters of both models, a hidden layer of half the width
before the energy of PaiNN. SchNet's Gaussians get the spacing of their centers as width, and
PaiNN's radial functions lose the factor sqrt(2 / cutoff), which goes into the weights.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import ase
import numpy as np

CUTOFF, CHANNELS, LAYERS, RADIAL = 4.0, 8, 3, 7
SYMBOLS = ("C", "O")
SCHNET = {
    "hidden_channels": CHANNELS,
    "num_filters": CHANNELS,
    "num_interactions": LAYERS,
    "num_gaussians": RADIAL,
    "cutoff": CUTOFF,
}
PAINN = {
    "hidden_channels": CHANNELS,
    "num_layers": LAYERS,
    "num_rbf": RADIAL,
    "cutoff": CUTOFF,
}


def parameter(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The value of one of potstill's parameters, float64."""
    width = 1.7 / math.sqrt(shape[-1]) if len(shape) > 1 else 0.3
    seed = sum(k * ord(letter) for k, letter in enumerate(name, start=1))
    # RandomState's numbers are the same in all versions of NumPy.
    return np.random.RandomState(seed).uniform(-width, width, shape)


def structures() -> dict[str, ase.Atoms]:
    """A molecule and a triclinic crystal with images within reach."""
    rng = np.random.RandomState(4)
    molecule = ase.Atoms("COCCO", 1.1 * np.array([[k, k % 2, k // 2] for k in range(5)]))
    crystal = ase.Atoms(
        "CO2C",
        [[0.1, 0.0, 0.2], [1.5, 0.3, 0.1], [0.2, 1.6, 1.4], [1.7, 1.5, 1.5]],
        cell=[[3.1, 0.0, 0.0], [0.4, 3.3, 0.0], [-0.3, 0.5, 3.6]],
        pbc=True,
    )
    for atoms in (molecule, crystal):
        atoms.positions += rng.normal(0.0, 0.1, atoms.positions.shape)
        atoms.positions = np.round(atoms.positions, 6)
    return {"molecule": molecule, "crystal": crystal}


def schnet():
    """graph-pes' SchNet as potstill composes it."""
    import torch
    from ase.data import atomic_numbers
    from graph_pes.models import SchNet
    from graph_pes.models.components.distances import CosineEnvelope
    from graph_pes.utils.nn import HaddamardProduct

    class Column(CosineEnvelope):
        """The envelope of (E,) distances as a column."""

        def forward(self, r):
            return super().forward(r.unsqueeze(-1))

    model = SchNet(CUTOFF, CHANNELS, RADIAL, LAYERS)
    with torch.no_grad():
        embedding = _value("embedding.weight", len(SYMBOLS), CHANNELS)
        for symbol, row in zip(SYMBOLS, embedding, strict=True):
            model.chemical_embedding._embeddings[atomic_numbers[symbol]] = row
        for k, block in enumerate(model.interactions):
            basis, mlp = block.cfconv.filter_generator
            basis.coef.fill_(-0.5 / (CUTOFF / (RADIAL - 1)) ** 2)
            block.cfconv.filter_generator = HaddamardProduct(
                block.cfconv.filter_generator, Column(CUTOFF)
            )
            name = f"interactions.{k}"
            _set(mlp.linear_layers[0], f"{name}.filter_network.0")
            _set(mlp.linear_layers[1], f"{name}.filter_network.2")
            _set(block.linear, f"{name}.before")
            _set(block.mlp.linear_layers[0], f"{name}.after.0")
            _set(block.mlp.linear_layers[1], f"{name}.after.2")
        _set(model.read_out.linear_layers[0], "hidden.0")
        _set(model.read_out.linear_layers[1], "energy_layer")
    return model


def painn():
    """graph-pes' PaiNN as potstill composes it."""
    import torch
    from ase.data import atomic_numbers
    from graph_pes.models import PaiNN
    from graph_pes.models.components.distances import CosineEnvelope
    from graph_pes.utils.nn import MLP, HaddamardProduct

    model = PaiNN(CHANNELS, RADIAL, LAYERS, CUTOFF)
    model.read_out = MLP([CHANNELS, CHANNELS // 2, 1], activation=torch.nn.SiLU())
    with torch.no_grad():
        embedding = _value("embedding.weight", len(SYMBOLS), CHANNELS)
        for symbol, row in zip(SYMBOLS, embedding, strict=True):
            model.z_embedding._embeddings[atomic_numbers[symbol]] = row
        for k, (message, update) in enumerate(zip(model.interactions, model.updates, strict=True)):
            basis, linear = message.filter_generator.components[0]
            message.filter_generator = HaddamardProduct(
                torch.nn.Sequential(basis, linear), CosineEnvelope(CUTOFF)
            )
            _set(linear, f"messages.{k}.filters")
            linear.weight.mul_(math.sqrt(CUTOFF / 2.0))
            _set(message.Phi.linear_layers[0], f"messages.{k}.network.0")
            _set(message.Phi.linear_layers[1], f"messages.{k}.network.2")
            both = _value(f"updates.{k}.mix.weight", 2 * CHANNELS, CHANNELS)
            update.U._linear.weight.copy_(both[:CHANNELS])
            update.V._linear.weight.copy_(both[CHANNELS:])
            _set(update.mlp.linear_layers[0], f"updates.{k}.network.0")
            _set(update.mlp.linear_layers[1], f"updates.{k}.network.2")
            # potstill: scalar, dot, vector; graph-pes: vector, scalar, dot
            for tensor in update.mlp.linear_layers[1].parameters():
                scalar, dot, vector = tensor.clone().chunk(3)
                tensor.copy_(torch.cat([vector, scalar, dot]))
        _set(model.read_out.linear_layers[0], "hidden.0")
        _set(model.read_out.linear_layers[1], "energy_layer")
    return model


def _value(name: str, *shape: int):
    import torch

    return torch.from_numpy(parameter(name, shape))


def _set(layer, name: str) -> None:
    """Give a linear layer the values of potstill's layer of this name."""
    layer.weight.copy_(_value(f"{name}.weight", *layer.weight.shape))
    if layer.bias is not None:
        layer.bias.copy_(_value(f"{name}.bias", *layer.bias.shape))


def main() -> None:
    """Write graph_pes.json beside this file."""
    import graph_pes
    import torch
    from graph_pes import AtomicGraph

    torch.set_default_dtype(torch.float64)
    found = {"graph_pes": graph_pes.__version__, "results": {}}
    for kind, model in (("schnet", schnet()), ("painn", painn())):
        for name, atoms in structures().items():
            graph = AtomicGraph.from_ase(atoms, CUTOFF)
            wanted = ["energy", "forces", "local_energies"] + ["stress"] * bool(atoms.pbc.all())
            result = model.predict(graph, properties=wanted)
            found["results"][f"{kind} {name}"] = {
                key.replace("local_energies", "atomic_energies"): value.detach().tolist()
                for key, value in result.items()
                if key in wanted
            }
    path = Path(__file__).with_name("graph_pes.json")
    path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
