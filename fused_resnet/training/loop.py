"""The training loop."""

import dataclasses
import math
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel

from fused_resnet import engines
from fused_resnet.surgery import fuse
from fused_resnet.system.atomic import replacing
from fused_resnet.system.environment import environment
from fused_resnet.training import data
from fused_resnet.training.curves import draw_curves
from fused_resnet.training.data.order import seeded
from fused_resnet.training.distributed import World
from fused_resnet.training.evaluation import evaluate
from fused_resnet.training.extras import require_extras
from fused_resnet.training.files import CheckpointError, EpochMetrics, RunFolder
from fused_resnet.training.network import make_network
from fused_resnet.training.optimizer import make_optimizer
from fused_resnet.training.precision import DTYPES, Forward, memory_format
from fused_resnet.training.recipe import Recipe, require
from fused_resnet.training.schedule import make_scheduler
from fused_resnet.training.step import EagerStep, GraphedStep, Step

ALONE = World()

# in a generator's key, behind (seed, rank, iteration)
NOISE = 2


class TrainingDiverged(ArithmeticError):
    """The loss is no longer a finite number."""


@dataclass
class Progress:
    """Where a run is in an epoch: its first learning rate, steps taken, the sums of loss and wrong images, time."""

    lr: float
    steps: int = 0
    totals: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))
    seconds: float = 0.0


