"""verify: what is right passes, what is wrong is named, and nothing of the user's is touched."""

import random
from dataclasses import dataclass, field

import numpy
import pytest
import torch
import torchvision
from torch import nn
from torch.utils.checkpoint import checkpoint

import fused_resnet
from fused_resnet import cli, models
from fused_resnet.verification import report, runs

# the package's attribute of that name is the function


@pytest.fixture
def images():
    return torch.randn(4, 3, 32, 32)


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.relu(self.bn(self.conv(x)))


class Network(nn.Module):
    """A fused chain, and around it what a test asks for."""

    def __init__(self, wrap=lambda x: x, before=lambda x: x):
        super().__init__()
        self.chain, self.fc = Chain(), nn.Linear(8, 5)
        self.wrap, self.before = wrap, before

    def forward(self, x):
        return self.wrap(self.fc(self.chain(self.before(x)).mean((2, 3))))


def broken(verification):
    return [row.name for row in verification.rows if not row.ok]


def spoil_fused(monkeypatch, spoil):
    """Let ``fuse`` give ``verify`` a model with a fault."""
    fuse = runs.fuse

    def spoiling(model):
        spoil(fuse(model))
        return model

    monkeypatch.setattr(runs, "fuse", spoiling)


# ---- what is right -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "stock"])
def test_a_resnet_is_ok(fused, training, dtype, images):
    model = torchvision.models.resnet18().train(training)
    if fused:
        fused_resnet.fuse(model)
    verification = fused_resnet.verify(model, images, dtype=dtype)
    assert verification.ok, str(verification)
    assert verification.chains == 9
    names = {row.name for row in verification.rows}
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    assert names == {"output types", "output", "input 0.grad", *(f"{name}.grad" for name in parameters), *buffers}


def test_the_report_is_a_table_of_the_worst(images):
    verification = fused_resnet.verify(models.resnet20(), images)
    head, _, *rows = str(verification).splitlines()
    assert head.startswith(f"ok: 10 chains, {len(verification.rows)} results within 2 × stock's error + 4 units")
    assert len(rows) == 5
    assert len(verification.table().splitlines()) == 2 + len(verification.rows)


def test_a_fused_model_is_checked_as_it_is(images):
    model = fused_resnet.fuse(models.resnet20(), chain="stage", memory="lean")
    verification = fused_resnet.verify(model, images)
    assert verification.ok, str(verification)
    assert verification.chains == len(fused_resnet.explain(model).fused) == 4


def test_where_nothing_is_fused_the_report_says_so():
    verification = fused_resnet.verify(nn.Linear(3, 2), torch.randn(4, 3))
    assert verification.ok
    assert "nothing is fused" in str(verification)


@dataclass
class Output:
    logits: torch.Tensor
    more: list = field(default_factory=list)


@pytest.mark.parametrize(
    ("wrap", "names"),
    [
        (lambda y: {"logits": y, "top": y.argmax(1)}, {"output['logits']", "output['top']"}),
        (lambda y: (y, [y * 2, None]), {"output[0]", "output[1][0]"}),
        (lambda y: Output(y, [y.sum()]), {"output.logits", "output.more[0]"}),
        (lambda y: (y, y.sum().item()), {"output[0]", "output[1]"}),
    ],
    ids=["dict", "tuple", "dataclass", "float"],
)
def test_outputs_may_be_nested(wrap, names, images):
    verification = fused_resnet.verify(Network(wrap), images)
    assert verification.ok, str(verification)
    assert names == {row.name for row in verification.rows if row.name.startswith("output") and " " not in row.name}


def test_random_layers_draw_the_same(images):
    def before(x):
        return x * random.random() * numpy.random.rand() + nn.functional.dropout(x, 0.3)

    verification = fused_resnet.verify(Network(before=before), images)
    assert verification.ok, str(verification)
    assert not any(row.note for row in verification.rows)


def test_where_random_numbers_depend_on_the_dtype_the_report_says_so(images):
    verification = fused_resnet.verify(Network(wrap=torch.randn_like), images)
    assert "other random numbers" in str(verification)


def test_inputs_may_be_nested_and_named(images):
    class Pair(Network):
        def forward(self, batch, *, scale, index):
            return super().forward(batch["x"] * scale)[index]

    inputs = {"x": images.requires_grad_()}
    verification = fused_resnet.verify(Pair(), inputs, scale=torch.ones(1), index=torch.tensor([0, 2]))
    assert verification.ok, str(verification)
    assert [row.name for row in verification.rows if row.name.startswith("input")] == ["input 0.grad"]


