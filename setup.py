"""Runs CMakeLists.txt and puts what it builds into the package; everything else is in pyproject.toml.

The native libraries are an engine among others: where they cannot be built, the installation succeeds without them, and
``fused_resnet/_build.json`` (which ``fused-resnet doctor`` reads) says what was left out, why, and what to do.

Environment variables: ``FUSED_RESNET_TORCH`` names the folder of the torch package to build against;
``FUSED_RESNET_NATIVE=required`` turns what would be left out into an error (but for CUDA kernels where there is no CUDA
to build them with), ``FUSED_RESNET_NATIVE=off`` builds nothing; ``TORCH_CUDA_ARCH_LIST`` names the GPU architectures.
"""

import contextlib
import filecmp
import json
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 10)


class LeftOut(Exception):
    """A part that is not built: what, why, and what to do."""

    def __init__(self, part: str, reason: str, mend: str) -> None:
        super().__init__(f"{part} was left out, because {reason}. {mend}.")
        self.part = part


class NoCuda(LeftOut):
    """The CUDA kernels are left out where nothing is there to build them with; that is said, and never an error."""

    def __init__(self, reason: str, mend: str) -> None:
        super().__init__(CUDA_LIBRARY, reason, f"Triton's kernels serve GPUs without it; if you want it: {mend}")


LIBRARY = "libfused_resnet_cpu.so"
CUDA_LIBRARY = "libfused_resnet_cuda.so"
MODULE = "fused_resnet._C"


