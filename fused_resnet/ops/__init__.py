"""The fused operations, one folder each.

Every folder reads the same way: ``reference.py`` is the definition in plain torch, the files beside it are the engines'
kernels, and ``__init__.py`` holds the schemas and the fakes.  The operations have no autograd formula of their own:
:mod:`fused_resnet.chain` composes them, forward and backward, into one autograd node.

Schemas are always defined here, in Python, so that the package is whole without a compiler; the native libraries only
add implementations to them.
"""

import functools
from types import SimpleNamespace

import torch

from fused_resnet import engines
from fused_resnet.ops import batch_norm_act, batch_norm_act_pool
from fused_resnet.ops.library import library

FOLDERS = (batch_norm_act, batch_norm_act_pool)

for _folder in FOLDERS:
    for _name, (_schema, _fake) in _folder.OPERATIONS.items():
        library.define(_name + _schema)
        # the definition serves every device that no native library has kernels for
        library.impl(_name, getattr(_folder.reference, _name), "CompositeExplicitAutograd")
        torch.library.register_fake(f"fused_resnet::{_name}", _fake, lib=library)


@functools.cache
def kernels(engine: str, device_type: str, dtype: torch.dtype) -> SimpleNamespace:
    """Return every operation as a function, by name, in the engine that serves ``dtype`` on ``device_type``."""
    if engines.choose(engine, device_type, dtype) == "reference":
        return SimpleNamespace(
            **{name: getattr(folder.reference, name) for folder in FOLDERS for name in folder.OPERATIONS}
        )
    return dispatched()


@functools.cache
def dispatched() -> SimpleNamespace:
    """Return every operation as torch's dispatcher knows it: native kernels for real tensors, shapes for fake ones."""
    return SimpleNamespace(
        **{
            name: getattr(torch.ops.fused_resnet, name).default for folder in FOLDERS for name in folder.OPERATIONS
        }
    )
