"""The engines' kernels, loaded on first use and never at import; and why one cannot be."""

import functools
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

PACKAGE = Path(__file__).parent.parent
CPU_LIBRARY = PACKAGE / "libfused_resnet_cpu.so"
CUDA_LIBRARY = PACKAGE / "libfused_resnet_cuda.so"
LEAST_CAPABILITY = (8, 0)


@functools.cache
def load_cpu_library() -> str | None:
    """Load the native CPU kernels once; return why that is impossible, or None."""
    return _load(CPU_LIBRARY)


@functools.cache
def load_cuda_library() -> str | None:
    """Load the native CUDA kernels once; return why that is impossible, or None."""
    if reason := _why_no_gpu():
        return reason
    built = build_record().get("cuda", {})
    needed = str(torch.version.cuda).split(".")[0]
    if built and built["version"].split(".")[0] != needed:
        return (
            f"{CUDA_LIBRARY.name} was built with CUDA {built['version']}, torch with {torch.version.cuda}: "
            f"install the wheel with +cu{needed} in its name, or from the source in this environment"
        )
    major, minor = torch.cuda.get_device_capability()
    if built and not has_code_for((major, minor), built["architectures"]):
        return (
            f"{CUDA_LIBRARY.name} has no code for sm_{major}{minor} (built for {built['architectures']}): "
            f"install from the source with TORCH_CUDA_ARCH_LIST={major}.{minor}"
        )
    return _load(CUDA_LIBRARY)


def has_code_for(capability: tuple[int, int], architectures: str) -> bool:
    """Return whether a library built for ``architectures`` runs on a device.

    Binary code serves the same major version from its minor on; ``+PTX`` is compiled for whatever is newer; an
    ending ``a`` is for that very device, ``f`` for its major version.
    """
    for entry in architectures.split():
        name, _, ptx = entry.partition("+")
        major, minor = map(int, name.rstrip("af").split("."))
        exact = name.endswith("a")
        if capability == (major, minor) or (not exact and capability[0] == major and capability[1] >= minor):
            return True
        if ptx and not exact and capability >= (major, minor):
            return True
    return False


@functools.cache
def load_triton() -> str | None:
    """Return why Triton's kernels cannot run here, or None."""
    if reason := _why_no_gpu():
        return reason
    return None if find_spec("triton") else "triton is not installed: pip install triton"


def _why_no_gpu() -> str | None:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if torch.cuda.get_device_capability() < LEAST_CAPABILITY:
        return f"{torch.cuda.get_device_name()} is older than compute capability {LEAST_CAPABILITY[0]}.0"
    return None


def _load(library: Path) -> str | None:
    if not library.exists():
        reason = build_record().get("left_out") or "this installation was made without it"
        return f"the native library {library.name} is missing: {reason}"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"{library.name} does not load under torch {torch.__version__}: {error}"
    return None


def build_record() -> dict[str, Any]:
    """Return what the build wrote down about itself: versions, flags, architectures, what was left out and why."""
    path = PACKAGE / "build_info.json"
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return record
