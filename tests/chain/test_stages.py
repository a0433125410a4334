"""Chains of several blocks: as accurate as stock, one autograd node, and fewer passes over the widest tensors."""

import copy
from collections import Counter

import pytest
import torch
from torch import nn

import fused_resnet
from fused_resnet.engines.tuning import Tuning, using
from tests.support.accuracy import (
    assert_as_accurate_as_stock,
    assert_fused_is_as_accurate_as_stock,
    gradient_for,
    outputs_and_gradients,
    record,
)
from tests.support.chains import BASIC, STAGES, Block, images, make_stage
from tests.support.operations import Operations


def small(model: nn.Module, **options) -> torch.Tensor:
    return images(model, size=8, **options)


@pytest.mark.parametrize("memory", ["fast", "lean"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("name", STAGES)
def test_a_stage_is_as_accurate_as_stock(name, layout, training, memory, chains_run):
    model = make_stage(name).train(training)
    assert_fused_is_as_accurate_as_stock(model, small(model, layout=layout), chain="stage", memory=memory)
    assert [len(blocks) for blocks, _ in chains_run] == [len(model)]


@pytest.mark.parametrize("memory", ["fast", "lean"])
@pytest.mark.parametrize("autocast", [False, True], ids=["bf16", "autocast-bf16"])
@pytest.mark.parametrize("name", ["basic", "bottleneck", "two projections"])
def test_a_stage_in_half_precision_is_as_accurate_as_stock(name, autocast, memory):
    model = make_stage(name, clear=True)
    draws = [small(model, seed=seed).bfloat16() for seed in range(7)]
    dtype, autocast_dtype = (torch.float32, torch.bfloat16) if autocast else (torch.bfloat16, None)
    assert_fused_is_as_accurate_as_stock(
        model, *draws, dtype=dtype, autocast=autocast_dtype, chain="stage", memory=memory
    )


@pytest.mark.parametrize("x_wants", [True, False], ids=["x with gradient", "x without"])
@pytest.mark.parametrize(
    "trained", ["", "0.project", "0.body.0", "1.body.1", "1.body.3", "2.body", "2.body.4.bias", "nothing"]
)
@pytest.mark.parametrize("name", ["basic", "bottleneck"])
def test_gradients_come_where_they_are_wanted_and_nowhere_else(name, trained, x_wants):
    model = make_stage(name)
    for path, parameter in model.named_parameters():
        parameter.requires_grad_(path.startswith(trained))
    x = small(model)
    exact, stock = (
        outputs_and_gradients(copy.deepcopy(model).to(dtype), x.to(dtype), x_wants)
        for dtype in (torch.float64, torch.float32)
    )
    fused = fused_resnet.fuse(model, chain="stage")
    assert_as_accurate_as_stock(outputs_and_gradients(fused, x, x_wants), stock, exact)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model[1].body[1].eval(),
        lambda model: model[0].project[1].eval(),
        lambda model: model[2].body[-1].eval(),
        lambda model: [m.requires_grad_(False).eval() for m in model.modules() if isinstance(m, nn.BatchNorm2d)],
    ],
    ids=["a norm", "the projection's", "the last", "all, frozen"],
)
@pytest.mark.parametrize("name", ["basic", "bottleneck"])
def test_norms_in_eval_are_as_accurate_as_stock(name, change):
    model = make_stage(name)
    change(model)
    assert_fused_is_as_accurate_as_stock(model, small(model), chain="stage")


def test_backward_can_run_twice():
    for name in ("basic", "bottleneck"):
        model = fused_resnet.fuse(make_stage(name), chain="stage", memory="lean")
        z = model(small(model).requires_grad_())
        first = torch.autograd.grad(z, list(model.parameters()), gradient_for(z), retain_graph=True)
        second = torch.autograd.grad(z, list(model.parameters()), gradient_for(z))
        assert all(map(torch.equal, first, second))


