"""A training step: forward, cross entropy, backward, SGD."""

import pytest

from fused_resnet.bench.libraries import is_library_name
from fused_resnet.bench.network import NetworkStep, Workload
from fused_resnet.bench.suites.model import step_refusals


def test_model(benchmark, settings, model, dtype, peer, synchronized):
    if is_library_name(model):
        pytest.importorskip(model.partition(":")[0])
    workload = Workload(model, settings.batch_size, settings.image_size, dtype, settings.device)
    assert step_refusals(workload, tuple(settings.contenders(dtype))) == {}  # computed once for both peers
    benchmark.group = f"{model} {dtype}"
    benchmark.pedantic(synchronized(NetworkStep(workload, peer)), rounds=10, warmup_rounds=2)
