"""Random images, made on the device: what a network's speed is without loading."""

from collections.abc import Iterator

import torch
from torch import Tensor

from fused_resnet.training.data.order import seeded
from fused_resnet.training.data.source import Augmentation


class Synthetic:
    """Noise with random labels, as many of ImageNet's shape as are asked for; nothing can be learned from it.

    Parameters
    ----------
    image_size : int
        Height and width, in pixels.
    device : torch.device
        Where the images are made.
    """

    channels = 3
    num_classes = 1000
    train_size = 12_800
    test_size = 256

    def __init__(self, *, image_size: int, device: torch.device) -> None:
        self.image_size = image_size
        self.device = device

    def train_batches(
        self, batches: Tensor, augmentation: Augmentation, seed: int, epoch: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images [B, 3, H, W] and labels [B] for each row of `batches`; noise is not augmented."""
        for chosen in batches:
            yield self.draw(len(chosen), seed, epoch, int(chosen[0]))

    def test_batches(self, batch_size: int, crops: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield all test images in order, as views [B, crops, 3, H, W], and labels [B]."""
        for first in range(0, self.test_size, batch_size):
            images, labels = self.draw(min(batch_size, self.test_size - first), first)
            yield images.unsqueeze(1).expand(-1, crops, -1, -1, -1), labels

    def draw(self, count: int, *key: int) -> tuple[Tensor, Tensor]:
        """Return images and labels that depend on `key` alone."""
        generator = seeded(*key, device=self.device)
        shape = (count, self.channels, self.image_size, self.image_size)
        images = torch.randn(shape, generator=generator, device=self.device)
        return images, torch.randint(self.num_classes, (count,), generator=generator, device=self.device)
