"""The ``fused-resnet`` command.

Each subcommand is two functions: ``add_<name>``, which declares it, and ``run_<name>``, which does it.
"""

import argparse
import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fused_resnet import models
from fused_resnet.bench.command import add_bench
from fused_resnet.doctor import add_doctor
from fused_resnet.engines import EngineError
from fused_resnet.experiments.command import add_experiment
from fused_resnet.models.command import add_models
from fused_resnet.surgery import NothingToFuse, explain, fuse
from fused_resnet.training.command import INTERRUPTED, add_train
from fused_resnet.training.eval_command import add_eval

if TYPE_CHECKING:
    Subcommands = argparse._SubParsersAction[argparse.ArgumentParser]


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
    add_eval(subcommands)
    add_experiment(subcommands)
    add_bench(subcommands)
    add_models(subcommands)
    add_explain(subcommands)
    add_doctor(subcommands)
    return parser


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
