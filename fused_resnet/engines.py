"""Which engine serves the fused operations, and if one does not, why.

An engine is a complete set of kernels: ``reference`` (plain torch, on any device: the definition), ``cpu`` (C++,
vectorised and threaded), ``triton`` and ``cuda`` (C++) for NVIDIA GPUs.  The native libraries are loaded on first use
and never at import.
"""

import functools
import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from fused_resnet.tuning import tuning

PACKAGE = Path(__file__).parent
CPU_LIBRARY = PACKAGE / "libfused_resnet_cpu.so"
CUDA_LIBRARY = PACKAGE / "libfused_resnet_cuda.so"
CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEAST_CAPABILITY = (8, 0)

NAMES = ("cpu", "triton", "cuda", "reference")
# those whose kernels want activations in channels_last
GPU_NAMES = ("triton", "cuda")


class EngineError(RuntimeError):
    """An engine that was asked for by name cannot serve."""


@functools.cache
def choose(engine: str, device_type: str, dtype: torch.dtype) -> str:
    """Return the name of the engine that serves activations of ``dtype`` on ``device_type``.

    Parameters
    ----------
    engine
        One of :data:`NAMES`, or ``"auto"`` for the fastest that can, by :mod:`fused_resnet.tuning`.

    Raises
    ------
    EngineError
        Where the engine asked for by name cannot serve; says why.
    """
    check_name(engine)
    if engine == "auto":
        engine = os.environ.get("FUSED_RESNET_ENGINE", "auto")
        check_name(engine, "FUSED_RESNET_ENGINE")
    if engine == "auto":
        fastest = (*tuning(device_type).engines, *NAMES)
        return next(name for name in fastest if name in NAMES and why_not(name, device_type, dtype) is None)
    if reason := why_not(engine, device_type, dtype):
        raise EngineError(f"engine={engine!r} cannot serve: {reason}; use engine='auto' for one that can")
    return engine


def check_name(engine: str, argument: str = "engine") -> None:
    """Raise a ValueError that names ``argument`` unless ``engine`` is ``"auto"`` or one of :data:`NAMES`."""
    if engine not in ("auto", *NAMES):
        raise ValueError(f"{argument} must be one of {', '.join(map(repr, ('auto', *NAMES)))}, got {engine!r}")


def why_not(engine: str, device_type: str, dtype: torch.dtype | None = None) -> str | None:
    """Return why ``engine`` cannot serve, or None where it can."""
    if engine == "reference":
        return None
    kind, dtypes = ("cuda", GPU_DTYPES) if engine in GPU_NAMES else ("cpu", CPU_DTYPES)
    if device_type != kind:
        where = "a GPU" if kind == "cuda" else "the CPU"
        return f"its kernels run on {where}, the activations are on {device_type!r}"
    if dtype is not None and dtype not in dtypes:
        return f"its kernels take {', '.join(str(d).removeprefix('torch.') for d in dtypes)}, not {dtype}"
    load = {"cpu": load_cpu_library, "triton": load_triton, "cuda": load_cuda_library}[engine]
    return load() or _wrong.get(engine)


# engines whose self-check failed on this machine, and how
_wrong: dict[str, str] = {}


def rule_out(engine: str, reason: str) -> None:
    """Let ``engine`` serve nothing in this process from now on: it gives wrong numbers on this machine."""
    _wrong[engine] = reason
    choose.cache_clear()


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
