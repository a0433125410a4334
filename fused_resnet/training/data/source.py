"""What a data set is to the training loop and to the evaluation."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

TEST_CROPS = (1, 10)
TRAIN_CROPS = ("scale", "resized")


@dataclass(frozen=True)
class Augmentation:
    """What chance does to a training image.

    Parameters
    ----------
    max_shift : int
        Images that are in memory move by up to this many pixels up, down and sideways, as when they are padded by as
        many and cropped at random.
    flip : bool
        Whether images are mirrored, each with probability 1/2.
    crop : {"scale", "resized"}
        Of images from files. ``scale``: the shorter side is resized to between 256 and 480 pixels, for crops of 224 (He
        et al. 2015, section 3.4). ``resized``: a random area and aspect ratio (Szegedy et al. 2015, arXiv:1409.4842,
        section 6).
    """

    max_shift: int = 0
    flip: bool = False
    crop: str = "scale"


class Source(Protocol):
    """A data set, split in two. Images come standardized, in float32, on the device that the source was made for."""

    @property
    def num_classes(self) -> int:
        """How many labels there are."""

    @property
    def channels(self) -> int:
        """Channels of an image."""

    @property
    def train_size(self) -> int:
        """How many images there are to train on."""

    @property
    def test_size(self) -> int:
        """How many images there are to test on."""

    def train_batches(
        self, batches: Tensor, augmentation: Augmentation, seed: int, epoch: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images [B, C, H, W] and labels [B] for each row of `batches`, indices [steps, B].

        What chance does to an image depends on (seed, epoch, index) alone.
        """

    def test_batches(self, batch_size: int, crops: int, share: slice = slice(None)) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield a share of the test images in order, as views [B, crops, C, H, W], and labels [B].

        The share is every N-th image, by default all; the last batch may be smaller, and there may be none.
        Ten crops are the four corners and the center of an image and of its mirror image (Krizhevsky et al. 2012).
        """


def standardize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Subtract a mean from images [..., C, H, W] and divide by a deviation, both [C, 1, 1] in units of a pixel."""
    return (images.float() - mean) / std
