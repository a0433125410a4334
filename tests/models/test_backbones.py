"""Detection and segmentation with fused backbones, and features by torchvision's extractors."""

import copy

import pytest
import torch
from torch import Tensor, nn

import fused_resnet
from fused_resnet import models
from tests.support.accuracy import outputs_of

torchvision = pytest.importorskip("torchvision")

from torchvision.models import detection, segmentation  # noqa: E402
from torchvision.models._utils import IntermediateLayerGetter  # noqa: E402
from torchvision.models.feature_extraction import create_feature_extractor  # noqa: E402
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign  # noqa: E402

FAMILIES = {"torchvision": torchvision.models, "ours": models}
SIZE = 64  # of the images
CLASSES = 3


def pyramid(family: str) -> nn.Module:
    """A ResNet-18 under a feature pyramid of 16 channels; its norms are frozen, and so are its first two stages."""
    body = FAMILIES[family].resnet18(norm_layer=FrozenBatchNorm2d)
    for name, parameter in body.named_parameters():
        parameter.requires_grad_(name.startswith(("layer3", "layer4")))
    stages = {f"layer{i}": str(i - 1) for i in range(1, 5)}
    return detection.backbone_utils.BackboneWithFPN(body, stages, [64, 128, 256, 512], out_channels=16)


def dilated(family: str) -> nn.Module:
    """Bottlenecks, dilated in the third stage, whose output is ``"out"``."""
    options = {"replace_stride_with_dilation": (False, True, True)}
    if family == "torchvision":
        body = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], **options)
    else:
        body = models.ResNet(models.Bottleneck, (1, 1, 1, 1), **options)
    return IntermediateLayerGetter(body, {"layer3": "out"})


def faster_rcnn(family: str, cls: type[nn.Module] = detection.FasterRCNN, **heads: nn.Module) -> nn.Module:
    return cls(
        pyramid(family),
        min_size=SIZE,
        max_size=SIZE,
        box_roi_pool=MultiScaleRoIAlign(["0", "1", "2", "3"], output_size=3, sampling_ratio=1),
        box_head=detection.faster_rcnn.TwoMLPHead(16 * 3 * 3, 32),
        box_predictor=detection.faster_rcnn.FastRCNNPredictor(32, CLASSES),
        rpn_pre_nms_top_n_train=50,
        rpn_post_nms_top_n_train=20,
        rpn_post_nms_top_n_test=20,
        **heads,
    )


def mask_rcnn(family: str) -> nn.Module:
    heads = detection.mask_rcnn
    return faster_rcnn(
        family,
        detection.MaskRCNN,
        mask_head=heads.MaskRCNNHeads(16, (16,), dilation=1),
        mask_predictor=heads.MaskRCNNPredictor(16, 16, CLASSES),
    )


def fcn(family: str) -> nn.Module:
    return segmentation.FCN(dilated(family), segmentation.fcn.FCNHead(1024, CLASSES))


def deeplab(family: str) -> nn.Module:
    return segmentation.DeepLabV3(dilated(family), segmentation.deeplabv3.DeepLabHead(1024, CLASSES, (2, 3)))


# what makes the model, and how many chains its backbone and its heads run
MODELS = {
    "Faster R-CNN": (faster_rcnn, 1 + 8),
    "Mask R-CNN": (mask_rcnn, 1 + 8),
    "FCN": (fcn, 1 + 3 + 1),
    "DeepLabV3": (deeplab, 1 + 3 + 6),
}


def scenes() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Two images, each with two objects."""
    noise = torch.Generator().manual_seed(1)
    images = [torch.rand(3, SIZE, SIZE, generator=noise, dtype=torch.float64) for _ in range(2)]
    boxes = torch.tensor([[4, 4, 30, 40], [20, 10, 60, 60]], dtype=torch.float64)
    masks = torch.zeros(2, SIZE, SIZE, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
        mask[top:bottom, left:right] = 1
    return images, [{"boxes": boxes, "labels": torch.tensor([1, 2]), "masks": masks} for _ in images]


def loss_of(model: nn.Module) -> Tensor:
    """The loss of a training step."""
    torch.manual_seed(2)  # of the boxes that are sampled, and of dropout
    images, targets = scenes()
    if isinstance(model, detection.FasterRCNN):
        return sum(model(images, targets).values())
    labels = torch.stack([target["masks"].sum(0) for target in targets]).long()
    return nn.functional.cross_entropy(model(torch.stack(images))["out"], labels)


def step(model: nn.Module) -> tuple[float, dict[str, Tensor]]:
    """Take a step of SGD; return its loss, its gradients, and what it left of parameters and buffers."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    loss = loss_of(model)
    loss.backward()
    optimizer.step()
    gradients = {f"{name}.grad": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.item(), {**gradients, **model.state_dict()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", MODELS)
def test_with_a_fused_backbone_a_model_trains_and_runs_as_with_stocks(name, family, chains_run):
    # in float64, where no rounding changes which boxes are kept and sampled
    make, chains = MODELS[name]
    stock = make(family).double()
    fused = fused_resnet.fuse(copy.deepcopy(stock))
    assert not fused_resnet.explain(fused).left

    loss, expected = step(stock)
    assert not chains_run
    fused_loss, results = step(fused)
    assert len(chains_run) == chains
    assert fused_loss == pytest.approx(loss, rel=1e-9)
    assert list(results) == list(expected)
    for key, value in expected.items():
        assert value.isfinite().all()
        torch.testing.assert_close(results[key], value, rtol=1e-6, atol=1e-9, msg=lambda m, key=key: f"{key}: {m}")

    images, _ = scenes()
    batch = images if isinstance(stock, detection.FasterRCNN) else torch.stack(images)
    expected, results = outputs_of(stock.eval()(batch)), outputs_of(fused.eval()(batch))
    assert len(chains_run) == 2 * chains
    torch.testing.assert_close(results, expected, rtol=1e-6, atol=1e-9)


BUILDERS = [
    detection.fasterrcnn_resnet50_fpn,
    detection.maskrcnn_resnet50_fpn,
    segmentation.fcn_resnet50,
    segmentation.deeplabv3_resnet50,
]


@pytest.mark.parametrize("build", BUILDERS, ids=lambda build: build.__name__)
def test_in_torchvisions_own_models_everything_is_fused(build):
    with torch.device("meta"):
        model = build(weights=None, weights_backbone=None)
    report = fused_resnet.explain(fused_resnet.fuse(model.to_empty(device="cpu")))
    assert not report.left
    assert sum(row.module.startswith("backbone") for row in report.fused) == 1 + 16


@pytest.mark.parametrize("fuse_first", [True, False], ids=["fused before", "fused behind"])
@pytest.mark.parametrize("extract", [IntermediateLayerGetter, create_feature_extractor])
def test_torchvisions_extractors_take_the_features_of_our_networks(extract, fuse_first):
    model = models.resnet18(num_classes=CLASSES).eval()
    images = torch.randn(2, 3, SIZE, SIZE)
    expected = models.resnet18(features_only=True).eval()
    expected.load_state_dict({key: t for key, t in model.state_dict().items() if not key.startswith("fc.")})
    if fuse_first:
        features = extract(fused_resnet.fuse(model), {"layer2": "layer2", "layer4": "layer4"})
    else:
        features = fused_resnet.fuse(extract(model, {"layer2": "layer2", "layer4": "layer4"}))
    results = features(images)
    assert list(results) == ["layer2", "layer4"]
    torch.testing.assert_close(dict(results), {name: expected(images)[name] for name in results}, rtol=1e-4, atol=1e-4)
