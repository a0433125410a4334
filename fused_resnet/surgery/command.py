"""``fused-resnet explain``."""

import argparse
import sys
import warnings

import torch
from torch import nn

from fused_resnet import models
from fused_resnet.engines import EngineError
from fused_resnet.surgery import NothingToFuse, Report, explain, fuse

EXAMPLES = """\
examples:
  fused-resnet explain resnet50                 this package's networks
  fused-resnet explain torchvision:resnext50_32x4d
  fused-resnet explain timm:seresnet50          what fits is fused, what does not is named
  fused-resnet explain resnet50 --input-shape 32 3 224 224 --dtype bf16
                                                and what a training step moves, computes and keeps for backward
  fused-resnet explain resnet50 --input-shape 32 3 224 224 --steps layer1.0
                                                kernel by kernel
"""

# what --dtype gives to autocast
AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def add_explain(subcommands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare ``explain``."""
    parser = subcommands.add_parser(
        "explain",
        help="say what would be fused in a model, and what would stay stock and why",
        description="Fuse a model and print every chain with the engine that serves it, and what was left and why.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_fused_model(parser)
    traced = parser.add_argument_group("trace a training step, without data")
    traced.add_argument(
        "--input-shape", type=int, nargs=4, metavar=("N", "C", "H", "W"), help="bytes, FLOP and memory of every chain"
    )
    traced.add_argument("--dtype", choices=list(AUTOCAST), default="fp32", help="of autocast (default: %(default)s)")
    traced.add_argument("--steps", metavar="MODULE", help="kernel by kernel, of this module's chains")
    parser.set_defaults(run=run_explain)


def add_fused_model(parser: argparse.ArgumentParser) -> None:
    """Declare the model that a command looks at, and how it is fused; :func:`fuse_quietly` reads that."""
    parser.add_argument("model", help=f"{', '.join(models.names())}, torchvision:NAME or timm:NAME")
    parser.add_argument("--engine", default="auto", help="that serves the fused blocks (default: %(default)s)")
    parser.add_argument(
        "--memory", default="fast", help="fast, or lean to keep less for backward where that costs time (default: fast)"
    )
    parser.add_argument("--chain", default="auto", help="auto or block for one node a block, or stage (default: auto)")


def fuse_quietly(model: nn.Module, options: argparse.Namespace) -> nn.Module:
    """Fuse a model as it is asked for; where nothing can be fused the report says it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NothingToFuse)
        return fuse(model, engine=options.engine, memory=options.memory, chain=options.chain)


def run_explain(options: argparse.Namespace) -> int:
    """Print the report of a freshly fused model; the status is 1 where nothing is fused."""
    try:
        model = fuse_quietly(models.create(options.model), options)
        report = explain(model, options.input_shape, dtype=AUTOCAST[options.dtype])
        if options.steps is None:
            print(report)
        else:
            print_steps(report, options.steps)
    except (ValueError, ImportError, EngineError) as error:
        print(f"fused-resnet explain: error: {error}", file=sys.stderr)
        return 2
    return 0 if report.fused else 1


def print_steps(report: Report, module: str) -> None:
    """Print what the chains of one module do, kernel by kernel."""
    traced = {row.module: row for row in report.fused if row.steps is not None}
    if not traced:
        raise ValueError("--steps needs --input-shape N C H W")
    if module not in traced:
        raise ValueError(f"--steps must be one of {', '.join(traced)}; got {module!r}")
    for row in report.fused:
        if row.module == module:
            print(f"{row.module}  {row.what}  [{row.engine}]\n{row.steps}")