@dataclass(frozen=True)
class Torch:
    """An installed torch, known by its files: under build isolation it cannot be imported."""

    folder: Path
    version: str
    cuda: str | None  # the version of CUDA that it was built with

    @classmethod
    def find(cls) -> "Torch":
        """The torch of the environment that is installed into."""
        for folder in cls.candidates():
            with contextlib.suppress(OSError):
                record = (folder / "version.py").read_text()
                cuda = re.search(r"^cuda[^=]*= ['\"]([^'\"]+)", record, re.MULTILINE)
                if match := re.search(r"__version__ = ['\"]([^'\"]+)", record):
                    return cls(folder, match[1], cuda[1] if cuda else None)
        raise LeftOut(
            LIBRARY,
            "no torch was found in the environment that is installed into",
            "Install torch first, then this package again, or set FUSED_RESNET_TORCH to the folder of torch",
        )

    @staticmethod
    def candidates() -> list[Path]:
        """Where torch may be, the surest first.

        Without build isolation it is on ``sys.path``.  With it, pip hides the environment's packages but still runs its
        interpreter; other front ends run one of their own, and the environment shows in variables or in the project.
        """
        if "FUSED_RESNET_TORCH" in os.environ:
            return [Path(os.environ["FUSED_RESNET_TORCH"])]
        paths = list(sys.path)
        prefixes = [sys.prefix, os.environ.get("VIRTUAL_ENV"), os.environ.get("CONDA_PREFIX"), str(ROOT / ".venv")]
        for prefix in filter(None, [*prefixes, sys.base_prefix]):
            names = {"base": prefix, "platbase": prefix}
            paths += [sysconfig.get_path(kind, vars=names) for kind in ("platlib", "purelib")]
        paths += [*site.getsitepackages(), site.getusersitepackages()]
        return [Path(path) / "torch" for path in paths]

    def check(self) -> None:
        if tuple(int(part) for part in self.version.split(".")[:2]) < OLDEST_TORCH:
            wanted = ".".join(map(str, OLDEST_TORCH))
            raise LeftOut(LIBRARY, f"torch is {self.version} and its stable ABI starts with {wanted}", "Upgrade torch")


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
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda", *pip_cuda(torch)]
    found = [os.environ.get("CUDACXX"), *(home and shutil.which(f"{home}/bin/nvcc") for home in homes[:2])]
    found += [tool("nvcc"), *(shutil.which(f"{home}/bin/nvcc") for home in homes[2:])]
    path = next(filter(None, found), None)
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

    def run(self) -> list[Path]:
        """Configure and build; returns the files that belong into the package."""
        cmake = tool("cmake")
        if cmake is None:
            raise LeftOut(
                LIBRARY, "no cmake was found", "Install it (pip install cmake ninja), then this package again"
            )
        options = [f"-DTORCH_DIR={self.torch.folder}", f"-DCMAKE_CXX_COMPILER={compiler()}", *self.module_options()]
        if ninja := tool("ninja"):
            options += ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        options += self.cuda_options()
        try:
            self.make(cmake, options)
        except LeftOut:
            if self.leaves_out(CUDA_LIBRARY):
                raise
            # the other libraries may build all the same
            mend = "Run pip install again with FUSED_RESNET_NATIVE=required to see the compiler's messages"
            self.leave_out(LeftOut(CUDA_LIBRARY, "the native build with it failed", mend))
            self.make(cmake, [*options, "-DFUSED_RESNET_CUDA=OFF"])
        files = {LIBRARY: LIBRARY, CUDA_LIBRARY: CUDA_LIBRARY, MODULE: "_C" + sysconfig.get_config_var("EXT_SUFFIX")}
        return [self.folder / file for part, file in files.items() if not self.leaves_out(part)]

    def make(self, cmake: str, options: list[str]) -> None:
        self.call([cmake, "-S", str(ROOT), "-B", str(self.folder), *options])
        self.call([cmake, "--build", str(self.folder), "--parallel"])

    def leaves_out(self, part: str) -> bool:
        return any(left_out.part == part for left_out in self.left_out)

    def leave_out(self, left_out: LeftOut) -> None:
        report(left_out)
        self.left_out.append(left_out)

    def cuda_options(self) -> list[str]:
        try:
            path = nvcc(self.torch)
        except NoCuda as no_cuda:
            self.leave_out(no_cuda)
            return ["-DFUSED_RESNET_CUDA=OFF"]
        return [
            "-DFUSED_RESNET_CUDA=ON",
            f"-DCMAKE_CUDA_COMPILER={path}",
            f"-DCMAKE_CUDA_HOST_COMPILER={compiler()}",
            f"-DCUDA_INCLUDE_DIRS={';'.join(f'{folder}/include' for folder in pip_cuda(self.torch))}",
        ]

    def module_options(self) -> list[str]:
        """The Python module needs headers that a bare Python does not bring; the library goes without."""
        try:
            if not Path(sysconfig.get_path("include"), "Python.h").exists():
                mend = "Install them (Debian, Ubuntu: apt install python3-dev), then this package again"
                raise LeftOut(MODULE, "Python's headers were not found", mend)
            try:
                import pybind11
            except ImportError:
                mend = "Install it (pip install pybind11), then this package again"
                raise LeftOut(MODULE, "pybind11 was not found", mend) from None
        except LeftOut as left_out:
            self.leave_out(left_out)
            return ["-DFUSED_RESNET_PYTHON_MODULE=OFF"]
        return [
            "-DFUSED_RESNET_PYTHON_MODULE=ON",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]

    def call(self, command: list[str]) -> None:
        try:
            subprocess.run(command, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            mend = "Run pip install again with FUSED_RESNET_NATIVE=required to see the compiler's messages"
            raise LeftOut(LIBRARY, "the native build failed", mend) from error

    def facts(self) -> dict[str, object]:
        """What the libraries were built with, from CMake's own record."""
        record = "".join(path.read_text() for path in self.folder.glob("CMakeFiles/*/CMakeCXXCompiler.cmake"))
        values = dict(re.findall(r'set\((CMAKE_CXX_COMPILER_ID|CMAKE_CXX_COMPILER_VERSION) "([^"]*)"\)', record))
        facts: dict[str, object] = {"torch": self.torch.version, "compiler": " ".join(values.values())}
        if not self.leaves_out(CUDA_LIBRARY):
            facts["cuda"] = json.loads((self.folder / "cuda.json").read_text())
        if self.left_out:
            facts["left_out"] = " ".join(map(str, self.left_out))
        return facts


def report(left_out: LeftOut) -> str:
    """Say what is left out, or stop where nothing may be; returns the line for the record."""
    if os.environ.get("FUSED_RESNET_NATIVE") == "required" and not isinstance(left_out, NoCuda):
        raise SystemExit(f"fused_resnet: {left_out}")
    print(f"fused_resnet: {left_out}", file=sys.stderr, flush=True)
    return str(left_out)


def replace(source: Path, target: Path) -> None:
    """Copy as a new file: a running process keeps the one that it has mapped."""
    if target.exists() and filecmp.cmp(source, target, shallow=False):
        return
    temporary = target.with_name(target.name + ".new")
    shutil.copy2(source, temporary)
    temporary.replace(target)


class BuildNative(build_ext):
    """``build_ext`` by CMake; never fails for what can be left out."""

    def run(self) -> None:
        in_place = self.inplace or self.editable_mode
        package = (ROOT if in_place else Path(self.build_lib)) / "fused_resnet"
        package.mkdir(parents=True, exist_ok=True)
        built: list[Path] = []
        facts: dict[str, object] = {}
        try:
            if os.environ.get("FUSED_RESNET_NATIVE") == "off":
                raise LeftOut(LIBRARY, "FUSED_RESNET_NATIVE=off", "Unset it, then install this package again")
            torch = Torch.find()
            torch.check()
            build = NativeBuild(torch)
            built = build.run()
            facts = build.facts()
        except LeftOut as left_out:
            facts = {"left_out": report(left_out)}

        # what an earlier build left here must not pass for this one's
        for stale in package.glob("*.so"):
            if stale.name not in {path.name for path in built}:
                stale.unlink()
        for path in built:
            replace(path, package / path.name)
        facts["files"] = sorted(path.name for path in built)
        (package / "_build.json").write_text(json.dumps(facts, indent=2) + "\n")

    def get_source_files(self) -> list[str]:
        return ["CMakeLists.txt", *(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*"))]


# The extension is declared so that a wheel gets the tag of its Python and platform.
setup(ext_modules=[Extension("fused_resnet._C", sources=[])], cmdclass={"build_ext": BuildNative})
