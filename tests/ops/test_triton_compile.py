"""What the compiler makes of every Triton kernel, for GPUs that need not be here: no spills, wide accesses, occupancy.

The bounds are what the kernels have today, with a little room; who changes a kernel sees at once what it costs.
"""

import collections
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

PROGRAM = Path(__file__).parents[1] / "support" / "compile_ahead.py"
ROOT = PROGRAM.parents[2]

# a capability, a dtype, and channels: 30 is a multiple of no vector
RUNS = [("90", "bfloat16", "64", "30"), ("80", "bfloat16", "64"), ("100", "bfloat16", "64"), ("90", "float32", "2048")]
# a 1×1 convolution's inputs and outputs, at the ends of ResNet-50's first two stages
PRODUCTS = [(capability, "bfloat16", "64x256", "128x512") for capability in ("90", "80", "100")]
PRODUCTS.append(("90", "float32", "64x256"))
# a GPU whose blocks have 99 KB of shared memory, as those of sm_89 and sm_120
SMALL = [("86", dtype, "64", "128x512") for dtype in ("float32", "bfloat16")]
# the kernels that an activation is in, with those that cost most
ACTIVATIONS = [(capability, "bfloat16", "64:silu", "64:gelu") for capability in ("80", "90", "100")]
EVERY = RUNS + PRODUCTS + SMALL + ACTIVATIONS

# blocks of a multiprocessor, and instructions an element (one pass) or in all (a loop), at the most
PASSES = {"_act_kernel": (4, 14), "_backward_kernel": (3, 28), "_add_masked_kernel": (5, 12)}
REDUCTIONS = {"_stats_kernel": (3, 1000), "_reduce_kernel": (1, 1100), "_masked_grad_kernel": (2, 680)}
ELEMENTS_PER_THREAD = 32

# with an activation: blocks of a multiprocessor, and instructions for SiLU and for GELU
WITH_ACTIVATION = {
    "_act_kernel": (5, 800, 1400),
    "_reduce_kernel": (1, 960, 1350),
    "_backward_kernel": (3, 1090, 1880),
    "_pool_kernel": (2, 2450, 3700),
}

# warps that a multiprocessor holds with 64 and with 128 inputs on sm_90, and what multiplies
PRODUCT_WARPS = {
    "_gram_kernel": (12, 8),
    "_fprop_act_kernel": (16, 8),
    "_wgrad_kernel": (12, 8),
    "_dgrad_kernel": (16, 8),
    "_conv_stats_kernel": (16, 8),
    "_conv_add_grad_kernel": (12, 12),  # three programs of four, or with the weight gradient two of eight
}
WRITERS = {"_fprop_act_kernel", "_dgrad_kernel", "_conv_stats_kernel", "_conv_add_grad_kernel"}  # of activations
# bytes of a thread, at the most: where a product comes from tensor memory, no thread has two rows that are 8 apart
SPILLED = {("100", "_conv_stats_kernel"): 64}
PRODUCT_INSTRUCTION = {"80": "HMMA.16816", "90": "HGMMA.64", "100": "UTCHMMA"}


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[str, ...], list[dict]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)

    def run(arguments):
        done = subprocess.run([sys.executable, PROGRAM, *arguments], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return [json.loads(line) for line in done.stdout.splitlines()]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(EVERY, pool.map(run, EVERY), strict=True))


@pytest.mark.parametrize("run", RUNS + PRODUCTS, ids="-".join)
def test_every_kernel_is_compiled_and_none_spills(compiled, run):
    kernels = compiled[run]
    assert len({kernel["kernel"] for kernel in kernels}) == (13 if run in RUNS else 12)
    assert [kernel for kernel in kernels if kernel["spilled"] > SPILLED.get((run[0], kernel["kernel"]), 0)] == []


def wide(run):
    return [kernel for kernel in run if int(kernel["channels"]) % 8 == 0]


@pytest.mark.parametrize("run", RUNS, ids="-".join)
def test_activations_are_read_and_written_in_16_bytes(compiled, run):
    """A pass reads and writes nothing narrower, but for per-channel vectors; a reduction copies past the registers."""
    for kernel in wide(compiled[run]):
        accesses = collections.Counter(kernel["global"])
        if kernel["kernel"] in PASSES:
            assert accesses["STG.E.128"] >= 4, kernel
            assert not any("U16" in name or name == "STG.E" for name in accesses), kernel
        if kernel["kernel"] in REDUCTIONS:
            assert accesses["LDGSTS.E.BYPASS.128"] >= 6, kernel


@pytest.mark.parametrize("run", RUNS, ids="-".join)
def test_enough_blocks_fit_a_multiprocessor_and_instructions_stay_few(compiled, run):
    for kernel in wide(compiled[run]):
        name = kernel["kernel"]
        if name in PASSES:
            blocks, instructions = PASSES[name]
            assert kernel["instructions"] <= instructions * ELEMENTS_PER_THREAD, kernel
        elif name in REDUCTIONS:
            blocks, instructions = REDUCTIONS[name]
            assert kernel["instructions"] <= instructions, kernel
        else:
            continue
        assert kernel["blocks"] >= blocks, kernel


@pytest.mark.parametrize("run", ACTIVATIONS, ids="-".join)
def test_an_activation_spills_nothing_and_keeps_the_accesses_wide(compiled, run):
    kernels = [kernel for kernel in compiled[run] if kernel["kernel"] in WITH_ACTIVATION]
    assert len(kernels) == 2 * (2 + 2 + 3 + 1)
    for kernel in kernels:
        blocks, *instructions = WITH_ACTIVATION[kernel["kernel"]]
        assert kernel["spilled"] == 0, kernel
        assert kernel["blocks"] >= blocks, kernel
        assert kernel["instructions"] <= instructions[kernel["channels"].endswith(":gelu")], kernel
        name = "LDGSTS.E.BYPASS.128" if kernel["kernel"] == "_reduce_kernel" else "LDG.E.128"
        assert kernel["global"][name] >= 6, kernel


@pytest.mark.parametrize("run", SMALL, ids="-".join)
def test_a_small_gpu_has_the_shared_memory(compiled, run):
    assert max(kernel["shared"] for kernel in compiled[run]) <= 99 << 10


@pytest.mark.parametrize("run", [run for run in PRODUCTS if run[1] == "bfloat16"], ids="-".join)
def test_products_are_made_by_the_tensor_cores_from_16_byte_accesses(compiled, run):
    kernels = [kernel for kernel in compiled[run] if kernel["kernel"] in PRODUCT_WARPS]
    # three that apply: alone, with a residual, with a second branch; two gradients: alone, with sums; two that add:
    # alone, with the weight gradient
    assert len(kernels) == 2 * 10
    for kernel in kernels:
        assert any(name.startswith(PRODUCT_INSTRUCTION[run[0]]) for name in kernel["products"]), kernel
        accesses = kernel["global"]
        assert accesses["LDGSTS.E.BYPASS.128"] >= 4, kernel
        if kernel["kernel"] in WRITERS:
            assert accesses["STG.E.128"] >= 4, kernel
            assert accesses.get("STG.E", 0) <= 2, kernel  # of the sums
            assert not any("U16" in name for name in accesses), kernel


def test_as_many_programs_of_a_product_fit_an_h200s_multiprocessor_as_are_launched(compiled):
    for kernel in compiled[PRODUCTS[0]]:
        if kernel["kernel"] in PRODUCT_WARPS:
            few, many = PRODUCT_WARPS[kernel["kernel"]]
            held = kernel["blocks"] * kernel["warps"]
            assert held >= (few if kernel["channels"] == "64x256" else many), kernel
