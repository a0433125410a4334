"""Images in folders, a folder a class: decoded, augmented and cropped by torchvision in loader workers."""

import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fused_resnet.training.data.order import seeded
from fused_resnet.training.data.source import Augmentation, standardize

if TYPE_CHECKING:
    from torchvision.datasets import ImageFolder

# of ImageNet's training images, as torchvision's weights expect them; pixels are 0 to 255
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)

# for crops of 224 pixels: the shorter side that a test image, and a training image, is resized to
CROP, TEST_SIDE, TRAIN_SIDES = 224, 256, (256, 480)

MOST_WORKERS = 16

HOW_TO_GET = {"imagenet": "; get ILSVRC 2012 from https://image-net.org/download.php and unpack it like that"}


class Folders:
    """An image folder with ``train/CLASS/*`` and ``val/CLASS/*`` (or ``test/CLASS/*``); images may have any size.

    Parameters
    ----------
    name : str
        The data set's, for messages.
    folder : Path
        Where it is. A split is opened when it is first asked for: an evaluation needs no training images.
    image_size : int
        Height and width of a crop, in pixels; sides are resized in proportion, 256 for 224.
    workers : int, optional
        Processes that decode; 0 decodes in this one. One for each core by default.
    device : torch.device
        Where batches go.

    Raises
    ------
    FileNotFoundError
        A split is not there, or empty (when it is first asked for).
    """

    channels = 3

    def __init__(self, name: str, folder: Path, *, image_size: int, workers: int | None, device: torch.device) -> None:
        self.name = name
        self.folder = folder
        self.image_size = image_size
        self.workers = min(len(os.sched_getaffinity(0)), MOST_WORKERS) if workers is None else workers
        self.device = device
        self.mean, self.std = (torch.tensor(values, device=device)[:, None, None] for values in (MEAN, STD))

    @cached_property
    def train(self) -> "ImageFolder":
        """The training images."""
        train = self.open("train")
        if train.classes != self.test.classes:
            raise ValueError(
                f"data {self.name}: {train.root} and {self.test.root} must hold the same classes, got "
                f"{len(train.classes)} and {len(self.test.classes)}, of which "
                f"{', '.join(sorted({*train.classes} ^ {*self.test.classes})[:5])} are in one alone"
            )
        return train

    @cached_property
    def test(self) -> "ImageFolder":
        """The test images."""
        return self.open("val", "test")

    def open(self, *names: str) -> "ImageFolder":
        """Return the split in the first of these folders that is there."""
        from torchvision.datasets import ImageFolder

        found = [self.folder / name for name in names if (self.folder / name).is_dir()]
        if not found:
            raise FileNotFoundError(
                f"data {self.name} was looked for in {self.folder / names[0]} and is not there; name the folder that "
                f"holds train/CLASS/IMAGE and val/CLASS/IMAGE with --data-dir{HOW_TO_GET.get(self.name, '')}"
            )
        try:
            return ImageFolder(str(found[0]))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"data {self.name}: {found[0]} must hold CLASS/IMAGE: {error}") from error

    @property
    def num_classes(self) -> int:
        """How many labels there are."""
        return len(self.test.classes)

    @property
    def train_size(self) -> int:
        """How many images there are to train on."""
        return len(self.train)

    @property
    def test_size(self) -> int:
        """How many images there are to test on."""
        return len(self.test)

    def train_batches(
        self, batches: Tensor, augmentation: Augmentation, seed: int, epoch: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images [B, 3, H, W] and labels [B] for each row of `batches`, cropped and mirrored at random."""
        images = Augmented(self.train, train_transform(self.image_size, augmentation), seed, epoch)
        for views, labels in self.loader(images, batch_sampler=batches.tolist()):
            yield self.place(views), labels.to(self.device, non_blocking=True)

    def test_batches(self, batch_size: int, crops: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield all test images in order, as views [B, crops, 3, H, W], and labels [B]."""
        self.test.transform = test_transform(self.image_size, crops)
        for views, labels in self.loader(self.test, batch_size=batch_size):
            yield self.place(views), labels.to(self.device, non_blocking=True)

    def place(self, images: Tensor) -> Tensor:
        """Standardize on the device: a byte a pixel travels, not four."""
        return standardize(images.to(self.device, non_blocking=True), self.mean, self.std)

    def loader(self, images: "Dataset[Any]", **batches: Any) -> "DataLoader[Any]":
        """Return a loader; its generator is its own, so that the model's random numbers do not depend on it."""
        return DataLoader(
            images,
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),
            **batches,
        )


class Augmented(Dataset[tuple[Tensor, int]]):
    """Training images, augmented by what (seed, epoch, index) says, in whichever process."""

    def __init__(self, images: "ImageFolder", transform: Any, seed: int, epoch: int) -> None:
        self.images = images
        self.transform = transform
        self.seed = seed
        self.epoch = epoch

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return an image [3, H, W] in uint8 and its label."""
        image, label = self.images[index]
        # torchvision draws from torch's global generator: lend it a state
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(seeded(self.seed, self.epoch, index).get_state())
            return self.transform(image), label


def train_transform(image_size: int, augmentation: Augmentation) -> Any:
    """Return what makes a training image [3, H, W] in uint8 of a picture."""
    from torchvision.transforms import v2

    if augmentation.crop == "scale":
        least, most = (round(image_size * side / CROP) for side in TRAIN_SIDES)
        crop = [v2.RandomResize(least, most + 1), v2.RandomCrop(image_size)]
    else:
        crop = [v2.RandomResizedCrop(image_size)]
    flip = [v2.RandomHorizontalFlip()] if augmentation.flip else []
    return v2.Compose([*crop, *flip, v2.PILToTensor()])


def test_transform(image_size: int, crops: int) -> Any:
    """Return what makes views [crops, 3, H, W] in uint8 of a picture."""
    from torchvision.transforms import v2

    resize = v2.Resize(round(image_size * TEST_SIDE / CROP))
    if crops == 1:
        return v2.Compose([resize, v2.CenterCrop(image_size), v2.PILToTensor(), lambda view: view.unsqueeze(0)])
    return v2.Compose([resize, v2.TenCrop(image_size), v2.PILToTensor(), torch.stack])
