"""fuse and unfuse: options and refusals, what is left alone, what happens the second time."""

import pytest
import torch
from torch import nn

import fused_resnet
from fused_resnet.blocks.mixin import FusedModule
from fused_resnet.engines import EngineError
from fused_resnet.surgery import NothingToFuse
from tests.support.hand_written import Basic, images, make


def test_fuse_leaves_random_numbers_and_modes_alone():
    model = nn.Sequential(make(Basic), make(Basic).eval())
    state, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    fused_resnet.fuse(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes


def test_fuse_twice_is_fuse_once():
    once, twice = fused_resnet.fuse(make(Basic)), fused_resnet.fuse(fused_resnet.fuse(make(Basic)))
    assert type(once) is type(twice)
    assert str(fused_resnet.explain(once)) == str(fused_resnet.explain(twice))
    assert type(fused_resnet.unfuse(twice)) is Basic


def test_unfuse_of_a_stock_model_does_nothing():
    model = make(Basic)
    assert type(fused_resnet.unfuse(model)) is Basic


def test_fuse_finds_what_was_new_since_the_last_time(chains_run):
    model = nn.Sequential(fused_resnet.fuse(make(Basic)))
    model.append(make(Basic))
    fused_resnet.fuse(model)(images())
    assert len(chains_run) == 2


# ---- options and refusals --------------------------------------------------------------------------------------------


def test_nothing_to_fuse_warns_with_the_reasons():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), nn.ReLU())
    with pytest.warns(NothingToFuse, match=r"nothing to fuse in Sequential.\n(?s:.*)GroupNorm, not a batch norm"):
        assert fused_resnet.fuse(model) is model
    with pytest.raises(ValueError, match="nothing to fuse in Sequential"):
        fused_resnet.fuse(model, strict=True)


def test_strict_is_silent_where_something_is_fused():
    assert isinstance(fused_resnet.fuse(make(Basic), strict=True), FusedModule)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": "slow"}, r"memory must be 'fast' or 'lean' \(keeps less for backward\), got 'slow'"),
        ({"chain": "network"}, "chain must be 'auto', 'block' or 'stage'.*got 'network'"),
        ({"engine": "quantum"}, "engine must be one of .*got 'quantum'"),
    ],
)
def test_an_unknown_option_is_refused_and_changes_nothing(options, message):
    model = make(Basic)
    with pytest.raises(ValueError, match=message):
        fused_resnet.fuse(model, **options)
    assert type(model) is Basic


def test_an_engine_that_cannot_serve_the_model_is_refused_and_changes_nothing():
    model = make(Basic).half()
    with pytest.raises(EngineError, match=r"engine='cpu' cannot serve: .*float16"):
        fused_resnet.fuse(model, engine="cpu")
    assert type(model) is Basic


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def wrapped(kind: str) -> nn.Module:
    model = make(Basic)
    if kind == "DistributedDataParallel":
        return nn.parallel.DistributedDataParallel(model)
    if kind == "DataParallel":
        return nn.DataParallel(model)
    return torch.compile(model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["DistributedDataParallel", "DataParallel", "OptimizedModule"])
def test_a_wrapped_model_is_refused_with_the_right_order(kind, process_group):
    with pytest.raises(TypeError, match=rf"wrapped in {kind} already; fuse first, then wrap: .*DDP.*torch.compile"):
        fused_resnet.fuse(wrapped(kind))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_model_is_refused():
    with pytest.raises(TypeError, match="ScriptModule; fuse the model it was made from"):
        fused_resnet.fuse(torch.jit.script(make(Basic)))


@pytest.mark.parametrize("function", [fused_resnet.fuse, fused_resnet.explain])
def test_what_is_no_module_is_refused(function):
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got function"):
        function(make)


def test_ddp_trains_a_fused_model(process_group, chains_run):
    stock = make(Basic).double()
    fused = nn.parallel.DistributedDataParallel(fused_resnet.fuse(make(Basic).double()))
    for model in (stock, fused):
        model(images().double()).square().sum().backward()
    assert len(chains_run) == 1
    for a, b in zip(fused.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
