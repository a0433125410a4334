"""A data set that is small enough to be trained on in a test."""

import pytest
import torch
import torch.nn.functional as F

from fused_resnet.training import data


def few_digits(monkeypatch: pytest.MonkeyPatch) -> data.InMemory:
    """Stand in for the digits: the first few of them, at 16x16, so that an epoch takes a fraction of a second."""
    digits = data.load_digits(torch.device("cpu"))
    tiny = data.InMemory(
        train_images=F.avg_pool2d(digits.train_images[:70], 2),  # not a multiple of the batch
        train_labels=digits.train_labels[:70],
        test_images=F.avg_pool2d(digits.test_images[:20], 2),
        test_labels=digits.test_labels[:20],
        num_classes=10,
        mean=digits.mean,
        std=digits.std,
        padding="replicate",
    )
    monkeypatch.setattr(data, "load_digits", lambda device: tiny)
    return tiny
