"""Activation checkpointing: stock's gradients, and running statistics that move once, however often a forward runs."""

import copy
import functools
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential, set_checkpoint_early_stop

import fused_resnet
from fused_resnet.blocks.checkpointing import is_recomputation
from tests.support import chains
from tests.support.accuracy import assert_as_accurate_as_stock, record
from tests.support.chains import BASIC, BOTTLENECK, Block, images

# the first forward of a reentrant checkpoint runs without gradients, and so do those that it has inside
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")

REENTRANT = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
RNG = pytest.mark.parametrize("rng", [True, False], ids=["rng preserved", "rng left alone"])


def make() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(Block(8, *BASIC), Block(16, *BASIC), Block(16, *BOTTLENECK))
    return fused_resnet.fuse(model)


def step(model: nn.Module, call) -> dict[str, torch.Tensor]:
    x = images(model, size=6).requires_grad_()
    call(x).square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"x": x.grad, **gradients, **dict(model.named_buffers())}


def assert_same_step(model: nn.Module, call) -> None:
    """Hold a step of ``model`` by ``call`` against the one of a copy without checkpoints, bit for bit."""
    alone = copy.deepcopy(model)
    expected, results = step(alone, alone), step(model, call)
    assert results.keys() == expected.keys()
    for name, result in results.items():
        assert torch.equal(result, expected[name]), name
    assert {int(t) for name, t in results.items() if name.endswith("num_batches_tracked")} == {1}


def whole(model, **options):
    return lambda x: checkpoint(model, x, **options)


def block_by_block(model, **options):
    def call(x):
        for block in model:
            x = checkpoint(block, x, **options)
        return x

    return call


def nested(model, **options):
    """A checkpoint around one for each block, and around one of two blocks that has one inside."""
    first, second, third = model

    def inner(x):
        return checkpoint(third, second(x), **options)

    def outer(x):
        return checkpoint(inner, checkpoint(first, x, **options), **options)

    return lambda x: checkpoint(outer, x, **options)


@REENTRANT
def test_activation_checkpointing_gives_stocks_gradients(reentrant):
    def run(model, x):
        results = record(model, x, call=lambda x: checkpoint(model, x, use_reentrant=reentrant))
        # stock's second forward moves running statistics once more, ours does not
        return {name: t for name, t in results.items() if name.endswith(".grad") or name.startswith("output")}

    model = chains.make("bottleneck, stride 2")
    x = images(model)
    exact, stock = run(copy.deepcopy(model).double(), x.double()), run(copy.deepcopy(model), x)
    assert_as_accurate_as_stock(run(fused_resnet.fuse(model), x), stock, exact)


@pytest.mark.parametrize("call", [whole, block_by_block, nested])
@RNG
@REENTRANT
def test_a_checkpointed_step_is_the_step(call, reentrant, rng):
    model = make()
    assert_same_step(model, call(model, use_reentrant=reentrant, preserve_rng_state=rng))


@pytest.mark.parametrize("call", [whole, block_by_block, nested])
def test_a_recomputation_that_runs_to_its_end_moves_nothing(call):
    model = make()
    run = call(model, use_reentrant=False)
    with set_checkpoint_early_stop(False):
        assert_same_step(model, run)


@pytest.mark.parametrize("outer", [True, False], ids=["in reentrant", "in non-reentrant"])
@REENTRANT
def test_checkpoints_of_both_kinds_in_each_other(reentrant, outer):
    model = make()
    inner = block_by_block(model, use_reentrant=reentrant)
    assert_same_step(model, lambda x: checkpoint(inner, x, use_reentrant=outer))


@RNG
@REENTRANT
def test_checkpoint_sequential(reentrant, rng):
    model = make()
    assert_same_step(
        model, lambda x: checkpoint_sequential(model, 2, x, use_reentrant=reentrant, preserve_rng_state=rng)
    )


def make_and_run_alone():
    """Make a model, a copy that has run without checkpoints, and the input that it ran on."""
    model = make()
    alone = copy.deepcopy(model)
    x = images(model, size=6).requires_grad_()
    alone(x)
    return model, alone, x


def assert_buffers_equal(model, alone):
    for (name, buffer), expected in zip(model.named_buffers(), alone.buffers(), strict=True):
        assert torch.equal(buffer, expected), name


@REENTRANT
def test_a_step_of_several_backwards(reentrant):
    """Each of them recomputes; a reentrant checkpoint keeps what it needs for the second one."""
    model, alone, x = make_and_run_alone()
    z = checkpoint(model, x, use_reentrant=reentrant)
    for _ in range(2):
        z.sum().backward(retain_graph=True)
    assert_buffers_equal(model, alone)


