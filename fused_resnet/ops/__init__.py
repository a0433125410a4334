"""The fused operations, one folder each.

Every folder reads the same way: ``reference.py`` is the definition in plain torch, ``triton_forward.py`` and
``triton_backward.py`` are Triton's kernels, and ``__init__.py`` holds the schemas and the fakes.  What the kernels of
several folders share stands beside the folders.  The operations have no autograd formula of their own:
:mod:`fused_resnet.chain.schedule` composes them, forward and backward, into one autograd node.

Schemas are always defined here, in Python, so that the package is whole without a compiler; the native libraries only
add implementations to them.
"""

import functools
from collections.abc import Callable
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fused_resnet import engines
from fused_resnet.engines import libraries
from fused_resnet.ops import batch_norm_act, batch_norm_act_pool, pointwise_conv, pointwise_conv_norm
from fused_resnet.ops.library import image, library

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
def kernels(engine: str, device_type: str, dtype: torch.dtype, dims: int = 4) -> SimpleNamespace:
    """Return every operation as a function, by name, in the engine that serves ``dtype`` on ``device_type``.

    ``engine`` names it, and ``channels_last`` says whether it takes activations in that memory format only.
    Activations have ``dims`` dimensions: sequences, images or volumes.
    """
    if dims != 4:
        return of_images(kernels(engine, device_type, dtype), dims)
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
def fakes(engine: str, device_type: str, dtype: torch.dtype, dims: int = 4) -> SimpleNamespace:
    """Return what :func:`kernels` does as torch's dispatcher knows it, which for fake tensors gives shapes alone."""
    return fakes_of(engines.choose(engine, device_type, dtype), dims)


def fakes_of(engine: str, dims: int = 4) -> SimpleNamespace:
    """Return what :func:`fakes` does for an engine that need not be able to serve here."""
    k = gather(engine, dispatched(batch_norm_act), dispatched(batch_norm_act_pool))
    return k if dims == 4 else of_images(k, dims)


def of_images(k: SimpleNamespace, dims: int) -> SimpleNamespace:
    """Return the norms' operations for activations of ``dims`` dimensions, which are handed on as images."""

    def of(operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(x: Any, *others: Any) -> Any:
            def shaped(result: Any) -> Any:
                is_image = isinstance(result, Tensor) and result.dim() == 4
                return result.view(*result.shape[:2], *x.shape[2:]) if is_image else result

            arguments = [image(a) if isinstance(a, Tensor) and a.dim() == dims else a for a in (x, *others)]
            results = operation(*arguments)
            return tuple(map(shaped, results)) if isinstance(results, tuple) else shaped(results)

        return call

    norms = {name: of(getattr(k, name)) for name in batch_norm_act.OPERATIONS}
    return SimpleNamespace(engine=k.engine, channels_last=k.channels_last, **norms)


def gather(engine: str, norm: Any, pool: Any, *pointwise: Any) -> SimpleNamespace:
    """Gather an engine's operations, those of each folder from one source; without one, ``POINTWISE`` are composed."""
    k = SimpleNamespace(engine=engine, channels_last=engine in engines.GPU_NAMES)
    pointwise = pointwise or tuple(folder.composed.operations(k) for folder in POINTWISE)
    for folder, source in zip((*FOLDERS, *POINTWISE), (norm, pool, *pointwise), strict=True):
        vars(k).update({name: getattr(source, name) for name in folder.OPERATIONS})
    return k


def triton_kernels(folder: Any) -> SimpleNamespace:
    """Return a folder's operations as Triton kernels, those of both directions; the first call imports triton."""
    modules = [import_module(f"{folder.__name__}.triton_{direction}") for direction in ("forward", "backward")]
    functions = {name: getattr(module, name) for module in modules for name in module.__all__}
    return SimpleNamespace(**{name: functions[name] for name in folder.OPERATIONS})


def dispatched(folder: Any) -> SimpleNamespace:
    """Return a folder's operations as torch's dispatcher knows them."""
    return SimpleNamespace(**{name: getattr(torch.ops.fused_resnet, name).default for name in folder.OPERATIONS})
