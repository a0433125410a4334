"""Compile every Triton kernel that a training step launches, for a GPU that is not there, and report what came out.

    python tests/support/compile_ahead.py 90 bfloat16 64 2048 64x256 64:silu

The operations are called on meta tensors of a ResNet-50's shapes; every launch is made a compile.  Printed is one line
of JSON for each kernel: registers, spilled bytes, shared memory, warps, blocks a multiprocessor, instructions.  The
numbers behind the dtype are channels, with an activation's name for the kernels that it is in alone; or the inputs and
outputs of a 1×1 convolution.
"""

import collections
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

from fused_resnet import ops
from fused_resnet.ops import activation as activations
from fused_resnet.ops import batch_norm_act, batch_norm_act_pool, launch, pointwise_conv, pointwise_conv_norm
from fused_resnet.ops.activation import NONE, RELU, Act

REGISTERS, THREADS = 65536, 2048
SHARED_BYTES = {80: 164 << 10, 86: 100 << 10, 89: 100 << 10, 90: 228 << 10, 100: 228 << 10, 120: 100 << 10}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
H200_MULTIPROCESSORS = 132
SIZE = 14


class AbsentDevice:
    """A driver for a device that is compiled for and never launched on."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def activation(channels: int, dtype: torch.dtype) -> torch.Tensor:
    """An activation of a batch of 256."""
    return torch.empty((256, channels, SIZE, SIZE), dtype=dtype, device="meta", memory_format=torch.channels_last)


def launches(k, dtype: torch.dtype, channels: int) -> None:
    """Call every operation as a training step does."""
    x, grad, z, residual = (activation(channels, dtype) for _ in range(4))
    weight, bias = torch.empty(2, channels, device="meta").unbind()
    moments, affine = k.batch_norm_stats(x, weight, bias, 1e-5)
    k.batch_norm_affine(moments, weight, bias, 1e-5)
    k.batch_norm_merge(torch.empty(64, 2 * channels + 1, device="meta"), weight, bias, 1e-5)  # of 64 processes
    for branch in [(None, None), (residual, None), (residual, affine)]:
        k.batch_norm_act(x, affine, *branch, *RELU)
    k.batch_norm_act(x, affine, residual, affine, *NONE)
    # what option A adds to a block's end: half of the channels, from an eighth of them on
    half = residual[:, : channels // 2].contiguous(memory_format=torch.channels_last)
    k.batch_norm_act(x, affine, half, None, *RELU, channels // 8)
    sums = k.batch_norm_act_reduce(grad, x, moments, affine, z, residual, moments, *RELU)
    k.batch_norm_act_reduce(grad, x, moments, affine, z, None, None, *RELU)
    k.batch_norm_act_reduce(grad, x, moments, affine, None, None, None, *RELU)
    _, _, coefficients = k.batch_norm_coefficients(sums, 0, moments, weight, 1e-5, 1000, True)
    _, _, frozen = k.batch_norm_coefficients(sums, 1, moments, weight, 1e-5, 1000, False)
    for branch, part in [((None, None), (0,)), ((residual, coefficients), (0,)), ((None, None), (channels,))]:
        k.batch_norm_act_backward(grad, x, affine, coefficients, z, *branch, *RELU, *part)
    k.batch_norm_act_backward(grad, x, affine, coefficients, z, None, None, *RELU, channels // 2, channels // 8)
    k.batch_norm_act_backward(grad, x, affine, frozen, z, None, None, *RELU, 0)
    for wants_activation in (False, True):
        k.batch_norm_act_backward_(grad, x, affine, coefficients, None, *RELU, wants_activation)
    k.masked_grad(grad, z)
    k.masked_grad_(grad, residual, z)
    k.add_masked_(x, grad, z)
    geometry = [3, 3], [2, 2], [1, 1]
    pooled, index = k.batch_norm_act_pool(x, affine, *RELU, *geometry)
    k.max_pool_backward(pooled, index, [SIZE, SIZE], *geometry)


def activation_launches(k, dtype: torch.dtype, channels: int, act: Act) -> None:
    """Call the operations that an activation is in, inside a block and at its end."""
    x, grad, z, residual = (activation(channels, dtype) for _ in range(4))
    moments, affine, coefficients = (torch.empty(rows, channels, device="meta") for rows in (3, 2, 4))
    for side in (None, residual):
        k.batch_norm_act(x, affine, side, None, *act)
    for preactivation in (None, z):
        k.batch_norm_act_reduce(grad, x, moments, affine, preactivation, None, None, *act)
    k.batch_norm_act_backward_(grad, x, affine, coefficients, None, *act, False)
    k.batch_norm_act_backward_(grad, x, affine, coefficients, None, *act, True)
    k.batch_norm_act_backward(grad, x, affine, coefficients, z, None, None, *act, channels)
    k.batch_norm_act_pool(x, affine, *act, [3, 3], [2, 2], [1, 1])


def pointwise_launches(dtype: torch.dtype, inputs: int, outputs: int) -> None:
    """Call the operations of a 1×1 convolution as a training step does."""
    k = ops.triton_kernels(pointwise_conv_norm)
    x, grad = activation(inputs, dtype), activation(outputs, dtype)
    w = torch.empty(outputs, inputs, 1, 1, dtype=dtype, device="meta")
    x_affine, affine = torch.empty(2, inputs, device="meta"), torch.empty(2, outputs, device="meta")
    weight, bias = affine.unbind()
    for branch in [(None, None), (grad, None), (grad, affine)]:
        _, moments, _, gram = k.pointwise_conv_norm_act(x, x_affine, RELU, w, weight, bias, 1e-5, *branch, RELU)
    for x_moments in [None, torch.empty(3, inputs, device="meta")]:
        k.pointwise_conv_norm_backward(
            grad, weight, x, x_affine, x_moments, RELU, w, moments, gram, weight, 1e-5, True
        )  # fmt: skip
    # the convolution at the block's other end has as many inputs as this one has outputs
    k = ops.triton_kernels(pointwise_conv)
    w = torch.empty(inputs, outputs, 1, 1, dtype=dtype, device="meta")
    y, _, _ = k.pointwise_conv_stats(grad, w, *x_affine.unbind(), 1e-5)
    for wants_weight in (False, True):
        k.pointwise_conv_add_grad_(torch.empty_like(grad), y, w, grad, wants_weight)


def tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def describe(kernel, channels: str, capability: int) -> dict:
    """Read what the compiler made of a kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "-res-usage", file.name)
        sass = tool("cuobjdump", "-sass", file.name)
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d\s+)?([A-Z][A-Z0-9_.]*)", sass, re.MULTILINE)
    counts = collections.Counter(instructions)
    threads, shared = 32 * kernel.metadata.num_warps, kernel.metadata.shared
    blocks = min(
        REGISTERS // (-(-registers // 8) * 8 * threads), THREADS // threads, SHARED_BYTES[capability] // (shared + 1024)
    )
    return {
        "kernel": kernel.metadata.name,
        "registers": registers,
        "spilled": stack + local,
        "shared": shared,
        "channels": channels,
        "warps": kernel.metadata.num_warps,
        "blocks": blocks,
        "instructions": len([i for i in instructions if i != "NOP"]),
        "global": {name: n for name, n in counts.items() if re.match(r"(LDG|STG|LDGSTS)\b", name)},
        "products": {name: n for name, n in counts.items() if re.match(r"(HMMA|HGMMA|UTCHMMA|UTCQMMA)\b", name)},
    }


def main(capability: int, dtype: torch.dtype, all_channels: list[str]) -> None:
    driver.set_active(AbsentDevice(capability))
    launch.INTERPRETED_MULTIPROCESSORS = H200_MULTIPROCESSORS  # what a tensor that is on no GPU is cut for
    compiled = {}
    run = jit.JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled[kernel.hash] = kernel

    jit.JITFunction.run = compile_only
    k = ops.gather("triton", *map(ops.triton_kernels, (batch_norm_act, batch_norm_act_pool)))
    for channels in all_channels:
        compiled.clear()
        if "x" in channels:
            pointwise_launches(dtype, *map(int, channels.split("x")))
        elif ":" in channels:
            count, name = channels.split(":")
            activation_launches(k, dtype, int(count), activations.EXAMPLES[activations.Kind[name.upper()]])
        else:
            launches(k, dtype, int(channels))
        for kernel in compiled.values():
            print(json.dumps(describe(kernel, channels, capability)))


if __name__ == "__main__":
    main(int(sys.argv[1]), getattr(torch, sys.argv[2]), sys.argv[3:])
