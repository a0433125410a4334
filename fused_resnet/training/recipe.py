"""A training recipe: everything that decides a run's learning curve."""

from dataclasses import dataclass

import torch

from fused_resnet import models
from fused_resnet.training import data

PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class Recipe:
    """What is trained, on what, and how.

    Optimized by SGD with Nesterov momentum under a one-cycle schedule: the learning rate rises linearly over the
    first `warmup` of the steps, then falls along a cosine to nearly zero (Smith & Topin 2017, arXiv:1708.07120).

    Parameters
    ----------
    model : str
        A name that `fused_resnet.models.create` knows.
    data : str
        A name that `fused_resnet.training.data.load` knows.
    epochs, batch_size : int
        Length of the run, and images of a step.
    lr : float
        The schedule's highest learning rate.
    momentum, weight_decay : float
        Of SGD.
    warmup : float
        The part of all steps, between 0 and 1, in which the learning rate rises.
    max_shift : int
        Training images are moved by up to this many pixels up, down and sideways.
    seed : int
        Of the initial weights, the order of the images and their shifts.
    device : str
        ``auto`` is the GPU where there is one, else the CPU; or a device as PyTorch names it.
    precision : {"fp32", "bf16"}
        ``bf16`` trains under autocast.
    channels_last : bool
        Whether activations and weights are stored NHWC.
    fuse : bool
        Whether the model's blocks are fused; otherwise it is trained as it is.
    engine : str
        The engine that serves the fused blocks, as in `fused_resnet.fuse`.
    threads : int, optional
        Of the CPU; PyTorch's own choice by default.

    Raises
    ------
    ValueError
        A value that no run can be made with.
    """

    model: str = "resnet20"
    data: str = "digits"
    epochs: int = 12
    batch_size: int = 64
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: float = 0.2
    max_shift: int = 3
    seed: int = 0
    device: str = "auto"
    precision: str = "fp32"
    channels_last: bool = True
    fuse: bool = True
    engine: str = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        require("model", self.model, self.model in models.names(), f"one of {', '.join(models.names())}")
        require("data", self.data, self.data in data.names(), f"one of {', '.join(data.names())}")
        require("precision", self.precision, self.precision in PRECISIONS, f"one of {', '.join(PRECISIONS)}")
        require("epochs", self.epochs, self.epochs >= 1, "at least 1")
        require("batch_size", self.batch_size, self.batch_size >= 2, "at least 2, as batch norm needs")
        require("lr", self.lr, self.lr > 0, "above 0")
        require("momentum", self.momentum, 0 < self.momentum < 1, "between 0 and 1")
        require("weight_decay", self.weight_decay, self.weight_decay >= 0, "at least 0")
        require("warmup", self.warmup, 0 < self.warmup < 1, "between 0 and 1")
        require("max_shift", self.max_shift, self.max_shift >= 0, "at least 0")
        require("threads", self.threads, self.threads is None or self.threads >= 1, "at least 1")

    def resolve_device(self) -> torch.device:
        """Return the device to train on.

        Raises
        ------
        ValueError
            PyTorch knows no such device, or sees none here.
        """
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
        except RuntimeError as error:
            raise ValueError(f"device must be auto, cpu, cuda or cuda:0, cuda:1 ...; got {self.device!r}") from error
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(
                f"device {self.device!r} is not there: torch {torch.__version__} sees {torch.cuda.device_count()} GPUs "
                f"here; take cpu, or install a torch that is built for this machine's driver"
            )
        return device


def require(name: str, value: object, holds: bool, wanted: str) -> None:
    """Raise a ValueError that names the field, what was wanted and what came, unless it holds."""
    if not holds:
        raise ValueError(f"{name} must be {wanted}; got {value!r}")
