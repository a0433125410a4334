"""What is measured on a GPU that is there for half an hour, in the order of its worth.

    python benchmarks/gpu.py facts        what the machine does, and what stock PyTorch makes of it
    python benchmarks/gpu.py kernels      every engine's kernels, and every block
    python benchmarks/gpu.py networks     ResNet-50 and ResNet-18 against stock and torch.compile
    python benchmarks/gpu.py all          the three, one after the other

Each part and each step in it has its own time limit; a step that fails or runs out of time does not keep the next from
running, and what it had measured is kept: rows are written as they come, to OUT/STEP.json, where OUT is --out, else
$OUT, else benchmarks/results/DEVICE. Needs a Python that has torch and pytest; installs nothing, fetches nothing.

    python benchmarks/gpu.py all --device cpu --quick --out /tmp/dry      a rehearsal without a GPU
"""

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from fused_resnet import engines  # noqa: E402
from fused_resnet.bench.report import TUNING  # noqa: E402
from fused_resnet.system.environment import cpu_model  # noqa: E402

PART_LIMIT = 480  # seconds: three parts, and the machine's start, in half an hour
BATCH_SIZE = 256

POINTWISE_TESTS = ("tests/ops/test_pointwise_conv.py", "tests/ops/test_pointwise_triton_kernels.py")
GPU_TESTS = ("tests/test_cuda.py", "tests/ops/test_cuda_kernels.py", "tests/bench/test_harness.py")


@dataclass(frozen=True)
class Step:
    """One process.

    Attributes
    ----------
    name
        Of the file that it writes.
    arguments
        Of Python.
    limit
        Seconds.
    models
        Networks; a rehearsal has --quick's instead.
    graph
        Whether what is timed is captured into a CUDA graph; a CPU has none.
    records
        Whether it writes a record.
    """

    name: str
    arguments: tuple[str, ...]
    limit: int
    models: tuple[str, ...] = ()
    graph: bool = False
    records: bool = True


def bench(name: str, words: str, limit: int, *, models: str = "", graph: bool = False) -> Step:
    """Return a step of ``fused-resnet bench``."""
    arguments = ("-m", "fused_resnet", "bench", *words.split())
    return Step(name, arguments, limit, tuple(models.split()), graph)


def parts(device: torch.device) -> dict[str, tuple[Step, ...]]:
    """Return the steps of every part, with the engines that serve on a device."""
    serving = [name for name in engines.NAMES if name != "reference" and engines.why_not(name, device.type) is None]
    every_engine = f"--engine {' '.join(serving or ['reference'])}"
    half = "bf16 fp16" if device.type == "cuda" else "bf16"
    both = f"--dtype {half}"
    peers = "--peers fused lean compile"
    return {
        "facts": (
            Step("doctor", ("-m", "fused_resnet", "doctor"), 60, records=False),
            bench("ceilings", f"ceilings roofline {both}", 60, models="resnet50 resnet18"),
            bench("eager", f"model --peers stock {both}", 120, models="resnet50"),
            bench("eager-graph", f"model --peers stock {both}", 120, models="resnet50", graph=True),
            bench("conv", "conv --dtype bf16", 120, models="resnet50 resnet18", graph=True),
            bench("eager-profile", f"profile --peers stock {both}", 90, models="resnet50"),
            Step("tests", ("-m", "pytest", "-q", *GPU_TESTS), 240, records=False),
        ),
        "kernels": (
            # compiles some hundred variants
            Step("tests-triton", ("-m", "pytest", "-q", "-x", "tests/ops/test_triton_kernels.py"), 120, records=False),
            Step("tests-pointwise", ("-m", "pytest", "-q", *POINTWISE_TESTS), 120, records=False),
            # the first two layers' shapes come first; named here, since a rehearsal's ResNet-20 has no bottleneck
            bench("pointwise", "pointwise --model resnet50 resnet18 --dtype bf16", 150, graph=True),
            bench("op", f"op {every_engine} {both}", 150, graph=True),
            bench("block", f"block {every_engine} {both}", 180, models="resnet50 resnet18", graph=True),
            bench("block-peers", f"block {peers} --dtype bf16", 180, models="resnet50", graph=True),
            Step("tune", ("-m", "fused_resnet", "tune", "--device", str(device)), 120, records=False),
        ),
        "networks": (
            bench("model", f"model {peers} {both}", 240, models="resnet50 resnet18"),
            bench("model-graph", f"model {peers} {both}", 200, models="resnet50 resnet18", graph=True),
            bench("memory", f"memory {peers} --dtype bf16", 100, models="resnet50 resnet18"),
            bench("profile", "profile --peers fused compile --dtype bf16", 100, models="resnet50"),
            bench("timm", "model --model resnet50 --peers fused timm --dtype bf16", 60),
            bench("max-autotune", "model --peers fused compile-max-autotune --dtype bf16", 240, models="resnet50"),
        ),
    }


