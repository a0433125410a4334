"""The ``fused-resnet tune`` command: measures what ``fuse`` chooses by, and keeps it for this machine.

Two questions, asked of a ResNet-50's blocks that end in an expanding 1×1 convolution: which engine is faster, and up to
how many inputs of that convolution it costs no time to do without its output.  On Triton the same figure decides which
1×1 convolutions make their batch norm's sums in products of its own, so that both are measured together.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from fused_resnet.bench.block import BlockShape, BlockStep, distinct_blocks
from fused_resnet.bench.command import read_device, require_at_least
from fused_resnet.bench.harness import make_clock, take_turns
from fused_resnet.bench.peers import DTYPES, LEAN, STOCK_PEER, Peer
from fused_resnet.bench.rows import FUSED
from fused_resnet.bench.settings import Settings
from fused_resnet.bench.suites.contest import refusals
from fused_resnet.engines import GPU_NAMES, EngineError, tuning, why_not
from fused_resnet.engines.tuning import Tuning
from fused_resnet.ops.pointwise_conv import config
from fused_resnet.system.environment import environment

EXAMPLES = """\
examples:
  fused-resnet tune                       this machine's processor, about a minute
  fused-resnet tune --device cuda         its GPU, at 256 images
  fused-resnet tune --dry-run             measure and show, keep nothing

Every later process on the same device goes by the file that is written; delete it to go back, or set
FUSED_RESNET_TUNING=0. Run it on a machine that does nothing else.
"""


class Measured(NamedTuple):
    """Medians of a block's forward and backward in seconds, with every output kept and with the last one not kept."""

    dtype: str
    inputs: int
    engine: str
    kept: float
    not_kept: float


