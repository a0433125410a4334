"""What a GPU can show: the same claims as on the CPU, and the capture of a training step."""

import copy

import pytest
import torch

import fused_resnet
from fused_resnet import models
from tests.accuracy import assert_as_accurate_as_stock, gradient_for

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def any_algorithm(poisoned_memory):
    """Let cuDNN take the algorithms that it takes in training."""
    torch.use_deterministic_algorithms(False)


def step(model, x, autocast=None):
    with torch.autocast("cuda", dtype=autocast, enabled=autocast is not None):
        z = model(x)
    z.backward(gradient_for(z))
    results = {"output": z.detach().cpu()}
    results.update({f"{name}.grad": p.grad.cpu() for name, p in model.named_parameters()})
    results.update({name: b.cpu() for name, b in model.named_buffers()})
    return results


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_a_step_is_as_accurate_as_stock(autocast):
    model = models.resnet20().cuda().to(memory_format=torch.channels_last)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # no ReLU's input is near 0, where no dtype is right
            torch.nn.init.constant_(module.bias, 6)
    x = torch.randn(16, 3, 32, 32, device="cuda").contiguous(memory_format=torch.channels_last)
    exact = step(copy.deepcopy(model).double(), x.double())
    fused = step(fused_resnet.fuse(copy.deepcopy(model)), x, autocast)
    assert_as_accurate_as_stock(fused, step(model, x, autocast), exact)


def test_a_training_step_can_be_captured():
    model = fused_resnet.fuse(models.resnet20().cuda())
    x = torch.randn(8, 3, 32, 32, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            model(x).sum().backward()
    torch.cuda.synchronize()
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(x).sum().backward()
    before = model.bn1.num_batches_tracked.item()
    graph.replay()
    assert model.bn1.num_batches_tracked.item() == before + 1
    assert all(p.grad.isfinite().all() for p in model.parameters())
