"""``fused-resnet bench``."""

import argparse
import shlex
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fused_resnet import engines, models
from fused_resnet.bench import peers, table
from fused_resnet.bench.libraries import check_input, check_name, is_library_name
from fused_resnet.bench.network import MODES
from fused_resnet.bench.plot import draw, drawable
from fused_resnet.bench.record import make_record, write_record
from fused_resnet.bench.report import write_report
from fused_resnet.bench.rows import FUSED, STOCK, Row
from fused_resnet.bench.settings import Settings
from fused_resnet.bench.suites import SUITES, Suite
from fused_resnet.ops.activation import BY_NAME
from fused_resnet.system.atomic import replacing
from fused_resnet.system.environment import environment
from fused_resnet.system.host_memory import keep_freed_memory

if TYPE_CHECKING:
    Subcommands = argparse._SubParsersAction[argparse.ArgumentParser]

REPORT, ALL = "report", "all"
# this package's networks that are made of the blocks that suites count
RESIDUAL = [name for name in models.names() if name.startswith("resnet")]
# what runs without a word: what a user wants to know of a machine
DEFAULT_SUITES = ("op", "model", "memory")

DESCRIPTION = """\
Measure the fused operations and networks beside stock PyTorch, in one process and by turns, channels_last.

  ceilings  a large copy and a large matrix product: what this machine can do at the most
  pointwise every distinct 1x1 convolution with its batch norm: what prologue, statistics, mask and sums cost
  op        act(batch_norm(x) + shortcut) at the shapes of a ResNet-50, with percent of the limit
  conv      every distinct convolution of a network, fprop, dgrad and wgrad, with percent of the limit
  block     forward and backward of every distinct residual block of a network
  model     a step of a network: forward, cross entropy, backward, SGD
  memory    activations that a training step keeps for its backward (on a GPU also its peak)
  profile   the time of a step by class of kernel: convolutions, norm, pointwise, casts, optimizer, gaps
  roofline  what a step of a network must move, keep and can reach; counted, needs no GPU (a library's network runs)

  report    make docs/benchmarks.md and its plots from benchmarks/results/DEVICE/WHAT.json

Networks are this package's ResNets; model, memory, profile and roofline also take timm:NAME and torchvision:NAME, with
random weights and without a download: stock is the library's network as it is, fused the same behind fused_resnet.fuse.

Every result is first compared with float64: a peer farther off than twice stock's error gets no figure, and the exit
status is 1. Times are medians with the 20th and 80th percentile; a ratio is the median of those within each round of
turns. On a GPU times are CUDA events, with caches flushed in front of each.
"""

EXAMPLES = """\
examples:
  fused-resnet bench --quick                             does it all work? a few seconds; the figures mean little
  fused-resnet bench                                     op, model and memory of ResNet-18 and ResNet-50, fp32 and bf16
  fused-resnet bench model memory --model resnet50 --dtype bf16 fp16 --batch-size 256 --device cuda \\
      --peers fused compile compile-max-autotune timm    one network against everybody
  fused-resnet bench model --device cuda --cuda-graph    the same without launch gaps, for every peer
  fused-resnet bench op --engine triton cuda --device cuda    two engines by turns
  fused-resnet bench op --act relu silu hardswish gelu --dtype fp32    the operation with other activations
  fused-resnet bench model memory --model timm:efficientnet_b0 torchvision:mobilenet_v3_large    other networks
  fused-resnet bench memory --model torchvision:r3d_18 --batch-size 2    clips: 16 frames at half of --image-size
  fused-resnet bench pointwise --model resnet50 --dtype bf16 --device cuda    what a 1x1 costs, part by part
  fused-resnet bench profile --peers fused compile --trace trace.json    where the time goes
  fused-resnet bench roofline --model resnet50 --dtype bf16 --batch-size 256 --copy 4300 --matmul 790
  fused-resnet bench --json benchmarks/results/MY-GPU/all.json && fused-resnet bench report

Measure on a machine that does nothing else, and look at the percentiles before you believe a median.
"""


