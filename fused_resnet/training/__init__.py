"""Training: a `Recipe`, a `Trainer` that follows it, the `RunFolder` that it leaves behind, and how good it is."""

from fused_resnet.training.evaluation import Evaluation, evaluate
from fused_resnet.training.files import CheckpointError, EpochMetrics, RunFolder
from fused_resnet.training.loop import Trainer, TrainingDiverged
from fused_resnet.training.recipe import Recipe
from fused_resnet.training.recipes import RECIPES, named

__all__ = [
    "RECIPES",
    "CheckpointError",
    "EpochMetrics",
    "Evaluation",
    "Recipe",
    "RunFolder",
    "Trainer",
    "TrainingDiverged",
    "evaluate",
    "named",
]
