import torch

from fused_resnet.training import data


def test_digits_are_split_alike_in_every_class_and_in_every_run():
    digits, again = data.load("digits"), data.load("digits")
    assert (len(digits.train_labels), len(digits.test_labels)) == (1437, 360)
    assert torch.equal(digits.test_images, again.test_images)
    shares = digits.test_labels.bincount(minlength=10) / digits.train_labels.bincount(minlength=10)
    assert shares.min() > 0.23
    assert shares.max() < 0.27


def test_no_test_image_is_a_training_image():
    digits = data.load("digits")
    train = {image.numpy().tobytes() for image in digits.train_images}
    assert not any(image.numpy().tobytes() in train for image in digits.test_images)


def test_training_images_are_standardized():
    images = data.load("digits").train_images
    assert images.shape[1:] == (1, 32, 32)
    torch.testing.assert_close(torch.stack(torch.std_mean(images)), torch.tensor([1.0, 0.0]), atol=1e-5, rtol=0)


def test_random_shift_moves_each_image_as_a_whole():
    images = torch.randn(6, 2, 9, 7)
    shifted = data.random_shift(images, 2, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2), mode="replicate")
    offsets = []
    for image, candidates in zip(shifted, padded, strict=True):
        windows = {
            (row, column): candidates[:, row : row + 9, column : column + 7] for row in range(5) for column in range(5)
        }
        (offset,) = [offset for offset, window in windows.items() if torch.equal(window, image)]
        offsets.append(offset)
    assert len(set(offsets)) > 1


def test_random_shift_by_nothing_changes_nothing():
    images = torch.randn(3, 1, 8, 8)
    assert torch.equal(data.random_shift(images, 0, torch.Generator()), images)