def add_bench(subcommands: "Subcommands") -> None:
    """Declare ``bench``."""
    parser = subcommands.add_parser(
        "bench",
        help="measure the fused operations and networks beside stock PyTorch",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run_bench)
    default = Settings()
    add = parser.add_argument
    add(
        "suites",
        nargs="*",
        metavar="SUITE",
        help=f"{', '.join(SUITES)}, {ALL} or {REPORT} (default: {' '.join(DEFAULT_SUITES)})",
    )

    what = parser.add_argument_group("what").add_argument
    what(
        "--model",
        nargs="+",
        metavar="NAME",
        help=f"networks: {', '.join(RESIDUAL)}, timm:NAME, torchvision:NAME (default: {' '.join(default.models)})",
    )
    what(
        "--act",
        nargs="+",
        choices=list(BY_NAME),
        metavar="NAME",
        help=f"activations of op, one or more: {', '.join(BY_NAME)} (default: {' '.join(default.acts)})",
    )
    what(
        "--peers",
        nargs="+",
        choices=peers.NAMES,
        metavar="PEER",
        help=f"who is compared with {STOCK}: {', '.join(peers.NAMES[1:])} (default: {FUSED}); {STOCK} alone for itself",
    )
    what("--mode", choices=MODES, default=default.mode, help="of model and profile (default: %(default)s)")
    what("--batch-size", type=int, metavar="N", help=f"images of a step (default: {default.batch_size}; on a GPU 256)")
    what("--image-size", type=int, metavar="PIXELS", help=f"their height and width (default: {default.image_size})")
    what(
        "--dtype",
        nargs="+",
        choices=list(peers.DTYPES),
        help=f"bf16 and fp16 are autocast (default: {' '.join(default.dtypes)}; on a GPU bf16 fp16)",
    )

    how = parser.add_argument_group("how").add_argument
    how("--device", default=str(default.device), help=f"cpu, cuda, cuda:1 ... (default: {default.device})")
    how(
        "--engine",
        nargs="+",
        choices=["auto", *engines.NAMES],
        metavar="ENGINE",
        help=f"that serves the fused peer, one or more: auto, {', '.join(engines.NAMES)} (default: auto)",
    )
    how("--cuda-graph", action="store_true", help="capture what is timed into a CUDA graph, for every peer")
    how("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice)")
    how(
        "--repeats",
        type=int,
        metavar="N",
        help=f"rounds that count (default: {default.model_repeats} for networks, else {default.op_repeats})",
    )
    how("--copy", type=float, metavar="GB/S", help="copy bandwidth for the limits (default: measured)")
    how("--matmul", type=float, metavar="TFLOP/S", help="matrix product for the limits (default: measured)")
    how("--quick", action="store_true", help="small shapes and few rounds, except where an option says otherwise")

    where = parser.add_argument_group("where").add_argument
    where("--json", type=Path, metavar="FILE", help="record every value and the environment, row by row")
    where("--plot", type=Path, metavar="FILE.png", help="draw the ratios (needs matplotlib)")
    where("--trace", type=Path, metavar="FILE.json", help="profile: a Chrome trace for each model, dtype and peer")
    where(
        "--results",
        type=Path,
        metavar="FOLDER",
        default=Path("benchmarks/results"),
        help="report: holds DEVICE/WHAT.json (default: %(default)s)",
    )
    where(
        "--page",
        type=Path,
        metavar="FILE.md",
        default=Path("docs/benchmarks.md"),
        help="report: what is made, plots beside it (default: %(default)s)",
    )


def run_bench(options: argparse.Namespace) -> int:
    """Measure, print, keep; return 0, 1 where a result was refused, 2 for bad input."""
    try:
        suites = read_suites(options)
        check_files(options)
        if options.suites == [REPORT]:
            print(*write_report(options.results, options.page), sep="\n")
            return 0
        settings = read_settings(options, suites)
    except (ValueError, OSError, ImportError, engines.EngineError) as error:
        print(f"fused-resnet bench: error: {error}", file=sys.stderr)
        return 2
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.backends.cudnn.benchmark = True
    if settings.device.type == "cpu":
        keep_freed_memory()  # as fuse does: for every peer, whoever comes first

    rows: list[Row] = []
    here = environment(settings.device)
    print(title(here))
    for suite in suites:
        own = settings_of(suite, settings)
        suite = table.fitted(suite, own)
        print(f"\n{table.heading(suite, own)}", flush=True)
        previous: Row | None = None
        for row in suite.measure(own):
            rows.append(row)
            first = previous is None or previous.values.keys() != row.values.keys()
            group = table.group_line(suite, row, previous)
            print(*group, *table.lines(suite, row, first=first), sep="\n", flush=True)
            previous = row
            if options.json is not None:
                write_record(options.json, make_record(command_line(), here, settings, rows))
    if options.plot is not None and drawable(rows):
        with replacing(options.plot) as file:
            draw(drawable(rows), title(here), file)
    if any(row.refused for row in rows):
        print(f"fused-resnet bench: {table.summary(rows)}: see above", file=sys.stderr)
        return 1
    return 0


def read_suites(options: argparse.Namespace) -> list[Suite]:
    """Return the suites that are asked for, the ceilings in front of those that need them."""
    known = (*SUITES, ALL)
    if options.suites == [REPORT]:
        return []
    for name in options.suites:
        if name not in known:
            alone = "; report goes alone" if name == REPORT else ""
            raise ValueError(f"SUITE must be one of {', '.join((*known, REPORT))}, got {name!r}{alone}")
    names = list(SUITES) if ALL in options.suites else options.suites or list(DEFAULT_SUITES)
    if any(SUITES[name].limited for name in names):
        names = ["ceilings", *names]
    return [SUITES[name] for name in dict.fromkeys(names)]


