"""``fused-resnet verify``."""

import argparse
import sys

import torch

from fused_resnet import models
from fused_resnet.engines import EngineError
from fused_resnet.surgery.command import AUTOCAST, add_fused_model, fuse_quietly
from fused_resnet.verification import verify
from fused_resnet.verification.accuracy import FACTOR, ULPS

DESCRIPTION = f"""\
Fuse a model and run one step, forward and backward, from the same weights and random images: stock, fused, and stock in
float64.  Every output, every gradient and every running statistic of the fused model may be {FACTOR} times as far from
float64 as stock PyTorch's, and {ULPS} units in the last place more.  The exit status is 1 where one is farther.
"""

EXAMPLES = """\
examples:
  fused-resnet verify resnet50                  this package's networks, in training mode, float32
  fused-resnet verify timm:seresnet50 --dtype bf16 --device cuda
                                                under autocast, on the GPU
  fused-resnet verify torchvision:resnet18 --input-shape 8 3 224 224 --eval
  fused-resnet verify resnet20 --all            every tensor, not only the worst

how to read it:
  fused, stock, allowed   errors against float64, relative to the tensor's own size (root mean squares)
  own noise               stock's error when its input moves by one rounding; measured where fused breaks the rule.
                          A deep network magnifies roundings, by the ReLUs that flip: what stays below twice that is
                          no fault, and says "within the network's own noise"

on your own model, data and mode, in Python:
  print(fused_resnet.verify(model, images, dtype=torch.bfloat16))
"""


def add_verify(subcommands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare ``verify``."""
    parser = subcommands.add_parser(
        "verify",
        help="check on this machine that a model, fused, computes what stock PyTorch computes",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_fused_model(parser)
    parser.add_argument(
        "--input-shape",
        type=int,
        nargs=4,
        default=(8, 3, 64, 64),
        metavar=("N", "C", "H", "W"),
        help="of the random images (default: 8 3 64 64)",
    )
    parser.add_argument("--dtype", choices=list(AUTOCAST), default="fp32", help="of autocast (default: %(default)s)")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--train", dest="training", action="store_true", default=True, help="in training mode (default)")
    modes.add_argument("--eval", dest="training", action="store_false", help="in evaluation mode")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ... (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and images (default: %(default)s)")
    parser.add_argument("--all", action="store_true", help="print every tensor")
    parser.set_defaults(run=run_verify)


def run_verify(options: argparse.Namespace) -> int:
    """Verify a model with random weights on random images; the status is 1 where it breaks the rule."""
    try:
        torch.manual_seed(options.seed)
        images = torch.randn(options.input_shape, device=options.device)
        model = models.create(options.model).to(options.device).train(options.training)
        verification = verify(fuse_quietly(model, options), images, dtype=AUTOCAST[options.dtype])
    except (ValueError, ImportError, EngineError, RuntimeError) as error:
        print(f"fused-resnet verify: error: {error}", file=sys.stderr)
        return 2
    print(verification.table() if options.all else verification)
    return 0 if verification.ok else 1
