"""Whole networks, torchvision's, timm's and Hugging Face's: as accurate as stock, in less memory, however they run."""

import copy
import functools
import itertools
import warnings

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn

import fused_resnet
from fused_resnet.surgery import NothingToFuse
from tests.support.accuracy import assert_as_accurate_as_stock, assert_fused_is_as_accurate_as_stock, outputs_of, record
from tests.support.saved import kept_for_backward


@functools.cache
def build(family: str, name: str, **options) -> nn.Module:
    """A network of one seed, its norms as a trained one's, to be copied."""
    torch.manual_seed(0)
    if family == "torchvision":
        models = pytest.importorskip("torchvision").models
        model = models.get_model(name, weights=None, num_classes=10, **options)
        model = model.features if name.startswith("vgg") else model
    elif family == "timm":
        timm = pytest.importorskip("timm")
        model = timm.create_model(
            name, pretrained=False, **({} if "features_only" in options else {"num_classes": 10}) | options
        )
    elif family == "ours":
        model = fused_resnet.models.create(name, **options)
    else:
        transformers = pytest.importorskip("transformers")
        config = transformers.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[2, 2], layer_type=name)
        model = transformers.ResNetModel(config)
    for path, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1)
            # keeps what a ReLU reads away from 0: there a rounding decides whether a gradient passes, and in a deep
            # network one such element outweighs all other errors, in stock as in fused blocks
            nn.init.constant_(module.bias, 6)
            if name == "vgg11_bn":  # its five max pools choose by differences that the offset would round away
                nn.init.normal_(module.bias, std=0.2)
            if path.endswith("bn1"):  # some channels are off; behind an add all are on
                module.bias.data[::4] = -6
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 2)
    return model


def make(name: str, family: str = "torchvision", **options) -> nn.Module:
    return copy.deepcopy(build(family, name, **options))


def shallow(model: nn.Module) -> nn.Module:
    """Cut a ResNet off behind its second stage: deeper, small images leave too few values for a norm."""
    if hasattr(model, "layer4") and hasattr(model, "fc"):
        width = max(m.num_features for m in model.layer2.modules() if isinstance(m, nn.BatchNorm2d))
        model.layer3, model.layer4, model.fc = nn.Identity(), nn.Identity(), nn.Linear(width, 10)
    return model


def images(size: int = 64, batch: int = 4, seed: int = 2) -> Tensor:
    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))
    return x.contiguous(memory_format=torch.channels_last)


# ---- accuracy --------------------------------------------------------------------------------------------------------

PRECISIONS = [
    pytest.param(torch.float32, None, id="fp32"),
    pytest.param(torch.bfloat16, None, id="bf16"),
    pytest.param(torch.float32, torch.bfloat16, id="autocast-bf16"),
]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("dtype", "autocast"), PRECISIONS)
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_network_is_as_accurate_as_stock(name, dtype, autocast, training, chains_run):
    model = make(name).to(memory_format=torch.channels_last).train(training)
    assert_fused_is_as_accurate_as_stock(model, images(), dtype=dtype, autocast=autocast)
    assert len(chains_run) == {"resnet18": 1 + 8, "resnet50": 1 + 16}[name]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["fp32", "autocast-bf16"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_compiled_a_network_is_as_accurate_as_stock(name, autocast, training):
    torch.compiler.reset()
    model = make(name).to(memory_format=torch.channels_last).train(training)
    compiled = functools.partial(torch.compile, fullgraph=True, backend="aot_eager")
    assert_fused_is_as_accurate_as_stock(model, images(), autocast=autocast, compile=compiled)


# family, name, options, and how many chains run in one call
OTHERS = [
    ("torchvision", "resnext50_32x4d", {}, 8),
    ("torchvision", "wide_resnet50_2", {}, 8),
    ("torchvision", "vgg11_bn", {}, 5),
    ("timm", "resnet18", {}, 5),
    ("timm", "resnet50d", {}, 8),
    ("timm", "seresnet50", {}, 8),
    ("timm", "resnet18", {"features_only": True}, 9),
    ("ours", "resnet20", {"shortcut": "A"}, 10),
    ("Hugging Face", "basic", {}, 5),
    ("Hugging Face", "bottleneck", {}, 5),
]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("family", "name", "options", "chains"), OTHERS, ids=lambda v: v if isinstance(v, str) else "")
def test_another_network_is_as_accurate_as_stock(family, name, options, chains, training, chains_run):
    model = shallow(make(name, family, **options)).train(training)
    assert_fused_is_as_accurate_as_stock(model, *(images(48, seed=seed) for seed in range(3)))
    assert len(chains_run) >= 3 * chains


