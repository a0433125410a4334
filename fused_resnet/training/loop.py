"""The training loop."""

import dataclasses
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_resnet import engines, models
from fused_resnet.atomic import replacing
from fused_resnet.environment import environment
from fused_resnet.surgery import fuse
from fused_resnet.training import data
from fused_resnet.training.curves import draw_curves
from fused_resnet.training.extras import require_extras
from fused_resnet.training.files import CheckpointError, EpochMetrics, RunFolder
from fused_resnet.training.recipe import Recipe, require


class TrainingDiverged(ArithmeticError):
    """The loss is no longer a finite number."""


class Trainer:
    """A training run: the model, all that changes while it learns, and the folder where that is kept.

    Made by `start` or by `resume`; `run` does the rest.

    Parameters
    ----------
    recipe : Recipe
        What is trained, and how.
    folder : RunFolder
        Where the run's files go.

    Raises
    ------
    ValueError
        The recipe does not fit the data or this machine.
    ModuleNotFoundError
        An extra package is missing.
    """

    def __init__(self, recipe: Recipe, folder: RunFolder) -> None:
        require_extras()
        self.recipe = recipe
        self.folder = folder
        self.device = recipe.resolve_device()
        if recipe.threads is not None:
            torch.set_num_threads(recipe.threads)

        memory_format = torch.channels_last if recipe.channels_last else torch.contiguous_format
        self.dataset = data.load(recipe.data).to(self.device, memory_format)
        train_size = len(self.dataset.train_labels)
        self.steps_per_epoch = train_size // recipe.batch_size
        require("batch_size", recipe.batch_size, self.steps_per_epoch > 0, f"at most {train_size}, the training images")

        torch.manual_seed(recipe.seed)
        model: nn.Module = models.create(
            recipe.model, in_channels=self.dataset.channels, num_classes=self.dataset.num_classes
        )
        model.to(self.device).to(memory_format=memory_format)  # type: ignore[call-overload]
        self.engine: str | None = None  # that serves the fused blocks
        if recipe.fuse:
            model = fuse(model, engine=recipe.engine)
            dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
            self.engine = engines.choose(recipe.engine, self.device.type, dtype)
        self.model = model
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=recipe.lr,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            nesterov=True,
        )
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer,
            max_lr=recipe.lr,
            total_steps=recipe.epochs * self.steps_per_epoch,
            pct_start=recipe.warmup,
            cycle_momentum=False,
        )
        self.generator = torch.Generator().manual_seed(recipe.seed)  # draws the images' order and their shifts
        self.history: list[EpochMetrics] = []

    @classmethod
    def start(cls, recipe: Recipe, path: Path) -> "Trainer":
        """Begin a run in a new or empty folder, and keep its state there before the first step.

        Raises
        ------
        FileExistsError
            The folder already holds a run.
        OSError
            The folder cannot be made or written.
        """
        folder = RunFolder(path)
        if folder.checkpoint.exists():
            raise FileExistsError(
                f"{path} already holds a run: continue it with --resume {path}, or choose another folder"
            )
        trainer = cls(recipe, folder)
        try:
            path.mkdir(parents=True, exist_ok=True)
            folder.write_config(
                {
                    "recipe": dataclasses.asdict(recipe),
                    "environment": {**environment(trainer.device), "engine": trainer.engine},
                }
            )
            folder.write_checkpoint(trainer.state_dict())
        except OSError as error:
            raise OSError(f"cannot write the run folder {path}: {error.strerror}; choose another with --out") from error
        return trainer

    @classmethod
    def resume(cls, path: Path) -> "Trainer":
        """Continue a run where its last epoch ended: the curve is the one that it would have had without the break.

        Raises
        ------
        FileNotFoundError
            There is no run in the folder.
        CheckpointError
            The checkpoint is of no use.
        """
        folder = RunFolder(path)
        state = folder.read_checkpoint()
        trainer = cls(Recipe(**state["recipe"]), folder)
        try:
            trainer.load_state_dict(state)
        except (KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{folder.checkpoint} does not fit its own recipe: {reason}") from error
        return trainer

    def state_dict(self) -> dict[str, Any]:
        """Return all that the rest of the run depends on."""
        return {
            "recipe": dataclasses.asdict(self.recipe),
            "history": [dataclasses.asdict(row) for row in self.history],
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "generator": self.generator.get_state(),
            "cpu_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.history = [EpochMetrics(**row) for row in state["history"]]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["cpu_rng"])
        if self.device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)

    def run(self) -> None:
        """Train for the epochs that are left; after each, the checkpoint and the metrics are written.

        Raises
        ------
        TrainingDiverged
            The loss became infinite or NaN; the checkpoint is that of the last good epoch.
        """
        for epoch in range(len(self.history) + 1, self.recipe.epochs + 1):
            row = self.run_epoch(epoch)
            if not math.isfinite(row.train_loss):
                raise TrainingDiverged(f"the training loss of epoch {epoch} is {row.train_loss}: take a lower lr")
            self.history.append(row)
            self.folder.write_metrics(
                self.history
            )  # first: if only this is written, the epoch is run and written again
            self.folder.write_checkpoint(self.state_dict())
            print(
                f"epoch {epoch:3d}/{self.recipe.epochs}   lr {row.lr:.4f}   "
                f"train loss {row.train_loss:.4f} error {row.train_error:7.2%}   "
                f"test loss {row.test_loss:.4f} error {row.test_error:7.2%}   "
                f"{row.images_per_second:.0f} images/s",
                flush=True,
            )
        with replacing(self.folder.curves) as file:
            title = f"{self.recipe.model} on {self.recipe.data}, {'fused' if self.recipe.fuse else 'stock'} blocks"
            draw_curves(self.history, title, file)

    def run_epoch(self, epoch: int) -> EpochMetrics:
        """Train on every batch once, then test."""
        start = time.perf_counter()
        lr = float(self.scheduler.get_last_lr()[0])
        train_loss, train_error = self.train(f"epoch {epoch:3d}/{self.recipe.epochs}")
        trained = time.perf_counter()
        test_loss, test_error = self.evaluate()
        return EpochMetrics(
            epoch=epoch,
            lr=lr,
            train_loss=train_loss,
            train_error=train_error,
            test_loss=test_loss,
            test_error=test_error,
            images_per_second=self.steps_per_epoch * self.recipe.batch_size / (trained - start),
            seconds=time.perf_counter() - start,
        )

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the training images in a new order, shifted, in whole batches; the rest is left out of this epoch."""
        order = torch.randperm(len(self.dataset.train_labels), generator=self.generator)
        whole = order[: self.steps_per_epoch * self.recipe.batch_size]
        for chosen in whole.to(self.device).split(self.recipe.batch_size):
            images = data.random_shift(self.dataset.train_images[chosen], self.recipe.max_shift, self.generator)
            yield images, self.dataset.train_labels[chosen]

    def train(self, label: str) -> tuple[float, float]:
        """Take one step a batch, with a progress bar on a terminal; return the epoch's mean loss and error."""
        from tqdm import tqdm

        self.model.train()
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)  # of loss and of wrong images
        seen = 0
        with tqdm(
            desc=label,
            total=self.steps_per_epoch * self.recipe.batch_size,
            unit=" images",
            leave=False,
            dynamic_ncols=True,
            file=sys.stdout,
            disable=not sys.stdout.isatty(),
        ) as bar:
            for step, (images, labels) in enumerate(self.batches()):
                logits = self.forward(images)
                loss = F.cross_entropy(logits, labels)
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                self.scheduler.step()

                seen += len(labels)
                totals += torch.stack((loss.detach() * len(labels), count_wrong(logits, labels)))
                if step % 10 == 0 and not bar.disable:  # to read the totals waits for the GPU
                    mean_loss, error = (totals / seen).tolist()
                    bar.set_postfix_str(f"loss {mean_loss:.4f}, error {error:.2%}", refresh=False)
                bar.update(len(labels))
        mean_loss, error = (totals / seen).tolist()
        return mean_loss, error

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float]:
        """Return the mean loss and the error on the test images."""
        self.model.eval()
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        for images, labels in zip(
            self.dataset.test_images.split(self.recipe.batch_size),
            self.dataset.test_labels.split(self.recipe.batch_size),
            strict=True,
        ):
            logits = self.forward(images)
            totals += torch.stack((F.cross_entropy(logits, labels, reduction="sum"), count_wrong(logits, labels)))
        mean_loss, error = (totals / len(self.dataset.test_labels)).tolist()
        return mean_loss, error

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits in float32, computed in the recipe's precision."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16"):
            logits: Tensor = self.model(images)
        return logits.float()


def count_wrong(logits: Tensor, labels: Tensor) -> Tensor:
    """Return how many images are not given their label."""
    return (logits.argmax(1) != labels).sum()
