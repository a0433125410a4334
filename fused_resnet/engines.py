"""Which engine serves the fused operations, and if one does not, why.

An engine is a complete set of kernels: ``reference`` (plain torch, on any device: the definition) and ``cpu`` (C++,
vectorised and threaded).  The native library is loaded on first use and never at import.
"""

import functools
import json
from pathlib import Path
from typing import Any

import torch

PACKAGE = Path(__file__).parent
CPU_LIBRARY = PACKAGE / "libfused_resnet_cpu.so"
CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float64)

# in the order in which "auto" tries them
NAMES = ("cpu", "reference")


class EngineError(RuntimeError):
    """An engine that was asked for by name cannot serve."""


@functools.cache
def choose(engine: str, device_type: str, dtype: torch.dtype) -> str:
    """Return the name of the engine that serves activations of ``dtype`` on ``device_type``.

    Parameters
    ----------
    engine
        ``"auto"`` for the first engine of :data:`NAMES` that can, or one of :data:`NAMES`.

    Raises
    ------
    EngineError
        Where the engine asked for by name cannot serve; says why.
    """
    check_name(engine)
    if engine == "auto":
        return next(name for name in NAMES if why_not(name, device_type, dtype) is None)
    if reason := why_not(engine, device_type, dtype):
        raise EngineError(f"engine={engine!r} cannot serve: {reason}; use engine='auto' for one that can")
    return engine


def check_name(engine: str) -> None:
    """Raise a ValueError unless ``engine`` is ``"auto"`` or one of :data:`NAMES`."""
    if engine not in ("auto", *NAMES):
        raise ValueError(f"engine must be one of {', '.join(map(repr, ('auto', *NAMES)))}, got {engine!r}")


def why_not(engine: str, device_type: str, dtype: torch.dtype | None = None) -> str | None:
    """Return why ``engine`` cannot serve, or None where it can."""
    if engine == "reference":
        return None
    if device_type != "cpu":
        return f"its kernels run on the CPU, the activations are on {device_type!r}"
    if dtype is not None and dtype not in CPU_DTYPES:
        return f"its kernels take {', '.join(str(d).removeprefix('torch.') for d in CPU_DTYPES)}, not {dtype}"
    return load_cpu_library() or _wrong.get(engine)


# engines whose self-check failed on this machine, and how
_wrong: dict[str, str] = {}


def rule_out(engine: str, reason: str) -> None:
    """Let ``engine`` serve nothing in this process from now on: it gives wrong numbers on this machine."""
    _wrong[engine] = reason
    choose.cache_clear()


@functools.cache
def load_cpu_library() -> str | None:
    """Load the native CPU kernels once; return why that is impossible, or None."""
    if not CPU_LIBRARY.exists():
        reason = build_record().get("left_out", "this installation was made without it")
        return f"the native library {CPU_LIBRARY.name} is missing: {reason}"
    try:
        torch.ops.load_library(str(CPU_LIBRARY))
    except OSError as error:
        return f"{CPU_LIBRARY.name} does not load under torch {torch.__version__}: {error}"
    return None


def build_record() -> dict[str, Any]:
    """Return what the native build wrote down about itself: compiler, instruction sets, what was left out and why."""
    path = PACKAGE / "_build.json"
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return record
