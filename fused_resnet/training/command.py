"""``fused-resnet train``."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fused_resnet import models
from fused_resnet.engines import EngineError
from fused_resnet.training import data
from fused_resnet.training.distributed import ContactLost, World
from fused_resnet.training.files import RunFolder
from fused_resnet.training.loop import Trainer, TrainingDiverged
from fused_resnet.training.precision import PRECISIONS
from fused_resnet.training.recipe import SCHEDULES, Recipe, require
from fused_resnet.training.recipes import RECIPES, named

if TYPE_CHECKING:
    Subcommands = argparse._SubParsersAction[argparse.ArgumentParser]

DONE, FAILED, BAD_INPUT = 0, 1, 2
INTERRUPTED = 130  # 128 + SIGINT, as shells have it

# what may change when a run goes on: no curve depends on it
WITH_RESUME = ("data_dir", "workers", "checkpoint_minutes")

EXAMPLES = """\
recipes:
  digits    ResNet-20 for 12 epochs of 64 images, one cycle up to 0.1: about a minute on 2 cores
  cifar     64 000 steps of 128 images at 0.1, divided by ten at 32 000 and at 48 000; moved by up to 4 pixels, mirrored
            (section 4.2 of the paper; ResNet-110 starts with 400 steps at 0.01)
  imagenet  ResNet-50 for 90 epochs of 256 images at 0.1, divided by ten after 30 and 60; shorter side 256 to 480, crops
            of 224, mirrored (section 3.4)

examples:
  fused-resnet train                                      a fused ResNet-20 on handwritten digits
  fused-resnet train --stock                              the same without fusion, to compare with
  fused-resnet train --data cifar10 --download            the paper's CIFAR-10 run
  fused-resnet train --data imagenet --data-dir /data/ilsvrc --precision bf16 --cuda-graph
  fused-resnet train --data folder --data-dir pictures --model torchvision:resnet18 --batch-size 64 --epochs 20
  fused-resnet train --data synthetic --model resnet50 --iterations 100     speed without loading
  fused-resnet train --resume runs/NAME                   continue an interrupted run to the same weights
  torchrun --nproc-per-node 8 -m fused_resnet train --data imagenet --data-dir /data/ilsvrc --batch-size 2048 --lr 0.8
                                                          on 8 GPUs, 256 images of each batch on each (docs/cluster.md)

