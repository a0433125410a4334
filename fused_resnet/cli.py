"""The ``fused-resnet`` command.

Each subcommand is two functions: ``add_<name>``, which declares it, and ``run_<name>``, which does it.
"""

import argparse
import sys
import warnings
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from fused_resnet import models
from fused_resnet.bench.command import add_bench
from fused_resnet.doctor import add_doctor
from fused_resnet.engines import EngineError
from fused_resnet.models.command import add_models
from fused_resnet.surgery import NothingToFuse, explain, fuse
from fused_resnet.training import Recipe, Trainer, TrainingDiverged, data
from fused_resnet.training.recipe import PRECISIONS

if TYPE_CHECKING:
    Subcommands = argparse._SubParsersAction[argparse.ArgumentParser]

INTERRUPTED = 130  # 128 + SIGINT, as shells have it

TRAIN_EXAMPLES = """\
examples:
  fused-resnet train                                  a fused ResNet-20 on handwritten digits, about a minute on 2 cores
  fused-resnet train --stock                          the same without fusion, to compare with
  fused-resnet train --model resnet56 --epochs 30     a deeper network, for longer
  fused-resnet train --precision bf16 --device cuda   mixed precision on the GPU
  fused-resnet train --resume runs/NAME               continue an interrupted run to the same curve

A run folder holds checkpoint.pt (all that --resume needs, written whole after each epoch), metrics.csv (a row for each
epoch; errors are fractions), curves.png and config.json.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 1 after a failure, 2 for bad input, 130 after Ctrl-C."""
    options = build_parser().parse_args(arguments)
    try:
        status: int = options.run(options)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED
    return status


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command and of all its subcommands."""
    parser = argparse.ArgumentParser(prog="fused-resnet", description="Faster training of residual networks.")
    subcommands = parser.add_subparsers(title="subcommands", metavar="SUBCOMMAND", required=True)
    add_train(subcommands)
    add_bench(subcommands)
    add_models(subcommands)
    add_explain(subcommands)
    add_doctor(subcommands)
    return parser


def add_train(subcommands: "Subcommands") -> None:
    """Declare ``train``."""
    parser = subcommands.add_parser(
        "train",
        help="train a residual network with fused blocks",
        description="Train a residual network with fused blocks; checkpoint, metrics and curves go to a run folder.",
        epilog=TRAIN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # what is not given is left to Recipe's defaults
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
        help="continue the run in this folder by its own recipe; no other option goes with it",
    )

    default = Recipe()
    recipe = parser.add_argument_group("recipe").add_argument
    recipe("--model", metavar="NAME", help=listing(models.names(), default.model))
    recipe("--data", metavar="NAME", help=listing(data.names(), default.data))
    recipe("--epochs", type=int, metavar="N", help=f"(default: {default.epochs})")
    recipe("--batch-size", type=int, metavar="N", help=f"(default: {default.batch_size})")
    recipe("--lr", type=float, help=f"highest learning rate (default: {default.lr})")
    recipe("--momentum", type=float, help=f"(default: {default.momentum})")
    recipe("--weight-decay", type=float, help=f"(default: {default.weight_decay})")
    recipe(
        "--warmup",
        type=float,
        metavar="PART",
        help=f"part of the run in which the learning rate rises (default: {default.warmup})",
    )
    recipe(
        "--max-shift",
        type=int,
        metavar="PIXELS",
        help=f"training images are moved by up to this much (default: {default.max_shift})",
    )
    recipe(
        "--seed",
        type=int,
        metavar="N",
        help=f"of the weights and of the images' order (default: {default.seed})",
    )

    machine = parser.add_argument_group("machine").add_argument
    machine("--device", help=f"auto (the GPU if there is one), cpu, cuda (default: {default.device})")
    machine("--precision", help=listing(PRECISIONS, default.precision))
    machine("--engine", help=f"that serves the fused blocks (default: {default.engine})")
    machine(
        "--stock",
        dest="fuse",
        action="store_false",
        help="train without fusion",
    )
    machine(
        "--contiguous",
        dest="channels_last",
        action="store_false",
        help="store activations NCHW instead of NHWC",
    )
    machine("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice)")


def listing(names: Sequence[str], default: str) -> str:
    """Return the help text of an option that takes one of `names`."""
    return f"{', '.join(names)} (default: {default})"


def run_train(options: argparse.Namespace) -> int:
    """Train, and say where the result is."""
    given = {name: value for name, value in vars(options).items() if name not in ("run", "out", "resume")}
    try:
        if options.resume is not None:
            if given:
                raise ValueError(f"--resume keeps the run's own recipe: leave out {', '.join(sorted(given))}")
            trainer = Trainer.resume(options.resume)
        else:
            recipe = Recipe(**given)
            trainer = Trainer.start(recipe, options.out or default_folder(recipe))
    except (ValueError, OSError, ImportError, EngineError) as error:
        print(f"fused-resnet train: error: {error}", file=sys.stderr)
        return 2

    recipe, path = trainer.recipe, trainer.folder.path
    blocks = f"fused blocks (engine {trainer.engine})" if recipe.fuse else "stock blocks"
    print(
        f"{recipe.model} on {recipe.data}, {blocks}, {recipe.precision}, on {trainer.device}; run folder {path}",
        flush=True,
    )
    resume_hint = f"continue with: fused-resnet train --resume {path}"
    try:
        trainer.run()
    except KeyboardInterrupt:
        done = len(trainer.folder.read_checkpoint()["history"])
        print(f"\ninterrupted; {trainer.folder.checkpoint} holds {done} of {recipe.epochs} epochs; {resume_hint}")
        return INTERRUPTED
    except TrainingDiverged as error:
        print(f"fused-resnet train: error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"fused-resnet train: error: {error}; the last checkpoint is whole; {resume_hint}", file=sys.stderr)
        return 1

    folder, test_error = trainer.folder, trainer.history[-1].test_error
    files = ", ".join(file.name for file in (folder.metrics, folder.curves, folder.config, folder.checkpoint))
    print(f"test error {test_error:.2%} after {recipe.epochs} epochs; {files} in {path}")
    return 0


def default_folder(recipe: Recipe) -> Path:
    """Return a run folder named by what is trained and when."""
    return Path("runs") / f"{recipe.model}-{recipe.data}-{datetime.now():%Y%m%d-%H%M%S}"


EXPLAIN_EXAMPLES = """\
examples:
  fused-resnet explain resnet50                 this package's networks
  fused-resnet explain torchvision:resnext50_32x4d
  fused-resnet explain timm:seresnet50          what fits is fused, what does not is named
"""


def add_explain(subcommands: "Subcommands") -> None:
    """Declare ``explain``."""
    parser = subcommands.add_parser(
        "explain",
        help="say what would be fused in a model, and what would stay stock and why",
        description="Fuse a model and print every chain with the engine that serves it, and what was left and why.",
        epilog=EXPLAIN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help=f"{', '.join(models.names())}, torchvision:NAME or timm:NAME")
    parser.add_argument("--engine", default="auto", help="that serves the fused blocks (default: %(default)s)")
    parser.set_defaults(run=run_explain)


def run_explain(options: argparse.Namespace) -> int:
    """Print the report of a freshly fused model; the status is 1 where nothing is fused."""
    try:
        model = models.create(options.model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NothingToFuse)  # the report says it
            report = explain(fuse(model, engine=options.engine))
    except (ValueError, ImportError, EngineError) as error:
        print(f"fused-resnet explain: error: {error}", file=sys.stderr)
        return 2
    print(report)
    return 0 if report.fused else 1
