"""Triton kernels: on the GPU that is there, else in Triton's interpreter, on the CPU."""

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fused_resnet import ops
from fused_resnet.engines import libraries


def triton_kernels(monkeypatch) -> SimpleNamespace:
    """Return the operations of the engine ``triton``, for the GPU or interpreted."""
    pytest.importorskip("triton", reason="triton is not installed")
    if os.environ.get("TRITON_INTERPRET") != "1":
        if reason := libraries.load_triton():
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

    dot = interpreter.InterpreterBuilder.create_dot

    def dot_of_values(self, a, b, *others):
        """The interpreter multiplies the bits of bfloat16 as integers."""
        a, b = (cast(self, t, tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b))
        return dot(self, a, b, *others)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "cast_impl", rounding_cast)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot_of_values)
    return ops.gather("triton", *map(ops.triton_kernels, (*ops.FOLDERS, *ops.POINTWISE)))
