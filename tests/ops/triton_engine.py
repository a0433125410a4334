"""Triton kernels: on the GPU that is there, else in Triton's interpreter, on the CPU."""

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fused_resnet import engines, ops
from fused_resnet.ops import batch_norm_act, batch_norm_act_pool


def triton_kernels(monkeypatch) -> SimpleNamespace:
    """Return the operations of the engine ``triton``, for the GPU or interpreted."""
    pytest.importorskip("triton", reason="triton is not installed")
    if os.environ.get("TRITON_INTERPRET") != "1":
        if reason := engines.load_triton():
            pytest.skip(f"Triton was imported for a GPU, and {reason}; TRITON_INTERPRET=1 runs this on the CPU")
        return ops.kernels("triton", "cuda", torch.float32)
    import triton.language as tl
    from triton.runtime import interpreter

    cast = interpreter.InterpreterBuilder.cast_impl

    def rounding_cast(self, source, wanted):
        """The interpreter cuts a float32 off to a bfloat16; the hardware rounds to the nearest, as torch does."""
        if (source.dtype.scalar, wanted.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, wanted)
        values = np.ascontiguousarray(source.data)
        rounded = torch.from_numpy(values.reshape(-1)).bfloat16().view(torch.int16).numpy().view(np.uint16)
        return interpreter.TensorHandle(rounded.reshape(values.shape), wanted.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "cast_impl", rounding_cast)
    sources = [ops.triton_kernels(folder) for folder in (batch_norm_act, batch_norm_act_pool)]
    return ops.gather("triton", *sources)
