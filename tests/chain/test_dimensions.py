"""Chains over sequences and volumes: BatchNorm1d and BatchNorm3d with their convolutions, as accurate as stock."""

import copy

import pytest
import torch
from torch import nn

import fused_resnet
from fused_resnet import ops
from tests.support.accuracy import assert_fused_is_as_accurate_as_stock
from tests.support.norms import draw_norms
from tests.support.triton_engine import triton_kernels

CONVS, NORMS = {1: nn.Conv1d, 3: nn.Conv3d}, {1: nn.BatchNorm1d, 3: nn.BatchNorm3d}
SIZES = {1: (23,), 3: (5, 6, 7)}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last_3d}


class Block(nn.Module):
    """A residual block; with a projection where it has a stride."""

    def __init__(self, dims, stride=1, act=nn.ReLU, norm=None):
        super().__init__()
        conv, norm = CONVS[dims], norm or NORMS[dims]
        self.conv1, self.bn1 = conv(6, 8, 3, stride, 1, bias=False), norm(8)
        self.conv2, self.bn2 = conv(8, 6, 1, bias=False), norm(6)
        self.project = None if stride == 1 else nn.Sequential(conv(6, 6, 1, stride, bias=False), norm(6))
        self.act = act()

    def forward(self, x):
        shortcut = x if self.project is None else self.project(x)
        return self.act(self.bn2(self.conv2(self.act(self.bn1(self.conv1(x))))) + shortcut)


def make(dims, **options):
    torch.manual_seed(0)
    model = Block(dims, **options)
    draw_norms(model)
    for norm in (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)):
        norm.bias.data.add_(9)  # away from a ReLU's 0, where a rounding decides
    return model


def draw(dims, seed=0, batch=3):
    return torch.randn(batch, 6, *SIZES[dims], generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dims", [1, 3])
def test_a_chain_is_as_accurate_as_stock(dims, stride, act, dtype, training, chains_run):
    model = make(dims, stride=stride, act=act).train(training)
    draws = [draw(dims, seed).to(dtype) for seed in range(5 if dtype.itemsize == 2 else 1)]
    assert_fused_is_as_accurate_as_stock(model, *draws, dtype=dtype)
    assert len(chains_run) == len(draws)


@pytest.mark.parametrize("engine", ["cpu", "reference"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_volume_keeps_its_layout(layout, engine, chains_run):
    model = make(3, stride=2).to(memory_format=LAYOUTS[layout])
    x = draw(3).contiguous(memory_format=LAYOUTS[layout])
    assert_fused_is_as_accurate_as_stock(model, x, engine=engine)
    stock = model(x)
    assert fused_resnet.fuse(copy.deepcopy(model), engine=engine)(x).stride() == stock.stride()


def test_stages_of_volumes_are_one_node(chains_run):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(make(3, stride=2), make(3)))
    assert_fused_is_as_accurate_as_stock(model, draw(3), chain="stage")
    assert len(chains_run) == 1


@pytest.mark.parametrize("dims", [1, 3])
def test_lean_memory_keeps_the_outputs_of_its_pointwise_convolutions(dims):
    assert_fused_is_as_accurate_as_stock(make(dims), draw(dims), memory="lean")


@pytest.mark.parametrize("dims", [1, 3])
def test_gradients_of_gradients_are_stocks(dims):
    model = make(dims, act=nn.SiLU).double()
    x = draw(dims).double()
    penalties = []
    for m in (model, fused_resnet.fuse(copy.deepcopy(model))):
        given = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(m(given).square().sum(), given, create_graph=True)
        penalties.append(torch.autograd.grad(dx.square().sum(), tuple(m.parameters())))
    for ours, theirs in zip(*penalties, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dims", [1, 3])
def test_a_compiled_chain_gives_what_stock_gives(dims):
    model = make(dims).double()
    x = draw(dims).double()
    fused = torch.compile(fused_resnet.fuse(copy.deepcopy(model)), backend="aot_eager", fullgraph=True)
    results = []
    for m in (model, fused):
        model.zero_grad()
        given = x.clone().requires_grad_()
        z = m(given)
        results.append((z, *torch.autograd.grad(z.square().sum(), given)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("dims", "shape"), [(1, (3, 6)), (1, (6, 9)), (3, (6, 5, 6, 7)), (3, (2, 6, 5, 5))], ids=str)
def test_what_has_other_dimensions_is_stocks(dims, shape, chains_run):
    """Without a batch a convolution takes it, and the norm behind it does not, or takes it for something else."""
    model = make(dims)
    x, results = torch.randn(shape), []
    for m in (model, fused_resnet.fuse(copy.deepcopy(model))):
        try:
            results.append(m(x))
        except Exception as error:
            results.append((type(error), str(error)))
    ours, theirs = results[::-1]
    assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
    assert not chains_run


def test_a_norm_over_rows_is_stocks(chains_run):
    model = nn.Sequential(nn.BatchNorm1d(4), nn.ReLU())
    x = torch.randn(5, 4)
    fused = fused_resnet.fuse(copy.deepcopy(model))
    assert torch.equal(fused(x), model(x))
    assert not chains_run
    assert "of 2 dimensions" in str(fused_resnet.explain(fused))


def test_explain_traces_a_volumes_steps():
    model = fused_resnet.fuse(make(3))
    (row,) = fused_resnet.explain(model, (2, 6, *SIZES[3])).fused
    assert row.steps.kept > 0
    assert any(step.name.startswith("convolution") for step in row.steps.forward)


@pytest.mark.parametrize("dims", [1, 3])
def test_synchronised_norms_take_any_dimensions(dims, chains_run):
    model = make(dims, norm=nn.SyncBatchNorm)
    stock = make(dims)
    stock.load_state_dict(model.state_dict())
    torch.testing.assert_close(fused_resnet.fuse(model)(draw(dims)), stock(draw(dims)))
    assert len(chains_run) == 1


@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # of Triton's interpreter
@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU])
@pytest.mark.parametrize("dims", [1, 3])
def test_triton_takes_them_as_images(dims, act, monkeypatch, chains_run):
    k = triton_kernels(monkeypatch)
    if torch.cuda.is_available():
        pytest.skip("what a GPU runs is tested in tests/test_cuda.py")
    monkeypatch.setattr(ops, "kernels", lambda engine, device, dtype, dims=4: ops.of_images(k, dims))
    assert_fused_is_as_accurate_as_stock(make(dims, act=act), draw(dims))
    assert len(chains_run) == 1
