"""The fused operations, one folder each.

Every folder reads the same way: ``reference.py`` is the definition in plain torch, the files beside it are the engines'
kernels, and ``__init__.py`` holds the schemas and the fakes.  The operations have no autograd formula of their own:
:mod:`fused_resnet.chain.schedule` composes them, forward and backward, into one autograd node.

Schemas are always defined here, in Python, so that the package is whole without a compiler; the native libraries only
add implementations to them.
"""

import copy
import functools
import itertools
import os
from collections.abc import Callable
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch

from fused_resnet import engines
from fused_resnet.engines import libraries
from fused_resnet.ops import batch_norm_act, batch_norm_act_pool, pointwise_conv, pointwise_conv_norm
from fused_resnet.ops.library import library

# those whose operations the dispatcher knows, and those whose functions only a chain calls
FOLDERS = (batch_norm_act, batch_norm_act_pool)
POINTWISE = (pointwise_conv, pointwise_conv_norm)

for _folder in FOLDERS:
    for _name, (_schema, _fake) in _folder.OPERATIONS.items():
        library.define(_name + _schema)
        # the definition serves every device that no native library has kernels for
        library.impl(_name, getattr(_folder.reference, _name), "CompositeExplicitAutograd")
        torch.library.register_fake(f"fused_resnet::{_name}", _fake, lib=library)


@functools.cache
def kernels(engine: str, device_type: str, dtype: torch.dtype) -> SimpleNamespace:
    """Return every operation as a function, by name, in the engine that serves ``dtype`` on ``device_type``.

    ``engine`` names it, and ``channels_last`` says whether it takes activations in that memory format only.
    """
    served = engines.choose(engine, device_type, dtype)
    if served == "reference":
        return gather(served, batch_norm_act.reference, batch_norm_act_pool.reference)
    if served == "cpu":
        return fakes(engine, device_type, dtype)
    if served == "triton":
        return gather(served, *map(triton_kernels, (*FOLDERS, *POINTWISE)))
    pool = batch_norm_act_pool.reference if libraries.load_triton() else triton_kernels(batch_norm_act_pool)
    return gather(served, dispatched(batch_norm_act), pool)


@functools.cache
def fakes(engine: str, device_type: str, dtype: torch.dtype) -> SimpleNamespace:
    """Return what :func:`kernels` does as torch's dispatcher knows it, which for fake tensors gives shapes alone."""
    return fakes_of(engines.choose(engine, device_type, dtype))


def fakes_of(engine: str) -> SimpleNamespace:
    """Return what :func:`fakes` does for an engine that need not be able to serve here."""
    return gather(engine, dispatched(batch_norm_act), dispatched(batch_norm_act_pool))


def gather(engine: str, norm: Any, pool: Any, *pointwise: Any) -> SimpleNamespace:
    """Gather an engine's operations, those of each folder from one source; without one, ``POINTWISE`` are composed."""
    k = SimpleNamespace(engine=engine, channels_last=engine in engines.GPU_NAMES)
    pointwise = pointwise or tuple(folder.composed.operations(k) for folder in POINTWISE)
    for folder, source in zip((*FOLDERS, *POINTWISE), (norm, pool, *pointwise), strict=True):
        vars(k).update({name: getattr(source, name) for name in folder.OPERATIONS})
    return k


def triton_kernels(folder: Any) -> Any:
    """Return an operation folder's module of Triton kernels; the first call imports triton."""
    return import_module(f"{folder.__name__}.triton")


def dispatched(folder: Any) -> SimpleNamespace:
    """Return a folder's operations as torch's dispatcher knows them."""
    return SimpleNamespace(**{name: getattr(torch.ops.fused_resnet, name).default for name in folder.OPERATIONS})


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
            checked[engine] = _first_wrong(kernels(engine, device, torch.float32), device, dtypes)
            if checked[engine] is not None:
                engines.rule_out(engine, f"its self-check failed: {checked[engine]}")
                kernels.cache_clear()
    return checked


def _first_wrong(k: SimpleNamespace, device: str, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Return the first operation whose result is not the definition's, up to rounding, or None."""
    reference = kernels("reference", device, torch.float32)
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
        z = reference.batch_norm_act(x, affine, residual, None, True)
        sums = reference.batch_norm_act_reduce(grad, x, moments, affine, z, None, None, True)
        *_, coefficients = reference.batch_norm_coefficients(
            sums, 0, moments, weight, 1e-5, x.numel() // channels, True
        )
        _, index = reference.batch_norm_act_pool(x, affine, True, [3, 3], [2, 2], [1, 1])
        pooled = grad[:, :, :3, :4].contiguous(memory_format=memory_format)
        part = residual[:, :8].contiguous(memory_format=memory_format)
        calls: list[tuple[str, tuple[Any, ...]]] = [
            ("batch_norm_stats", (x, weight, bias, 1e-5)),
            ("batch_norm_affine", (moments, weight, bias, 1e-5)),
            ("batch_norm_act", (x, affine, residual, affine, True)),
            ("batch_norm_act", (x, affine, part, None, True, 8)),
            ("batch_norm_act_", (x, affine, residual, affine, True)),
            ("batch_norm_act_reduce", (grad, x, moments, affine, z, residual, moments, True)),
            ("batch_norm_coefficients", (sums, 0, moments, weight, 1e-5, x.numel() // channels, True)),
            ("batch_norm_act_backward", (grad, x, affine, coefficients, None, None, None, True, channels)),
            ("batch_norm_act_backward", (grad, x, affine, coefficients, z, None, None, True, 8, 8)),
            ("batch_norm_act_backward_", (grad, x, affine, coefficients, None, True, True)),
            ("update_running_stats_", ([affine[0]], [affine[1]], [], [moments], 0.1)),
            ("masked_grad", (grad, z)),
            ("masked_grad_", (grad, residual, z)),
            ("add_masked_", (x, grad, z, True)),
            ("batch_norm_act_pool", (x, affine, True, [3, 3], [2, 2], [1, 1])),
            ("max_pool_backward", (pooled, index, [5, 7], [3, 3], [2, 2], [1, 1])),
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
