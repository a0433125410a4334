"""``relu(batch_norm(x) + shortcut)`` at the shapes of a ResNet-50."""

import pytest

from fused_resnet.bench.harness import STOCK
from fused_resnet.bench.peers import DTYPES, EXACT, FUSED, Operation
from fused_resnet.bench.suites import Settings, op_cases, refusal


@pytest.fixture(scope="module", params=DTYPES)
def dtype(request):
    return request.param


@pytest.fixture(
    scope="module", params=op_cases(Settings()), ids=lambda case: "x".join(map(str, case[0])) + f"-{case[1]}"
)
def operations(request, dtype, settings):
    """The operation of one shape by every peer, after all were found to be right."""
    stock = Operation.make(*request.param, DTYPES[dtype], settings.device, settings.engine)
    checked = {peer: stock.by(peer) for peer in (STOCK, FUSED)}
    assert refusal(checked, stock.by(EXACT)) is None
    return {peer: stock.by(peer) for peer in checked}


@pytest.mark.parametrize("passes", ["forward", "forward_backward"])
@pytest.mark.parametrize("peer", [STOCK, FUSED])
def test_op(benchmark, operations, dtype, peer, passes, synchronized):
    operation = operations[peer]
    shortcut = "none" if operation.residual is None else "residual" if operation.residual_norm is None else "dual"
    benchmark.group = f"{'x'.join(map(str, operation.x.shape))} {shortcut} {dtype} {passes}"
    benchmark.pedantic(synchronized(getattr(operation, passes)), rounds=20, warmup_rounds=3)
