"""Pickle one graph with torch_geometric itself: python make_oc20_graphs.py VERSION.

VERSION is 1 or 2 and names the output oc20_pyg<VERSION>.pkl; run it in an environment with
torch_geometric 1.7.2 (torch 1.x layout of Data) or 2.8.1.
"""

import pickle
import sys
from pathlib import Path

import numpy as np
import torch
from torch_geometric.data import Data


def main() -> None:
    """Write the file beside this script."""
    graph = Data(
        cell=5.0 * torch.eye(3).view(1, 3, 3),
        pos=torch.arange(9.0).view(3, 3) / 4.0,
        atomic_numbers=torch.tensor([1.0, 8.0, 1.0]),
        natoms=3,
        tags=torch.tensor([0, 1, 2], dtype=torch.int),
    )
    graph.y = np.float64(-1.5)
    graph.force = torch.arange(9.0).view(3, 3) / 2.0
    graph.fixed = torch.tensor([1.0, 0.0, 0.0])
    graph.sid, graph.fid = np.int64(5), 7
    graph.edge_index = torch.zeros(2, 4, dtype=torch.long)
    graph.extra = np.arange(3.0)
    path = Path(__file__).parent / f"oc20_pyg{sys.argv[1]}.pkl"
    path.write_bytes(pickle.dumps(graph, protocol=-1))


if __name__ == "__main__":
    main()
