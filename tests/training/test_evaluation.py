import math

import pytest
import torch

from fused_resnet.training import evaluate
from fused_resnet.training.published import PUBLISHED, published


def table(logits):
    """A network whose logits for an image are the row of a table that the image's only pixel names."""
    return lambda images: logits[images[:, 0, 0, 0].long()]


def test_errors_count_the_images_whose_label_is_not_among_the_first_one_or_five():
    logits = torch.arange(8.0).flip(0).repeat(4, 1)  # class 0 first, class 7 last
    views = torch.arange(4.0).view(4, 1, 1, 1, 1)
    result = evaluate(table(logits), [(views[:3], torch.tensor([0, 4, 5])), (views[3:], torch.tensor([7]))])
    assert (result.images, result.top1, result.top5) == (4, 0.75, 0.5)
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor([0, 4, 5, 7]))
    assert result.loss == pytest.approx(loss.item())


def test_ten_views_are_judged_by_the_mean_of_their_probabilities():
    logits = torch.randn(20, 6) * 3
    views = torch.arange(20.0).view(2, 10, 1, 1, 1)
    labels = torch.tensor([3, 1])
    probabilities = logits.softmax(1).view(2, 10, 6).mean(1)
    result = evaluate(table(logits), [(views, labels)])
    assert result.top1 == (probabilities.argmax(1) != labels).float().mean()
    assert result.loss == pytest.approx(-probabilities[range(2), labels].log().mean().item())


def test_fewer_than_five_classes_have_no_top_five_error():
    views = torch.arange(3.0).view(3, 1, 1, 1, 1)
    result = evaluate(table(torch.eye(3)), [(views, torch.tensor([1, 2, 0]))])
    assert (result.top1, result.top5) == (1, 0)
    assert math.isfinite(result.loss)


def test_published_errors_are_found_by_data_network_and_crops():
    (row,) = published("imagenet", "torchvision:resnet50", 1)
    assert (row.top1, row.top5) == (24.7, 7.8)
    assert {row.shortcut for row in published("imagenet", "resnet34", 10)} == {"A", "B", "C"}
    assert published("folder", "resnet50", 1) == []
    assert len({row[:3] + row[5:6] for row in PUBLISHED}) == len(PUBLISHED)
