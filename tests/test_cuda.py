"""What a GPU can show: the same claims as on the CPU, and the capture of a training step."""

import copy

import pytest
import torch

import fused_resnet
from fused_resnet import engines, models
from fused_resnet.functional import batch_norm_act
from tests.support.accuracy import assert_as_accurate_as_stock, gradient_for

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


@pytest.fixture(params=engines.GPU_NAMES)
def engine(request):
    if reason := engines.why_not(request.param, "cuda"):
        pytest.skip(reason)
    return request.param


def without_kinks(model):
    """Keep every ReLU's input away from 0, where no dtype is right."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.constant_(module.bias, 6)
    return model


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=["NHWC", "NCHW"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_a_step_is_as_accurate_as_stock(engine, shortcut, autocast, memory_format):
    model = without_kinks(models.resnet20(shortcut=shortcut)).cuda().to(memory_format=memory_format)
    x = torch.randn(16, 3, 32, 32, device="cuda").contiguous(memory_format=memory_format)
    exact = step(copy.deepcopy(model).double(), x.double())
    fused = step(fused_resnet.fuse(copy.deepcopy(model), engine=engine), x, autocast)
    assert_as_accurate_as_stock(fused, step(model, x, autocast), exact)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_the_stem_and_bottlenecks_are_as_accurate_as_stock(engine, memory, autocast):
    model = without_kinks(models.resnet50(num_classes=10)).cuda().to(memory_format=torch.channels_last)
    x = torch.randn(8, 3, 96, 96, device="cuda").contiguous(memory_format=torch.channels_last)
    exact = step(copy.deepcopy(model).double(), x.double())
    fused = step(fused_resnet.fuse(copy.deepcopy(model), engine=engine, memory=memory), x, autocast)
    assert_as_accurate_as_stock(fused, step(model, x, autocast), exact)


def test_a_compiled_step_has_the_gradients_of_an_eager_one(engine):
    model = fused_resnet.fuse(
        without_kinks(models.resnet20()).cuda().to(memory_format=torch.channels_last), engine=engine
    )
    x = torch.randn(16, 3, 32, 32, device="cuda").contiguous(memory_format=torch.channels_last)
    eager = step(copy.deepcopy(model), x)
    compiled = step(torch.compile(model, fullgraph=True), x)
    for name, expected in eager.items():
        found = compiled[name] if name in compiled else compiled[f"_orig_mod.{name}"]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=name)


def test_more_than_two_to_the_31_elements(engine):
    """The last image of a batch gets what it gets alone, with the statistics given: addresses are 64 bits wide."""
    x = torch.randn(8, 64, 2, 2, device="cuda", dtype=torch.bfloat16)
    whole = torch.zeros(2**31 // 256 + 8, 64, 2, 2, device="cuda", dtype=torch.bfloat16)
    whole = whole.contiguous(memory_format=torch.channels_last)
    whole[-8:] = x
    mean, var = torch.zeros(64, device="cuda"), torch.ones(64, device="cuda")
    z = batch_norm_act(whole, mean, var, training=False, engine=engine)
    x = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(z[-8:], batch_norm_act(x, mean, var, training=False, engine=engine))
    batch_norm_act(whole, mean, var, training=True, momentum=1.0, engine=engine)
    torch.testing.assert_close(var, whole.double().square().mean((0, 2, 3)).float(), rtol=1e-3, atol=0)


def test_a_training_step_can_be_captured(engine):
    model = fused_resnet.fuse(models.resnet20().cuda(), engine=engine)
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


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_on_another_device_than_the_current_one(engine):
    model = fused_resnet.fuse(models.resnet20().to("cuda:1"), engine=engine)
    z = model(torch.randn(8, 3, 32, 32, device="cuda:1"))
    z.sum().backward()
    assert z.device.index == 1
