"""The ``fused-resnet warm`` command: compiles a network's Triton kernels before a job needs them.

Triton compiles a kernel when it is first launched, about a second for each, and keeps it on disk; what it keeps is
found by every later process of the same versions on the same kind of GPU. Here several processes launch the kernels of
different blocks at once.
"""

import argparse
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context

import torch

from fused_resnet import models
from fused_resnet.bench.block import BlockShape, BlockStep, distinct_blocks
from fused_resnet.bench.command import read_device, require_at_least
from fused_resnet.bench.network import NetworkStep, Workload
from fused_resnet.bench.peers import DTYPES, LEAN, LEAN_STAGE, STAGE, Peer
from fused_resnet.bench.rows import FUSED
from fused_resnet.engines import EngineError, choose

EXAMPLES = """\
examples:
  fused-resnet warm                                              ResNet-50 in bf16, 256 images of 224x224
  fused-resnet warm resnet18 resnet50 --dtype bf16 fp16
  TRITON_CACHE_DIR=/shared/triton fused-resnet warm resnet50     once for all nodes of a cluster

Take the batch size of the job: some kernels are compiled for what a number of images is divisible by.
"""

# by what fuse is asked for: memory and chain
PEERS = {("fast", "block"): FUSED, ("lean", "block"): LEAN, ("fast", "stage"): STAGE, ("lean", "stage"): LEAN_STAGE}


def warm_block(shape: BlockShape, workload: Workload, peer: Peer) -> None:
    """Run a block once, forward and backward, which compiles all that its kernels need."""
    BlockStep(*BlockStep.make(shape, workload.batch_size, workload.dtype, workload.device), peer)()
    if workload.device.type == "cuda":
        torch.cuda.synchronize(workload.device)


def warm(workload: Workload, peer: Peer, processes: int) -> float:
    """Compile a network's kernels, its blocks' by several processes at once.

    Parameters
    ----------
    workload : Workload
        The network, its images and its dtype.
    peer : Peer
        With the engine.
    processes : int
        At once; each has a context on the GPU and a block's activations.

    Returns
    -------
    The seconds of the whole network's first step, afterwards, in a process that has compiled nothing itself.
    """
    from tqdm import tqdm

    shapes = distinct_blocks(workload.model, workload.image_size)
    with (
        ProcessPoolExecutor(min(processes, len(shapes)), mp_context=get_context("spawn")) as pool,
        tqdm(total=len(shapes), unit=" blocks", leave=False, disable=not sys.stdout.isatty()) as bar,
    ):
        for done in as_completed([pool.submit(warm_block, shape, workload, peer) for shape in shapes]):
            done.result()
            bar.update()
    step = NetworkStep(workload, peer)
    start = time.perf_counter()
    step()
    if workload.device.type == "cuda":
        torch.cuda.synchronize(workload.device)
    return time.perf_counter() - start


def add_warm(subcommands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare ``warm``."""
    parser = subcommands.add_parser(
        "warm",
        help="compile a network's Triton kernels before a job",
        description="Compile the kernels that a network's training needs, so that the first step of a job does not.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("models", nargs="*", default=["resnet50"], metavar="NAME", help="(default: resnet50)")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["bf16"], help="(default: bf16)")
    parser.add_argument("--batch-size", type=int, default=256, metavar="N", help="images (default: %(default)s)")
    parser.add_argument("--image-size", type=int, default=224, metavar="PIXELS", help="(default: %(default)s)")
    parser.add_argument("--memory", choices=["fast", "lean"], default="fast", help="as for fuse (default: %(default)s)")
    parser.add_argument("--chain", choices=["block", "stage"], default="block", help="the same (default: %(default)s)")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 ... (default: %(default)s)")
    parser.add_argument(
        "--processes", type=int, default=min(8, os.cpu_count() or 1), metavar="N", help="at once (default: %(default)s)"
    )
    parser.set_defaults(run=run_warm)


def run_warm(options: argparse.Namespace) -> int:
    """Compile, and say how long a first step takes now; return 0, 2 for bad input."""
    try:
        require_at_least(options, batch_size=1, processes=1, image_size=32)
        unknown = [name for name in options.models if name not in models.names()]
        if unknown:
            raise ValueError(f"NAME must be one of {', '.join(models.names())}; got {', '.join(unknown)}")
        device = read_device(options.device)
        for dtype in options.dtype:
            if (engine := choose("auto", device.type, DTYPES[dtype])) != "triton":
                raise ValueError(f"the engine {engine} serves {dtype} on {device}, whose kernels are compiled already")
        for model in options.models:
            for dtype in options.dtype:
                peer = Peer(PEERS[options.memory, options.chain], "triton")
                workload = Workload(model, options.batch_size, options.image_size, dtype, device)
                start = time.perf_counter()
                first = warm(workload, peer, options.processes)
                seconds = time.perf_counter() - start
                print(f"{model} {dtype}: compiled in {seconds:.1f} s; a first step takes {first:.1f} s", flush=True)
    except (ValueError, EngineError) as error:
        print(f"fused-resnet warm: error: {error}", file=sys.stderr)
        return 2
    return 0
