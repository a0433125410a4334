"""Which engine serves the fused operations, and if one does not, why.

An engine is a complete set of kernels: ``reference`` (plain torch, on any device: the definition), ``cpu`` (C++,
vectorised and threaded), ``triton`` and ``cuda`` (C++) for NVIDIA GPUs.  The native libraries are loaded on first use
and never at import.
"""

import functools
import os

import torch

from fused_resnet.engines import libraries
from fused_resnet.engines.tuning import tuning

CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
        One of :data:`NAMES`, or ``"auto"`` for the fastest that can, by :mod:`fused_resnet.engines.tuning`.

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
    load = {"cpu": libraries.load_cpu_library, "triton": libraries.load_triton, "cuda": libraries.load_cuda_library}[
        engine
    ]
    return load() or _wrong.get(engine)


# engines whose self-check failed on this machine, and how
_wrong: dict[str, str] = {}


def rule_out(engine: str, reason: str) -> None:
    """Let ``engine`` serve nothing in this process from now on: it gives wrong numbers on this machine."""
    _wrong[engine] = reason
    choose.cache_clear()
