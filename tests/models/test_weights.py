"""Weights from files and from torchvision."""

import pickle
import sys

import pytest
import torch

from fused_resnet import models
from fused_resnet.training.files import RunFolder


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(x == y and torch.equal(s, t) for (x, s), (y, t) in pairs)


@pytest.fixture
def trained():
    return models.resnet20(num_classes=7)


def test_a_state_dict_is_loaded_key_for_key(tmp_path, trained):
    torch.save(trained.state_dict(), tmp_path / "weights.pt")
    assert not same(models.create("resnet20", num_classes=7), trained)
    for weights in (tmp_path / "weights.pt", str(tmp_path / "weights.pt")):
        assert same(models.create("resnet20", num_classes=7, weights=weights), trained)
    assert same(models.resnet20(num_classes=7, weights=weights), trained)


def test_a_checkpoint_of_a_training_run_is_loaded(tmp_path, trained):
    RunFolder(tmp_path).write_checkpoint(
        {"model": trained.state_dict(), "history": [], "recipe": {"model": "resnet20"}}
    )
    assert same(models.create("resnet20", num_classes=7, weights=tmp_path / "checkpoint.pt"), trained)


def test_torchvisions_checkpoint_is_loaded_key_for_key(tmp_path):
    theirs = pytest.importorskip("torchvision").models.resnet18(num_classes=7)
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    assert same(models.create("resnet18", num_classes=7, weights=tmp_path / "weights.pth"), theirs)


def test_the_name_of_torchvisions_weights_loads_them(monkeypatch):
    torchvision = pytest.importorskip("torchvision")
    theirs = torchvision.models.resnet18()
    asked = []

    def downloaded(url, **options):
        asked.append((url, options))
        return theirs.state_dict()

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", downloaded)
    assert same(models.create("resnet18", weights="IMAGENET1K_V1"), theirs)
    assert same(models.create("resnet18", weights="DEFAULT"), theirs)
    url = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url
    assert asked == [(url, {"check_hash": True, "weights_only": True})] * 2


def test_features_leave_the_weights_of_the_classifier_out(tmp_path, trained):
    torch.save(trained.state_dict(), tmp_path / "weights.pt")
    features = models.create("resnet20", features_only=True, weights=tmp_path / "weights.pt")
    assert torch.equal(features.layer3[2].conv2.weight, trained.layer3[2].conv2.weight)


def test_trained_norms_are_loaded_into_frozen_ones(tmp_path, trained):
    frozen = pytest.importorskip("torchvision").ops.FrozenBatchNorm2d
    torch.save(trained.state_dict(), tmp_path / "weights.pt")
    model = models.create("resnet20", num_classes=7, norm_layer=frozen, weights=tmp_path / "weights.pt")
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(images), trained.eval()(images))


def test_weights_of_another_network_are_refused(tmp_path, trained):
    torch.save(trained.state_dict(), tmp_path / "weights.pt")
    with pytest.raises(
        ValueError, match=r"weights .* do not fit this resnet20.*num_classes.*size mismatch for fc.weight"
    ):
        models.create("resnet20", weights=tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"do not fit this resnet20.*Unexpected key.*downsample"):
        models.create("resnet20", num_classes=7, shortcut="A", weights=tmp_path / "weights.pt")


@pytest.mark.parametrize(
    ("name", "weights", "reason"),
    [
        ("resnet50", "IMAGENET1K", "torchvision's weights for resnet50 are IMAGENET1K_V1, IMAGENET1K_V2, DEFAULT"),
        ("resnet20", "runs/none/checkpoint.pt", "torchvision has no weights for resnet20"),
    ],
)
def test_weights_that_are_nowhere_are_named_with_those_that_are(name, weights, reason):
    pytest.importorskip("torchvision")
    with pytest.raises(FileNotFoundError, match=f"weights '{weights}': there is no such file, and {reason}"):
        models.create(name, weights=weights)


def test_without_torchvision_the_error_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(
        FileNotFoundError, match="no such file; if it is the name of torchvision's weights: pip install"
    ):
        models.create("resnet20", weights="DEFAULT")


class Evil:
    def __reduce__(self):
        return pytest.fail, ("code of the checkpoint was run",)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"no checkpoint", "are damaged, or hold more than tensors"),
        (pickle.dumps({"conv1.weight": Evil()}), "are damaged, or hold more than tensors"),
        (["conv1.weight"], "must be a state_dict, alone or under 'model' or 'state_dict'; found neither"),
        ({"epoch": 3}, "must be a state_dict, alone or under 'model' or 'state_dict'; found neither"),
    ],
    ids=["text", "code", "list", "plain values"],
)
def test_what_is_no_state_dict_is_refused(tmp_path, content, reason):
    path = tmp_path / "weights.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=f"weights {path} {reason}"):
        models.create("resnet20", weights=path)
