"""Runs CMakeLists.txt and puts what it builds into the package; everything else is in pyproject.toml.

The native libraries are an engine among others: where they cannot be built, the installation succeeds without them, and
``fused_resnet/build_info.json`` (which ``fused-resnet doctor`` shows) says what was left out, why, and what to do.

Environment variables: ``FUSED_RESNET_NATIVE`` is ``off`` to build nothing (a wheel is then pure Python), ``required``
to make what would be left out an error (but for CUDA kernels where there is no CUDA to build them with), or ``cuda`` to
make that an error, too, and to name the CUDA of a wheel in its version (``+cu13``).  ``FUSED_RESNET_TORCH`` names the
folder of the torch package to build against, ``TORCH_CUDA_ARCH_LIST`` the GPU architectures, ``MAX_JOBS`` how many
compilers run at a time.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.command.egg_info import egg_info

ROOT = Path(__file__).resolve().parent
LIBRARY = "libfused_resnet_cpu.so"
CUDA_LIBRARY = "libfused_resnet_cuda.so"
SEE = "Install again with FUSED_RESNET_NATIVE=required to see the compiler's messages"
NATIVE = os.environ.get("FUSED_RESNET_NATIVE", "")
if NATIVE not in ("", "off", "required", "cuda"):
    raise SystemExit(f"FUSED_RESNET_NATIVE must be off, required, cuda or unset, got {NATIVE!r}")


class LeftOut(Exception):
    """A part that is not built: what, why, and what to do."""

    def __init__(self, part: str, reason: str, mend: str) -> None:
        super().__init__(f"{part} was left out, because {reason}. {mend}.")


class NoCuda(LeftOut):
    """The CUDA kernels are left out where nothing is there to build them with; an error where they are asked for."""

    def __init__(self, reason: str, mend: str) -> None:
        super().__init__(CUDA_LIBRARY, reason, f"Triton's kernels serve GPUs without it; if you want it: {mend}")


@dataclass(frozen=True)
class Torch:
    """An installed torch, known by its files: under build isolation it cannot be imported."""

    folder: Path
    version: str
    cuda: str | None  # the version of CUDA that it was built with

    @classmethod
    def find(cls) -> "Torch":
        """The torch of the environment that is installed into; one of before the stable ABI is of no use."""
        for folder in cls.candidates():
            with contextlib.suppress(OSError):
                record = (folder / "version.py").read_text()
                cuda = re.search(r"^cuda[^=]*= ['\"]([^'\"]+)", record, re.MULTILINE)
                version = re.search(r"__version__ = ['\"]((\d+)\.(\d+)[^'\"]*)", record)
                if version and (int(version[2]), int(version[3])) < (2, 10):
                    reason = f"torch is {version[1]}, and the stable ABI that is built for starts with 2.10"
                    raise LeftOut(LIBRARY, reason, "Upgrade torch, then install this package again")
                if version:
                    return cls(folder, version[1], cuda[1] if cuda else None)
        raise LeftOut(
            LIBRARY,
            "no torch was found in the environment that is installed into",
            "Install torch first, then this package again, or set FUSED_RESNET_TORCH to the folder of torch",
        )

    @staticmethod
    def candidates() -> Iterator[Path]:
        """Where torch may be, the surest first.

        Without build isolation this Python knows it.  With it, pip hides the environment's packages by PYTHONPATH but
        still runs its interpreter; other front ends run one of their own, and the environment shows in variables or in
        the project.
        """
        if "FUSED_RESNET_TORCH" in os.environ:
            yield Path(os.environ["FUSED_RESNET_TORCH"])
            return
        ask = "from importlib.util import find_spec; print(*find_spec('torch').submodule_search_locations)"
        prefixes = [os.environ.get("VIRTUAL_ENV"), os.environ.get("CONDA_PREFIX"), ROOT / ".venv", sys.base_prefix]
        others = [f"{prefix}/bin/python3.{sys.version_info.minor}" for prefix in prefixes if prefix]
        for command in [sys.executable], *([python, "-E"] for python in [sys.executable, *others]):
            with contextlib.suppress(OSError):
                told = subprocess.run([*command, "-c", ask], capture_output=True, text=True, cwd="/")
                if told.returncode == 0:
                    yield Path(told.stdout.strip())


def tool(name: str) -> str | None:
    """A program on the path, or beside the interpreter (where pip puts it, though the environment is not active)."""
    return shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))


def compiler() -> str:
    """The C++ compiler that CMake will take."""
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["c++", "g++", "clang++"]:
        if shutil.which(name.split()[0]):
            return name
    raise LeftOut(
        LIBRARY,
        f"no C++ compiler was found ({wanted})" if wanted else "no C++ compiler was found",
        "Install one (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++), then this package again",
    )


def nvcc(torch: Torch) -> str:
    """The CUDA compiler, of the CUDA that torch was built with."""
    if torch.cuda is None or not (torch.folder / "lib" / "libtorch_cuda.so").exists():
        raise NoCuda(f"torch {torch.version} was built without CUDA", "install a torch that has it, then this again")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    named = [os.environ.get("CUDACXX"), home and f"{home}/bin/nvcc", tool("nvcc")]
    usual = [f"{folder}/bin/nvcc" for folder in ["/usr/local/cuda", *pip_cuda(torch)]]
    path = next(filter(shutil.which, filter(None, [*named, *usual])), None)
    mend = f"install the CUDA {torch.cuda} toolkit, let CUDA_HOME name its folder, then install this package again"
    if path is None:
        raise NoCuda("no nvcc was found", mend)
    try:
        says = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise NoCuda(f"{path} does not run ({error})", mend) from error
    version = re.search(r"release (\d+)\.(\d+)", says)
    if version is None or version[1] != torch.cuda.split(".")[0]:
        has = "of an unknown version" if version is None else f"of CUDA {version[1]}.{version[2]}"
        raise NoCuda(f"{path} is {has}, torch {torch.version} of CUDA {torch.cuda}", mend)
    return path


def pip_cuda(torch: Torch) -> list[str]:
    """The folders of CUDA's packages beside torch, with headers that a bare toolkit lacks."""
    return sorted(map(str, (torch.folder.parent / "nvidia").glob("cu[0-9]*")))


