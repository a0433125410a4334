"""The JSON file of a run: every value, and where and how it was measured."""

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import fused_resnet
from fused_resnet.bench.harness import Row
from fused_resnet.bench.suites import Settings
from fused_resnet.training.files import replacing

FORMAT = 1

# environment variables that change how fast torch is
VARIABLES = ("ATEN_", "DNNL_", "GOMP_", "KMP_", "LD_PRELOAD", "MALLOC_", "MKL_", "OMP_", "ONEDNN_")


def environment(device: torch.device) -> dict[str, Any]:
    """Return the versions and the machine that figures depend on."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = None
    return {
        "fused_resnet": fused_resnet.__version__,
        "commit": commit(),
        "torch": torch.__version__,
        "triton": triton,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "variables": {name: os.environ[name] for name in sorted(os.environ) if name.startswith(VARIABLES)},
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }


def commit() -> str | None:
    """Return the git commit of the checkout that this package is run from, with ``-dirty`` where files differ."""
    root = Path(fused_resnet.__file__).parent.parent
    if not (root / ".git").exists():
        return None
    try:
        described = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()


def cpu_model() -> str:
    """Return the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor())


def make_record(command: str, settings: Settings, rows: Sequence[Row]) -> dict[str, Any]:
    """Return a run as plain data."""
    return {
        "format": FORMAT,
        "command": command,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "environment": environment(settings.device),
        "settings": {name: _plain(value) for name, value in vars(settings).items()},
        "rows": [row.record() for row in rows],
    }


def _plain(value: object) -> object:
    return str(value) if isinstance(value, torch.device) else value


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write the file, whole or not at all."""
    with replacing(path) as file:
        file.write((json.dumps(record, indent=2) + "\n").encode())
