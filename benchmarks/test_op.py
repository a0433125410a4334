"""``relu(batch_norm(x) + shortcut)`` at the shapes of a ResNet-50."""

import pytest
import torch

from fused_resnet.bench.operation import Operation
from fused_resnet.bench.peers import DTYPES
from fused_resnet.bench.settings import Settings
from fused_resnet.bench.suites.contest import refusals
from fused_resnet.bench.suites.op import PASSES, op_cases

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = list(op_cases(Settings.on(DEVICE)))


@pytest.mark.parametrize("case", CASES, ids=lambda case: "x".join(map(str, case[0])) + f"-{case[1]}")
@pytest.mark.parametrize("passes", PASSES)
def test_op(benchmark, settings, case, dtype, peer, passes, synchronized):
    shape, shortcut = case
    stock = Operation.make(shape, shortcut, DTYPES[dtype], settings.device)
    assert refusals(stock.by, [peer]) == {}
    benchmark.group = f"{'x'.join(map(str, shape))} {shortcut} {dtype} {passes}"
    operation = stock.by(peer)
    benchmark.pedantic(synchronized(lambda: PASSES[passes](operation)), rounds=20, warmup_rounds=3)
