"""The CUDA kernels' numbers without a GPU: their own source, compiled for the CPU, in the tests that a GPU would run.

``cuda_emulation`` stands in for CUDA's headers: a block's threads are fibers, and a barrier is where they take turns.
"""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from fused_resnet.engines import libraries

ROOT = Path(__file__).parents[2]
EMULATION = ROOT / "tests" / "building" / "cuda_emulation"
PATTERNS = ["csrc/cuda/*.cu", "csrc/cuda/*.cpp", "csrc/ops/*.cpp", "tests/building/cuda_emulation/*.cpp"]
SOURCES = [source for pattern in PATTERNS for source in sorted(ROOT.glob(pattern))]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    compiler = shutil.which("g++") or pytest.skip("no g++, whose _Float16 stands in for half")
    torch_dir = Path(torch.__file__).parent
    includes = [EMULATION, ROOT / "csrc"]
    includes += [torch_dir / "include", torch_dir / "include/torch/csrc/api/include"]
    defines = ["-DUSE_CUDA", "-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    # the operations of CPU tensors
    defines += ["-DFUSED_RESNET_DISPATCH_KEY=CPU", "-Daoti_torch_device_type_cuda=aoti_torch_device_type_cpu"]
    options = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", *defines, *(f"-I{folder}" for folder in includes)]
    folder = tmp_path_factory.mktemp("emulation")

    def compile(source: Path) -> Path:
        target = folder / f"{source.parent.name}_{source.name}.o"
        subprocess.run([compiler, *options, "-x", "c++", "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile, SOURCES))
    target = folder / "libemulated.so"
    # its own stand-ins for streams and devices come before torch's
    link = ["-shared", "-Wl,-Bsymbolic", f"-L{torch_dir / 'lib'}", "-ltorch_cpu"]
    subprocess.run([compiler, *objects, *link, "-o", target], check=True)
    return target


def test_kernels_equal_the_reference(library):
    """In a process of its own, since the emulated operations take the place of the CPU engine's."""
    tests = ROOT / "tests/ops/test_cuda_kernels.py"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests],
        cwd=ROOT,
        env={**os.environ, "FUSED_RESNET_CUDA_EMULATION": str(library), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-5000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) > 3000


@pytest.fixture
def native():
    return pytest.importorskip("fused_resnet._C", reason="built without Python's headers")


REDUCTIONS = ["batch_norm_stats", "batch_norm_act_reduce", "masked_grad"]
OPERATIONS = [*REDUCTIONS, "batch_norm_act", "batch_norm_act_backward", "add_masked_"]


@pytest.mark.parametrize("multiprocessors", [1, 3, 108, 132, 148, 500])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("channels", [1, 3, 16, 24, 64, 100, 256, 264, 1000, 2048, 2049, 1 << 20])
@pytest.mark.parametrize("rows", [0, 1, 7, 392, 12544, 802816, 1 << 33])
def test_a_plan_covers_the_activation_once(native, rows, channels, itemsize, multiprocessors):
    for operation in OPERATIONS:
        plan = native.cuda_plan(operation, rows, channels, itemsize, multiprocessors)
        if rows == 0:
            assert plan["parts"] == plan["column_tiles"] == 0
            continue
        assert sum(plan["rows_of_parts"]) == rows
        assert min(plan["rows_of_parts"]) > 0  # a part's first thread has a row
        assert max(plan["rows_of_parts"]) - min(plan["rows_of_parts"]) <= plan["block_rows"]
        tile_channels = plan["tile_columns"] * plan["vector"]
        assert channels % plan["vector"] == 0
        assert plan["vector"] in (1, 16 // itemsize)
        assert (plan["column_tiles"] - 1) * tile_channels < channels <= plan["column_tiles"] * tile_channels
        assert tile_channels <= 256
        assert 1 <= plan["block_rows"] * plan["tile_columns"] <= 512
        assert plan["parts"] <= max(264, 4 * multiprocessors)
        assert plan["parts"] * plan["column_tiles"] < 2**31
        if operation in REDUCTIONS:
            assert plan["parts"] <= min(264, multiprocessors)
            assert plan["block_rows"] * plan["tile_columns"] >= tile_channels  # a thread for each sum of the tile


def test_resnet50_keeps_every_multiprocessor_of_an_h200_at_work(native):
    for channels, pixels in [(64, 112), (64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (1024, 14), (2048, 7)]:
        for operation in OPERATIONS:
            plan = native.cuda_plan(operation, 256 * pixels**2, channels, 2, 132)
            assert plan["vector"] == 8
            blocks = plan["parts"] * plan["column_tiles"]
            assert blocks >= 0.95 * 132, (operation, channels)


def test_a_plan_of_nonsense_is_refused(native):
    with pytest.raises(ValueError, match="itemsize 2 or 4"):
        native.cuda_plan("batch_norm_act", 10, 8, 8, 132)
    with pytest.raises(ValueError, match="no kernel passes over activations in batch_norm_affine"):
        native.cuda_plan("batch_norm_affine", 10, 8, 4, 132)


@pytest.mark.skipif(not libraries.CUDA_LIBRARY.exists(), reason="the CUDA library was not built")
def test_the_library_loads_without_a_driver_and_registers_its_operations():
    program = (
        "import sys, torch, fused_resnet.ops; torch.ops.load_library(sys.argv[1]);"
        "from fused_resnet.ops.batch_norm_act import OPERATIONS;"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key;"
        "print(*(name for name in OPERATIONS if has(f'fused_resnet::{name}', 'CUDA')))"
    )
    if torch.version.cuda is None:
        pytest.skip("this torch was built without CUDA")
    run = subprocess.run(
        [sys.executable, "-c", program, libraries.CUDA_LIBRARY], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert set(run.stdout.split()) == {
        *OPERATIONS,
        "batch_norm_affine",
        "batch_norm_coefficients",
        "batch_norm_act_",
        "batch_norm_act_backward_",
        "masked_grad_",
    }
