import dataclasses

import pytest
import torch

from fused_resnet.bench import report
from fused_resnet.bench.harness import Row
from fused_resnet.bench.peers import DTYPES, SHORTCUTS
from fused_resnet.bench.suites import SUITES, Settings, op_cases

SETTINGS = Settings(compile=True, batch_size=256)


def widest(suite):
    """The row that needs most room: the longest names, 100 seconds, twelve times as fast."""
    words = {
        "shape": max(("x".join(map(str, shape)) for shape, _ in op_cases(SETTINGS)), key=len),
        "shortcut": max(SHORTCUTS, key=len),
        "dtype": max(DTYPES, key=len),
        "pass": "forward+backward",
        "model": "resnet152",
        "memory": "activations",
    }
    stock = 100.0 if suite.quantity.name == "seconds" else 1e11
    rounds = 1 if suite.name == "memory" else 3
    values = {peer: (stock if peer == "stock" else stock / 12.34,) * rounds for peer in suite.peers(SETTINGS)}
    return Row(suite.name, {name: words[name] for name in suite.columns}, "cpu", suite.quantity, values)


@pytest.mark.parametrize("suite", SUITES.values(), ids=SUITES.keys())
def test_a_table_fits_into_a_terminal(suite):
    lines = f"{report.heading(suite, SETTINGS)}\n{report.line(suite, widest(suite))}".splitlines()
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("suite", SUITES.values(), ids=SUITES.keys())
def test_figures_stand_under_their_names(suite):
    head, line = report.heading(suite, SETTINGS).splitlines()[-1], report.line(suite, widest(suite))
    ends = [head.index(name) + len(name) for name in (f"stock {suite.quantity.symbol}", suite.quantity.ratio)]
    assert all(line[end - 1] != " " and (end == len(line) or line[end] == " ") for end in ends)


def test_a_row_shows_medians_ratio_and_quartiles():
    case = {"model": "resnet18", "dtype": "fp32"}
    values = {"stock": (0.2, 0.2, 0.3), "fused": (0.1, 0.1, 0.1)}
    suite = SUITES["model"]
    assert report.line(suite, Row("model", case, "cpu", suite.quantity, values)).split() == [
        "resnet18", "fp32", "200.00", "100.00", "2.00x", "2.00-2.50",
    ]  # fmt: skip


def test_a_refused_row_has_a_reason_and_no_figure():
    suite = SUITES["model"]
    row = dataclasses.replace(widest(suite), values={}, refused="fused is wrong: " + 20 * "a long reason, ")
    lines = report.line(suite, row).splitlines()
    assert "refused: fused is wrong" in lines[0]
    assert max(map(len, lines)) <= 100


def test_shapes_follow_batch_and_image_size():
    small = [shape for shape, _ in op_cases(Settings(batch_size=4, image_size=112, device=torch.device("cpu")))]
    assert (4, 64, 56, 56) in small
    assert all(batch == 4 and size >= 1 for batch, _, size, _ in small)
