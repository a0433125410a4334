"""Installs what ``make wheel`` made beside several versions of torch, and lets ``check_wheel.py`` try it there.

Every environment is fresh: a virtual environment with one torch (some gigabytes and a minute each), or one on top of an
interpreter at hand (``--python``), whose packages it sees and never changes.  Into it go, in turn, the wheel for this
platform, the pure Python one and the source distribution, each by a plain ``pip install``: nothing but this package may
change.  The checks run without a compiler on the path.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "build" / "test-wheel"
TORCHES = ["2.10.0", "2.11.0", "2.13.0+cpu", "2.15.0"]


def run(*command: object, **options) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    return done.stdout


def artifacts(dist: Path) -> list[Path]:
    """This platform's wheel, the pure Python one, the source distribution."""
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    found = []
    for pattern in (f"*-{tag}-*.whl", "*-py3-none-any.whl", "*.tar.gz"):
        files = sorted(dist.glob(pattern), key=lambda path: path.stat().st_mtime)
        if not files:
            raise SystemExit(f"{dist} holds no {pattern}: run make wheel first, with the same Python")
        found.append(files[-1])
    return found


def make(name: str, torch: str | None = None, python: str | None = None) -> Path:
    """Make a virtual environment with a version of torch, or on top of another interpreter's packages."""
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    interpreter = folder / "bin" / "python"
    if python:
        # not venv.create, which would take this Python's version
        run(python, "-m", "venv", "--without-pip", folder)
        ours, theirs = (
            run(path, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
            for path in (interpreter, python)
        )
        Path(ours, "below.pth").write_text(theirs + "\n")
    else:
        venv.create(folder, with_pip=True)
        index = ["--extra-index-url", "https://download.pytorch.org/whl/cpu"] if torch.endswith("+cpu") else []
        run(interpreter, "-m", "pip", "install", "--quiet", f"torch=={torch}", "numpy", *index)
    return interpreter


def packages(python: Path) -> set[str]:
    return set(run(python, "-m", "pip", "list", "--format=freeze").split())


def check(python: Path, artifact: Path) -> dict[str, str]:
    """Install, check and uninstall; returns the row of the table."""
    before = packages(python)
    # the source distribution is built for one architecture: the wheel shows the others
    environment = {**os.environ, "TORCH_CUDA_ARCH_LIST": "9.0"}
    run(python, "-m", "pip", "install", "--no-cache-dir", artifact, env=environment, cwd=FOLDER)
    added, gone = packages(python) - before, before - packages(python)
    if gone or [name.split("==")[0].replace("-", "_") for name in added] != ["fused_resnet"]:
        raise SystemExit(f"installing {artifact.name} changed {python}: added {added}, removed {gone}")
    # no compiler, no nvcc, no checkout
    bare = {"PATH": str(python.parent), "HOME": str(FOLDER), "OMP_NUM_THREADS": "1"}
    row = json.loads(run(python, ROOT / "tests/building/wheel/check_wheel.py", env=bare, cwd=FOLDER))
    run(python, "-m", "pip", "uninstall", "--yes", "fused_resnet")
    return {"from": "source" if artifact.suffix == ".gz" else artifact.stem.split("-")[-1], **row}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dist", type=Path, default=ROOT / "dist", help="where the wheels are (default: dist)")
    parser.add_argument("--torch", nargs="*", help=f"versions of torch to install (default: {' '.join(TORCHES)})")
    parser.add_argument("--python", nargs="*", default=[], help="interpreters at hand that have torch and pip")
    options = parser.parse_args()
    versions = options.torch if options.torch is not None else [] if options.python else TORCHES
    wanted = [{"name": f"python-{i}", "python": python} for i, python in enumerate(options.python)]
    wanted += [{"name": f"torch-{version}", "torch": version} for version in versions]
    files = artifacts(options.dist)
    heading = None
    for environment in wanted:
        python = make(**environment)
        for artifact in files:
            row = check(python, artifact)
            if heading is None:
                heading = list(row)
                print("|", " | ".join(heading), "|\n|" + "---|" * len(heading))
            print("|", " | ".join(str(row[title]) for title in heading), "|", flush=True)
        shutil.rmtree(FOLDER / environment["name"])


if __name__ == "__main__":
    main()
