"""Whole chains, forward and backward, against stock: every kind of block, every subset of gradients, what is kept."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_resnet
from fused_resnet.tuning import Tuning, using
from tests.support.accuracy import (
    assert_as_accurate_as_stock,
    assert_fused_is_as_accurate_as_stock,
    gradient_for,
    record,
)


class Block(nn.Module):
    """A BasicBlock or a Bottleneck, by the kernel sizes of its convolutions."""

    def __init__(
        self, c_in, widths, kernels, *, stride=1, dilation=1, groups=1, bias=False, norm=nn.BatchNorm2d, before=None
    ):
        super().__init__()
        layers, c = [], c_in
        strided = kernels.index(3)
        for i, (width, kernel) in enumerate(zip(widths, kernels, strict=True)):
            options = {"stride": stride} if i == strided else {}
            if kernel == 3:
                options |= {"padding": dilation, "dilation": dilation, "groups": groups}
            layers += [nn.Conv2d(c, width, kernel, bias=bias, **options), norm(width), nn.ReLU(inplace=True)]
            c = width
        self.body = nn.Sequential(*layers[:-1])
        self.stride, self.before, self.after = stride, before, None if before is None else c - c_in - before
        self.project = None
        if before is None and (stride != 1 or c != c_in):
            self.project = nn.Sequential(nn.Conv2d(c_in, c, 1, stride, bias=bias), norm(c))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.body(x)
        if self.before is not None:
            out += F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))
        else:
            out += x if self.project is None else self.project(x)
        return self.relu(out)


class Stem(nn.Module):
    def __init__(self, pool):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 16, 7, 2, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)
        self.pool = pool

    def forward(self, x):
        return self.pool(self.relu(self.bn(self.conv(x))))


class PreActivation(nn.Module):
    """The first unit has no convolution; nothing comes behind the add."""

    def __init__(self):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(16), nn.BatchNorm2d(8)
        self.conv1, self.conv2 = nn.Conv2d(16, 8, 1, bias=False), nn.Conv2d(8, 16, 3, padding=1, bias=False)
        self.relu = nn.ReLU()

    def forward(self, x):
        return x + self.conv2(self.relu(self.bn2(self.conv1(self.relu(self.bn1(x))))))


class OtherSource(Block):
    """The shortcut starts from another tensor than the chain."""

    def forward(self, x):
        shortcut, out = self.source(x), self.main(x)
        for layer in self.body:
            out = layer(out)
        shortcut = shortcut[:, :, :: self.stride, :: self.stride]
        return self.relu(out + F.pad(shortcut, (0, 0, 0, 0, self.before, self.after)))

    def main(self, x):
        return x.sin()

    def source(self, x):
        return x.cos()


class DetachedMain(OtherSource):
    def main(self, x):
        return x.sin().detach()


class DetachedSource(OtherSource):
    def source(self, x):
        return x.cos().detach()


class MixedSource(OtherSource):
    """The sum has another dtype than the chain."""

    def source(self, x):
        return x.double().cos()


class PreActivationA(PreActivation):
    """With a stride, and channels of zeros around the shortcut's."""

    def __init__(self):
        super().__init__()
        self.conv2 = nn.Conv2d(8, 21, 3, 2, padding=1, bias=False)

    def forward(self, x):
        out = self.conv2(self.relu(self.bn2(self.conv1(self.relu(self.bn1(x))))))
        return F.pad(x[..., ::2, ::2], [0, 0, 0, 0, 2, 3], value=0.0) + out


