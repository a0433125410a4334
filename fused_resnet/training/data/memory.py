"""Small data sets, whole on the device, and their augmentation."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.training.data.order import seeded
from fused_resnet.training.data.source import Augmentation, standardize

# in a generator's key, behind (seed, epoch), which is that of the order
AUGMENTATION = 1


@dataclass(frozen=True)
class InMemory:
    """Images [N, C, H, W] of one size and their labels [N] in int64, split in two.

    Images are kept as they came, in uint8 or float32, and leave standardized for each channel by `mean` and `std`
    [C, 1, 1], the training images'. (The paper subtracts the mean of each pixel and divides by nothing; in front of a
    convolution and a batch norm, that is the same up to the mean's shape.)

    Parameters
    ----------
    padding : {"constant", "replicate"}
        What is beyond the edge of an image that is moved: the mean color, or the edge again.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    num_classes: int
    mean: Tensor
    std: Tensor
    padding: str = "constant"

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return self.train_images.shape[1]

    @property
    def train_size(self) -> int:
        """How many images there are to train on."""
        return len(self.train_labels)

    @property
    def test_size(self) -> int:
        """How many images there are to test on."""
        return len(self.test_labels)

    def train_batches(
        self, batches: Tensor, augmentation: Augmentation, seed: int, epoch: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images [B, C, H, W] and labels [B] for each row of `batches`, moved and mirrored at random."""
        # drawn for every image of the set, so that an image's fate does not depend on its batch
        generator = seeded(seed, epoch, AUGMENTATION)
        size, device = self.train_size, self.train_images.device
        offsets = torch.randint(2 * augmentation.max_shift + 1, (2, size), generator=generator).to(device)
        mirrored = (torch.rand(size, generator=generator) < 0.5).to(device)
        for chosen in batches.to(device):
            images = standardize(self.train_images[chosen], self.mean, self.std)
            images = shifted(images, augmentation.max_shift, offsets[:, chosen], self.padding)
            if augmentation.flip:
                images = torch.where(mirrored[chosen, None, None, None], images.flip(3), images)
            yield images, self.train_labels[chosen]

    def test_batches(self, batch_size: int, crops: int, share: slice = slice(None)) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield a share of the test images in order, as views [B, crops, C, H, W], and labels [B].

        An image is its own single view, as the paper tests on CIFAR-10; ten crops are its corners, padded by an eighth.
        """
        test_images, test_labels = self.test_images[share], self.test_labels[share]
        for images, labels in zip(test_images.split(batch_size), test_labels.split(batch_size), strict=True):
            images = standardize(images, self.mean, self.std)
            yield images.unsqueeze(1) if crops == 1 else ten_crops(images, self.padding), labels


def shifted(images: Tensor, max_shift: int, offsets: Tensor, padding: str) -> Tensor:
    """Pad images [N, C, H, W] by `max_shift` on each side and cut [H, W] out at `offsets`, rows and columns [2, N]."""
    n, channels, height, width = images.shape
    rows = offsets[0, :, None] + torch.arange(height, device=images.device)  # [N, H]
    columns = offsets[1, :, None] + torch.arange(width, device=images.device)  # [N, W]
    padded = F.pad(images, (max_shift,) * 4, mode=padding)
    image = torch.arange(n, device=images.device)[:, None, None, None]
    channel = torch.arange(channels, device=images.device)[:, None, None]
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


def ten_crops(images: Tensor, padding: str) -> Tensor:
    """Return corners and center of padded images [N, C, H, W], and of their mirror images: [N, 10, C, H, W]."""
    height, width = images.shape[2:]
    top, left = height // 8, width // 8
    padded = F.pad(images, (left, left, top, top), mode=padding)
    places = [(0, 0), (0, 2 * left), (2 * top, 0), (2 * top, 2 * left), (top, left)]
    views = [padded[:, :, row : row + height, column : column + width] for row, column in places]
    return torch.stack([*views, *(view.flip(3) for view in views)], dim=1)


def load_digits(device: torch.device, size: int = 32) -> InMemory:
    """Return scikit-learn's handwritten digits: 1797 gray images of 8x8 in 10 classes, enlarged to `size`.

    Four in five are for training, one in five for testing, in each class alike; the split is the same in every run.
    """
    from sklearn.datasets import load_digits as bundled_digits
    from sklearn.model_selection import train_test_split

    digits = bundled_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1)
    images = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False).to(device)
    labels = torch.from_numpy(digits.target).long().to(device)

    train, test = train_test_split(range(len(labels)), test_size=0.2, stratify=digits.target, random_state=0)
    std, mean = torch.std_mean(images[train], dim=(0, 2, 3), keepdim=True)
    return InMemory(images[train], labels[train], images[test], labels[test], 10, mean[0], std[0], padding="replicate")


CIFAR = {"cifar10": ("CIFAR10", 10), "cifar100": ("CIFAR100", 100)}  # torchvision's class, and how many labels


def load_cifar(name: str, folder: Path, device: torch.device) -> InMemory:
    """Return CIFAR-10 or CIFAR-100 (Krizhevsky 2009): 50 000 and 10 000 color images of 32x32, kept in uint8.

    Raises
    ------
    FileNotFoundError
        It is not in `folder`.
    """
    from torchvision import datasets

    of_torchvision, num_classes = CIFAR[name]
    kind = getattr(datasets, of_torchvision)
    if not (folder / kind.base_folder).is_dir():
        raise FileNotFoundError(
            f"data {name} was looked for in {folder / kind.base_folder} and is not there; name the folder that holds "
            f"{kind.base_folder} with --data-dir, or get it with --download ({kind.url})"
        )
    try:
        train, test = kind(folder, train=True), kind(folder, train=False)
    except RuntimeError as error:  # torchvision compares checksums
        raise FileNotFoundError(
            f"data {name} in {folder / kind.base_folder} is damaged: {error}; remove it, then --download"
        ) from error

    def tensors(split: "datasets.CIFAR10") -> tuple[Tensor, Tensor]:
        images = torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous()
        return images.to(device), torch.tensor(split.targets, device=device)

    (train_images, train_labels), (test_images, test_labels) = tensors(train), tensors(test)
    # channel by channel: whole, the images are a gigabyte in float32
    statistics = [torch.std_mean(train_images[:, channel].float()) for channel in range(train_images.shape[1])]
    std, mean = (torch.stack(values)[:, None, None] for values in zip(*statistics, strict=True))
    return InMemory(train_images, train_labels, test_images, test_labels, num_classes, mean, std)


def download_cifar(name: str, folder: Path) -> None:
    """Fetch CIFAR-10 or CIFAR-100 into `folder`, unless it is there: 160 MB from its authors' site, by torchvision."""
    from torchvision import datasets

    getattr(datasets, CIFAR[name][0])(folder, download=True)
