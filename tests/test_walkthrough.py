"""What docs/walkthrough.md shows is what happens; the files and tests that it and CONTRIBUTING.md name are there."""

import doctest
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "walkthrough.md"


def test_what_the_page_shows_is_what_happens(monkeypatch):
    torch.use_deterministic_algorithms(False)  # which would fill memory, in steps of its own
    failed, tried = doctest.testfile(str(PAGE), module_relative=False, optionflags=doctest.FAIL_FAST)
    assert tried > 20
    assert not failed


@pytest.mark.parametrize("page", [PAGE, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.stem)
def test_the_files_that_a_page_names_are_there(page):
    named = set(re.findall(r"`((?:\w+/)+\w+\.\w+)`", page.read_text()))
    assert len(named) > 15
    assert not [name for name in named if not any((folder / name).exists() for folder in (ROOT, ROOT / "fused_resnet"))]


def test_the_rules_are_held_by_tests_that_are_there():
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "CONTRIBUTING.md").read_text()))
    there = {
        name for path in (ROOT / "tests").rglob("*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    assert len(named) > 30
    assert named <= there
