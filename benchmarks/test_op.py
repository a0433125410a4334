"""``act(batch_norm(x) + shortcut)`` at the shapes of a ResNet-50; with SiLU at the largest of each shortcut."""

from dataclasses import replace

import pytest
import torch

from fused_resnet.bench.operation import Operation
from fused_resnet.bench.peers import DTYPES
from fused_resnet.bench.settings import Settings
from fused_resnet.bench.suites.contest import refusals
from fused_resnet.bench.suites.op import PASSES, op_cases

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SETTINGS = Settings.on(DEVICE)
CASES = [("relu", *case) for case in op_cases(SETTINGS)]
CASES += [("silu", *case) for case in op_cases(replace(SETTINGS, largest_only=True))]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{'x'.join(map(str, case[1]))}-{case[2]}")
@pytest.mark.parametrize("passes", PASSES)
def test_op(benchmark, settings, case, dtype, peer, passes, synchronized):
    act, shape, shortcut = case
    stock = Operation.make(shape, shortcut, DTYPES[dtype], settings.device, act=act)
    assert refusals(stock.by, [peer]) == {}
    benchmark.group = f"{act} {'x'.join(map(str, shape))} {shortcut} {dtype} {passes}"
    operation = stock.by(peer)
    benchmark.pedantic(synchronized(lambda: PASSES[passes](operation)), rounds=20, warmup_rounds=3)
