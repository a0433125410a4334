import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fused_resnet.training import Recipe, data

CPU = torch.device("cpu")


@pytest.fixture
def tiny_digits(monkeypatch):
    """Stand in for the digits: the first few of them, at 16x16, so that an epoch takes a fraction of a second."""
    digits = data.load_digits(CPU)
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


@pytest.fixture
def tiny_recipe(tiny_digits):
    return Recipe(epochs=4, batch_size=16)


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory):
    """Return an image folder of noise of many sizes, which is reddish in one class and bluish in the other."""
    from PIL import Image

    random = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("pictures")
    for split, count in (("train", 12), ("val", 5)):
        for label, channel in (("blue", 2), ("red", 0)):
            (root / split / label).mkdir(parents=True)
            for index in range(count):
                height, width = random.integers(40, 70, size=2)
                pixels = random.integers(0, 120, size=(height, width, 3))
                pixels[:, :, channel] += 100
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / label / f"{index}.png")
    return root