def command(step: Step, device: torch.device, out: Path, *, quick: bool) -> list[str]:
    """Return the words of a step."""
    words = [sys.executable, *step.arguments]
    if not step.records:
        return words
    words += ["--device", str(device), "--json", str(out / f"{step.name}.json")]
    if quick:
        words.append("--quick")
    else:
        words += ["--batch-size", str(BATCH_SIZE), *(["--model", *step.models] if step.models else [])]
    if step.graph and device.type == "cuda":
        words.append("--cuda-graph")
    return words


def run(words: list[str], limit: float, **variables: str) -> str:
    """Run a process and return how it ended; out of time, it and all that it started are ended."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **variables}
    with subprocess.Popen(words, cwd=ROOT, env=environment, start_new_session=True) as process:
        try:
            status = process.wait(timeout=limit)
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as error:
            os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, KeyboardInterrupt):
                raise
            return f"out of time after {limit:.0f} s"
    return "done" if status == 0 else f"exit status {status}"


def run_part(name: str, device: torch.device, out: Path, *, quick: bool) -> bool:
    """Run a part's steps and say how each ended; return whether all did well."""
    until = time.monotonic() + PART_LIMIT
    ends = []
    for step in parts(device)[name]:
        limit = min(step.limit, until - time.monotonic())
        words = command(step, device, out, quick=quick)
        print(f"\n== {name}: {step.name}, at most {max(0, limit):.0f} s: {shlex.join(words[1:])}", flush=True)
        start = time.monotonic()
        ended = "not begun: the part is out of time"
        if limit > 5:
            # what the step tune finds is a result, too, and networks go by it
            ended = run(words, limit, FUSED_RESNET_TUNING=os.environ.get("FUSED_RESNET_TUNING") or str(out / TUNING))
        ends.append((step.name, ended, time.monotonic() - start))
    print(f"\n{name}, in {out}:")
    for step_name, ended, seconds in ends:
        print(f"  {step_name:<14} {seconds:6.1f} s  {ended}", flush=True)
    return all(ended == "done" for _, ended, _ in ends)


def device_folder(device: torch.device) -> str:
    """Return a device's name as a folder."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu {cpu_model()}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def main(arguments: list[str] | None = None) -> int:
    """Run the parts that are asked for; return 1 where a step did not do well, 2 for bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["facts", "kernels", "networks", "all"])
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 ...; cpu for a rehearsal (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="small networks and few rounds: a rehearsal")
    parser.add_argument("--out", type=Path, default=os.environ.get("OUT"), metavar="FOLDER", help="of the records")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(
            f"{sys.executable}'s torch sees no CUDA device; make PYTHON=/path/to/python of an environment that does, "
            "or rehearse with --device cpu --quick",
            file=sys.stderr,
        )
        return 2
    out = Path(options.out or ROOT / "benchmarks" / "results" / device_folder(device)).absolute()
    out.mkdir(parents=True, exist_ok=True)
    names = ["facts", "kernels", "networks"] if options.part == "all" else [options.part]
    well = [run_part(name, device, out, quick=options.quick) for name in names]
    return 0 if all(well) else 1


if __name__ == "__main__":
    sys.exit(main())