A run folder holds checkpoint.pt (all that --resume needs, replaced whole), metrics.csv (a row for each epoch; errors
are fractions), curves.png and config.json.
"""


def add_train(subcommands: "Subcommands") -> None:
    """Declare ``train``."""
    parser = subcommands.add_parser(
        "train",
        help="train a residual network with fused blocks",
        description="Train a residual network with fused blocks; checkpoint, metrics and curves go to a run folder. "
        "Defaults are those of the recipe digits.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # what is not given is left to the recipe
    )
    parser.set_defaults(run=run_train)

    where = parser.add_argument_group("where")
    folder = where.add_mutually_exclusive_group()
    folder.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        default=None,
        help="run folder, made if need be (default: runs/MODEL-DATA-TIME)",
    )
    folder.add_argument(
        "--resume",
        type=Path,
        metavar="FOLDER",
        default=None,
        help="continue the run in this folder by its own recipe; of the other options only "
        f"{', '.join(map(option, WITH_RESUME))} go with it",
    )
    add_recipe(parser)


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Declare an option for every field of `Recipe`."""
    default = Recipe()

    what = parser.add_argument_group("what").add_argument
    what("--recipe", metavar="NAME", default=None, help=f"{', '.join(RECIPES)} (default: the data set's)")
    what("--model", metavar="NAME", help=listing([*models.names(), "torchvision:NAME", "timm:NAME"], default.model))
    what("--shortcut", metavar="OPTION", help="the model's shortcuts, A, B or C (default: the model's own)")
    what("--data", metavar="NAME", help=listing(data.names(), default.data))
    what("--data-dir", metavar="FOLDER", help="where the data set is (default: data/NAME)")
    what("--download", action="store_true", default=False, help="get CIFAR-10 or CIFAR-100 first, unless it is there")
    what(
        "--image-size",
        type=int,
        metavar="PIXELS",
        help=f"of the crops of imagenet and folder, and of synthetic (default: {default.image_size})",
    )
    what("--seed", type=int, metavar="N", help=f"of weights, order and augmentation (default: {default.seed})")

    length = parser.add_argument_group("length").add_mutually_exclusive_group().add_argument
    length("--epochs", type=int, metavar="N", help=f"(default: {default.epochs})")
    length("--iterations", type=int, metavar="N", help="length of the run in steps instead")

    how = parser.add_argument_group("optimization").add_argument
    how(
        "--batch-size",
        type=int,
        metavar="N",
        help=f"images of a step, of all processes together (default: {default.batch_size})",
    )
    how(
        "--accumulate",
        type=int,
        metavar="N",
        help=f"parts that a batch is computed in, to need less memory (default: {default.accumulate})",
    )
    how("--lr", type=float, help=f"highest learning rate (default: {default.lr})")
    how("--schedule", metavar="NAME", help=listing(SCHEDULES, default.schedule))
    how(
        "--milestones",
        type=float,
        nargs="*",
        action=AsTuple,
        metavar="PART",
        help="of steps: parts of the run after which the rate is divided by ten "
        f"(default: {' '.join(map(str, default.milestones))})",
    )
    how(
        "--warmup",
        type=float,
        metavar="PART",
        help="part of the run in which the rate rises, or with steps is a tenth (default: one-cycle's 0.2, else 0)",
    )
    how("--momentum", type=float, help=f"(default: {default.momentum})")
    how(
        "--nesterov",
        action=argparse.BooleanOptionalAction,
        help=f"Nesterov's momentum (default: {default.nesterov})",
    )
    how("--weight-decay", type=float, help=f"of all parameters (default: {default.weight_decay})")
    how("--label-smoothing", type=float, metavar="PART", help=f"(default: {default.label_smoothing})")

    augmentation = parser.add_argument_group("augmentation").add_argument
    augmentation(
        "--max-shift",
        type=int,
        metavar="PIXELS",
        help=f"digits, cifar: images are moved by up to this much (default: {default.max_shift})",
    )
    augmentation(
        "--flip", action=argparse.BooleanOptionalAction, help=f"mirror images at random (default: {default.flip})"
    )
    augmentation(
        "--crop",
        metavar="NAME",
        help=f"of image files: scale, as the paper's, or resized, of any area and shape (default: {default.crop})",
    )

    machine = parser.add_argument_group("machine").add_argument
    machine("--device", help=f"auto (the GPU if there is one), cpu, cuda (default: {default.device})")
    machine("--precision", help=listing(PRECISIONS, default.precision))
    machine("--engine", help=f"that serves the fused blocks (default: {default.engine})")
    machine("--memory", help=f"fast, or lean, which keeps less for backward (default: {default.memory})")
    machine("--chain", help=f"auto or block for one autograd node a block, or stage (default: {default.chain})")
    machine("--stock", dest="fuse", action="store_false", help="train without fusion")
    machine("--contiguous", dest="channels_last", action="store_false", help="store activations NCHW instead of NHWC")
    machine("--compile", action="store_true", help="under torch.compile")
    machine("--cuda-graph", action="store_true", help="replay a captured step; needs a GPU")
    machine("--sync-batch-norm", action="store_true", help="under torchrun: batch norm over the batch of all processes")
    machine(
        "--timeout",
        type=float,
        metavar="SECONDS",
        default=300.0,
        help="under torchrun: how long a process waits for another before it gives up (default: %(default)g)",
    )
    machine("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice)")
    machine("--workers", type=int, metavar="N", help="processes that decode image files (default: one for each core)")
    machine(
        "--checkpoint-minutes",
        type=float,
        metavar="M",
        help=f"within an epoch, keep a checkpoint this often (default: {default.checkpoint_minutes})",
    )


class AsTuple(argparse.Action):
    """Keeps a list of values as a tuple."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: object, option: object = None
    ) -> None:
        """Store the values."""
        assert isinstance(values, list)
        setattr(namespace, self.dest, tuple(values))


def option(field: str) -> str:
    """Return the option of a recipe's field."""
    return "--" + field.replace("_", "-")


def listing(names: Sequence[str], default: str) -> str:
    """Return the help text of an option that takes one of `names`."""
    return f"{', '.join(names)} (default: {default})"