@pytest.mark.parametrize(
    ("name", "memory", "expected"),
    [
        ("basic", "fast", {"masked_grad_": 2}),  # with the add
        ("bottleneck", "fast", {"addmm_": 3}),  # masked by what reads it
        ("bottleneck", "lean", {"addmm_": 3, "masked_grad_": 2, "masked_grad": 1}),  # read by two
    ],
)
def test_between_blocks_gradients_are_added_and_masked_in_place(name, memory, expected):
    model = make_stage(name)
    with using("cpu", Tuning(("cpu",), {})):
        z = fused_resnet.fuse(model, chain="stage", memory=memory)(small(model).requires_grad_())
        with Operations() as operations:
            z.square().sum().backward()
    counts = Counter(operation.partition("::")[2] for operation in operations.names)
    ours = ("addmm_", "masked_grad_", "masked_grad", "add_masked_")
    assert {kernel: counts[kernel] for kernel in ours if counts[kernel]} == expected


def test_a_hook_on_a_block_leaves_the_blocks_fused_one_by_one(chains_run):
    model = fused_resnet.fuse(make_stage("basic"), chain="stage")
    handle = model[1].register_forward_hook(lambda *_: None)
    x = small(model)
    model(x)
    assert [len(blocks) for blocks, _ in chains_run] == [1, 1, 1]
    report = fused_resnet.explain(model)
    assert [(row.module, row.reason) for row in report.left] == [("(Sequential)", "1 has a hook")]
    assert [row.module for row in report.fused] == ["0", "1", "2"]
    handle.remove()
    chains_run.clear()
    model(x)
    assert [len(blocks) for blocks, _ in chains_run] == [3]
    assert [row.module for row in fused_resnet.explain(model).fused] == ["(Sequential)"]


def test_explain_names_the_blocks_of_a_stage():
    (row,) = fused_resnet.explain(fused_resnet.fuse(make_stage("basic"), chain="stage")).fused
    block = "body.0 body.1 body.2 body.3 body.4 + {} relu"
    assert row.what == f"0: {block.format('(project.0 project.1)')}; 1, 2: {block.format('x')}"


def test_a_stage_of_one_block_is_that_block(chains_run):
    model = fused_resnet.fuse(nn.Sequential(nn.Sequential(Block(8, *BASIC))), chain="stage")
    assert [row.module for row in fused_resnet.explain(model).fused] == ["0.0"]


def test_a_block_whose_output_others_read_ends_its_chain(chains_run):
    class Features(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = make_stage("basic")

        def forward(self, x):
            features = []
            for block in self.blocks:
                x = block(x)
                features.append(x)
            return features

    model = fused_resnet.fuse(Features(), chain="stage")
    assert len(model(small(model))) == 3
    assert [len(blocks) for blocks, _ in chains_run] == [1, 1, 1]


def test_a_fused_stage_is_copied_pickled_and_unfused():
    import pickle

    model = make_stage("bottleneck")
    x = small(model)
    stock = record(copy.deepcopy(model), x)
    fused = fused_resnet.fuse(model, chain="stage")
    results = record(copy.deepcopy(fused), x)
    for copied in (pickle.loads(pickle.dumps(fused)), copy.deepcopy(fused)):
        assert all(torch.equal(t, results[name]) for name, t in record(copied, x).items())
    assert all(torch.equal(t, stock[name]) for name, t in record(fused_resnet.unfuse(fused), x).items())
    assert type(fused) is nn.Sequential
    assert {type(block) for block in fused} == {Block}


def test_layers_of_a_torchvision_network_are_stages(chains_run):
    torchvision = pytest.importorskip("torchvision")
    model = fused_resnet.fuse(torchvision.models.resnet18(num_classes=7), chain="stage")
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert [len(blocks) for blocks, _ in chains_run] == [1, 2, 2, 2, 2]
    report = fused_resnet.explain(model, (2, 3, 32, 32))
    assert [row.module for row in report.fused] == ["(ResNet)", "layer1", "layer2", "layer3", "layer4"]
    by_block = fused_resnet.explain(fused_resnet.fuse(model), (2, 3, 32, 32))
    passes = [sum(row.steps.bytes for row in r.fused) for r in (report, by_block)]
    assert passes[0] < passes[1]
