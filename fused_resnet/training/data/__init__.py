"""Data sets by name: `load` one, and it yields batches for training and views for testing."""

from pathlib import Path

import torch

from fused_resnet.training.data.folders import Folders
from fused_resnet.training.data.memory import CIFAR, InMemory, download_cifar, load_cifar, load_digits
from fused_resnet.training.data.order import epoch_order
from fused_resnet.training.data.source import TEST_CROPS, TRAIN_CROPS, Augmentation, Source
from fused_resnet.training.data.synthetic import Synthetic

__all__ = [
    "TEST_CROPS",
    "TRAIN_CROPS",
    "Augmentation",
    "Folders",
    "InMemory",
    "Source",
    "Synthetic",
    "default_folder",
    "download",
    "epoch_order",
    "load",
    "names",
]

NAMES = ("digits", "digits8x8", "cifar10", "cifar100", "imagenet", "folder", "synthetic")


def names() -> list[str]:
    """Return the name of every data set that `load` knows."""
    return list(NAMES)


def default_folder(name: str) -> Path:
    """Return where a data set is looked for when no folder is named."""
    return Path("data") / name


def load(
    name: str,
    folder: Path | None = None,
    *,
    image_size: int = 224,
    workers: int | None = None,
    device: torch.device,
    sharing: int = 1,
) -> Source:
    """Return a data set by its name, one of `names`.

    Parameters
    ----------
    name : str
        ``digits`` is bundled with scikit-learn, ``digits8x8`` is the same at its own size; ``cifar10`` and ``cifar100``
        are read as torchvision keeps them; ``imagenet`` and ``folder`` hold ``train/CLASS/IMAGE`` and
        ``val/CLASS/IMAGE``; ``synthetic`` is noise.
    folder : Path, optional
        Where it is; ``data/NAME`` by default.
    image_size : int
        Height and width of a crop of ``imagenet`` and ``folder``, and of ``synthetic``.
    workers : int, optional
        Processes that decode files.
    device : torch.device
        Where batches go.
    sharing : int
        How many processes of a run share this machine's cores.

    Raises
    ------
    FileNotFoundError
        It is not there; the message says where it was looked for and how to get it.
    ValueError
        No data set has that name.
    """
    folder = folder or default_folder(name)
    match name:
        case "digits":
            return load_digits(device)
        case "digits8x8":
            return load_digits(device, size=8)
        case "cifar10" | "cifar100":
            return load_cifar(name, folder, device)
        case "imagenet" | "folder":
            return Folders(name, folder, image_size=image_size, workers=workers, device=device, sharing=sharing)
        case "synthetic":
            return Synthetic(image_size=image_size, device=device)
    raise ValueError(f"data must be one of {', '.join(NAMES)}; got {name!r}")


def download(name: str, folder: Path | None = None) -> None:
    """Fetch a data set that is free to fetch.

    Raises
    ------
    ValueError
        It is not.
    """
    if name not in CIFAR:
        raise ValueError(f"--download fetches {' and '.join(CIFAR)}; got data {name!r}")
    download_cifar(name, folder or default_folder(name))
