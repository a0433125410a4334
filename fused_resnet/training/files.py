"""The files of a run folder, each replaced whole or not at all."""

import csv
import dataclasses
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fused_resnet.system.atomic import replacing

# every checkpoint says under this key which version of the format it has
FORMAT_KEY = "fused_resnet_checkpoint"
FORMAT = 2


class CheckpointError(ValueError):
    """A file that this version cannot continue a run from."""


@dataclass(frozen=True)
class EpochMetrics:
    """One row of ``metrics.csv``; errors are fractions, `iteration` is the steps so far, `lr` the epoch's first."""

    epoch: int
    iteration: int
    lr: float
    train_loss: float
    train_error: float
    test_loss: float
    test_error: float
    images_per_second: float
    seconds: float


@dataclass(frozen=True)
class RunFolder:
    """Where a run leaves its files."""

    path: Path

    @property
    def checkpoint(self) -> Path:
        """All that is needed to continue the run."""
        return self.path / "checkpoint.pt"

    @property
    def config(self) -> Path:
        """The recipe, and where it was run."""
        return self.path / "config.json"

    @property
    def metrics(self) -> Path:
        """A row for each epoch."""
        return self.path / "metrics.csv"

    @property
    def curves(self) -> Path:
        """The learning curves, drawn."""
        return self.path / "curves.png"

    def write_config(self, config: dict[str, Any]) -> None:
        """Write ``config.json``."""
        with replacing(self.config) as file:
            file.write((json.dumps(config, indent=2) + "\n").encode())

    def write_metrics(self, history: Sequence[EpochMetrics]) -> None:
        """Write ``metrics.csv``."""
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(field.name for field in dataclasses.fields(EpochMetrics))
        rows.writerows([f"{x:.6g}" for x in dataclasses.astuple(row)] for row in history)
        with replacing(self.metrics) as file:
            file.write(text.getvalue().encode())

    def write_checkpoint(self, state: dict[str, Any]) -> None:
        """Write ``checkpoint.pt``."""
        with replacing(self.checkpoint) as file:
            torch.save({FORMAT_KEY: FORMAT, **state}, file)

    def read_checkpoint(self) -> dict[str, Any]:
        """Read ``checkpoint.pt``, on the CPU and without running any code that it may hold.

        Raises
        ------
        FileNotFoundError
            There is no run in this folder.
        CheckpointError
            The file is not a checkpoint of this package, or of another version's format.
        """
        if not self.checkpoint.is_file():
            raise FileNotFoundError(f"no run to resume in {self.path}: {self.checkpoint} does not exist")
        state = read_weights(self.checkpoint)
        if not isinstance(state, dict) or FORMAT_KEY not in state:
            raise CheckpointError(f"{self.checkpoint} was not written by fused-resnet train")
        if state[FORMAT_KEY] != FORMAT:
            raise CheckpointError(
                f"{self.checkpoint} has format {state[FORMAT_KEY]}, this version of fused_resnet continues {FORMAT}: "
                f"start the run anew, or continue it with the version that wrote it"
            )
        return state


def read_weights(path: Path) -> Any:
    """Read what ``torch.save`` wrote, on the CPU and without running any code that it may hold.

    Raises
    ------
    CheckpointError
        The file is damaged, or no such file.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises what its many formats raise
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{path} is damaged or no checkpoint: {reason}") from error