BASIC, BOTTLENECK = ((16, 16), (3, 3)), ((8, 8, 16), (1, 3, 1))
CHAINS = {
    "basic": lambda: Block(16, *BASIC),
    "basic, projection": lambda: Block(8, *BASIC),
    "basic, stride 2": lambda: Block(16, *BASIC, stride=2),
    "basic, dilation 2": lambda: Block(16, *BASIC, dilation=2),
    "basic, conv bias": lambda: Block(8, *BASIC, bias=True),
    "bottleneck": lambda: Block(16, *BOTTLENECK),
    "bottleneck, projection": lambda: Block(8, *BOTTLENECK),
    "bottleneck, stride 2": lambda: Block(16, *BOTTLENECK, stride=2),
    "bottleneck, groups 4": lambda: Block(16, *BOTTLENECK, groups=4),
    "bottleneck, dilation 2, stride 2, groups 2": lambda: Block(8, *BOTTLENECK, dilation=2, stride=2, groups=2),
    "bottleneck, depthwise": lambda: Block(16, *BOTTLENECK, groups=8),
    "one unit": lambda: nn.Sequential(nn.Conv2d(16, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
    "one unit without relu": lambda: nn.Sequential(nn.Conv2d(16, 8, 3), nn.BatchNorm2d(8)),
    "option A": lambda: Block(8, *BASIC, stride=2, before=4),
    "option A, odd channels": lambda: Block(5, (16, 19), (3, 3), stride=2, before=3),
    "option A, stride 3, bottleneck": lambda: Block(8, *BOTTLENECK, stride=3, before=0),
    "option A, stride 1": lambda: Block(8, *BASIC, before=8),
    "option A, other source": lambda: OtherSource(8, *BASIC, stride=2, before=4),
    "option A, other source, stride 1": lambda: OtherSource(8, *BASIC, before=3),
    "option A, other source alone": lambda: DetachedMain(8, *BASIC, stride=2, before=4),
    "option A, other source detached": lambda: DetachedSource(8, *BASIC, stride=2, before=4),
    "option A, mixed source": lambda: MixedSource(8, *BASIC, stride=2, before=4),
    "option A, pre-activation": lambda: PreActivationA(),
    "five units": lambda: nn.Sequential(
        *itertools.chain(*((nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()) for _ in range(5)))
    ),
    "wide, stride 2": lambda: Block(12, (24, 24, 96), (1, 3, 1), stride=2),
    "pre-activation": PreActivation,
    "stem": lambda: Stem(nn.MaxPool2d(3, 2, 1)),
    "stem, pool 2x3": lambda: Stem(nn.MaxPool2d((2, 3), (1, 2), (1, 0))),
    "norm, momentum None": lambda: Block(8, *BASIC, norm=lambda c: nn.BatchNorm2d(c, momentum=None)),
    "norm, not affine": lambda: Block(8, *BASIC, norm=lambda c: nn.BatchNorm2d(c, affine=False)),
    "norm, untracked": lambda: Block(8, *BASIC, norm=lambda c: nn.BatchNorm2d(c, track_running_stats=False)),
}


def make(name: str, clear: bool = False) -> nn.Module:
    """Make a chain; ``clear`` keeps what its ReLUs read away from 0, where a rounding decides what passes."""
    torch.manual_seed(0)
    model = CHAINS[name]()
    for path, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)
            if module.affine and clear:
                module.bias.data.add_(12)
                if path not in ("body.4", "body.7", "project.1"):  # some channels are off; behind an add all are on
                    module.bias.data[::3] -= 24
            if module.track_running_stats:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return model


def images(
    model: nn.Module, size: int = 12, layout: torch.memory_format = torch.channels_last, seed: int = 2
) -> Tensor:
    channels = next(m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d)))
    c = channels.in_channels if isinstance(channels, nn.Conv2d) else channels.num_features
    x = torch.randn(4, c, size, size - 1, generator=torch.Generator().manual_seed(seed))
    return x.contiguous(memory_format=layout)


# ---- accuracy --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [
        pytest.param(torch.float32, None, id="fp32"),
        pytest.param(torch.bfloat16, None, id="bf16"),
        pytest.param(torch.float16, None, id="fp16"),
        pytest.param(torch.float32, torch.bfloat16, id="autocast-bf16"),
        pytest.param(torch.float32, torch.float16, id="autocast-fp16"),
    ],
)
@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_is_as_accurate_as_stock(name, dtype, autocast, training, chains_run):
    half = dtype is not torch.float32 or autocast is not None
    model = make(name, clear=half).train(training)
    # what a norm or an add reads, autocast does not cast
    reads_x_itself = "pre-activation" in name or getattr(model, "project", model) is None
    x_dtype = autocast if autocast is not None and reads_x_itself else dtype
    draws = [images(model, seed=seed).to(x_dtype) for seed in range(7 if half else 1)]
    assert_fused_is_as_accurate_as_stock(model, *draws, dtype=dtype, autocast=autocast)
    assert len(chains_run) == len(draws)


