"""The ``models`` subcommand: the networks, and what they cost."""

import argparse
import sys

from fused_resnet.models.registry import names
from fused_resnet.models.resnet import SHORTCUTS
from fused_resnet.models.summary import Summary, summarize

MODELS_NOTES = """\
depth is the number of weighted layers, without those of shortcuts; multiply-adds are those of the forward of one image
of the size shown, in convolutions and linear layers.

shortcut is the option of section 3.3 of the paper (arXiv:1512.03385): A, the identity padded by zeros; B, a projection
where the shape changes; C, projections everywhere; none, a plain network.

examples:
  fused-resnet models                            every network
  fused-resnet models resnet20 plain20           two of them
  fused-resnet models resnet56 --shortcut A      as the paper has it on CIFAR-10
  fused-resnet train --model plain20             trains one; in Python: fused_resnet.models.create("plain20")
"""


def add_models(subcommands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare ``models``."""
    parser = subcommands.add_parser(
        "models",
        help="list the networks with depth, parameters and multiply-adds",
        description="List this package's networks and what they cost. They are counted, not run: no memory is taken.",
        epilog=MODELS_NOTES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="of a network (default: all)")
    parser.add_argument(
        "--shortcut",
        choices=[option for option in SHORTCUTS if option != "none"],
        help="of the residual networks (default: B)",
    )
    parser.set_defaults(run=run_models)


def run_models(options: argparse.Namespace) -> int:
    """Print the table."""
    shortcut = {} if options.shortcut is None else {"shortcut": options.shortcut}
    unknown = [name for name in options.names if name not in names()]
    if unknown:
        known = ", ".join(names())
        print(f"fused-resnet models: error: NAME must be one of {known}; got {', '.join(unknown)}", file=sys.stderr)
        return 2
    print(f"{'model':<10}  depth  parameters  multiply-adds  images   shortcut")
    for name in options.names or names():
        print(row(summarize(name, **(shortcut if name.startswith("resnet") else {}))), flush=True)
    return 0


def row(network: Summary) -> str:
    """Return a network's line of the table."""
    parameters, multiply_adds = network.parameters / 1e6, network.multiply_adds / 1e6
    images = f"{network.image_size}x{network.image_size}"
    return (
        f"{network.name:<10}  {network.depth:>5}  {parameters:>8.2f} M  {multiply_adds:>11,.0f} M  {images:<7}  "
        f"{network.shortcut}"
    )
