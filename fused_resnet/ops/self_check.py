"""The check of the native kernels against the definition, on the machine that they are to run on."""

import copy
import functools
import itertools
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from fused_resnet import engines, ops
from fused_resnet.ops.activation import EXAMPLES, RELU


@functools.cache
def self_check(device_type: str) -> dict[str, str | None]:
    """Run a device's native kernels once, on small tensors, against the definition; a wrong engine is ruled out.

    A device that no model is on is left alone: to touch a GPU takes memory there.

    Returns the engines checked, each with None or what was wrong.  ``fuse`` asks for it, never a forward: a check
    there would break the capture of a CUDA graph.  ``FUSED_RESNET_SELF_TEST=0`` skips it.
    """
    if os.environ.get("FUSED_RESNET_SELF_TEST") == "0":
        return {}
    checked: dict[str, str | None] = {}
    for engine, device, dtypes in (("cpu", "cpu", engines.CPU_DTYPES), ("cuda", "cuda", engines.GPU_DTYPES)):
        if device == device_type and engines.why_not(engine, device) is None:
            checked[engine] = _first_wrong(ops.kernels(engine, device, torch.float32), device, dtypes)
            if checked[engine] is not None:
                engines.rule_out(engine, f"its self-check failed: {checked[engine]}")
                ops.kernels.cache_clear()
    return checked


def _first_wrong(k: SimpleNamespace, device: str, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Return the first operation whose result is not the definition's, up to rounding, or None."""
    reference = ops.kernels("reference", device, torch.float32)
    generator = torch.Generator().manual_seed(0)
    formats = (torch.channels_last,) if k.channels_last else (torch.channels_last, torch.contiguous_format)
    # channels that no vector length divides, and channels that all do
    for dtype, memory_format, channels in itertools.product(dtypes, formats, (19, 64)):
        shape = (3, channels, 5, 7)

        x, grad, residual = (
            values.to(device, dtype, memory_format=memory_format)
            for values in torch.randn(3, *shape, generator=generator)
        )
        weight, bias = (torch.randn(shape[1], generator=generator).to(device) for _ in range(2))
        moments, affine = reference.batch_norm_stats(x, weight, bias, 1e-5)
        z = reference.batch_norm_act(x, affine, residual, None, *RELU)
        sums = reference.batch_norm_act_reduce(grad, x, moments, affine, z, None, None, *RELU)
        *_, coefficients = reference.batch_norm_coefficients(
            sums, 0, moments, weight, 1e-5, x.numel() // channels, True
        )
        _, index = reference.batch_norm_act_pool(x, affine, *RELU, [3, 3], [2, 2], [1, 1])
        pooled = grad[:, :, :3, :4].contiguous(memory_format=memory_format)
        part = residual[:, :8].contiguous(memory_format=memory_format)
        calls: list[tuple[str, tuple[Any, ...]]] = [
            ("batch_norm_stats", (x, weight, bias, 1e-5)),
            ("batch_norm_affine", (moments, weight, bias, 1e-5)),
            ("batch_norm_act", (x, affine, residual, affine, *RELU)),
            ("batch_norm_act", (x, affine, part, None, *RELU, 8)),
            ("batch_norm_act_", (x, affine, residual, affine, *RELU)),
            ("batch_norm_act_reduce", (grad, x, moments, affine, z, residual, moments, *RELU)),
            ("batch_norm_coefficients", (sums, 0, moments, weight, 1e-5, x.numel() // channels, True)),
            ("batch_norm_act_backward", (grad, x, affine, coefficients, None, None, None, *RELU, channels)),
            ("batch_norm_act_backward", (grad, x, affine, coefficients, z, None, None, *RELU, 8, 8)),
            ("batch_norm_act_backward_", (grad, x, affine, coefficients, None, *RELU, True)),
            ("update_running_stats_", ([affine[0]], [affine[1]], [], [moments], 0.1)),
            ("masked_grad", (grad, z)),
            ("masked_grad_", (grad, residual, z)),
            ("add_masked_", (x, grad, z)),
            ("batch_norm_act_pool", (x, affine, *RELU, [3, 3], [2, 2], [1, 1])),
            ("max_pool_backward", (pooled, index, [5, 7], [3, 3], [2, 2], [1, 1])),
        ]
        for act in EXAMPLES if channels == 19 and memory_format is formats[0] else ():
            calls += [
                ("batch_norm_act", (x, affine, residual, None, *act)),
                ("batch_norm_act_reduce", (grad, x, moments, affine, None, None, None, *act)),
                ("batch_norm_act_backward", (grad, x, affine, coefficients, z, None, None, *act, 0)),
            ]
        tolerance = 32 * torch.finfo(dtype).eps
        for name, arguments in calls:
            got, wanted = (_results(getattr(engine, name), arguments) for engine in (k, reference))
            for a, b in zip(got, wanted, strict=True):
                error = (a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)
                if not (b.numel() == 0 or error <= tolerance):
                    return f"{name} in {dtype} is off by {error:.1e}"
    return None


def _results(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
    """Call an operation on copies; return its results and its arguments, some of which it may have written."""
    copies = copy.deepcopy(arguments)
    results = function(*copies)
    results = () if results is None else results if isinstance(results, tuple) else (results,)
    flat = itertools.chain.from_iterable(a if isinstance(a, list) else [a] for a in copies)
    return (*results, *(a for a in flat if isinstance(a, torch.Tensor)))