def test_drop_path_stays_stock_and_random():
    model = fused_resnet.fuse(make("resnet18", "timm", drop_path_rate=0.5)).train()
    outputs = [model(images(32)) for _ in range(4)]
    assert any(not torch.equal(outputs[0], other) for other in outputs[1:])
    model.eval()
    stock = make("resnet18", "timm", drop_path_rate=0.5).eval()
    stock.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(images(32)), stock(images(32)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_every_norm_of_a_network_is_fused(name):
    report = fused_resnet.explain(fused_resnet.fuse(make(name)))
    assert not report.left
    what = " ".join(row.what for row in report.fused)
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in make(name).modules())
    assert sum("bn" in word or word.strip("()") == "downsample.1" for word in what.split()) == norms


@pytest.mark.parametrize(("family", "name", "options", "chains"), OTHERS, ids=lambda v: v if isinstance(v, str) else "")
def test_unfuse_gives_a_network_back_bit_for_bit(family, name, options, chains):
    model = make(name, family, **options).eval()
    state = {key: t.clone() for key, t in model.state_dict().items()}
    tensors, classes = list(model.state_dict(keep_vars=True).values()), [type(m) for m in model.modules()]
    expected = outputs_of(model(images(32)))
    fused_resnet.unfuse(fused_resnet.fuse(model))
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(t, state[key]) for key, t in model.state_dict().items())
    assert all(a is b for a, b in zip(tensors, model.state_dict(keep_vars=True).values(), strict=True))
    assert [type(m) for m in model.modules()] == classes
    assert all(torch.equal(a, b) for a, b in zip(outputs_of(model(images(32))), expected, strict=True))


# ---- memory ----------------------------------------------------------------------------------------------------------


def bytes_kept(model: nn.Module, x: Tensor, autocast: torch.dtype | None) -> int:
    return sum(t.untyped_storage().nbytes() for t in kept_for_backward(model, x, autocast).values())


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["fp32", "autocast-bf16"])
@pytest.mark.parametrize(("name", "most"), [("resnet18", 0.75), ("resnet50", 0.85)])
def test_less_is_kept_for_backward_than_stock_keeps(name, most, autocast):
    # weights cast by autocast are kept by both sides: a batch at which they do not outweigh the activations
    x, model = images(112, 32), make(name).to(memory_format=torch.channels_last)
    stock = bytes_kept(model, x, autocast)
    assert bytes_kept(fused_resnet.fuse(model), x, autocast) <= most * stock


# ---- torch.compile and torch.export ----------------------------------------------------------------------------------


class Small(nn.Module):
    """A network in small: stem with pool, a plain block, a strided one, a classifier."""

    def __init__(self):
        super().__init__()
        blocks = pytest.importorskip("torchvision").models.resnet
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        project = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
        self.layers = nn.Sequential(blocks.BasicBlock(8, 8), blocks.BasicBlock(8, 16, 2, project))
        self.fc = nn.Linear(16, 10)

    def forward(self, x):
        x = self.layers(self.maxpool(self.relu(self.bn1(self.conv1(x)))))
        return self.fc(x.mean((2, 3)))


@pytest.fixture
def small():
    torch.compiler.reset()
    return Small()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_by_inductor_a_network_is_as_accurate_as_stock(small):
    compiled = functools.partial(torch.compile, fullgraph=True)
    assert_fused_is_as_accurate_as_stock(small, *(images(16, seed=seed) for seed in range(3)), compile=compiled)


@pytest.mark.parametrize("dynamic", [True, None], ids=["dynamic=True", "batch marked dynamic"])
def test_a_batch_of_another_size_is_compiled_no_oftener_than_stock(small, dynamic):
    stock, fused = copy.deepcopy(small).double(), fused_resnet.fuse(small).double()
    counts, results = [], []
    for model in (stock, fused):
        torch.compiler.reset()
        compilations = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend=compilations)

        def call(x, compiled=compiled):
            if dynamic is None:
                torch._dynamo.mark_dynamic(x, 0)
            return compiled(x)

        for batch in (5, 6, 7):
            model.zero_grad()
            results.append(record(model, images(16, batch).double(), call=call))
        counts.append(compilations.frame_count)
    for exact, result in zip(results[:3], results[3:], strict=True):
        for name, t in exact.items():
            torch.testing.assert_close(result[name], t, msg=lambda text, name=name: f"{name}: {text}")
    assert counts[1] <= counts[0]


def operations(program: torch.export.ExportedProgram) -> set[str]:
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


