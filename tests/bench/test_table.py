import dataclasses

import pytest

from fused_resnet import engines
from fused_resnet.bench import table
from fused_resnet.bench.kernel_classes import CLASSES
from fused_resnet.bench.operation import SHORTCUTS
from fused_resnet.bench.peers import DTYPES, NAMES
from fused_resnet.bench.pointwise import STEPS
from fused_resnet.bench.profile import GAPS
from fused_resnet.bench.roofline import SCHEMES
from fused_resnet.bench.rows import BYTES, FUSED, MATMUL, PROFILED_SECONDS, SECONDS, STOCK, TORCH, Limit, Row
from fused_resnet.bench.settings import Settings
from fused_resnet.bench.suites import SUITES
from fused_resnet.bench.suites.ceilings import MEASURED
from fused_resnet.bench.suites.model import WHOLE_STEP
from fused_resnet.bench.suites.op import PASSES, op_cases
from fused_resnet.bench.suites.roofline import AT_ONCE, DRAM, IN_TURN, SAVED

SETTINGS = Settings(batch_size=256, peers=NAMES)
QUANTITIES = {"memory": BYTES, "profile": PROFILED_SECONDS, "roofline": BYTES}


def widest(suite, peers=NAMES):
    """The row that needs most room: the longest names, a thousand seconds, twelve times as fast."""
    words = {
        "ceiling": "matmul",
        "shape": max(("x".join(map(str, shape[1:])) for shape, _ in op_cases(SETTINGS)), key=len),
        "step": max((step.name for step in STEPS), key=len),
        "shortcut": max(SHORTCUTS, key=len),
        "dtype": max(DTYPES, key=len),
        "pass": max(PASSES, key=len),
        "model": "resnet152",
        "block": "layer3.0",
        "input": "1024x14x14",
        "kernel": "2048 1x1/2",
        "memory": "activations",
        "kernels": max((*CLASSES, GAPS, WHOLE_STEP), key=len),
        "figure": max((DRAM, SAVED, IN_TURN, AT_ONCE), key=len),
    }
    if suite.name == "pointwise":
        words["shape"] = "1024>2048 7x7"
    engine = max(engines.NAMES, key=len)
    quantity = QUANTITIES.get(suite.name, SECONDS)
    if suite.name == "roofline":
        peers, engine = SCHEMES, ""
    if suite.name == "ceilings":
        peers = (MEASURED,)
    if suite.name == "conv":
        peers = (STOCK, MATMUL)
    if suite.name == "pointwise":
        peers = (TORCH, FUSED, MATMUL)
    peers = [peer for peer in peers if peer not in suite.without]
    stock = 1000.0 if quantity is not BYTES else 1e11
    values = {peer: (stock if peer == "stock" else stock / 12.34, 1.4 * stock, 0.7 * stock) for peer in peers}
    case = {name: words[name] for name in suite.columns}
    return Row(suite.name, case, engine, quantity, values, limit=Limit(1, 1, 1.0), images=256)


@pytest.mark.parametrize("suite", SUITES.values(), ids=SUITES.keys())
def test_a_table_fits_into_a_terminal(suite):
    lines = [*table.heading(suite, SETTINGS).splitlines(), *table.lines(suite, widest(suite))]
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("suite", SUITES.values(), ids=SUITES.keys())
def test_every_entry_fits_its_column(suite):
    assert all(len(word) <= suite.columns[name] for name, word in widest(suite).case.items())
    assert all(len(name) <= width for name, width in suite.columns.items())


@pytest.mark.parametrize("suite", [s for s in SUITES.values() if s.contest], ids=lambda suite: suite.name)
def test_figures_stand_under_their_names(suite):
    head = table.heading(suite, SETTINGS).splitlines()[-1]
    line = table.lines(suite, widest(suite))[2]  # the second peer but stock: it has every figure
    for name in ("median", "p20 p80", "p20-p80", "fused"):
        end = head.index(name) + len(name)
        assert line[end - 1] != " "
        assert line[end : end + 1] in ("", " ")


def test_a_row_shows_medians_speeds_ratios_and_percentiles():
    case = {"model": "resnet18", "dtype": "fp32"}
    values = {"stock": (0.2, 0.2, 0.2), "fused": (0.1, 0.1, 0.1), "compile": (0.16, 0.16, 0.16)}
    lines = table.lines(SUITES["model"], Row("model", case, "cpu", SECONDS, values, images=8))
    assert [line.split() for line in lines] == [
        ["resnet18", "fp32", "stock", "200.00", "+0%", "+0%", "40", "2.00x"],
        ["fused", "cpu", "100.00", "+0%", "+0%", "80", "2.00x", "2.00-2.00"],
        ["compile", "160.00", "+0%", "+0%", "50", "1.25x", "1.25-1.25", "1.60x"],
    ]


def test_a_row_with_a_limit_shows_the_part_reached():
    row = dataclasses.replace(widest(SUITES["op"]), values={"stock": (4.0,) * 3}, limit=Limit(1, 1, 1.0))
    assert "25%" in table.lines(SUITES["op"], row)[0].split()


@pytest.mark.parametrize("name", ["model", "profile"])
def test_a_refused_peer_has_a_reason_and_no_figure(name):
    suite = SUITES[name]
    reason = "fused is wrong: " + 20 * "a long reason, "
    row = dataclasses.replace(widest(suite, peers=["stock"]), refused={"fused": reason})
    lines = table.lines(suite, row, first=False)
    assert sum("resnet152" in line for line in lines) == 1
    assert "refused: fused is wrong" in lines[1]
    assert max(map(len, lines)) <= 100
    nothing = table.lines(suite, dataclasses.replace(row, values={}), first=False)
    assert "resnet152" in nothing[0]
    assert "refused: fused is wrong" in nothing[0]


def test_shapes_follow_batch_and_image_size():
    small = [shape for shape, _ in op_cases(Settings(batch_size=4, image_size=112))]
    assert (4, 64, 56, 56) in small
    assert all(batch == 4 and size >= 1 for batch, _, size, _ in small)