@dataclass
class NativeBuild:
    """One run of CMake, in a folder that is kept, so that the next run compiles only what changed."""

    torch: Torch
    left_out: list[LeftOut] = field(default_factory=list)  # what was built without

    @property
    def folder(self) -> Path:
        return ROOT / "build" / f"native-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"

    @property
    def installed(self) -> Path:
        """The files that belong into the package."""
        return self.folder / "installed"

    def run(self) -> None:
        cmake = tool("cmake")
        if cmake is None:
            mend = "Install it (pip install cmake ninja), then this package again"
            raise LeftOut(LIBRARY, "no cmake was found", mend)
        options = [f"-DTORCH_DIR={self.torch.folder}", f"-DPython_EXECUTABLE={sys.executable}"]
        options += [f"-DCMAKE_CXX_COMPILER={compiler()}"]
        if ninja := tool("ninja"):
            options += ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        cuda_options = self.cuda_options()
        try:
            self.make(cmake, [*options, *cuda_options])
        except LeftOut:
            if not cuda_options:
                raise
            # the other libraries may build all the same
            self.leave_out(LeftOut(CUDA_LIBRARY, "the native build with it failed", SEE))
            self.make(cmake, options)
        if not any(self.installed.glob("_C.*")):
            mend = "Install them (apt install python3-dev, pip install pybind11), then this package again"
            self.leave_out(LeftOut("fused_resnet._C", "Python's headers or pybind11 were not found", mend))

    def make(self, cmake: str, options: list[str]) -> None:
        jobs = os.environ.get("MAX_JOBS", "").split()
        shutil.rmtree(self.installed, ignore_errors=True)
        # a switch that is not among the options is not to come from the last run
        configure = ["-S", ROOT, "-B", self.folder, "-UFUSED_RESNET_*", *options]
        build = ["--build", self.folder, "--parallel", *jobs]
        install = ["--install", self.folder, "--prefix", self.installed]
        try:
            for arguments in configure, build, install:
                subprocess.run([cmake, *arguments], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise LeftOut(LIBRARY, "the native build failed", SEE) from error

    def leave_out(self, left_out: LeftOut) -> None:
        report(left_out)
        self.left_out.append(left_out)

    def cuda_options(self) -> list[str]:
        try:
            path = nvcc(self.torch)
        except NoCuda as no_cuda:
            self.leave_out(no_cuda)
            return []
        return [
            "-DFUSED_RESNET_CUDA=ON",
            f"-DCMAKE_CUDA_COMPILER={path}",
            f"-DCMAKE_CUDA_HOST_COMPILER={compiler()}",
            f"-DCUDA_INCLUDE_DIRS={';'.join(f'{folder}/include' for folder in pip_cuda(self.torch))}",
        ]


def report(left_out: LeftOut) -> None:
    """Say what is left out, or stop where nothing may be."""
    if NATIVE == "cuda" or (NATIVE == "required" and not isinstance(left_out, NoCuda)):
        raise SystemExit(f"fused_resnet: {left_out}")
    print(f"fused_resnet: {left_out}", file=sys.stderr, flush=True)


def commit() -> str | None:
    """The commit that is built; of a copy without its history FUSED_RESNET_COMMIT may tell it."""
    described = None
    if (ROOT / ".git").exists() and shutil.which("git"):
        command = ["git", "-C", ROOT, "describe", "--always", "--abbrev=40", "--dirty"]
        described = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return os.environ.get("FUSED_RESNET_COMMIT") or described or None


class BuildNative(build_ext):
    """``build_ext`` by CMake; never fails for what can be left out."""

    def run(self) -> None:
        in_place = self.inplace or self.editable_mode
        package = (ROOT if in_place else Path(self.build_lib)) / "fused_resnet"
        package.mkdir(parents=True, exist_ok=True)
        info: dict[str, object] = {"commit": commit()}
        built: list[Path] = []
        try:
            if NATIVE == "off":
                mend = "Install a wheel for this platform, or from the source without that variable"
                raise LeftOut(LIBRARY, "this is the pure Python of FUSED_RESNET_NATIVE=off", mend)
            native = NativeBuild(Torch.find())
            native.run()
            built = sorted(native.installed.glob("*.so"))
            info |= {"torch": native.torch.version, **json.loads((native.installed / "build_info.json").read_text())}
            info["left_out"] = " ".join(map(str, native.left_out))
        except LeftOut as left_out:
            if NATIVE != "off":
                report(left_out)
            info["left_out"] = str(left_out)

        # what an earlier build left here must not pass for this one's
        for stale in package.glob("*.so"):
            if stale.name not in {path.name for path in built}:
                stale.unlink()
        for path in built:
            # as a new file: a running process keeps the one that it has mapped
            new = Path(shutil.copy2(path, package / f"{path.name}.new"))
            new.replace(package / path.name)
        info["files"] = [path.name for path in built]
        (package / "build_info.json").write_text(json.dumps(info, indent=2) + "\n")


class Build(build):
    """``build`` that runs ``build_ext`` for pure Python, too: for its record, and to remove what another build left."""

    sub_commands = [("build_py", None), ("build_ext", None)]  # noqa: RUF012


class EggInfo(egg_info):
    """``egg_info``; a wheel that must have CUDA kernels tells their CUDA by its version.

    Of CUDA's versions only the major one matters.  PEP 440 orders 0.1.0+cu13 behind 0.1.0, so that pip takes it first.
    """

    def finalize_options(self) -> None:
        if NATIVE == "cuda":
            try:
                torch = Torch.find()
                nvcc(torch)
            except LeftOut as left_out:
                raise SystemExit(f"fused_resnet: {left_out}") from None
            self.tag_build = f"+cu{torch.cuda.split('.')[0]}"
        super().finalize_options()


setup(
    # declared so that a wheel gets the tag of its Python and platform
    ext_modules=[] if NATIVE == "off" else [Extension("fused_resnet._C", sources=[])],
    cmdclass={"build": Build, "build_ext": BuildNative, "egg_info": EggInfo},
)
