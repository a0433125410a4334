"""What ``setup.py`` makes of its environment: a copy of it, beside a torch, a cmake and an nvcc that do nothing."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools

import fused_resnet

ROOT = Path(__file__).parents[2]


@pytest.fixture
def project(tmp_path):
    for name in (
        "setup.py",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "fused_resnet/__init__.py",
        "fused_resnet/version.py",
    ):
        target = tmp_path / "project" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
    return tmp_path / "project"


@pytest.fixture
def environment(tmp_path):
    """A torch of CUDA 13.0, and programs that log how they were called."""
    torch, programs = tmp_path / "torch", tmp_path / "bin"
    (torch / "lib").mkdir(parents=True)
    (torch / "lib" / "libtorch_cuda.so").touch()
    (torch / "version.py").write_text("__version__ = '2.11.0+cu130'\ncuda: Optional[str] = '13.0'\n")
    programs.mkdir()
    for name, script in {"cmake": f'echo "$@" >> {tmp_path}/cmake.log; exit 1', "nvcc": "echo release 13.0"}.items():
        (programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs / name).chmod(0o755)
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("FUSED_RESNET_")},
        "PATH": f"{programs}:{os.environ['PATH']}",
        "CXX": "true",
        "CUDACXX": str(programs / "nvcc"),
        "FUSED_RESNET_TORCH": str(torch),
        "FUSED_RESNET_COMMIT": "0123456789",
    }


def setup(project, environment, *command, fails=False):
    run = subprocess.run(
        [sys.executable, "setup.py", "-q", *command], cwd=project, env=environment, capture_output=True, text=True
    )
    assert bool(run.returncode) == fails, run.stderr
    return run.stdout + run.stderr


def build_info(project):
    return json.loads((project / "fused_resnet" / "build_info.json").read_text())


def test_a_failed_build_leaves_pure_python_that_says_why(project, environment):
    (project / "fused_resnet" / "libfused_resnet_cpu.so").touch()
    said = setup(project, environment, "build_ext", "--inplace")
    assert "libfused_resnet_cpu.so was left out, because the native build failed" in said
    info = build_info(project)
    assert info["commit"] == "0123456789"
    assert info["left_out"] in said
    assert info["files"] == []
    assert not (project / "fused_resnet" / "libfused_resnet_cpu.so").exists()


def test_what_is_required_is_an_error_where_it_fails(project, environment):
    environment["FUSED_RESNET_NATIVE"] = "required"
    said = setup(project, environment, "build_ext", "--inplace", fails=True)
    assert "was left out, because the native build" in said
    assert not (project / "fused_resnet" / "build_info.json").exists()


def test_an_unknown_requirement_is_refused_with_those_that_exist(project, environment):
    environment["FUSED_RESNET_NATIVE"] = "yes"
    said = setup(project, environment, "build_ext", "--inplace", fails=True)
    assert "FUSED_RESNET_NATIVE must be off, required, cuda or unset, got 'yes'" in said


def test_max_jobs_is_how_many_compilers_run_at_a_time(project, environment, tmp_path):
    cmake = Path(environment["PATH"].split(":")[0], "cmake")
    cmake.write_text(cmake.read_text().replace("exit 1", 'case "$1" in --install) exit 1; esac'))
    setup(project, {**environment, "MAX_JOBS": "3"}, "build_ext", "--inplace")
    assert " --parallel 3\n" in (tmp_path / "cmake.log").read_text()
    assert "-DFUSED_RESNET_CUDA=ON" in (tmp_path / "cmake.log").read_text()


def test_a_wheel_without_native_libraries_is_pure_python(project, environment):
    (project / "fused_resnet" / "libfused_resnet_cpu.so").touch()
    setup(project, {**environment, "FUSED_RESNET_NATIVE": "off"}, "bdist_wheel")
    (wheel,) = (project / "dist").iterdir()
    assert wheel.name == f"fused_resnet-{fused_resnet.__version__}-py3-none-any.whl"
    assert list((project / "build/lib/fused_resnet").glob("*.so")) == []
    assert "pure Python" in json.loads((project / "build/lib/fused_resnet/build_info.json").read_text())["left_out"]


def test_a_wheel_with_cuda_kernels_names_their_cuda_in_its_version(project, environment):
    record = project / "fused_resnet.egg-info" / "PKG-INFO"
    setup(project, environment, "egg_info")
    assert f"\nVersion: {fused_resnet.__version__}\n" in record.read_text()
    setup(project, {**environment, "FUSED_RESNET_NATIVE": "cuda"}, "egg_info")
    assert f"\nVersion: {fused_resnet.__version__}+cu13\n" in record.read_text()


def test_an_nvcc_of_another_cuda_than_torchs_is_refused(project, environment):
    Path(environment["CUDACXX"]).write_text("#!/bin/sh\necho release 12.8\n")
    said = setup(project, environment, "build_ext", "--inplace")
    assert "nvcc is of CUDA 12.8, torch 2.11.0+cu130 of CUDA 13.0" in said
    assert "install the CUDA 13.0 toolkit" in said
    said = setup(project, {**environment, "FUSED_RESNET_NATIVE": "cuda"}, "egg_info", fails=True)
    assert "nvcc is of CUDA 12.8, torch 2.11.0+cu130 of CUDA 13.0" in said


def test_a_torch_without_the_stable_abi_is_refused(project, environment):
    Path(environment["FUSED_RESNET_TORCH"], "version.py").write_text("__version__ = '2.9.1'\ncuda = None\n")
    said = setup(project, environment, "build_ext", "--inplace")
    assert "torch is 2.9.1, and the stable ABI that is built for starts with 2.10" in said


@pytest.mark.parametrize("runs", ["installed_into", "front_end"])
def test_torch_is_found_where_the_builds_own_environment_hides_it(runs, project, environment, tmp_path):
    """By pip, which runs the interpreter but hides its packages, and by front ends with an interpreter of their own."""
    del environment["FUSED_RESNET_TORCH"]
    for name in ("installed_into", "front_end"):
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / name], check=True)
    # torch is not in the folder of packages but where a .pth there points to
    site = tmp_path / "installed_into" / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    (site / "below.pth").write_text(f"{tmp_path / 'below'}\n")
    torch = tmp_path / "below" / "torch"
    shutil.copytree(tmp_path / "torch", torch)
    (torch / "__init__.py").touch()

    build = tmp_path / "build_environment"
    build.mkdir()
    (build / "sitecustomize.py").write_text("import sys; sys.modules['torch'] = None\n")
    for package in ("setuptools", "_distutils_hack"):
        (build / package).symlink_to(Path(setuptools.__file__).parents[1] / package)
    isolated = {**environment, "PYTHONPATH": str(build), "VIRTUAL_ENV": str(tmp_path / "installed_into")}
    find = "import runpy, sys; sys.argv[1:] = ['--version']; print(runpy.run_path('setup.py')['Torch'].find().folder)"
    command = [tmp_path / runs / "bin" / "python", "-c", find]
    found = subprocess.run(command, cwd=project, env=isolated, capture_output=True, text=True)
    assert found.stdout.splitlines()[-1:] == [str(torch)], found.stderr
