"""Report what this installation can do on this machine, and what is missing, why, and how to get it."""

import argparse
import json
import shutil
import sys
from importlib.util import find_spec
from typing import Any

import torch

from fused_resnet import engines
from fused_resnet.engines import libraries, tuning
from fused_resnet.ops.self_check import self_check
from fused_resnet.system.environment import environment
from fused_resnet.system.host_memory import keep_freed_memory

# what the package does without, what for, and how to get it
OPTIONAL_PACKAGES = {
    "triton": ("kernels for NVIDIA GPUs", "pip install triton"),
    "torchvision": ("its networks, and the bench of whole networks", "pip install torchvision"),
    "matplotlib": ("training curves", "pip install 'fused_resnet[train]'"),
    "sklearn": ("the handwritten digits of fused-resnet train", "pip install 'fused_resnet[train]'"),
    "tqdm": ("the progress bar of fused-resnet train", "pip install 'fused_resnet[train]'"),
}
OPTIONAL_PROGRAMS = {
    "c++": ("to build the kernels from the source", "apt install g++, or dnf install gcc-c++"),
    "nvcc": ("to build the CUDA kernels from the source", "the CUDA toolkit of torch's CUDA"),
}


def examine() -> dict[str, Any]:
    """Return versions, devices, engines, what the native build holds and the result of its self-check."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    checked = {name: wrong for device in devices for name, wrong in self_check(device).items()}
    return {
        **environment(torch.device(devices[-1])),
        "gpus": [
            f"{torch.cuda.get_device_name(i)}, sm_{major}{minor}"
            for i in range(torch.cuda.device_count())
            for major, minor in [torch.cuda.get_device_capability(i)]
        ],
        "engines": {
            name: engines.why_not(name, "cuda" if name in engines.GPU_NAMES else "cpu") or "serves"
            for name in engines.NAMES
        },
        "default engine": {device: engines.choose("auto", device, torch.float32) for device in devices},
        "self-check": {name: wrong or "passed" for name, wrong in checked.items()},
        "tuning": {device: _tuning_of(device) for device in devices},
        "freed host memory": keep_freed_memory(),
        "native build": {**libraries.build_record(), **_instruction_sets()},
        "missing": _missing(),
    }


def _tuning_of(device: str) -> str:
    file = tuning.path(device)
    if file is None or not file.exists():
        return "built in; fused-resnet tune measures this machine"
    return str(file)


def _missing() -> dict[str, str]:
    """Return what is not here, of what the package does without: what it is for, and how to get it."""
    packages = {name: told for name, told in OPTIONAL_PACKAGES.items() if find_spec(name) is None}
    programs = {name: told for name, told in OPTIONAL_PROGRAMS.items() if shutil.which(name) is None}
    return {name: f"{purpose}: {mend}" for name, (purpose, mend) in {**packages, **programs}.items()}


def _instruction_sets() -> dict[str, Any]:
    try:
        from fused_resnet import _C  # type: ignore[attr-defined]
    except ImportError as error:
        return {"instruction sets": f"unknown: {error}"}
    return {"instruction sets": _C.isas(), "in use": _C.isa()}


def add_doctor(subcommands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare ``doctor``."""
    parser = subcommands.add_parser(
        "doctor",
        help="say what this installation can do here, and what is missing and why",
        description="Report versions, engines (and why one cannot serve), how the kernels were built and for which "
        "instruction sets and architectures, whether they give right numbers on this machine, and what is missing and "
        "how to get it. Exit status 1 where a self-check failed.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for a bug report")
    parser.set_defaults(run=run_doctor)


def run_doctor(options: argparse.Namespace) -> int:
    """Print the report."""
    report = examine()
    if options.json:
        json.dump(report, sys.stdout, indent=2)
        print()
    else:
        for title, value in report.items():
            _print(title, value, indent=0)
    return 0 if all(result == "passed" for result in report["self-check"].values()) else 1


def _print(title: str, value: Any, indent: int) -> None:
    label = f"{' ' * indent}{title}"
    if isinstance(value, dict) and value:
        print(label)
        for name, inner in value.items():
            _print(name, inner, indent + 2)
    else:
        shown = ", ".join(map(str, value)) if isinstance(value, list) else value
        print(f"{label:<24}{shown or 'none'}")
