"""The function beside stock PyTorch: its arguments, a run forward and backward, and the rule for both."""

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet import engines
from fused_resnet.functional import batch_norm_act
from tests.support.accuracy import assert_as_accurate_as_stock, gradient_for

CPU_ENGINES = [name for name in engines.NAMES if name not in engines.GPU_NAMES]

# float64 is the yardstick here: its own accuracy is gradcheck's matter, and assert_close's
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LAYOUTS = {"NHWC": torch.channels_last, "NCHW": torch.contiguous_format}
CASES = [
    pytest.param(engine, dtype, id=f"{engine}-{name}")
    for engine in CPU_ENGINES
    for name, dtype in DTYPES.items()
    if engine != "cpu" or dtype in engines.CPU_DTYPES
]
STOCK_ACTS = {
    "none": lambda z: z,
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "hardtanh": F.hardtanh,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
}
RESIDUALS = ["no residual", "residual", "residual norm"]


def stock_batch_norm_act(
    x, running_mean, running_var, weight, bias, *, residual, residual_norm, training, momentum=0.1, eps=1e-5, act="relu"
) -> Tensor:
    """What ``batch_norm_act`` fuses, in stock torch."""
    z = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    if residual_norm is not None:
        residual = F.batch_norm(residual, *residual_norm, training, momentum, eps)
    if residual is not None:
        z = z + residual
    return STOCK_ACTS[act](z)


def make_arguments(
    shape,
    dtype=torch.float32,
    *,
    layout=torch.channels_last,
    residual="no residual",
    mean=0.5,
    affine=True,
    tracked=True,
) -> dict[str, Tensor | None]:
    """Random arguments by name; those of the residual's norm begin with ``r_``."""
    channels = shape[1]
    arguments = {"x": (torch.randn(shape) + mean).to(dtype).contiguous(memory_format=layout)}
    if residual != "no residual":
        arguments["residual"] = torch.randn(shape).to(dtype).contiguous(memory_format=layout)
    accumulated = torch.promote_types(dtype, torch.float32)
    for prefix in [""] if residual != "residual norm" else ["", "r_"]:
        arguments[f"{prefix}running_mean"] = torch.randn(channels, dtype=accumulated) if tracked else None
        arguments[f"{prefix}running_var"] = torch.rand(channels, dtype=accumulated) + 0.5 if tracked else None
        arguments[f"{prefix}weight"] = torch.randn(channels, dtype=accumulated) if affine else None
        arguments[f"{prefix}bias"] = torch.randn(channels, dtype=accumulated) if affine else None
    return arguments


def run(function, arguments: dict[str, Tensor | None], dtype=None, grad=None, **options: Any) -> dict[str, Any]:
    """Run forward and backward on copies of the arguments; return the output, gradients and running statistics."""

    def copy(t: Tensor | None) -> Tensor | None:
        return t if t is None else t.detach().clone().to(dtype or t.dtype)

    a = {name: copy(t) for name, t in arguments.items()}
    differentiable = [n for n, t in a.items() if t is not None and "running" not in n]
    for name in differentiable:
        a[name].requires_grad_()
    norm = ("running_mean", "running_var", "weight", "bias")
    residual_norm = tuple(a[f"r_{n}"] for n in norm) if "r_weight" in a else None
    z = function(a["x"], *(a[n] for n in norm), residual=a.get("residual"), residual_norm=residual_norm, **options)
    z.backward((gradient_for(z) if grad is None else grad).to(z.dtype))
    results = {"z": z.detach()} | {f"{name}.grad": a[name].grad for name in differentiable}
    return results | {name: t for name, t in a.items() if "running" in name}


def assert_accurate(arguments, engine, *more: dict[str, Tensor | None], **options) -> dict[str, Any]:
    """Hold one draw of arguments against the rule, or several together: an error of few elements is luck."""
    options = {"training": True} | options
    fused_function = functools.partial(batch_norm_act, engine=engine)

    def results(function, dtype=None):
        return [run(function, draw, dtype, **options) for draw in (arguments, *more)]

    fused = results(fused_function)
    assert_as_accurate_as_stock(fused, results(stock_batch_norm_act), results(stock_batch_norm_act, torch.float64))
    return fused[0]