def run_train(options: argparse.Namespace) -> int:
    """Train, alone or as one of torchrun's processes."""
    try:
        world = World.join(options.timeout)
    except (ValueError, ContactLost) as error:
        complain(error)
        return BAD_INPUT
    try:
        status = train(options, world)
    except ContactLost as error:
        complain(error)
        status = FAILED
    if status in (FAILED, INTERRUPTED):
        return world.abandon(status)
    world.leave()
    return status


def train(options: argparse.Namespace, world: World) -> int:
    """Train, and say where the result is."""
    try:
        with world.contact():
            trainer = make_trainer(options, world)
    except (ValueError, OSError, ImportError, EngineError) as error:
        if world.first:  # they have agreed
            complain(error)
        return BAD_INPUT

    recipe, path = trainer.recipe, trainer.folder.path
    blocks = f"fused blocks (engine {trainer.engine})" if recipe.fuse else "stock blocks"
    ranks = f", {world.world_size} ranks" if world.world_size > 1 else ""
    if world.first:
        print(
            f"{recipe.model} on {recipe.data}, {blocks}, {recipe.precision}, on {trainer.device}{ranks}; "
            f"run folder {path}",
            flush=True,
        )
    torch.backends.cudnn.benchmark = True  # every batch has the same shape
    program = "torchrun ... -m fused_resnet" if world.world_size > 1 else "fused-resnet"
    resume_hint = f"continue with: {program} train --resume {path}"
    try:
        with world.contact():
            trainer.run()
    except KeyboardInterrupt:
        if world.first:
            print(f"\ninterrupted; {trainer.folder.checkpoint} holds {progress(trainer.folder)}; {resume_hint}")
        return INTERRUPTED
    except TrainingDiverged as error:
        if world.first:
            complain(error)
        return FAILED
    except (OSError, ContactLost) as error:
        complain(f"{error}; the last checkpoint is whole; {resume_hint}")
        return FAILED

    if world.first:
        folder, test_error = trainer.folder, trainer.history[-1].test_error
        files = ", ".join(file.name for file in (folder.metrics, folder.curves, folder.config, folder.checkpoint))
        print(f"test error {test_error:.2%} after {trainer.epochs} epochs; {files} in {path}")
    return DONE


def complain(error: object) -> None:
    """Print an error in one line."""
    print(f"fused-resnet train: error: {error}", file=sys.stderr, flush=True)


def make_trainer(options: argparse.Namespace, world: World) -> Trainer:
    """Start or resume the run that the options ask for."""
    fields = {field.name for field in dataclasses.fields(Recipe)}
    given = {name: value for name, value in vars(options).items() if name in fields}
    if options.resume is not None:
        refused = sorted({*given, *(["recipe"] if options.recipe else [])} - {*WITH_RESUME})
        if refused:
            raise ValueError(f"--resume keeps the run's own recipe: leave out {', '.join(map(option, refused))}")
        return Trainer.resume(options.resume, world, **given)
    recipe = named(options.recipe, **given)
    path = world.of_first(options.out or default_folder(recipe))
    if world.max_restarts > 0:
        wanted = "named where torchrun has --max-restarts, so that what starts again finds its run"
        require("out", options.out, options.out is not None, wanted)
        if world.of_first(RunFolder(path).checkpoint.exists()):
            return continue_run(recipe, path, world)
    if options.download:
        with world.agreement():
            if world.first:
                data.download(recipe.data, recipe.data_folder)
    return Trainer.start(recipe, path, world)


def continue_run(recipe: Recipe, path: Path, world: World) -> Trainer:
    """Go on with the run in a folder, if it is the one that would be started there."""
    trainer = Trainer.resume(path, world, **{name: getattr(recipe, name) for name in WITH_RESUME})
    if trainer.recipe != recipe:
        raise FileExistsError(f"{path} already holds a run of another recipe: choose another folder")
    return trainer


def progress(folder: RunFolder) -> str:
    """Say how far a run's checkpoint is."""
    state = folder.read_checkpoint()
    steps = state["progress"]["steps"]
    return f"{len(state['history'])} epochs" + (f" and {steps} steps" if steps else "")


def default_folder(recipe: Recipe) -> Path:
    """Return a run folder named by what is trained and when."""
    model = recipe.model.replace(":", "-")
    return Path("runs") / f"{model}-{recipe.data}-{datetime.now():%Y%m%d-%H%M%S}"