def test_exported_for_inference_it_is_plain_aten(small):
    fused = fused_resnet.fuse(small.eval())
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(fused, (images(16),), dynamic_shapes=({0: batch},))
    assert not [name for name in operations(program) if "fused_resnet" in name]
    torch.testing.assert_close(program.module()(images(16, 9)), fused(images(16, 9)), rtol=1e-4, atol=1e-4)


def test_exported_for_training_it_holds_the_chains(small):
    fused = fused_resnet.fuse(small.train())
    program = torch.export.export(fused, (images(16),))
    assert "fused_resnet.chain_forward.default" in operations(program)
    torch.testing.assert_close(program.module()(images(16)), fused(images(16)))


def test_compiled_it_follows_changes(small):
    fused = fused_resnet.fuse(small.eval())
    compiled = torch.compile(fused, backend="aot_eager")
    first = compiled(images(16))
    fused.layers[0].relu = nn.GELU()
    second = compiled(images(16))
    torch.testing.assert_close(second, fused_resnet.unfuse(fused)(images(16)), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(first, second)


# ---- other people's surgery ------------------------------------------------------------------------------------------


def freeze_by_timm(model: nn.Module) -> nn.Module:
    return pytest.importorskip("timm.layers").freeze_batch_norm_2d(model)


def freeze_by_torchvision(model: nn.Module) -> nn.Module:
    frozen = pytest.importorskip("torchvision").ops.FrozenBatchNorm2d
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                norm = frozen(child.num_features, child.eps)
                norm.load_state_dict(child.state_dict())
                setattr(module, name, norm)
    return model


@pytest.mark.parametrize("order", ["before fuse", "after fuse"])
@pytest.mark.parametrize("freeze", [freeze_by_timm, freeze_by_torchvision])
def test_frozen_norms_are_honoured(freeze, order, chains_run):
    stock, fused = freeze(shallow(make("resnet18"))), shallow(make("resnet18"))
    fused.fc.load_state_dict(stock.fc.state_dict())
    fused = fused_resnet.fuse(freeze(fused)) if order == "before fuse" else freeze(fused_resnet.fuse(fused))
    x = images(32)
    exact = record(copy.deepcopy(stock).double(), x.double())
    assert_as_accurate_as_stock(record(fused, x), record(stock, x), exact)
    assert len(chains_run) == 5


def test_features_are_extracted_from_inner_activations():
    feature_extraction = pytest.importorskip("torchvision").models.feature_extraction
    utils = pytest.importorskip("torchvision").models._utils
    nodes = {"relu": "stem", "layer1.0.relu": "inner", "layer2": "end"}
    for fused in (fused_resnet.fuse(make("resnet18")).eval(),):
        stock = make("resnet18").eval()
        got = feature_extraction.create_feature_extractor(fused, nodes)(images(32))
        expected = feature_extraction.create_feature_extractor(stock, nodes)(images(32))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        layers = {"relu": "stem", "layer2": "end"}
        got = utils.IntermediateLayerGetter(fused, layers)(images(32))
        torch.testing.assert_close(got, utils.IntermediateLayerGetter(stock, layers)(images(32)), rtol=1e-4, atol=1e-4)


def test_quantizable_networks_are_as_accurate_as_stock():
    quantization = pytest.importorskip("torchvision").models.quantization
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.manual_seed(0)
        model = shallow(quantization.resnet18(num_classes=10, quantize=False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NothingToFuse)
        assert_fused_is_as_accurate_as_stock(model, *(images(48, seed=seed) for seed in range(3)))


def test_optimizers_and_schedules_never_see_the_difference():
    stock, fused = make("resnet18").double(), make("resnet18").double()
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3) for model in (stock, fused)]
    fused_resnet.fuse(fused)
    for step in range(3):
        for model, optimizer in zip((stock, fused), optimizers, strict=True):
            optimizer.zero_grad()
            model(images(32, seed=step).double()).square().mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    for (name, a), b in zip(stock.state_dict().items(), fused.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


def test_modes_can_be_mixed_in_any_way(small):
    stock = small.double()
    fused = fused_resnet.fuse(copy.deepcopy(stock))
    parts = ["", "bn1", "layers", "layers.1.bn1", "layers.1.downsample", "layers.0", "relu"]
    for step, (part, training) in enumerate(itertools.product(parts, (False, True))):
        results = []
        for model in (stock, fused):
            model.get_submodule(part).train(training)
            model.zero_grad()
            results.append(record(model, images(16, seed=step).double()))
        for name, t in results[0].items():
            torch.testing.assert_close(
                results[1][name], t, msg=lambda text, what=(part, training, name): f"{what}: {text}"
            )
