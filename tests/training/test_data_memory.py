"""The data sets that are whole in memory: digits and CIFAR."""

import pickle
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fused_resnet.training import data
from fused_resnet.training.data import memory

CPU = torch.device("cpu")


def windows(image, max_shift, mode):
    """Every image that a shift can make, by its offsets."""
    height, width = image.shape[-2:]
    padded = F.pad(image, (max_shift,) * 4, mode=mode)
    size = range(2 * max_shift + 1)
    return {(row, column): padded[:, row : row + height, column : column + width] for row in size for column in size}


def test_digits_are_split_alike_in_every_class_and_in_every_run():
    digits, again = data.load("digits", device=CPU), data.load("digits", device=CPU)
    assert (digits.train_size, digits.test_size, digits.num_classes) == (1437, 360, 10)
    assert torch.equal(digits.test_images, again.test_images)
    shares = digits.test_labels.bincount(minlength=10) / digits.train_labels.bincount(minlength=10)
    assert shares.min() > 0.23
    assert shares.max() < 0.27


def test_no_test_image_is_a_training_image():
    digits = data.load("digits", device=CPU)
    train = {image.numpy().tobytes() for image in digits.train_images}
    assert not any(image.numpy().tobytes() in train for image in digits.test_images)


def test_training_images_are_standardized():
    digits = data.load("digits", device=CPU)
    ((images, labels),) = digits.train_batches(torch.arange(1437)[None], data.Augmentation(), seed=0, epoch=1)
    assert images.shape == (1437, 1, 32, 32)
    assert torch.equal(labels, digits.train_labels)
    torch.testing.assert_close(torch.stack(torch.std_mean(images)), torch.tensor([1.0, 0.0]), atol=1e-5, rtol=0)


def test_each_image_is_moved_and_mirrored_as_a_whole(tiny_digits):
    plain = data.Augmentation()
    moved = data.Augmentation(max_shift=2, flip=True)
    order = torch.arange(32)[None]
    ((images, _),) = tiny_digits.train_batches(order, plain, seed=0, epoch=1)
    ((augmented, _),) = tiny_digits.train_batches(order, moved, seed=0, epoch=1)
    fates = set()
    for image, result in zip(images, augmented, strict=True):
        upright = {(*key, False): window for key, window in windows(image, 2, "replicate").items()}
        mirrored = {(*key, True): window for key, window in windows(image, 2, "replicate").items()}
        candidates = {**upright, **{key: window.flip(2) for key, window in mirrored.items()}}
        (fate,) = [key for key, window in candidates.items() if torch.equal(window, result)]
        fates.add(fate)
    assert len({fate[:2] for fate in fates}) > 8
    assert {fate[2] for fate in fates} == {False, True}


def test_an_images_fate_does_not_depend_on_its_batch(tiny_digits):
    augmentation = data.Augmentation(max_shift=3, flip=True)
    order = data.epoch_order(70, 16, seed=0, epoch=5)
    whole = [images for images, _ in tiny_digits.train_batches(order, augmentation, seed=0, epoch=5)]
    later = [images for images, _ in tiny_digits.train_batches(order[2:], augmentation, seed=0, epoch=5)]
    halves = [images for images, _ in tiny_digits.train_batches(order[:, 1::2], augmentation, seed=0, epoch=5)]
    assert torch.equal(torch.stack(whole[2:]), torch.stack(later))
    assert torch.equal(torch.stack(whole)[:, 1::2], torch.stack(halves))
    other = [images for images, _ in tiny_digits.train_batches(order, augmentation, seed=0, epoch=6)]
    assert not torch.equal(torch.stack(whole), torch.stack(other))


def test_ten_crops_are_corners_center_and_their_mirror_images(tiny_digits):
    ((single, labels), _) = tiny_digits.test_batches(16, crops=1)
    ((views, _), _) = tiny_digits.test_batches(16, crops=10)
    assert single.shape == (16, 1, 1, 16, 16)
    assert views.shape == (16, 10, 1, 16, 16)
    assert torch.equal(labels, tiny_digits.test_labels[:16])
    assert torch.equal(views[:, 4], single[:, 0])
    assert torch.equal(views[:, 5:], views[:, :5].flip(-1))
    for image, crops in zip(single[:, 0], views, strict=True):
        expected = windows(image, 2, "replicate")
        corners = [expected[place] for place in ((0, 0), (0, 4), (4, 0), (4, 4))]
        assert torch.equal(crops[:4], torch.stack(corners))


@pytest.fixture
def cifar_folder(tmp_path, monkeypatch):
    """Return a folder with CIFAR-10 as its authors keep it, of five images a file, all but the checksums."""
    from torchvision.datasets import cifar

    monkeypatch.setattr(cifar, "check_integrity", lambda path, checksum=None: True)
    random = np.random.default_rng(0)
    base = tmp_path / "cifar-10-batches-py"
    base.mkdir()
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        pixels = random.integers(0, 256, size=(5, 3 * 32 * 32), dtype=np.uint8)
        (base / name).write_bytes(pickle.dumps({"data": pixels, "labels": list(range(5))}))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(label) for label in range(10)]}))
    return tmp_path


def test_cifar_is_read_as_torchvision_keeps_it(cifar_folder):
    cifar = data.load("cifar10", cifar_folder, device=CPU)
    assert (cifar.train_size, cifar.test_size, cifar.num_classes, cifar.channels) == (25, 5, 10, 3)
    first = pickle.loads((cifar_folder / "cifar-10-batches-py" / "data_batch_1").read_bytes())["data"][0]
    assert torch.equal(cifar.train_images[0], torch.from_numpy(first).view(3, 32, 32))
    ((images, _),) = cifar.train_batches(torch.arange(25)[None], data.Augmentation(), seed=0, epoch=1)
    deviation, mean = torch.std_mean(images, dim=(0, 2, 3))
    torch.testing.assert_close(mean, torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(deviation, torch.ones(3), atol=1e-4, rtol=0)


def test_cifar_is_padded_by_its_mean_color(cifar_folder):
    cifar = data.load("cifar10", cifar_folder, device=CPU)
    shifted = memory.shifted(torch.ones(1, 3, 32, 32), 4, torch.zeros(2, 1, dtype=torch.long), cifar.padding)
    assert torch.equal(shifted[0, :, :4], torch.zeros(3, 4, 32))
    assert torch.equal(shifted[0, :, 4:, 4:], torch.ones(3, 28, 28))


@pytest.mark.parametrize(("name", "base"), [("cifar10", "cifar-10-batches-py"), ("cifar100", "cifar-100-python")])
def test_a_missing_cifar_says_where_it_was_looked_for_and_how_to_get_it(tmp_path, name, base):
    wanted = (
        rf"data {name} was looked for in {re.escape(str(tmp_path / base))} .* --data-dir, or get it with --download"
    )
    with pytest.raises(FileNotFoundError, match=wanted):
        data.load(name, tmp_path, device=CPU)


def test_a_damaged_cifar_is_named(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(FileNotFoundError, match=r"is damaged: .* remove it, then --download"):
        data.load("cifar10", tmp_path, device=CPU)


def test_a_download_is_torchvisions(tmp_path, monkeypatch):
    from torchvision import datasets

    asked = []
    monkeypatch.setattr(datasets.CIFAR100, "__init__", lambda self, root, download: asked.append((root, download)))
    data.download("cifar100", tmp_path)
    assert asked == [(tmp_path, True)]
    with pytest.raises(ValueError, match="--download fetches cifar10 and cifar100; got data 'imagenet'"):
        data.download("imagenet")
