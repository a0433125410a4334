"""Data sets, whole in memory, and their augmentation."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Dataset:
    """Standardized images [N, C, H, W] in float32 and their labels [N] in int64, split in two.

    Mean and standard deviation are the training images'; the test images are moved and scaled by the same two numbers.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    num_classes: int

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return self.train_images.shape[1]

    def to(self, device: torch.device, memory_format: torch.memory_format) -> "Dataset":
        """Return the data set on `device`, its images stored in `memory_format`."""
        return Dataset(
            self.train_images.to(device, memory_format=memory_format),
            self.train_labels.to(device),
            self.test_images.to(device, memory_format=memory_format),
            self.test_labels.to(device),
            self.num_classes,
        )


def load_digits() -> Dataset:
    """Return scikit-learn's handwritten digits: 1797 gray images of 8x8 in 10 classes, enlarged to 32x32.

    Four in five are for training, one in five for testing, in each class alike; the split is the same in every run.
    """
    from sklearn.datasets import load_digits as bundled_digits
    from sklearn.model_selection import train_test_split

    digits = bundled_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1)
    images = F.interpolate(images, size=(32, 32), mode="bilinear", align_corners=False)
    labels = torch.from_numpy(digits.target).long()

    train, test = train_test_split(range(len(labels)), test_size=0.2, stratify=digits.target, random_state=0)
    std, mean = torch.std_mean(images[train])
    images = (images - mean) / std
    return Dataset(images[train], labels[train], images[test], labels[test], num_classes=10)


_LOADERS: dict[str, Callable[[], Dataset]] = {"digits": load_digits}


def names() -> list[str]:
    """Return the name of every data set that `load` knows."""
    return list(_LOADERS)


def load(name: str) -> Dataset:
    """Return a data set by its name, one of `names`."""
    return _LOADERS[name]()


def random_shift(images: Tensor, max_shift: int, generator: torch.Generator) -> Tensor:
    """Move each image [N, C, H, W] by up to `max_shift` pixels along either axis, repeating the edge it leaves."""
    n, channels, height, width = images.shape
    offsets = torch.randint(2 * max_shift + 1, (2, n, 1), generator=generator).to(images.device)
    rows = offsets[0] + torch.arange(height, device=images.device)  # [N, H]
    columns = offsets[1] + torch.arange(width, device=images.device)  # [N, W]
    padded = F.pad(images, (max_shift,) * 4, mode="replicate")
    image = torch.arange(n, device=images.device)[:, None, None, None]
    channel = torch.arange(channels, device=images.device)[:, None, None]
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]