def measure(settings: Settings) -> Iterator[Measured]:
    """Time the blocks of every size on every engine, all by turns; a wrong result gets no figure.

    Parameters
    ----------
    settings : Settings
        Its device, dtypes, batch size, image size and rounds.
    """
    device_type = settings.device.type
    candidates = [e for e in (*GPU_NAMES, "cpu") if why_not(e, device_type) is None]
    clock = make_clock(settings.device)
    with tuning.using(device_type, Tuning(tuple(candidates), {})):  # fast keeps every output
        for dtype in settings.dtypes:
            for shape in blocks(settings.image_size):
                drawn = BlockStep.make(shape, settings.batch_size, dtype, settings.device)
                peers = [Peer(name, e) for e in candidates for name in (FUSED, LEAN)]
                refused = refusals(partial(BlockStep, *drawn), [STOCK_PEER, *peers])
                for reason in refused.values():
                    print(f"no figure: {reason}", file=sys.stderr)
                runs = {peer: BlockStep(*drawn, peer) for peer in peers if peer not in refused}
                times = take_turns(runs, clock, warmup=3, repeats=settings.op_repeats)
                seconds = {peer: statistics.median(values) for peer, values in times.items()}
                for engine in candidates:
                    kept, not_kept = (seconds.get(Peer(name, engine)) for name in (FUSED, LEAN))
                    if kept is not None and not_kept is not None:
                        yield Measured(dtype, shape.output // 4, engine, kept, not_kept)


def blocks(image_size: int) -> list[BlockShape]:
    """Return a ResNet-50's blocks with an identity shortcut, of the sizes in question."""
    shapes = distinct_blocks("resnet50", image_size)
    return [s for s in shapes if s.input[0] == s.output and s.output // 4 <= config.LEAN]


def decide(measured: list[Measured]) -> Tuning:
    """Return what follows from the figures: no output is left out unless all smaller ones may be, in every dtype."""
    total: dict[str, float] = {}
    most_inputs: dict[tuple[str, int], int] = {}
    for row in measured:
        total[row.engine] = total.get(row.engine, 0.0) + min(row.kept, row.not_kept)
    for engine, size in dict.fromkeys((row.engine, DTYPES[row.dtype].itemsize) for row in measured):
        rows = [row for row in measured if (row.engine, DTYPES[row.dtype].itemsize) == (engine, size)]
        losing = min((row.inputs for row in rows if row.not_kept > row.kept), default=None)
        winning = [row.inputs for row in rows if losing is None or row.inputs < losing]
        if winning:
            most_inputs[engine, size] = max(winning)
    return Tuning(tuple(sorted(total, key=total.__getitem__)), most_inputs)


def add_tune(subcommands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare ``tune``."""
    parser = subcommands.add_parser(
        "tune",
        help="measure on this machine what fuse chooses by, and keep it",
        description="Measure which engine is faster here, and which outputs it costs no time to do without; later "
        "processes go by it.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ... (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, metavar="N", help="images (default: 8, on a GPU 256)")
    parser.add_argument("--image-size", type=int, metavar="PIXELS", help="(default: 224)")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), help="(default: fp32 bf16, on a GPU bf16 fp16)")
    parser.add_argument("--repeats", type=int, metavar="N", help="rounds (default: 30)")
    parser.add_argument("--dry-run", action="store_true", help="keep nothing")
    parser.set_defaults(run=run_tune)


def run_tune(options: argparse.Namespace) -> int:
    """Measure, show and keep; return 0, 1 where nothing could be measured or kept, 2 for bad input."""
    try:
        settings = read_settings(options)
    except ValueError as error:
        print(f"fused-resnet tune: error: {error}", file=sys.stderr)
        return 2
    device_type = settings.device.type
    print(f"{tuning.device_name(device_type)}, {settings.batch_size} images, forward and backward of a block")
    print(f"{'dtype':<7}{'inputs':>6}  {'engine':<10}{'output kept':>12}{'not kept':>12}{'ratio':>8}", flush=True)
    measured = []
    try:
        for row in measure(settings):
            measured.append(row)
            times = f"{1e3 * row.kept:>9.2f} ms{1e3 * row.not_kept:>9.2f} ms{row.kept / row.not_kept:>8.2f}"
            print(f"{row.dtype:<7}{row.inputs:>6}  {row.engine:<10}{times}", flush=True)
    except EngineError as error:
        print(f"fused-resnet tune: error: {error}", file=sys.stderr)
        return 2
    if not measured:
        print("fused-resnet tune: error: no engine gave a figure; fused-resnet doctor says why", file=sys.stderr)
        return 1
    result = decide(measured)
    print(*conclusions(result), sep="\n")
    if options.dry_run:
        return 0
    record = {"measured": [row._asdict() for row in measured], "environment": environment(settings.device)}
    try:
        print(f"kept in {tuning.write(device_type, result, record)}")
    except OSError as error:
        print(f"fused-resnet tune: error: {error}", file=sys.stderr)
        return 1
    return 0


def read_settings(options: argparse.Namespace) -> Settings:
    """Return what is measured; a ValueError names the option that cannot be."""
    settings = Settings.on(read_device(options.device))
    given = {
        "batch_size": options.batch_size,
        "image_size": options.image_size,
        "dtypes": options.dtype and tuple(options.dtype),
        "op_repeats": options.repeats,
    }
    require_at_least(options, batch_size=1, image_size=32, repeats=1)
    return replace(settings, **{name: value for name, value in given.items() if value is not None})


def conclusions(result: Tuning) -> Iterator[str]:
    """Say in words what was decided."""
    yield f"engine='auto' takes {result.engines[0]}" + (
        f", then {', '.join(result.engines[1:])}" if result.engines[1:] else ""
    )
    sizes: Mapping[int, str] = {4: "float32", 2: "half precision"}
    for engine in result.engines:
        for size, name in sizes.items():
            most = result.most_inputs.get((engine, size))
            kept = "keeps every output" if most is None else f"does without outputs of up to {most} inputs"
            yield f"memory='fast' on {engine} in {name} {kept}"