def read_settings(options: argparse.Namespace, suites: list[Suite]) -> Settings:
    """Return the settings that the options ask for; a ValueError names an option, what it takes and what came."""
    require_at_least(options, batch_size=2, image_size=32, repeats=1, threads=1)
    for name in ("copy", "matmul"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name} must be more than 0, got {value}")
    device = read_device(options.device)
    if options.cuda_graph and device.type != "cuda":
        raise ValueError(f"--cuda-graph needs --device cuda, got {options.device}: only a GPU's work can be captured")
    names = [suite.name for suite in suites]
    if options.act is not None and "op" not in names:
        raise ValueError(f"--act belongs to the suite op, got {' '.join(names)}")
    if options.trace is not None and "profile" not in names:
        raise ValueError(f"--trace belongs to the suite profile, got {' '.join(names)}")

    settings = Settings.on(device)
    if options.quick:
        settings = settings.quick()
    given = {
        "models": options.model and tuple(dict.fromkeys(options.model)),
        "acts": options.act and tuple(dict.fromkeys(options.act)),
        "dtypes": options.dtype and tuple(options.dtype),
        "peers": options.peers and tuple(dict.fromkeys(options.peers)),
        "engines": options.engine and tuple(options.engine),
        "batch_size": options.batch_size,
        "image_size": options.image_size,
        "op_repeats": options.repeats,
        "model_repeats": options.repeats,
        "copy": options.copy and options.copy * 1e9,
        "matmul": options.matmul and options.matmul * 1e12,
        "mode": options.mode,
        "cuda_graph": options.cuda_graph,
        "trace": options.trace,
    }
    settings = replace(settings, **{name: value for name, value in given.items() if value is not None})
    check_models(settings, suites)
    for suite in suites:
        own = settings_of(suite, settings)
        # of this package's networks, roofline traces what an engine would do elsewhere
        runs = suite.name != "roofline" or any(map(is_library_name, own.models))
        for dtype in own.dtypes if runs else ():
            own.contenders(dtype)
        if peers.TIMM in own.peers:
            check_timm(own.models)
    return settings


def require_at_least(options: argparse.Namespace, **least_values: int) -> None:
    """Raise a ValueError that names the first option, of those that were given, whose value is too small."""
    for name, least in least_values.items():
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")


def read_device(name: str) -> torch.device:
    """Return the device of that name, if it is there."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device must be cpu, cuda, cuda:1 ...; got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu, cuda, cuda:1 ...; got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name} is not there: torch sees {torch.cuda.device_count()} GPUs here")
    return device


def settings_of(suite: Suite, settings: Settings) -> Settings:
    """Return the settings with the peers that a suite has."""
    return replace(settings, peers=tuple(name for name in settings.peers if name not in suite.without))


def check_models(settings: Settings, suites: list[Suite]) -> None:
    """Find out before anything is measured whether the networks are there, and what is asked of them can be done."""
    counting = [suite.name for suite in suites if suite.counts_blocks]
    for name in settings.models:
        if not is_library_name(name):
            if name not in RESIDUAL:
                known = ", ".join(RESIDUAL)
                raise ValueError(f"--model must be one of {known}, or timm:NAME or torchvision:NAME, got {name!r}")
            continue
        check_name(name)
        if counting:
            raise ValueError(
                f"{' and '.join(counting)} need this package's networks, whose blocks they know, got --model {name}"
            )
        if any("model" in suite.columns for suite in suites):
            check_input(name, settings.image_size)


def check_timm(names: tuple[str, ...]) -> None:
    """Find out before anything is measured whether timm has the networks."""
    if find_spec("timm") is None:
        raise ModuleNotFoundError("--peers timm needs timm, not installed here; mend: pip install timm")
    import timm

    for name in names:
        if not timm.is_model(name):
            raise ValueError(f"--peers timm needs models that timm has, got --model {name}")


def check_files(options: argparse.Namespace) -> None:
    """Find out before an hour of measuring that its result could not be kept."""
    for path in filter(None, (options.json, options.plot, options.trace)):
        if not path.absolute().parent.is_dir():
            raise FileNotFoundError(f"the folder of {path} does not exist: make it, or choose another")
    draws = options.plot is not None or options.suites == [REPORT]
    if draws and find_spec("matplotlib") is None:
        raise ModuleNotFoundError("plots need matplotlib, not installed here; mend: pip install matplotlib")


def title(here: dict[str, Any]) -> str:
    """Return the line above everything: versions and machine."""
    machine = here["gpu"] or f"{here['cpu']} {here['instruction_set']}, {here['threads']} threads"
    return f"fused_resnet {here['fused_resnet']}, torch {here['torch']}, {machine}, channels_last"


def command_line() -> str:
    """Return what was typed."""
    return shlex.join(["fused-resnet", *sys.argv[1:]])