@pytest.mark.parametrize("engine", ["reference", "cpu"])
@pytest.mark.parametrize("name", CHAINS)
def test_a_contiguous_chain_is_as_accurate_as_stock(name, engine):
    model = make(name)
    assert_fused_is_as_accurate_as_stock(model, images(model, layout=torch.contiguous_format), engine=engine)


def test_a_shortcut_of_another_tensor_is_part_of_the_chain(chains_run):
    model = fused_resnet.fuse(make("option A, other source"))
    model(images(model))
    assert [block[1] for blocks, _ in chains_run for block in blocks] == [((2, 2), 4, 4)]


@pytest.mark.parametrize("memory", ["fast", "lean"])
@pytest.mark.parametrize("name", ["bottleneck, projection", "bottleneck, stride 2"])
def test_gradients_have_stocks_strides_also_where_a_side_is_one(name, memory):
    """DistributedDataParallel compares strides that mean nothing."""
    model = make(name).to(memory_format=torch.channels_last)
    fused_resnet.fuse(model, memory=memory)(images(model)).sum().backward()
    assert [p.grad.stride() for p in model.parameters()] == [p.stride() for p in model.parameters()]


@pytest.mark.parametrize("weights", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_gradients_come_back_in_the_parameters_strides(layout, weights):
    model = fused_resnet.fuse(make("bottleneck, stride 2")).to(memory_format=weights)
    model(images(model, layout=layout)).square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 4:
            assert parameter.grad.is_contiguous(memory_format=weights), name


@pytest.mark.parametrize("name", ["basic", "bottleneck, stride 2", "pre-activation", "stem", "option A"])
@pytest.mark.parametrize("grad", ["expanded", "contiguous", "channels_last", "transposed"])
def test_any_strides_of_the_incoming_gradient_are_as_accurate_as_stock(name, grad):
    def reduce(z: Tensor) -> Tensor:
        """Return a sum whose gradient comes in the strides wanted."""
        if grad == "expanded":
            return z.sum()
        if grad == "transposed":
            z = z.transpose(2, 3)
        layout = torch.channels_last if grad == "channels_last" else torch.contiguous_format
        noise = gradient_for(z.detach().contiguous()).contiguous(memory_format=layout)
        return (z * noise.as_strided(z.shape, noise.stride())).sum()

    def run(model, x):
        return record(model, x, call=lambda x: reduce(model(x)))

    for layout in (torch.channels_last, torch.contiguous_format):
        model = make(name)
        x = images(model, layout=layout)
        exact, stock = run(copy.deepcopy(model).double(), x.double()), run(copy.deepcopy(model), x)
        assert_as_accurate_as_stock(run(fused_resnet.fuse(model), x), stock, exact)


@pytest.mark.parametrize("name", ["basic", "bottleneck, stride 2"])
def test_five_steps_accumulate_as_stocks(name):
    def run(model, x):
        for step in range(5):
            out = model(x + step)
            out.square().sum().backward()
        return {n: p.grad for n, p in model.named_parameters()} | {n: b.clone() for n, b in model.named_buffers()}

    model = make(name)
    x = images(model)
    exact, stock = run(copy.deepcopy(model).double(), x.double()), run(copy.deepcopy(model), x)
    assert_as_accurate_as_stock(run(fused_resnet.fuse(model), x), stock, exact)


# ---- the gradients that are wanted -----------------------------------------------------------------------------------


def freeze_all_but(*kept: str):
    def freeze(model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(name.startswith(k) for k in kept))

    return freeze


def freeze_norms(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval().requires_grad_(False)


def freeze_convolutions(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.requires_grad_(False)


def one_norm_in_eval(model: nn.Module) -> None:
    model.body[1].eval()


def the_last_norm_in_eval(model: nn.Module) -> None:
    model.body[-1].eval()


def the_projections_norm_in_eval(model: nn.Module) -> None:
    model.project[1].eval()


FREEZES = {
    "nothing": freeze_all_but(""),
    "everything": freeze_all_but(),
    "all but the first conv": freeze_all_but("body.0"),
    "all but the first norm's scale": freeze_all_but("body.1.weight"),
    "all but the first norm's shift": freeze_all_but("body.1.bias"),
    "all but the second conv": freeze_all_but("body.3"),
    "all but the last norm": freeze_all_but("body.7"),
    "all but the projection": freeze_all_but("project"),
    "all but the projection's conv": freeze_all_but("project.0"),
    "all but the projection's norm": freeze_all_but("project.1"),
    "the norms": freeze_norms,
    "the convolutions": freeze_convolutions,
    "one norm in eval": one_norm_in_eval,
    "the last norm in eval": the_last_norm_in_eval,
    "the projection's norm in eval": the_projections_norm_in_eval,
}


def outputs_and_gradients(model: nn.Module, x: Tensor, x_wants: bool) -> dict[str, Tensor | None]:
    """What a step gives, a gradient or None for every parameter, and for ``x`` where it wants one."""
    x = x.clone().requires_grad_(x_wants)
    z = model(x)
    assert z.requires_grad == (x_wants or any(p.requires_grad for p in model.parameters()))
    if z.requires_grad:
        z.backward(gradient_for(z))
    return {"z": z.detach(), "x": x.grad} | {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("x_wants", [True, False], ids=["x with gradient", "x without"])
@pytest.mark.parametrize(
    ("name", "freeze"),
    [("bottleneck, stride 2", freeze) for freeze in FREEZES]
    + [("option A", freeze) for freeze in FREEZES if "projection" not in freeze],
)
def test_gradients_come_where_they_are_wanted_and_nowhere_else(name, freeze, x_wants):
    model = make(name)
    FREEZES[freeze](model)
    x = images(model)
    exact, stock = (
        outputs_and_gradients(copy.deepcopy(model).to(dtype), x.to(dtype), x_wants)
        for dtype in (torch.float64, torch.float32)
    )
    assert_as_accurate_as_stock(outputs_and_gradients(fused_resnet.fuse(model), x, x_wants), stock, exact)


class Operations(torch.utils._python_dispatch.TorchDispatchMode):
    """The operations that run inside, in order, with their arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.calls]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append((func.name().split(".")[0], args))
        return func(*args, **(kwargs or {}))


def convolution_gradients(model: nn.Module, x: Tensor) -> list[int]:
    """How many convolutions' gradients a backward computes: of the input, of the weight, of the bias."""
    z = model(x)
    with Operations() as operations:
        z.square().sum().backward()
    masks = [args[-1] for name, args in operations.calls if name == "aten::convolution_backward"]
    return [sum(mask[i] for mask in masks) for i in range(3)]


@using("cpu", Tuning(("cpu",), {}))  # the products of a y that is not kept are others
def test_no_gradient_is_computed_that_nobody_wants():
    for freeze in FREEZES:
        model = make("bottleneck, stride 2")
        FREEZES[freeze](model)
        if not any(p.requires_grad for p in model.parameters()):
            continue
        x = images(model)
        stock = convolution_gradients(copy.deepcopy(model), x)
        assert convolution_gradients(fused_resnet.fuse(model), x) == stock, freeze


def test_a_frozen_end_computes_no_product():
    model = make("bottleneck, stride 2")
    for path in ("body.6", "body.7", "project"):
        for parameter in model.get_submodule(path).parameters():
            parameter.requires_grad_(False)
    for parameter in model.body[:6].parameters():
        parameter.requires_grad_(False)
    model.body[7].bias.requires_grad_(True)  # its gradient is a sum
    assert convolution_gradients(fused_resnet.fuse(model), images(model)) == [0, 0, 0]
    model.body[7].weight.requires_grad_(True)
    assert convolution_gradients(model, images(model)) == [0, 2, 0]


@pytest.mark.parametrize("name", ["basic", "bottleneck", "bottleneck, stride 2", "stem", "pre-activation", "option A"])
def test_backward_can_run_twice(name):
    model = fused_resnet.fuse(make(name))
    z = model(images(model).requires_grad_())
    first = torch.autograd.grad(z, list(model.parameters()), gradient_for(z), retain_graph=True)
    kept = [t.clone() for t in first]
    second = torch.autograd.grad(z, list(model.parameters()), gradient_for(z))
    for a, b, c in zip(first, second, kept, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(z, list(model.parameters()), gradient_for(z))


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_activation_checkpointing_gives_stocks_gradients(reentrant):
    from torch.utils.checkpoint import checkpoint

    def run(model, x):
        results = record(model, x, call=lambda x: checkpoint(model, x, use_reentrant=reentrant))
        # stock's second forward moves running statistics once more, ours does not: tests/test_checkpointing.py
        return {name: t for name, t in results.items() if name.endswith(".grad") or name.startswith("output")}

    model = make("bottleneck, stride 2")
    x = images(model)
    exact, stock = run(copy.deepcopy(model).double(), x.double()), run(copy.deepcopy(model), x)
    assert_as_accurate_as_stock(run(fused_resnet.fuse(model), x), stock, exact)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["fp32", "autocast-bf16"])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("outputs", ["kept", "not kept"])
@pytest.mark.parametrize("name", ["bottleneck", "bottleneck, projection", "bottleneck, stride 2", "wide, stride 2"])
def test_the_end_of_a_block_is_as_accurate_as_stock_with_and_without_its_outputs(name, outputs, layout, autocast):
    model = make(name, clear=autocast is not None)
    draws = [images(model, layout=layout, seed=seed) for seed in range(7 if autocast else 1)]
    with using("cpu", Tuning(("cpu",), {("cpu", size): 64 for size in (2, 4) if outputs == "not kept"})):
        assert_fused_is_as_accurate_as_stock(model, *draws, autocast=autocast)


@pytest.mark.parametrize("name", ["bottleneck", "bottleneck, projection", "wide, stride 2"])
@pytest.mark.parametrize("weights", [torch.channels_last, torch.contiguous_format], ids=["channels_last", "contiguous"])
def test_the_end_of_a_block_takes_an_input_in_another_format_than_its_weights(name, weights):
    other = torch.contiguous_format if weights is torch.channels_last else torch.channels_last
    model = make(name).to(memory_format=weights)
    assert_fused_is_as_accurate_as_stock(model, images(model, layout=other))
    gaps = images(model, size=24)[:, :, ::2, ::2]
    assert_fused_is_as_accurate_as_stock(model, gaps)


@pytest.mark.parametrize("memory", ["fast", "lean"])
@pytest.mark.parametrize("name", ["bottleneck", "bottleneck, projection"])
def test_the_first_product_adds_to_the_shortcuts_gradient(name, memory):
    model = make(name)
    x = images(model)
    z = assert_fused_is_as_accurate_as_stock(model, x, memory=memory)(x.requires_grad_())
    with Operations() as operations:
        z.square().sum().backward()
    assert operations.names.count("aten::addmm_") == 1
    assert "fused_resnet::add_masked_" not in operations.names


def test_a_lean_block_is_as_accurate_as_stock_and_keeps_less():
    torch.manual_seed(0)
    model = Block(72, (72, 72, 288), (1, 3, 1), stride=2)
    x = images(model)
    fast, lean = (assert_fused_is_as_accurate_as_stock(model, x, memory=memory) for memory in ("fast", "lean"))
    assert [row.reason for row in fused_resnet.explain(fast).fused] == [""]
    assert [row.reason for row in fused_resnet.explain(lean).fused] == ["body.6 and project.0 not kept"]
    kept, kept_lean = ([t.shape for t in kept_for_backward(m, x).values() if t.dim() == 4] for m in (fast, lean))
    wide = torch.Size((4, 288, 6, 6))
    assert (kept.count(wide), kept_lean.count(wide)) == (3, 1)  # its own output, and the two in front of the add


# ---- what is kept ----------------------------------------------------------------------------------------------------


def kept_for_backward(model: nn.Module, x: Tensor) -> dict[int, Tensor]:
    """Every tensor that autograd keeps, parameters and x left out, by the address of its memory."""
    outside = {t.untyped_storage().data_ptr() for t in (x, *model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in outside:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        kept_alive = model(x)
    assert kept_alive.requires_grad
    return kept


@pytest.mark.parametrize(
    "name", ["basic", "bottleneck", "bottleneck, stride 2", "stem", "five units", "one unit", "option A"]
)
def test_no_normalised_activation_is_kept(name):
    model = fused_resnet.fuse(make(name))
    x = images(model)
    z = model(x)
    raw = []
    hooks = [
        m.register_forward_hook(lambda m, args, out: raw.append(out)) for m in model.modules() if type(m) is nn.Conv2d
    ]
    model(x)  # by hooks it runs stock, on other statistics but the same batch
    for hook in hooks:
        hook.remove()
    images_kept = [t for t in kept_for_backward(model, x).values() if t.dim() == 4 and t.is_floating_point()]
    for t in images_kept:
        same = [torch.allclose(t, y, atol=1e-4) for y in (*raw, z) if y.shape == t.shape]
        assert any(same), f"{tuple(t.shape)} is neither a convolution's output nor the chain's"


def test_a_change_in_place_of_what_is_kept_is_an_error():
    model = fused_resnet.fuse(make("basic"))
    x = images(model).requires_grad_()
    y = x * 1
    z = model(y)
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()
    z = model(x)
    with torch.no_grad():
        model.body[3].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_running_statistics_may_change_between_forward_and_backward():
    for training in (True, False):
        model = fused_resnet.fuse(make("basic").train(training))
        x = images(model).requires_grad_()
        z = model(x)
        expected = torch.autograd.grad(z, x, gradient_for(z), retain_graph=True)[0]
        model.body[1].running_mean.add_(1)
        model.body[1].running_var.mul_(2)
        assert torch.equal(torch.autograd.grad(z, x, gradient_for(z))[0], expected)


def test_an_output_changed_in_place_gives_stocks_gradient_or_stocks_error():
    for name in ("one unit", "one unit without relu"):
        model = make(name)
        x = images(model)

        def run(model, x):
            x = x.clone().requires_grad_()
            z = model(x)
            z += 1
            z.square().sum().backward()
            return {"x": x.grad}

        if name == "one unit":
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                run(model, x)
            exact = record(copy.deepcopy(model).double(), x.double(), call=None)
            assert exact["x.grad"] is not None
            run(fused_resnet.fuse(model), x)  # keeps no output: nothing that it needs was changed
        else:
            exact, stock = run(copy.deepcopy(model).double(), x.double()), run(copy.deepcopy(model), x)
            assert_as_accurate_as_stock(run(fused_resnet.fuse(model), x), stock, exact)


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_one_value_per_channel_is_stocks_error():
    model = make("one unit")
    x = torch.randn(1, 16, 3, 3)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        model(x)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        fused_resnet.fuse(model)(x)
    assert model.eval()(x).shape == (1, 8, 1, 1)


def test_a_shortcut_of_another_shape_is_an_error():
    model = fused_resnet.fuse(make("basic, stride 2"))
    model.project[0].stride = (1, 1)
    with pytest.raises((ValueError, RuntimeError), match=r"(?i)shape|size"):
        model(images(model))


def test_a_padded_shortcut_of_another_shape_is_an_error():
    model = fused_resnet.fuse(make("option A"))
    model.body[0] = nn.Conv2d(4, 16, 3, 2, 1)  # the shortcut's channels and the zeros are too few for the sum
    with pytest.raises((ValueError, RuntimeError), match=r"(?i)shape|size"):
        model(torch.randn(2, 4, 12, 12))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_nan_comes_out_where_stock_gives_it(bad):
    for name in ("basic", "bottleneck, stride 2", "stem", "option A"):
        model = make(name).eval()
        x = images(model)
        x[1, 2, 5, 5] = bad
        stock, fused = record(copy.deepcopy(model), x), record(fused_resnet.fuse(copy.deepcopy(model)), x)
        for key, t in stock.items():
            assert torch.equal(fused[key].isfinite(), t.isfinite()), (name, key)
