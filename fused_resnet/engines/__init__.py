"""The engines: which one serves, why another cannot, and what was measured to be fastest."""

from fused_resnet.engines.choice import (
    CPU_DTYPES,
    GPU_DTYPES,
    GPU_NAMES,
    NAMES,
    EngineError,
    check_name,
    choose,
    rule_out,
    why_not,
)

__all__ = [
    "CPU_DTYPES",
    "GPU_DTYPES",
    "GPU_NAMES",
    "NAMES",
    "EngineError",
    "check_name",
    "choose",
    "rule_out",
    "why_not",
]
