"""Forward and backward of every distinct residual block."""

from functools import partial

import pytest

from fused_resnet.bench.block import BlockStep, distinct_blocks
from fused_resnet.bench.settings import Settings
from fused_resnet.bench.suites.contest import refusals

BLOCKS = [block for model in Settings().models for block in distinct_blocks(model, Settings().image_size)]


@pytest.mark.parametrize("shape", BLOCKS, ids=lambda shape: f"{shape.model}-{shape.name}")
def test_block(benchmark, settings, shape, dtype, peer, synchronized):
    drawn = BlockStep.make(shape, settings.batch_size, dtype, settings.device)
    assert refusals(partial(BlockStep, *drawn), [peer]) == {}
    benchmark.group = f"{shape.model} {shape.name} {dtype}"
    benchmark.pedantic(synchronized(BlockStep(*drawn, peer)), rounds=10, warmup_rounds=2)
