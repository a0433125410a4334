"""Where a result is made: versions, the machine, and how its C library keeps memory."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fused_resnet.version import __version__

# environment variables that change how fast torch is
VARIABLES = (
    "ATEN_",
    "CUBLAS",
    "CUDA_",
    "CUDNN_",
    "DNNL_",
    "FUSED_RESNET_",
    "GOMP_",
    "KMP_",
    "LD_PRELOAD",
    "MALLOC_",
    "MKL_",
    "NVIDIA_TF32",
    "OMP_",
    "ONEDNN_",
    "PYTORCH_",
    "TORCH",
    "TRITON_",
)

PACKAGES = ("triton", "torchvision", "timm", "numpy")

# what nvidia-smi is asked: the driver, and what a figure's speed may hang on
DRIVER_QUERIES = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu")


def installed(package: str) -> str | None:
    """Return the version of a package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def environment(device: torch.device) -> dict[str, Any]:
    """Return the versions and the machine that figures depend on."""
    return {
        "fused_resnet": __version__,
        "commit": commit(),
        "torch": torch.__version__,
        **{name: installed(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "variables": {name: os.environ[name] for name in sorted(os.environ) if name.startswith(VARIABLES)},
        **gpu(device),
    }


def gpu(device: torch.device) -> dict[str, Any]:
    """Return what is known of a GPU, its driver and its libraries; on a CPU only that there is none."""
    if device.type != "cuda":
        return {"gpu": None}
    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "capability": f"sm_{properties.major}{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "gpu_memory": properties.total_memory,
        "l2_cache": properties.L2_cache_size,
        "cudnn": torch.backends.cudnn.version(),
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "tf32": {"matmul": torch.backends.cuda.matmul.allow_tf32, "cudnn": torch.backends.cudnn.allow_tf32},
        **driver(str(properties.uuid).removeprefix("GPU-")),
    }


def driver(uuid: str) -> dict[str, Any]:
    """Return what nvidia-smi says of a GPU now, by `DRIVER_QUERIES`; empty where it is not there or does not answer."""
    command = ["nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={','.join(DRIVER_QUERIES)}", "--format=csv,noheader"]
    try:
        answered = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in answered.stdout.strip().split(",")]
    named = dict(zip(DRIVER_QUERIES, values, strict=False))
    return {"driver": named.pop("driver_version", None), "gpu_state": named}


def commit() -> str | None:
    """Return the git commit of the checkout that this package is run from, with ``-dirty`` where files differ.

    A copy without its history is what ``FUSED_RESNET_COMMIT`` says.
    """
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return os.environ.get("FUSED_RESNET_COMMIT")
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
