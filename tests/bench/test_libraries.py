"""Networks of timm and torchvision in the suites that take them."""

import json
import re

import pytest
import torch
from torch import nn

from fused_resnet.bench import libraries
from fused_resnet.bench.network import NetworkStep, Workload
from fused_resnet.bench.peers import DTYPES, EXACT_PEER, FUSINGS, STOCK_PEER, Peer
from fused_resnet.bench.recorded import recorded
from fused_resnet.bench.roofline import count, network_shapes
from fused_resnet.bench.suites.contest import refusals
from fused_resnet.bench.suites.model import own_noise, step_refusals, trace_file
from fused_resnet.blocks.mixin import FusedModule

CPU = torch.device("cpu")
FUSED_PEER = Peer("fused", "auto")
SMALL = ("timm:test_efficientnet", "torchvision:mobilenet_v3_small", "torchvision:r3d_18")


def tiny(model, dtype="fp32", batch_size=2, image_size=32):
    pytest.importorskip(model.partition(":")[0])
    return Workload(model, batch_size, image_size, dtype, CPU)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("model", SMALL)
def test_the_fused_step_is_what_stock_computes(model, dtype):
    workload = tiny(model, dtype, batch_size=4)
    assert step_refusals(workload, (STOCK_PEER, FUSED_PEER)) == {}
    step = NetworkStep(workload, FUSED_PEER)
    assert any(isinstance(module, FusedModule) for module in step.model.modules())
    assert not any(isinstance(module, FusedModule) for module in NetworkStep(workload, STOCK_PEER).model.modules())


@pytest.mark.parametrize("factor", [1.0, 1.2])
def test_a_wrong_gradient_is_noticed(factor):
    """Also where some gradients are exactly 0, of which nobody has a digit right, and behind draws of noise."""
    workload = tiny("timm:test_efficientnet", batch_size=4)

    def make(peer):
        step = NetworkStep(workload, peer)
        if peer == FUSED_PEER:
            step.model.conv_stem.weight.register_hook(lambda gradient: factor * gradient)
        return step

    refused = refusals(make, [FUSED_PEER], lambda: own_noise(workload))
    assert bool(refused) == (factor != 1)
    assert all("gradient of conv_stem.weight is off by 2.0e-01" in reason for reason in refused.values())


def test_peers_drop_the_same_in_every_step_that_is_checked():
    workload = tiny("torchvision:mobilenet_v3_small")
    kept = {}
    for peer in (STOCK_PEER, FUSED_PEER, EXACT_PEER):
        step = NetworkStep(workload, peer)
        (dropout,) = (module for module in step.model.modules() if isinstance(module, nn.Dropout))
        # in front of it stand ones: it works in place
        dropout.register_forward_pre_hook(lambda _, args: (torch.ones_like(args[0]),))
        dropout.register_forward_hook(lambda _, args, out, peer=peer: kept.update({peer: out.detach() != 0}))
        step.result()
    assert 0.1 < 1 - kept[STOCK_PEER].float().mean() < 0.3
    assert torch.equal(kept[STOCK_PEER], kept[FUSED_PEER])
    assert torch.equal(kept[STOCK_PEER], kept[EXACT_PEER])


def test_no_norm_begins_at_zero_and_hides_what_is_in_front():
    pytest.importorskip("timm")
    from timm import create_model

    def zero(model):
        return [n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) and not m.weight.any()]

    assert zero(create_model("regnetx_002"))
    assert not zero(NetworkStep(tiny("timm:regnetx_002"), STOCK_PEER).model)


def test_clips_are_volumes():
    step = NetworkStep(tiny("torchvision:r3d_18"), FUSED_PEER)
    assert step.images.shape == (2, 3, 16, 16, 16)
    assert step.images.is_contiguous(memory_format=torch.channels_last_3d)
    assert libraries.input_shape("torchvision:r3d_18", 224) == (3, 16, 112, 112)
    assert libraries.input_shape("torchvision:resnet18", 224) == (3, 224, 224)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_is_noted_of_a_step_is_what_is_counted_from_shapes(dtype):
    workload = Workload("resnet18", 4, 64, dtype, CPU)
    noted = recorded(NetworkStep(workload, STOCK_PEER))
    counted = count(network_shapes("resnet18", 64), "eager", element_size=DTYPES[dtype].itemsize, batch_size=4)
    assert noted.bytes == pytest.approx(counted.bytes, rel=0.02)
    assert noted.flop == pytest.approx(counted.flop, rel=0.001)
    assert noted.saved == pytest.approx(counted.saved, rel=0.02)


