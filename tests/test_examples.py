"""Every page of ``examples/`` runs as its reader would run it."""

import math
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("train_*.py"))


def run(*arguments) -> str:
    """Return what a command of this interpreter prints."""
    process = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def losses(printed: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"^epoch \d+: loss ([\d.]+)", printed, re.MULTILINE)]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_fuses_its_network_and_learns(example):
    for package in ("accelerate", "lightning", "timm", "torchvision"):
        if re.search(rf"^(from|import) {package}\b", example.read_text(), re.MULTILINE) and find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    printed = run(example)
    assert re.search(r"^[1-9]\d* chains fused, 0 places left stock$", printed, re.MULTILINE)
    first, *_, last = losses(printed)
    assert last < 0.75 * first


def test_a_fused_network_trains_sharded_over_two_processes():
    pytest.importorskip("torchvision")
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", 2)
    example = ROOT / "examples" / "train_torchvision.py"
    (loss,) = losses(run(*torchrun, example, "--parallel", "fsdp", "--epochs", 1))  # printed by one of the two
    assert loss < 0.9 * math.log(10)  # what guessing costs


def test_every_example_is_a_page_and_in_the_table():
    table = (ROOT / "examples" / "README.md").read_text()
    for example in EXAMPLES:
        assert len(example.read_text().splitlines()) <= 80
        assert f"[{example.name}]({example.name})" in table
