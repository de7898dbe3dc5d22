"""Which devices and processes a training run uses."""

from __future__ import annotations

import atexit
import os

import lightning_fabric
import torch


def default_fabric() -> lightning_fabric.Fabric:
    """One process on a GPU if there is one, else on the CPU; under `torchrun` all its processes.

    It is launched, and data-parallel (DDP) where there are several processes.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    fabric = lightning_fabric.Fabric(
        accelerator="cuda" if torch.cuda.is_available() else "cpu",
        devices=local,
        num_nodes=world // local,
        strategy="ddp" if world > 1 else "auto",
    )
    fabric.launch()
    if world > 1:
        atexit.register(_end_processes)
    return fabric


def _end_processes() -> None:
    """End the group: threads of gloo that outlive the interpreter abort its process."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