def test_a_quick_run_of_what_takes_them(bench, tmp_path, capsys):
    model = SMALL[0]
    tiny(model)
    words = ("--quick", "--dtype", "fp32", "--model", model, "--json", tmp_path / "run.json")
    assert bench("model", "memory", "profile", "roofline", *words) == 0
    shown = capsys.readouterr().out
    (head,) = re.findall(r"^model +dtype +peer .*", shown, re.MULTILINE)
    (line,) = re.findall(rf"^{model} +fp32 +stock .*", shown, re.MULTILINE)
    assert head.index("peer") == line.index("stock")
    rows = json.loads((tmp_path / "run.json").read_text())["rows"]
    assert {row["suite"] for row in rows} == {"ceilings", "model", "memory", "profile", "roofline"}
    assert {row["case"]["model"] for row in rows if row["suite"] != "ceilings"} == {model}
    (memory,) = (row["peers"] for row in rows if row["suite"] == "memory")
    moved, kept = (row["peers"] for row in rows if row["case"].get("figure", "").endswith("per image"))
    assert kept.keys() == moved.keys() == {"eager", *FUSINGS}
    assert memory["fused"]["median"] < memory["stock"]["median"]
    for figures in (kept, moved):
        assert figures["fused"]["median"] < figures["eager"]["median"]


def test_a_trace_has_a_name_that_every_file_system_takes(tmp_path):
    workload = Workload("timm:resnet18", 2, 32, "fp32", CPU)
    assert trace_file(tmp_path / "t.json", workload, FUSED_PEER).name == "t-timm-resnet18-fp32-fused-auto.json"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "resnet19"], "--model must be one of resnet18, "),
        (["--model", "hub:resnet18"], "--model must be NAME, timm:NAME or torchvision:NAME, got 'hub:resnet18'"),
        (["--model", "timm:resnet19"], "classifiers, got 'resnet19'; is it timm:resnet"),
        (["--model", "timm:qqqq"], "classifiers, got 'qqqq'; timm.list_models() lists them"),
        (["--model", "torchvision:fcn_resnet50"], "one of torchvision's "),
        (["block", "conv", "--model", "timm:resnet18"], "block and conv need this package's networks"),
        (["--model", "timm:vit_tiny_patch16_224"], "does not take inputs of 3x32x32, set by --image-size"),
        (["--act", "silu"], "--act belongs to the suite op, got model"),
    ],
)
def test_bad_input_is_named_before_anything_is_measured(bench, capsys, words, message):
    pytest.importorskip("timm")
    pytest.importorskip("torchvision")
    suites = [] if words[0] == "block" else ["model"]
    assert bench(*suites, *words, "--quick") == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.out == ""


def test_a_network_that_gives_more_than_logits_is_named(bench, monkeypatch, capsys):
    """As GoogLeNet and Inception do, whose losses are several."""
    tiny("timm:test_resnet")
    several = nn.Sequential(nn.Flatten(), nn.LazyLinear(1000), nn.Unflatten(1, (2, 500)))
    monkeypatch.setattr(libraries, "create", lambda model: several)
    assert bench("model", "--quick", "--model", "timm:test_resnet") == 2
    message = "--model must give logits [N, 1000] in training and nothing else, got timm:test_resnet: (2, 2, 500)"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("library", libraries.LIBRARIES)
def test_a_library_that_is_missing_is_named_with_its_mend(bench, monkeypatch, capsys, library):
    monkeypatch.setattr(libraries, "find_spec", lambda name: None)
    assert bench("model", "--model", f"{library}:resnet18") == 2
    message = f"--model {library}:resnet18 needs {library}, not installed here; mend: pip install {library}"
    assert message in capsys.readouterr().err