def test_a_model_may_write_to_its_input(images):
    before = images.clone()
    assert fused_resnet.verify(Network(before=lambda x: x.mul_(2)), images).ok
    assert torch.equal(images, before)


class Checkpointed(Network):
    def forward(self, x):
        return self.fc(checkpoint(self.chain, x, use_reentrant=False).mean((2, 3)))


def test_what_checkpointing_counts_twice_may_be_counted_once(images):
    verification = fused_resnet.verify(Checkpointed(), images)
    assert verification.ok, str(verification)
    assert verification.chains == 1
    noted = [row.name for row in verification.rows if row.note == "stock counted the recomputation, too"]
    assert noted == ["chain.bn.running_mean", "chain.bn.running_var", "chain.bn.num_batches_tracked"]


def test_a_wrong_buffer_is_found_under_checkpointing(monkeypatch, images):
    def wrong(model, args, output):
        model.chain.bn.running_var.mul_(1.0001)

    spoil_fused(monkeypatch, lambda model: model.register_forward_hook(wrong))
    assert broken(fused_resnet.verify(Checkpointed(), images)) == ["chain.bn.running_var"]


# ---- what is wrong -------------------------------------------------------------------------------------------------


def test_a_wrong_output_is_found(monkeypatch, images):
    spoil_fused(monkeypatch, lambda model: model.fc.register_forward_hook(lambda m, args, y: y + 1e-4 * y.detach()))
    verification = fused_resnet.verify(Network(), images)
    assert broken(verification) == ["output"]
    assert "NOT ok" in str(verification)
    (row,) = (row for row in verification.rows if not row.ok)
    assert row.note == "less accurate than stock"
    assert row.fused > row.allowed > row.noise


def test_a_wrong_gradient_is_found(monkeypatch, images):
    spoil_fused(monkeypatch, lambda model: model.chain.conv.weight.register_hook(lambda g: g * 1.0001))
    assert broken(fused_resnet.verify(Network(), images)) == ["chain.conv.weight.grad"]


@pytest.mark.parametrize("buffer", ["running_mean", "running_var", "num_batches_tracked"])
def test_a_wrong_buffer_is_found(buffer, monkeypatch, images):
    def wrong(model, args, output):
        t = getattr(model.chain.bn, buffer)
        t.copy_(t * 1.0001 if t.is_floating_point() else t + 1)

    spoil_fused(monkeypatch, lambda model: model.register_forward_hook(wrong))
    assert broken(fused_resnet.verify(Network(), images)) == [f"chain.bn.{buffer}"]


@pytest.mark.parametrize(
    ("wrong", "note"),
    [
        (lambda y: y.double(), "float64"),
        (lambda y: y[:1], "(1, 5)"),
        (lambda y: y * float("nan"), "NaN in fused"),
        (lambda y: [y], "output is list, stock's is Tensor"),
        (lambda y: y.detach(), "output is Tensor without gradient"),
    ],
    ids=["dtype", "shape", "NaN", "list", "detached"],
)
def test_an_output_of_another_kind_is_found(wrong, note, monkeypatch, images):
    spoil_fused(monkeypatch, lambda model: model.register_forward_hook(lambda m, args, y: wrong(y)))
    verification = fused_resnet.verify(Network(), images)
    assert not verification.ok
    assert note in str(verification)


def test_frozen_parameters_have_no_gradients(monkeypatch, images):
    model = models.resnet20()
    model.layer1.requires_grad_(False)
    verification = fused_resnet.verify(model, images)
    assert verification.ok, str(verification)
    spoil_fused(monkeypatch, lambda fused: fused.layer1.requires_grad_(True))
    verification = fused_resnet.verify(model, images)
    assert broken(verification) == [f"layer1.{name}.grad" for name, _ in model.layer1.named_parameters()]
    assert "stock has no gradient, fused has" in str(verification)


def test_what_the_network_itself_magnifies_is_no_fault(monkeypatch, images):
    def magnify(x):  # what rounding adds to integers
        return x + (x - x.detach().round()) * 1e5

    off = 1 + 64 * torch.finfo(torch.float32).eps
    spoil_fused(
        monkeypatch, lambda model: model.fc.register_forward_hook(lambda m, args, y: y + (off - 1) * y.detach())
    )
    integers = images.mul(4).round()
    assert broken(fused_resnet.verify(Network(), integers)) == ["output"]
    verification = fused_resnet.verify(Network(before=magnify), integers)
    assert verification.ok, str(verification)
    (row,) = (row for row in verification.rows if row.name == "output")
    assert row.note == "within the network's own noise"
    assert row.allowed < row.fused < row.noise
    assert "by the network's own noise" in str(verification)


