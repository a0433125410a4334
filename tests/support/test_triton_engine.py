"""Triton's interpreter rounds and multiplies as the hardware does, once the tests have mended it."""

import os

import pytest
import torch

from tests.support.triton_engine import triton_kernels

triton = pytest.importorskip("triton", reason="triton is not installed")
import triton.language as tl  # noqa: E402

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="Triton was imported for a GPU"),
    # of the interpreter, which takes a program's number from an array
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]


@triton.jit
def _round_kernel(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, tl.load(x + i).to(tl.bfloat16))


@triton.jit
def _product_kernel(a, b, c, N: tl.constexpr):
    i = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(c + i, tl.dot(tl.load(a + i), tl.load(b + i)))


@pytest.fixture
def k(monkeypatch):
    return triton_kernels(monkeypatch)


def test_a_float32_is_rounded_to_the_nearest_bfloat16(k):
    x = torch.cat([torch.randn(252), torch.tensor([0.0, float("inf"), -float("inf"), 1 + 2**-8])])
    y = torch.empty(256, dtype=torch.bfloat16)
    _round_kernel[(1,)](x, y, 256)
    assert torch.equal(y, x.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_product_is_that_of_the_values(k, dtype):
    a, b = torch.randn(2, 16, 16).to(dtype).unbind()
    c = torch.empty(16, 16)
    _product_kernel[(1,)](a, b, c, 16)
    torch.testing.assert_close(c, a.float() @ b.float())


def test_the_engine_has_every_operation(k):
    from fused_resnet import ops

    assert {name for folder in (*ops.FOLDERS, *ops.POINTWISE) for name in folder.OPERATIONS} <= vars(k).keys()
