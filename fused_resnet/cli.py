"""The ``fused-resnet`` command.

Each subcommand is two functions, beside what it is about: ``add_<name>``, which declares it, and ``run_<name>``, which
does it.
"""

import argparse
import sys
from collections.abc import Sequence

from fused_resnet.bench.command import add_bench
from fused_resnet.bench.tune import add_tune
from fused_resnet.bench.warm import add_warm
from fused_resnet.doctor import add_doctor
from fused_resnet.experiments.command import add_experiment
from fused_resnet.models.command import add_models
from fused_resnet.surgery.command import add_explain
from fused_resnet.training.command import INTERRUPTED, add_train
from fused_resnet.training.eval_command import add_eval
from fused_resnet.verification.command import add_verify

# in the order in which --help lists them
SUBCOMMANDS = (
    add_train,
    add_eval,
    add_experiment,
    add_models,
    add_explain,
    add_verify,
    add_bench,
    add_tune,
    add_warm,
    add_doctor,
)


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
    for add in SUBCOMMANDS:
        add(subcommands)
    return parser
