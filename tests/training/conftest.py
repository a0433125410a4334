import pytest
import torch

from fused_resnet.training import Recipe, data


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors this small gain nothing from a second thread, and lose much where another process wants the core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny_digits(monkeypatch):
    """Stand in for the digits: the first few of them, at 16x16, so that an epoch takes a fraction of a second."""
    digits = data.load_digits()

    def shrink(images, count):
        return torch.nn.functional.avg_pool2d(images[:count], 2)

    tiny = data.Dataset(
        train_images=shrink(digits.train_images, 70),  # not a multiple of the batch
        train_labels=digits.train_labels[:70],
        test_images=shrink(digits.test_images, 20),
        test_labels=digits.test_labels[:20],
        num_classes=10,
    )
    monkeypatch.setitem(data._LOADERS, "digits", lambda: tiny)


@pytest.fixture
def tiny_recipe(tiny_digits):
    return Recipe(epochs=4, batch_size=16)
