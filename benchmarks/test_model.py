"""A training step: forward, cross entropy, backward, SGD."""

import pytest

from fused_resnet.bench.harness import STOCK
from fused_resnet.bench.peers import DTYPES, FUSED, TrainingStep, Workload
from fused_resnet.bench.suites import Settings, step_refusal


@pytest.mark.parametrize("peer", [STOCK, FUSED])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", Settings().models)
def test_model(benchmark, settings, model, dtype, peer, synchronized):
    workload = Workload(model, settings.batch_size, settings.image_size, dtype, settings.device, settings.engine)
    assert step_refusal(workload, (STOCK, FUSED)) is None  # computed once for both peers
    benchmark.group = f"{model} {dtype}"
    benchmark.pedantic(synchronized(TrainingStep(workload, peer)), rounds=10, warmup_rounds=2)
