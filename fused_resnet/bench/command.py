"""``fused-resnet bench``."""

import argparse
import shlex
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fused_resnet import engines, models
from fused_resnet.atomic import replacing
from fused_resnet.bench import report
from fused_resnet.bench.harness import Row
from fused_resnet.bench.peers import DTYPES
from fused_resnet.bench.plot import draw
from fused_resnet.bench.record import make_record, write_record
from fused_resnet.bench.suites import SUITES, Settings
from fused_resnet.environment import environment

if TYPE_CHECKING:
    Subcommands = argparse._SubParsersAction[argparse.ArgumentParser]

DESCRIPTION = """\
Measure the fused operations and networks beside stock PyTorch, in one process and by turns, channels_last.

  op       relu(batch_norm(x) + shortcut) at the shapes of a ResNet-50: forward, and forward with backward
  model    a training step of a network: forward, cross entropy, backward, SGD
  memory   activations that a training step keeps for its backward (on a GPU also its peak)

Every result is first compared with float64: what is farther off than twice stock's error gets no figure, and the exit
status is 1. Times are medians; a speed-up is the median of those within each round of turns.
"""

EXAMPLES = """\
examples:
  fused-resnet bench --quick                             does it all work? a few seconds; the figures mean little
  fused-resnet bench                                     everything: ResNet-18 and ResNet-50, fp32 and bf16
  fused-resnet bench model --model resnet50 --compile    one network, with torch.compile as a third peer
  fused-resnet bench op --dtype bf16 --threads 2         the operation alone, in bfloat16, on two cores
  fused-resnet bench --json run.json --plot run.png      keep every value and the environment; draw the ratios

Measure on a machine that does nothing else, and look at the quartiles before you believe a median.
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
    add("suite", nargs="?", choices=[*SUITES, "all"], default="all", help="what to measure (default: all)")

    what = parser.add_argument_group("what").add_argument
    what(
        "--model",
        nargs="+",
        choices=models.names(),
        metavar="NAME",
        help=f"networks of model and memory: {', '.join(models.names())} (default: {' '.join(default.models)})",
    )
    what("--batch-size", type=int, metavar="N", help=f"images of a step (default: {default.batch_size})")
    what("--image-size", type=int, metavar="PIXELS", help=f"their height and width (default: {default.image_size})")
    what("--dtype", nargs="+", choices=list(DTYPES), help=f"bf16 is autocast (default: {' '.join(default.dtypes)})")
    what("--compile", action="store_true", help="also measure stock under torch.compile in the suite model")

    how = parser.add_argument_group("how").add_argument
    how("--device", default=str(default.device), help=f"cpu, cuda, cuda:1 ... (default: {default.device})")
    how("--engine", choices=["auto", *engines.NAMES], default=default.engine, help="that serves the fused peer")
    how("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice)")
    how(
        "--repeats",
        type=int,
        metavar="N",
        help=f"rounds that count (default: {default.op_repeats} in op, {default.model_repeats} in model)",
    )
    how("--quick", action="store_true", help="small shapes and few rounds, except where an option says otherwise")

    where = parser.add_argument_group("where").add_argument
    where("--json", type=Path, metavar="FILE", help="record every value and the environment, row by row")
    where("--plot", type=Path, metavar="FILE.png", help="draw the ratios (needs matplotlib)")


def run_bench(options: argparse.Namespace) -> int:
    """Measure, print, keep; return 0, 1 where a result was refused, 2 for bad input."""
    try:
        settings = read_settings(options)
        check_files(options)
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        for dtype in settings.dtypes:
            settings.serving_engine(dtype)
    except (ValueError, OSError, ImportError, engines.EngineError) as error:
        print(f"fused-resnet bench: error: {error}", file=sys.stderr)
        return 2
    torch.backends.cudnn.benchmark = True

    names = list(SUITES) if options.suite == "all" else [options.suite]
    rows: list[Row] = []
    print(title(settings))
    for name in names:
        print(f"\n{report.heading(SUITES[name], settings)}", flush=True)
        for row in SUITES[name].measure(settings):
            rows.append(row)
            print(report.line(SUITES[name], row), flush=True)
            if options.json is not None:
                write_record(options.json, make_record(command_line(), settings, rows))
    measured = [row for row in rows if not row.refused]
    if options.plot is not None and measured:
        with replacing(options.plot) as file:
            draw(measured, title(settings), file)
    refused = len(rows) - len(measured)
    if refused:
        print(f"fused-resnet bench: {refused} of {len(rows)} cases refused: wrong results", file=sys.stderr)
    return 1 if refused else 0


def read_settings(options: argparse.Namespace) -> Settings:
    """Return the settings that the options ask for; a ValueError names an option, what it takes and what came."""
    for name, least in (("batch_size", 2), ("image_size", 32), ("repeats", 1), ("threads", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    try:
        device = torch.device(options.device)
    except RuntimeError as error:
        raise ValueError(f"--device must be cpu, cuda, cuda:1 ...; got {options.device!r}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {options.device} is not there: torch sees {torch.cuda.device_count()} GPUs here")

    settings = Settings(device=device, engine=options.engine, compile=options.compile)
    if options.quick:
        settings = settings.quick()
    given = {
        "models": options.model and tuple(options.model),
        "dtypes": options.dtype and tuple(options.dtype),
        "batch_size": options.batch_size,
        "image_size": options.image_size,
        "op_repeats": options.repeats,
        "model_repeats": options.repeats,
    }
    return replace(settings, **{name: value for name, value in given.items() if value is not None})


def check_files(options: argparse.Namespace) -> None:
    """Find out before an hour of measuring that its result could not be kept."""
    for path in filter(None, (options.json, options.plot)):
        if not path.absolute().parent.is_dir():
            raise FileNotFoundError(f"the folder of {path} does not exist: make it, or choose another")
    if options.plot is not None and find_spec("matplotlib") is None:
        raise ModuleNotFoundError("--plot needs matplotlib, not installed here; mend: pip install matplotlib")


def title(settings: Settings) -> str:
    """Return the line above everything: versions and machine."""
    here = environment(settings.device)
    machine = here["gpu"] or f"{here['cpu']} {here['instruction_set']}, {here['threads']} threads"
    return f"fused_resnet {here['fused_resnet']}, torch {here['torch']}, {machine}, channels_last"


def command_line() -> str:
    """Return what was typed."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