@REENTRANT
@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_a_checkpointed_stage(memory, reentrant):
    torch.manual_seed(0)
    model = fused_resnet.fuse(
        nn.Sequential(Block(8, *BOTTLENECK), Block(16, *BOTTLENECK)), chain="stage", memory=memory
    )
    assert_same_step(model, whole(model, use_reentrant=reentrant))


@REENTRANT
@pytest.mark.parametrize("where", ["in front", "inside", "behind"])
def test_a_forward_in_a_tensor_hook_moves_as_usual(where, reentrant):
    """It is run by a backward, and for a hook inside by one that a checkpoint has begun, but for the first time."""
    model, other = make(), make()
    seen = []

    def hook(grad):
        seen.append(is_recomputation())
        with torch.enable_grad():
            other(images(other, size=6))

    def inside(x):
        first, *rest = model
        z = first(x)
        if where == "inside" and z.requires_grad:
            z.register_hook(hook)
        for block in rest:
            z = block(z)
        return z

    x = images(model, size=6).requires_grad_().sin()
    if where == "in front":
        x.register_hook(hook)
    z = checkpoint(inside, x, use_reentrant=reentrant)
    if where == "behind":
        z.register_hook(hook)
    z.square().sum().backward()
    assert seen == [False]
    assert {int(block.body[1].num_batches_tracked) for block in other} == {1}
    assert {int(block.body[1].num_batches_tracked) for block in model} == {1}


@REENTRANT
def test_a_checkpoint_in_a_tensor_hook_is_first_run_there(reentrant):
    model, other = make(), make()
    called = []

    def hook(grad):
        called.append(grad)
        with torch.enable_grad():
            x = images(other, size=6).requires_grad_()
            checkpoint(other, x, use_reentrant=reentrant).sum().backward()

    def inside(x):
        z = model(x)
        if z.requires_grad:
            z.register_hook(hook)
        return z

    checkpoint(inside, images(model, size=6).requires_grad_(), use_reentrant=reentrant).sum().backward()
    assert len(called) == 1
    for norm in (m for net in (model, other) for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
        assert norm.num_batches_tracked == 1


def test_a_backward_of_ones_own_that_runs_a_forward_is_no_checkpoint():
    model = make()

    class Reversible(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            with torch.enable_grad():
                model(images(model, size=6))
            return grad

    Reversible.apply(torch.ones(1, requires_grad=True)).backward()
    assert {int(block.body[1].num_batches_tracked) for block in model} == {1}


@REENTRANT
def test_what_is_asked_in_a_checkpointed_function(reentrant):
    seen = []

    def function(x):
        seen.append(is_recomputation())
        return x.sin().exp()

    assert not is_recomputation()
    checkpoint(function, torch.ones(1, requires_grad=True), use_reentrant=reentrant).backward()
    assert seen == [False, True]
    assert not is_recomputation()


@REENTRANT
def test_a_backward_on_another_thread(reentrant):
    model, alone, x = make_and_run_alone()
    z = block_by_block(model, use_reentrant=reentrant)(x).sum()
    thread = threading.Thread(target=z.backward)
    thread.start()
    thread.join()
    assert x.grad is not None
    assert_buffers_equal(model, alone)


def test_compiled_the_statistics_move_as_usual():
    model = make()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(images(model, size=6)).sum().backward()
    assert {int(t) for name, t in model.named_buffers() if name.endswith("num_batches_tracked")} == {1}


def test_a_backward_on_the_engines_own_threads():
    """It moves to one, whose frames begin there, where backwards are nested too deeply; for devices it is always so."""
    model, other, seen, hooks = make(), make(), [], []

    def hook(grad):
        hooks.append((threading.get_ident(), is_recomputation()))
        with torch.enable_grad():
            other(images(other, size=6))

    def innermost(x):
        seen.append((threading.get_ident(), is_recomputation()))
        z = model(x)
        if z.requires_grad:
            z.register_hook(hook)
        return z

    function = innermost
    for _ in range(70):
        function = functools.partial(checkpoint, function, use_reentrant=True)
    function(images(model, size=6).requires_grad_()).sum().backward()
    here = threading.get_ident()
    (thread, answer), *again = seen
    assert (thread, answer) == (here, False)
    assert len(again) == 70
    assert all(answer for _, answer in again)
    assert again[0][0] == here != again[-1][0]
    (of_hook,) = hooks
    assert of_hook == (again[-1][0], False)
    for norm in (m for net in (model, other) for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
        assert norm.num_batches_tracked == 1
