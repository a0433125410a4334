"""What the compiler makes of the CUDA kernels: registers, spills and the width of their accesses, without a GPU."""

import json
import os
import re
import shutil
import subprocess
import sysconfig
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from fused_resnet.engines import libraries

ROOT = Path(__file__).parents[2]
ARCHITECTURES = ["sm_80", "sm_90", "sm_100", "sm_120"]
SASS_ARCHITECTURES = ["sm_80", "sm_90", "sm_100"]
REGISTERS = 65536  # of a multiprocessor
SHARED_BYTES = 100 << 10  # the least of those architectures


def program(name: str) -> str:
    """A program of the build or of the CUDA toolkit, or the one that comes with Triton."""
    beside = sysconfig.get_path("scripts")
    found = shutil.which(name) or shutil.which(f"{beside}/{name}") or shutil.which(f"/usr/local/cuda/bin/{name}")
    triton = find_spec("triton")
    if not found and triton and triton.origin:
        found = shutil.which(str(Path(triton.origin).parent / "backends/nvidia/bin" / name))
    return found or pytest.skip(f"{name} was not found")


def test_the_library_has_code_for_the_architectures_of_its_record():
    if not libraries.CUDA_LIBRARY.exists():
        pytest.skip("the CUDA library was not built")
    entries = libraries.build_record()["cuda"]["architectures"].split()
    recorded = {
        kind: {f"sm_{e.removesuffix('+PTX').replace('.', '')}" for e in named}
        for kind, named in {"elf": entries, "ptx": [e for e in entries if e.endswith("+PTX")]}.items()
    }
    for kind, expected in recorded.items():
        command = [program("cuobjdump"), f"--list-{kind}", libraries.CUDA_LIBRARY]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert set(re.findall(r"\.(sm_\w+)\.", listed)) == expected


@pytest.fixture(scope="module")
def configured(tmp_path_factory):
    """A build configured for two architectures, with a ccache on the path; only CMake's own trials are compiled."""
    cmake, ninja, nvcc = program("cmake"), program("ninja"), program("nvcc")
    folder = tmp_path_factory.mktemp("configured")
    ccache = folder / "ccache"
    ccache.write_text('#!/bin/sh\nexec "$@"\n')
    ccache.chmod(0o755)
    environment = {**os.environ, "TORCH_CUDA_ARCH_LIST": "8.0;9.0+PTX", "PATH": f"{folder}:{os.environ['PATH']}"}
    options = [f"-DTORCH_DIR={Path(torch.__file__).parent}", f"-DCMAKE_CUDA_COMPILER={nvcc}", "-DFUSED_RESNET_CUDA=ON"]
    command = [cmake, "-S", ROOT, "-B", folder, "-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}", *options]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    commands = subprocess.run([ninja, "-C", folder, "-t", "commands"], capture_output=True, text=True, check=True)
    return folder, commands.stdout.splitlines()


def test_the_environment_names_the_architectures(configured):
    folder, commands = configured
    record = json.loads((folder / "build_info.json").read_text())
    assert record["cuda"]["architectures"] == "8.0 9.0+PTX"
    codes = {code for command in commands for code in re.findall(r"--generate-code=(arch=\S+)", command)}
    assert codes == {f"arch=compute_{code}]" for code in ("80,code=[sm_80", "90,code=[sm_90", "90,code=[compute_90")}


