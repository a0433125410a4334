"""What the native build leaves behind: the library, the module of its plans, and the record of both."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from fused_resnet.engines import libraries

pytestmark = pytest.mark.skipif(not libraries.CPU_LIBRARY.exists(), reason="the native library was not built")


@pytest.fixture(params=[libraries.CPU_LIBRARY, libraries.CUDA_LIBRARY], ids=["cpu", "cuda"])
def library(request):
    if not request.param.exists():
        pytest.skip(f"{request.param.name} was not built")
    return request.param


def symbols(library, *options: str) -> list[str]:
    nm = shutil.which("nm") or pytest.skip("nm (binutils) is not installed")
    return subprocess.run(
        [nm, "-D", "-C", *options, library], capture_output=True, text=True, check=True
    ).stdout.splitlines()


def test_a_library_uses_nothing_of_torch_but_its_stable_interface(library):
    undefined = [line.split()[-1] if "::" not in line else line for line in symbols(library, "--undefined-only")]
    assert any(name.startswith("aoti_torch_") for name in undefined)
    assert [name for name in undefined if re.search(r"\b(at|c10|torch)::|\b_?Py[A-Z_]", name)] == []


def test_kernels_and_the_cuda_runtime_stay_inside_their_library(library):
    inside = r"baseline|x86_64_v\d|fused_resnet::|\b__?cuda"
    assert [line for line in symbols(library, "--defined-only") if re.search(inside, line)] == []


def test_the_record_says_what_was_built_and_with_what():
    record = libraries.build_record()
    assert libraries.CPU_LIBRARY.name in record["files"]
    assert re.match(r"\d+\.\d+", record["torch"])
    assert re.match(r"(GNU|Clang|AppleClang) \d+", record["compiler"])
    assert {"-O2", "-fno-math-errno"} <= set(record["flags"].split())
    assert "commit" in record
    for name in record["files"]:
        assert (libraries.PACKAGE / name).exists()
    if libraries.CUDA_LIBRARY.name in record["files"]:
        assert re.match(r"\d+\.\d+", record["cuda"]["version"])
        assert all(re.fullmatch(r"\d+\.\d+[af]?(\+PTX)?", name) for name in record["cuda"]["architectures"].split())
    else:
        assert f"{libraries.CUDA_LIBRARY.name} was left out, because" in record["left_out"]


@pytest.fixture
def native():
    return pytest.importorskip("fused_resnet._C", reason="built without Python's headers")


def test_the_chosen_instruction_set_is_one_of_those_built(native):
    assert native.isas()[0] == "baseline"
    assert native.isa() in native.isas()


def test_an_environment_variable_forces_a_lower_instruction_set(native):
    program = "from fused_resnet import _C; print(_C.isa())"
    environment = {**os.environ, "FUSED_RESNET_ISA": "baseline"}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "baseline"


@pytest.mark.parametrize("channels", [1, 3, 16, 64, 100, 512, 1000, 2048, 2049])
@pytest.mark.parametrize("rows", [0, 1, 7, 392, 100352])
def test_a_plan_covers_the_activation_and_does_not_depend_on_the_threads(native, rows, channels):
    one, many = native.plan(rows, channels, 4, 1), native.plan(rows, channels, 4, 64)
    tiles = one["row_tiles"] * one["column_tiles"]
    assert one["row_length"] == one["pixels_per_row"] * channels or rows == 0
    assert one["row_tiles"] * one["row_tile"] * one["pixels_per_row"] >= rows
    assert one["column_tiles"] * one["column_tile"] >= one["row_length"]
    assert one["column_tile"] <= 512  # what the kernels' accumulators hold
    assert many["threads"] == min(64, tiles)
    assert many["tiles_per_thread"] * many["threads"] >= tiles
    assert {k: one[k] for k in ("row_tile", "column_tile")} == {k: many[k] for k in ("row_tile", "column_tile")}


def test_a_plan_of_nonsense_is_refused(native):
    with pytest.raises(ValueError, match="channels"):
        native.plan(10, 0, 4, 1)
