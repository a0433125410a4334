"""What explain says of a training step: the kernels of a chain, traced without data."""

import pytest
import torch
from torch import nn

import fused_resnet
from fused_resnet import cli, models
from fused_resnet.surgery.steps import trace
from tests.support.chains import Block
from tests.support.operations import Operations

SHAPE = (4, 3, 32, 32)


def small_bottlenecks(memory="fast"):
    torch.manual_seed(0)
    model = models.ResNet(models.Bottleneck, (1, 2), widths=(8, 16), small_images=True, num_classes=10)
    return fused_resnet.fuse(model, memory=memory)


def test_an_explained_model_is_not_changed():
    model = small_bottlenecks()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = fused_resnet.explain(model, SHAPE)
    assert all(row.steps is not None for row in report.fused)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert type(model).__name__ == "ResNet"


def test_the_steps_are_those_that_a_step_runs():
    """Without data and with: the same operations on activations, in the same order, forward and backward."""
    block = small_bottlenecks().get_submodule("layer2.1")
    traced = trace(block, (2, 64, 8, 8), None, input_grad=True)["", 0]
    x = torch.randn(2, 64, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
    with Operations() as operations:
        block(x).backward(torch.ones(2, 64, 8, 8))
    seen = [name.partition("::")[2] for name in operations.names]
    ours = {step.name for step in (*traced.forward, *traced.backward)} - {"convolution dgrad", "convolution wgrad"}
    run = [name for name in seen if name in ours]
    assert run == [step.name for step in (*traced.forward, *traced.backward) if step.name in ours]
    backwards = [step.name for step in traced.backward if step.name.startswith("convolution ")]
    assert len(backwards) <= 2 * seen.count("convolution_backward")


def test_lean_keeps_less_than_fast():
    fast, lean = (
        fused_resnet.explain(small_bottlenecks(memory), SHAPE, dtype=torch.bfloat16) for memory in ("fast", "lean")
    )
    assert [row.reason for row in fast.fused[1:]] == [""] * 3
    assert all("conv3" in row.reason for row in lean.fused[1:])
    assert all(a.steps.kept > b.steps.kept for a, b in zip(fast.fused[1:], lean.fused[1:], strict=True))


def test_a_module_that_is_called_twice_has_the_steps_of_both_calls():
    block = models.BasicBlock(8, 8)
    once, twice = (
        trace(fused_resnet.fuse(nn.Sequential(*[block] * n)), (2, 8, 6, 6), None, input_grad=True) for n in (1, 2)
    )
    assert twice["0", 0].bytes == 2 * once["0", 0].bytes
    assert twice["0", 0].flop == 2 * once["0", 0].flop


def test_frozen_weights_have_no_gradient_steps():
    model = small_bottlenecks()
    for parameter in model.layer1.parameters():
        parameter.requires_grad_(False)
    model.conv1.weight.requires_grad_(False)
    model.bn1.requires_grad_(False)
    steps = trace(model, SHAPE, None)
    assert steps["layer1.0", 0].backward == ()
    assert steps["layer2.0", 0].backward != ()


@pytest.mark.parametrize(
    ("outputs", "trained", "products", "name"),
    [
        (8, True, 2, "dgrad, wgrad, add, mask"),
        (8, False, 1, "dgrad, add, mask"),
        (136, True, 1, "dgrad, add, mask"),  # more than its program can sum up: beside it, torch's
    ],
    ids=["both", "frozen", "many outputs"],
)
def test_both_gradients_of_a_blocks_first_convolution_are_one_kernel(outputs, trained, products, name):
    model = nn.Sequential(*(Block(32, (outputs, 16, 32), (1, 3, 1)) for _ in range(2)))
    model[1].body[0].requires_grad_(trained)
    fused = fused_resnet.fuse(model, chain="stage", memory="lean")
    (steps,) = trace(fused, (2, 32, 8, 8), torch.bfloat16, input_grad=True, engine="triton").values()
    product = 2 * 2 * 8 * 8 * 32 * outputs
    assert [(step.name, step.flop) for step in steps.backward if "mask" in step.name and step.flop] == [
        (name, products * product)
    ]
    # that of the first block is torch's: no ReLU is known in front of it
    x, y = (2, 32, 8, 8), (2, outputs, 8, 8)
    by_torch = [step for step in steps.backward if step.name == "convolution wgrad" and step.reads == (y, x)]
    assert len(by_torch) == (2 if outputs == 136 else 1)


def test_an_input_that_the_model_does_not_take_is_named():
    with pytest.raises(ValueError, match=r"takes no input of shape \(4, 5, 32, 32\): .*expected input"):
        fused_resnet.explain(small_bottlenecks(), (4, 5, 32, 32))


def test_the_report_has_a_line_for_all_chains_and_a_column_for_each(capsys):
    assert cli.main(["explain", "resnet20", "--input-shape", "8", "3", "32", "32"]) == 0
    head, total, stem, *_ = capsys.readouterr().out.splitlines()
    assert head.endswith("what the chains move and compute in a step and keep for backward:")
    for line in (total, stem):
        assert [unit in line for unit in ("MB ", "GFLOP", "MB kept")] == [True] * 3


def test_the_steps_of_one_module_fit_a_terminal(capsys):
    assert cli.main(["explain", "resnet50", "--input-shape", "256", "3", "224", "224", "--steps", "layer1.0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("layer1.0  conv1 bn1 relu")
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == ["layer1.0", "forward", "backward"]
    assert max(map(len, lines[1:])) <= 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "layer1.0"], "--steps needs --input-shape N C H W"),
        (
            ["--input-shape", "8", "3", "32", "32", "--steps", "layer9"],
            "--steps must be one of (ResNet), layer1.0",
        ),
        (["--input-shape", "8", "1", "32", "32"], "takes no input of shape (8, 1, 32, 32)"),
    ],
    ids=["no shape", "no such module", "no such input"],
)
def test_a_bad_request_is_answered_in_one_line(capsys, arguments, message):
    assert cli.main(["explain", "resnet20", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fused-resnet explain: error: ")
    assert message in error