@pytest.mark.parametrize("suffix", ["cpp", "cu"])
def test_ccache_is_used_where_it_is_installed(suffix, configured):
    folder, commands = configured
    compiles = [command for command in commands if re.search(rf" -c \S+\.{suffix}( |$)| -x cu .*\.{suffix} ", command)]
    assert len(compiles) >= 3
    assert all(command.startswith(f"{folder / 'ccache'} ") for command in compiles)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Every .cu compiled for all architectures at once: object files, and what ptxas says of them."""
    nvcc, folder = program("nvcc"), tmp_path_factory.mktemp("cuda")
    codes = [f"-gencode=arch=compute_{a[3:]},code={a}" for a in ARCHITECTURES]
    options = ["-std=c++17", "-O3", "-Xptxas=-v", f"-I{ROOT / 'csrc'}", *codes]

    def compile(source: Path) -> tuple[Path, str]:
        target = folder / f"{source.stem}.o"
        run = subprocess.run([nvcc, *options, "-c", source, "-o", target], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        return target, run.stderr

    sources = sorted(ROOT.glob("csrc/cuda/*.cu"), key=lambda path: path.stat().st_size, reverse=True)
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compile, sources))


@pytest.fixture(scope="module")
def kernels(compiled):
    """(architecture, kernel) -> bytes of stack frame and spills, registers, bytes of shared memory."""
    pattern = (
        r"entry function '(\w+)' for '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill"
        r" loads.*?Used (\d+) registers(?:[^\n]*?(\d+) bytes smem)?"
    )
    found = {}
    for _, text in compiled:
        for name, architecture, *numbers in re.findall(pattern, text, re.DOTALL):
            found[architecture, name] = [int(number or 0) for number in numbers]
    assert {architecture for architecture, _ in found} == set(ARCHITECTURES)
    return found


def occupancy(name: str) -> tuple[int, int]:
    """Threads of a block and blocks of a multiprocessor that plan.h says for a kernel of that name."""
    text = (ROOT / "csrc/cuda/plan.h").read_text()
    table = {kind: (int(t), int(b)) for kind, t, b in re.findall(r"k(\w+)Occupancy = {(\d+), (\d+)}", text)}
    kinds = {"stats_kernel": "Reduction", "reduce_kernel": "Reduction", "act_kernel": "Act"}
    kinds |= {"masked_grad_kernel": "Reduction", "backward_kernel": "Backward", "add_masked_kernel": "AddMasked"}
    if "finish_" in name:
        return 256, 1
    return next((table[kind] for kernel, kind in kinds.items() if f"{len(kernel)}{kernel}" in name), (128, 1))


def test_no_kernel_spills_or_has_a_stack_frame(kernels):
    assert {key: numbers for key, numbers in kernels.items() if any(numbers[:3])} == {}


def test_as_many_blocks_run_at_a_time_as_the_grids_are_made_for(kernels):
    for key, (_, _, _, registers, shared) in kernels.items():
        threads, blocks = occupancy(key[1])
        allocated = -(-registers // 8) * 8
        assert allocated * threads * blocks <= REGISTERS, key
        assert shared * blocks <= SHARED_BYTES, key
        assert shared <= 48 << 10, key


@pytest.fixture(scope="module", params=SASS_ARCHITECTURES)
def sass(compiled, request):
    """The machine code of every .cu for one architecture."""
    command = [program("cuobjdump"), "-sass", "-arch", request.param]
    runs = [subprocess.run([*command, path], capture_output=True, text=True, check=True) for path, _ in compiled]
    return "".join(run.stdout for run in runs)


def test_no_load_takes_the_path_for_read_only_memory(sass):
    """It may miss what the kernel stores, and four of them work in place."""
    assert "LDG.E" in sass
    assert re.search(r"LDG\S*CONSTANT", sass) is None


def accesses(sass: str) -> dict[str, dict[str, list[str]]]:
    """Kernel -> instruction (LDG, STG) -> widths, in the order of the machine code."""
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    name = ""
    for line in sass.splitlines():
        if match := re.search(r"Function : (\w+)", line):
            name = match[1]
        elif match := re.search(r"\b(LDG|STG)\.E(\S*)", line):
            width = re.search(r"\.(U8|U16|64|128)\b", match[2])
            found[name][match[1]].append(width[1] if width else "32")
    return found


def test_vector_kernels_move_16_bytes_at_a_time(sass):
    checked = 0
    for name, widths in accesses(sass).items():
        # the kernels' template arguments: __half, 8; __nv_bfloat16, 8; float, 4
        if not re.search(r"kernelI(6__halfLi8|13__nv_bfloat16Li8|fLi4)", name):
            continue
        checked += 1
        assert set(widths["LDG"]) == {"128"}, name
        if "masked_grad_kernel" in name:  # writes partial sums, too
            assert set(widths["STG"]) == {"128", "32"}, name
        elif "stats_kernel" not in name and "reduce_kernel" not in name:  # those write nothing else
            assert set(widths["STG"]) == {"128"}, name
    assert checked == 3 * (1 + 8 + 1 + 6 + 12 + 1)  # dtypes x (stats, reduce, masked gradient, act, backward, add)
