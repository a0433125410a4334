"""What a step costs the host: 16 bottlenecks so small that their kernels take next to nothing, and a block's guards."""

import pytest
import torch

import fused_resnet
from fused_resnet import models
from fused_resnet.bench.block import BlockStep
from fused_resnet.bench.peers import DTYPES
from fused_resnet.bench.suites.contest import refusals
from fused_resnet.blocks.fusion import plan_of, prepare_again
from fused_resnet.blocks.prepare import prepare

INPUT, BLOCKS = (2, 32, 4, 4), 16
READS = {"afresh": prepare, "as kept": prepare_again}


@pytest.fixture
def one_thread():
    """A thread pool's waking would be most of what is measured."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_host(benchmark, settings, dtype, peer, synchronized):
    torch.manual_seed(0)
    block = models.Bottleneck(32, 8).to(settings.device).to(memory_format=torch.channels_last)
    x, grad = torch.randn(2, *INPUT, device=settings.device, dtype=DTYPES[dtype])
    x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x.relu(), grad))
    assert refusals(lambda by: BlockStep(block, x, grad, by), [peer]) == {}
    step = BlockStep(block, x, grad, peer)
    benchmark.group = f"16 small bottlenecks {dtype}"
    benchmark.pedantic(synchronized(lambda: [step() for _ in range(BLOCKS)]), rounds=60, warmup_rounds=5)


@pytest.mark.parametrize("read", READS)
def test_guards(benchmark, read):
    block = fused_resnet.fuse(models.create("resnet50").layer1[1])
    plan = plan_of(block)
    assert [chain.signature for chain in READS[read](block, plan)] == [c.signature for c in prepare(block, plan)]
    benchmark.group = "guards of a bottleneck"
    benchmark(READS[read], block, plan)
