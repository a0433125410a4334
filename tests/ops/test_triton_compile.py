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

PROGRAM = Path(__file__).with_name("compile_ahead.py")
ROOT = PROGRAM.parents[2]

# a capability, a dtype, and channels: 30 is a multiple of no vector
RUNS = [("90", "bfloat16", "64", "30"), ("80", "bfloat16", "64"), ("100", "bfloat16", "64"), ("90", "float32", "2048")]

# blocks of a multiprocessor, and instructions an element (one pass) or in all (a loop), at the most
PASSES = {"_act_kernel": (4, 14), "_backward_kernel": (3, 28), "_add_masked_kernel": (5, 12)}
REDUCTIONS = {"_stats_kernel": (3, 1000), "_reduce_kernel": (1, 1100)}
ELEMENTS_PER_THREAD = 32


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[str, ...], list[dict]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)

    def run(arguments):
        done = subprocess.run([sys.executable, PROGRAM, *arguments], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return [json.loads(line) for line in done.stdout.splitlines()]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(RUNS, pool.map(run, RUNS), strict=True))


@pytest.mark.parametrize("run", RUNS, ids="-".join)
def test_every_kernel_is_compiled_and_none_spills(compiled, run):
    kernels = compiled[run]
    assert len({kernel["kernel"] for kernel in kernels}) == 11
    assert {kernel["kernel"]: kernel["spilled"] for kernel in kernels if kernel["spilled"]} == {}


def wide(run):
    return [kernel for kernel in run if kernel["channels"] % 8 == 0]


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