# ---- what raises ---------------------------------------------------------------------------------------------------


def fail(x):
    raise RuntimeError("no such luck")


def test_what_stock_raises_fused_must_raise(images):
    verification = fused_resnet.verify(Network(fail), images)
    assert verification.ok
    assert "stock raises RuntimeError: no such luck, and so does fused" in str(verification)


def test_what_fused_alone_raises_is_named(monkeypatch, images):
    spoil_fused(monkeypatch, lambda model: model.register_forward_hook(lambda m, args, y: fail(y)))
    verification = fused_resnet.verify(Network(), images)
    assert not verification.ok
    assert "fused raises RuntimeError: no such luck; stock raises nothing" in str(verification)


def test_a_model_without_a_float64_form_is_named(images):
    verification = fused_resnet.verify(Network(before=lambda x: x.float()), images)
    assert not verification.ok
    assert "in float64 stock raises RuntimeError" in str(verification)


def test_a_model_that_cannot_be_copied_is_named(images):
    model = Network()
    model.kept = model.fc.weight * 2
    verification = fused_resnet.verify(model, images)
    assert not verification.ok
    assert "cannot be deep-copied: RuntimeError" in str(verification)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fused_resnet.verify(torch.relu, torch.ones(1)), TypeError, "model must be a torch.nn.Module, got"),
        (lambda: fused_resnet.verify(Network()), TypeError, "inputs must be"),
        (lambda: fused_resnet.verify(Network(), torch.ones(1), dtype="bf16"), TypeError, "dtype must be"),
        (lambda: fused_resnet.verify(Network(), torch.ones(1), dtype=torch.int8), ValueError, "dtype must be"),
        (lambda: fused_resnet.verify(nn.DataParallel(Network()), torch.ones(1)), TypeError, "wrapped in DataParallel"),
    ],
    ids=["no module", "no inputs", "no dtype", "int8", "wrapped"],
)
def test_bad_arguments_raise(call, error, message):
    with pytest.raises(error, match=message):
        call()


# ---- what is left alone --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "stock"])
def test_model_and_generators_are_left_as_they_are(fused, images):
    model = Network(before=lambda x: nn.functional.dropout(x) * random.random() * numpy.random.rand())
    if fused:
        fused_resnet.fuse(model)
    model.chain.eval()
    model(images).sum().backward()
    tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters()), images]
    before = [t.clone() for t in tensors]
    classes = [(type(m), m.training) for m in model.modules()]
    states = torch.get_rng_state(), random.getstate(), str(numpy.random.get_state())
    with torch.no_grad():
        assert fused_resnet.verify(model, images).ok
    assert all(map(torch.equal, tensors, before))
    assert [p.grad for p in model.parameters()] == tensors[-1 - len(list(model.parameters())) : -1]
    assert not images.requires_grad
    assert [(type(m), m.training) for m in model.modules()] == classes
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), str(numpy.random.get_state())) == states[1:]


# ---- the command ---------------------------------------------------------------------------------------------------


def test_the_command_verifies_a_model(capsys):
    assert cli.main(["verify", "resnet20", "--input-shape", "4", "3", "16", "16", "--chain", "stage"]) == 0
    assert capsys.readouterr().out.startswith("ok: 4 chains")


def test_the_command_verifies_autocast_in_evaluation_mode(capsys):
    arguments = ["--input-shape", "2", "3", "16", "16", "--dtype", "bf16", "--eval", "--all"]
    assert cli.main(["verify", "resnet20", *arguments]) == 0
    assert "layer3.2.bn2.num_batches_tracked" in capsys.readouterr().out


def test_the_command_fails_where_the_rule_is_broken(monkeypatch, capsys):
    monkeypatch.setattr(report, "allowed_error", lambda stock, ulp: -1.0)
    monkeypatch.setattr(report, "FACTOR", 0)
    assert cli.main(["verify", "resnet20", "--input-shape", "2", "3", "16", "16"]) == 1
    assert capsys.readouterr().out.startswith("NOT ok")


@pytest.mark.parametrize("arguments", [["resnet7"], ["resnet20", "--engine", "abacus"], ["resnet20", "--device", "x"]])
def test_the_command_refuses_what_it_does_not_know(arguments, capsys):
    assert cli.main(["verify", *arguments]) == 2
    assert "fused-resnet verify: error: " in capsys.readouterr().err


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        cli.main(["verify", "--help"])
    assert "own noise" in capsys.readouterr().out
