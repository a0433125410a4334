"""Runs CMakeLists.txt and puts what it builds into the package; everything else is in pyproject.toml.

The native libraries are an engine among others: where they cannot be built, the installation succeeds without them, and
``fused_resnet/_build.json`` (which ``fused-resnet doctor`` reads) says what was left out, why, and what to do.

Environment variables: ``FUSED_RESNET_TORCH`` names the folder of the torch package to build against;
``FUSED_RESNET_NATIVE=required`` turns what would be left out into an error, ``FUSED_RESNET_NATIVE=off`` builds nothing.
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
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 10)


class LeftOut(Exception):
    """A part that is not built: what, why, and what to do."""

    def __init__(self, part: str, reason: str, mend: str) -> None:
        super().__init__(f"{part} was left out, because {reason}. {mend}.")


LIBRARY = "libfused_resnet_cpu.so"
MODULE = "fused_resnet._C"


@dataclass(frozen=True)
class Torch:
    """An installed torch, known by its files: under build isolation it cannot be imported."""

    folder: Path
    version: str

    @classmethod
    def find(cls) -> "Torch":
        """The torch of the environment that is installed into."""
        for folder in cls.candidates():
            with contextlib.suppress(OSError):
                match = re.search(r"__version__ = ['\"]([^'\"]+)", (folder / "version.py").read_text())
                if match:
                    return cls(folder, match[1])
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


@dataclass
class NativeBuild:
    """One run of CMake, in a folder that is kept, so that the next run compiles only what changed."""

    torch: Torch
    left_out: str | None = None  # what was built without, where it was

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
        self.call([cmake, "-S", str(ROOT), "-B", str(self.folder), *options])
        self.call([cmake, "--build", str(self.folder), "--parallel"])
        return [path for path in self.folder.glob("*.so") if path.name == LIBRARY or self.builds_module(path)]

    def builds_module(self, path: Path) -> bool:
        return not self.left_out and path.name == "_C" + sysconfig.get_config_var("EXT_SUFFIX")

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
            self.left_out = report(left_out)
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
        return facts if self.left_out is None else {**facts, "left_out": self.left_out}


def report(left_out: LeftOut) -> str:
    """Say what is left out, or stop where nothing may be; returns the line for the record."""
    if os.environ.get("FUSED_RESNET_NATIVE") == "required":
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
