import numpy as np
import pytest

from fused_resnet.training import Recipe
from tests.support.digits import few_digits


@pytest.fixture
def tiny_digits(monkeypatch):
    return few_digits(monkeypatch)


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
