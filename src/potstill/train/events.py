"""Training records for TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from potstill.errors import require


class EventLog:
    """Writes the numbers of every epoch's record as TensorBoard scalars.

    What an earlier process wrote from the first epoch of a resumed run on is dropped. If
    tensorboard is not installed, OptionalDependencyError is raised.
    """

    def __init__(self, folder: Path, first_epoch: int) -> None:
        require("tensorboard", extra="tensorboard", purpose="to write TensorBoard's event files")
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first_epoch)

    def log(self, record: dict[str, Any]) -> None:
        """Write one epoch: `train/...`, `validation/...`, score and learning rate."""
        epoch = record["epoch"]
        for part in ("train", "validation"):
            for name, value in record[part].items():
                self._writer.add_scalar(f"{part}/{name}", value, epoch)
        for name in ("score", "learning_rate"):
            self._writer.add_scalar(name, record[name], epoch)
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()
