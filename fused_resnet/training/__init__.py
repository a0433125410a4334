"""Training: a `Recipe`, a `Trainer` that follows it, and the `RunFolder` that it leaves behind."""

from fused_resnet.training.files import CheckpointError, EpochMetrics, RunFolder
from fused_resnet.training.loop import Trainer, TrainingDiverged
from fused_resnet.training.recipe import Recipe

__all__ = ["CheckpointError", "EpochMetrics", "Recipe", "RunFolder", "Trainer", "TrainingDiverged"]
