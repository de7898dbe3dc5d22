"""The training that test_train.py kills: `python train_runner.py FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from test_train import emt_set, settings, train

if __name__ == "__main__":
    torch.set_num_threads(1)
    train(settings(epochs=6), emt_set(12), emt_set(3, seed=9), Path(sys.argv[1]))