class Trainer:
    """A training run: the model, all that changes while it learns, and the folder where that is kept.

    Made by `start` or by `resume`; `run` does the rest.

    Parameters
    ----------
    recipe : Recipe
        What is trained, and how.
    folder : RunFolder
        Where the run's files go.
    world : World
        The processes that share the run.

    Raises
    ------
    ValueError
        The recipe does not fit the data or this machine.
    FileNotFoundError
        The data set is not there.
    ModuleNotFoundError
        An extra package is missing.
    """

    def __init__(self, recipe: Recipe, folder: RunFolder, world: World = ALONE) -> None:
        self.recipe = recipe
        self.folder = folder
        self.world = world
        with world.agreement():
            self.prepare()
        self.optimizer = make_optimizer(self.model, recipe, self.device)
        self.scheduler = make_scheduler(self.optimizer, recipe, self.steps)
        self.scaler = GradScaler(self.device.type, enabled=recipe.precision == "fp16")
        self.forward = self.make_forward(self.model)
        # synchronized statistics are the same on every rank as they are
        trained = world.parallel(self.model, broadcast_buffers=not recipe.sync_batch_norm)
        if recipe.sync_batch_norm and world.world_size > 1:
            # in place, after DDP, which refuses it on the CPU; there fused blocks have it
            nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        step = EagerStep(
            self.make_forward(trained),
            self.optimizer,
            self.scaler,
            accumulate=recipe.accumulate,
            label_smoothing=recipe.label_smoothing,
            no_sync=trained.no_sync if isinstance(trained, DistributedDataParallel) else nullcontext,
        )
        self.step: Step = GraphedStep(step) if recipe.cuda_graph else step

        self.history: list[EpochMetrics] = []
        self.progress = self.next_epoch()
        self.saved = time.monotonic()
        self.draw_apart()

    def prepare(self) -> None:
        """Make what needs this machine: device, data and model."""
        recipe, world = self.recipe, self.world
        require_extras(recipe.data, run=True)
        self.device = world.device(recipe.device)
        on_gpu = self.device.type == "cuda"
        require("cuda_graph", recipe.cuda_graph, on_gpu or not recipe.cuda_graph, f"off: the device is {self.device}")
        world.check(recipe, self.device)
        if recipe.threads is not None:
            torch.set_num_threads(recipe.threads)

        self.data = data.load(
            recipe.data,
            recipe.data_folder,
            image_size=recipe.image_size,
            workers=recipe.workers,
            device=self.device,
            sharing=world.local_world_size,
        )
        size = self.data.train_size
        self.steps_per_epoch = size // recipe.batch_size
        require("batch_size", recipe.batch_size, self.steps_per_epoch > 0, f"at most {size}, the training images")
        self.steps = recipe.iterations or self.steps_per_epoch * (recipe.epochs or 0)
        self.epochs = math.ceil(self.steps / self.steps_per_epoch)  # the last may be cut short

        torch.manual_seed(recipe.seed)
        self.model = make_network(
            recipe.model, channels=self.data.channels, num_classes=self.data.num_classes, shortcut=recipe.shortcut
        )
        self.model.to(self.device).to(memory_format=memory_format(recipe.channels_last))  # type: ignore[call-overload]
        self.engine: str | None = None  # that serves the fused blocks
        if recipe.fuse:
            fuse(self.model, engine=recipe.engine, memory=recipe.memory, chain=recipe.chain)
            self.engine = engines.choose(recipe.engine, self.device.type, DTYPES[recipe.precision])

    def make_forward(self, model: nn.Module) -> Forward:
        """Return the recipe's forward pass of a model."""
        recipe = self.recipe
        return Forward(torch.compile(model) if recipe.compile else model, recipe.precision, recipe.channels_last)

    @classmethod
    def start(cls, recipe: Recipe, path: Path, world: World = ALONE) -> "Trainer":
        """Begin a run in a new or empty folder, and keep its state there before the first step.

        Raises
        ------
        FileExistsError
            The folder already holds a run.
        OSError
            The folder cannot be made or written.
        """
        folder = RunFolder(path)
        with world.agreement():
            if world.first and folder.checkpoint.exists():
                raise FileExistsError(
                    f"{path} already holds a run: continue it with --resume {path}, or choose another folder"
                )
        trainer = cls(recipe, folder, world)
        with world.agreement():
            if world.first:
                trainer.open_folder()
        return trainer

    def open_folder(self) -> None:
        """Write the first files of a run."""
        path, here = self.folder.path, environment(self.device)
        try:
            path.mkdir(parents=True, exist_ok=True)
            self.folder.write_config(
                {
                    "recipe": dataclasses.asdict(self.recipe),
                    "environment": {**here, "engine": self.engine, "ranks": self.world.world_size},
                }
            )
            self.save()
        except OSError as error:
            raise OSError(f"cannot write the run folder {path}: {error.strerror}; choose another with --out") from error

    @classmethod
    def resume(cls, path: Path, world: World = ALONE, **machine: Any) -> "Trainer":
        """Continue a run from its checkpoint: the curve is the one that it would have had without the break.

        Parameters
        ----------
        path : Path
            The run's folder; rank 0 reads it.
        world : World
            The processes that share the run from here on; they may be more or fewer than before.
        **machine
            Fields of the recipe that no curve depends on, such as ``workers``.

        Raises
        ------
        FileNotFoundError
            There is no run in the folder.
        CheckpointError
            The checkpoint is of no use.
        """
        folder = RunFolder(path)
        state: dict[str, Any] = {}
        with world.agreement():
            if world.first:
                state = folder.read_checkpoint()
        state = world.of_first(state)
        trainer = cls(dataclasses.replace(Recipe(**state["recipe"]), **machine), folder, world)
        try:
            trainer.load_state_dict(state)
        except (KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{folder.checkpoint} does not fit its own recipe: {reason}") from error
        return trainer

    def state_dict(self) -> dict[str, Any]:
        """Return all that the rest of the run depends on; the order of the images is the recipe's seed's."""
        return {
            "recipe": dataclasses.asdict(self.recipe),
            "history": [dataclasses.asdict(row) for row in self.history],
            "progress": vars(self.progress),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "cpu_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.history = [EpochMetrics(**row) for row in state["history"]]
        self.progress = Progress(**state["progress"])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):  # came back to the CPU
                group["lr"] = group["lr"].to(self.device)
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["cpu_rng"])
        if self.device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        self.draw_apart()

    def draw_apart(self) -> None:
        """Let every rank drop activations of its own; what is saved are rank 0's random numbers."""
        if self.world.rank > 0:
            torch.manual_seed(seeded(self.recipe.seed, self.world.rank, self.iteration, NOISE).initial_seed())

    @property
    def iteration(self) -> int:
        """How many steps have been taken."""
        return (self.history[-1].iteration if self.history else 0) + self.progress.steps

    def next_epoch(self) -> Progress:
        """Return the beginning of an epoch."""
        return Progress(lr=float(self.scheduler.get_last_lr()[0]))

    def save(self) -> None:
        """Write the checkpoint."""
        self.folder.write_checkpoint(self.state_dict())
        self.saved = time.monotonic()

    def run(self, report: Callable[[EpochMetrics], None] | None = None) -> None:
        """Train for the steps that are left, keeping checkpoint and metrics.

        Parameters
        ----------
        report : callable, optional
            Is told of each epoch, on rank 0; by default a line of it is printed.

        Raises
        ------
        TrainingDiverged
            The loss became infinite or NaN; the checkpoint is from before.
        """
        with warnings.catch_warnings():
            # a step that the scaler skips counts in the schedule; torch warns where that is the first
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            for epoch in range(len(self.history) + 1, self.epochs + 1):
                row = self.run_epoch(epoch)
                self.history.append(row)
                self.progress = self.next_epoch()
                if self.world.first:
                    # first: if only this is written, the epoch is run and written again
                    self.folder.write_metrics(self.history)
                    self.save()
                    (report or self.print_epoch)(row)
        if not self.world.first:
            return
        with replacing(self.folder.curves) as file:
            title = f"{self.recipe.model} on {self.recipe.data}, {'fused' if self.recipe.fuse else 'stock'} blocks"
            draw_curves(self.history, title, file)

    def print_epoch(self, row: EpochMetrics) -> None:
        """Print a line of an epoch."""
        speed, ranks = row.images_per_second, self.world.world_size
        print(
            f"epoch {row.epoch:3d}/{self.epochs}   lr {row.lr:.4f}   "
            f"train loss {row.train_loss:.4f} error {row.train_error:7.2%}   "
            f"test loss {row.test_loss:.4f} error {row.test_error:7.2%}   "
            f"{speed:.0f} images/s" + (f", {speed / ranks:.0f} a rank" if ranks > 1 else ""),
            flush=True,
        )

    def run_epoch(self, epoch: int) -> EpochMetrics:
        """Take the epoch's steps that are left, then test."""
        train_loss, train_error = self.train(epoch)
        progress, start = self.progress, time.perf_counter()
        self.world.share_buffers(self.model)
        self.model.eval()
        images = self.data.test_batches(self.recipe.batch_size // self.world.world_size, 1, self.world.share)
        test = evaluate(self.forward, images, total=self.world.sum)
        return EpochMetrics(
            epoch=epoch,
            iteration=self.iteration,
            lr=progress.lr,
            train_loss=train_loss,
            train_error=train_error,
            test_loss=test.loss,
            test_error=test.top1,
            images_per_second=progress.steps * self.recipe.batch_size / progress.seconds,
            seconds=progress.seconds + time.perf_counter() - start,
        )

    def train(self, epoch: int) -> tuple[float, float]:
        """Take one step a batch, with a progress bar on a terminal; return the epoch's mean loss and error."""
        from tqdm import tqdm

        recipe, progress, world = self.recipe, self.progress, self.world
        order = data.epoch_order(self.data.train_size, recipe.batch_size, recipe.seed, epoch)
        order = order[progress.steps : progress.steps + self.steps - self.iteration]
        progress.totals = progress.totals.to(self.device)
        start = time.perf_counter() - progress.seconds
        self.model.train()
        with tqdm(
            desc=f"epoch {epoch:3d}/{self.epochs}",
            initial=progress.steps * recipe.batch_size,
            total=(progress.steps + len(order)) * recipe.batch_size,
            unit=" images",
            leave=False,
            dynamic_ncols=True,
            file=sys.stdout,
            disable=not (world.first and sys.stdout.isatty()),
        ) as bar:
            for images, labels in self.data.train_batches(
                world.columns(order), recipe.augmentation, recipe.seed, epoch
            ):
                progress.totals += world.sum(self.step(images, labels))
                self.scheduler.step()
                progress.steps += 1

                bar.update(recipe.batch_size)
                if progress.steps % 10 == 0 and not bar.disable:
                    loss, error = self.mean_so_far()
                    bar.set_postfix_str(f"loss {loss:.4f}, error {error:.2%}", refresh=False)
                if world.first and time.monotonic() - self.saved > 60 * recipe.checkpoint_minutes:
                    self.mean_so_far()
                    progress.seconds = time.perf_counter() - start
                    self.save()
        metrics = self.mean_so_far()
        progress.seconds = time.perf_counter() - start
        return metrics

    def mean_so_far(self) -> tuple[float, float]:
        """Return the mean loss and the error on the epoch's images so far; this waits for the GPU.

        Raises
        ------
        TrainingDiverged
            The loss is no finite number.
        """
        loss, error = (self.progress.totals / (self.progress.steps * self.recipe.batch_size)).tolist()
        if not math.isfinite(loss):
            epoch = len(self.history) + 1
            raise TrainingDiverged(f"the training loss of epoch {epoch} is {loss}: take a lower lr")
        return loss, error
