"""What a call has read is kept for the next, and read again after any change to what it was read from."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import fused_resnet
from fused_resnet.blocks import fusion
from fused_resnet.blocks.fusion import plan_of
from tests.support.changes import double_forward
from tests.support.networks import Network, through_file, through_pickle
from tests.support.oracle import assert_same_step, fuse, images, make


def one_block():
    """A stem with a pool, and a residual block."""
    model = make(lambda: Network(n=1))
    return fuse(model)


def kept_of(model):
    return [module._fused.kept for module in model.modules() if plan_of(module) is not None]


@pytest.fixture
def read_afresh(first_arguments):
    """The modules that were read afresh."""
    return first_arguments(fusion, "prepare")


def run(model):
    return model(images())


def test_a_second_call_reads_nothing_afresh(read_afresh):
    model = one_block()
    run(model)
    assert len(read_afresh) == 2  # the stem and the block
    run(model)
    assert len(read_afresh) == 2


def another_parameter(m):
    m.layers[0].conv1.weight = nn.Parameter(m.layers[0].conv1.weight.detach().clone())


def another_buffer(m):
    m.layers[0].bn1.running_mean = m.layers[0].bn1.running_mean.clone()


def a_subclass(m):
    m.layers[0].conv1.__class__ = type("Conv2d", (nn.Conv2d,), {})


def a_parameter_of_a_subclass(m):
    class Watching(nn.Parameter):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            return super().__torch_function__(function, types, args, kwargs or {})

    m.layers[0].bn2.weight.__class__ = Watching


def a_stride(m):
    m.stem[0].stride = (2, 2)


def an_epsilon(m):
    m.layers[0].bn1.eps = 0.5


def a_window_in_place(m):
    m.stem[3].kernel_size[0] = 1


def evaluation_of_one_norm(m):
    m.layers[0].bn2.eval()


def no_bias(m):
    m.layers[0].bn2.bias = None


def another_child(m):
    m.layers[0].bn1 = nn.BatchNorm2d(4).double()


def one_more_child(m):
    m.layers[0].more = nn.ReLU()


def a_hook(m):
    m.layers[0].bn1.register_forward_hook(lambda *_: None)


def a_forward(m):
    double_forward(m.layers[0].conv1)


def a_parametrization(m):
    nn.utils.parametrizations.weight_norm(m.layers[0].conv2)


def pruned(m):
    prune.l1_unstructured(m.layers[0].conv1, "weight", amount=0.3)


def loaded_by_assignment(m):
    m.load_state_dict({name: t * 2 for name, t in m.state_dict().items()}, assign=True)


CHANGES = [
    another_parameter, another_buffer, a_subclass, a_parameter_of_a_subclass, a_stride, an_epsilon, a_window_in_place,
    evaluation_of_one_norm, no_bias, another_child, one_more_child, a_hook, a_forward,
    a_parametrization, pruned, loaded_by_assignment,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_a_change_is_seen(change):
    stock, fused = make(lambda: Network(n=1)), make(lambda: Network(n=1))
    for m in (stock, fused):
        m.stem[3] = nn.MaxPool2d([2, 2])
    fuse(fused)
    assert_same_step(fused, stock)
    for m in (stock, fused):
        torch.manual_seed(1)
        change(m)
    assert_same_step(fused, stock)
    fused.zero_grad()
    run(fused).sum().backward()
    for parameter in fused.parameters():
        assert parameter.grad is not None  # a parameter that was replaced is the one that learns


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, through_pickle, through_file])
def test_a_copy_reads_its_own(copied):
    model = one_block()
    run(model)
    block = model.layers[0]
    twin = copied(block)
    with torch.no_grad():
        twin.conv1.weight = nn.Parameter(twin.conv1.weight * 2)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    for mine in (twin, block):
        expected = fused_resnet.unfuse(copy.deepcopy(mine))(x)
        torch.testing.assert_close(mine(x), expected)


def test_what_is_called_with_other_parameters_uses_them():
    model = one_block()
    run(model)
    doubled = {name: (p * 2).detach() for name, p in model.named_parameters()}
    expected = torch.func.functional_call(fused_resnet.unfuse(copy.deepcopy(model)), doubled, (images(),))
    torch.testing.assert_close(torch.func.functional_call(model, doubled, (images(),)), expected)
    torch.testing.assert_close(run(copy.deepcopy(model)), run(fused_resnet.unfuse(copy.deepcopy(model))))


def test_what_an_earlier_release_has_pickled_is_stock_until_it_is_fused_again(chains_run):
    stock, model = make(lambda: Network(n=1)), one_block()
    for module in model.modules():
        if plan_of(module) is not None:
            vars(module)["_fused"] = module._fused.plans  # a dict, as it was then
    assert_same_step(model, stock)
    assert not chains_run
    report = fused_resnet.explain(model)
    assert not report.fused
    assert all("not fused" in row.reason for row in report.left)
    assert_same_step(fuse(model), stock)
    assert chains_run


def test_a_model_that_was_kept_is_freed():
    model = one_block()
    model.layers[0].parent = (model,)
    run(model)
    assert all(kept is not None for kept in kept_of(model))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
