"""A training recipe: everything that decides a run's learning curve."""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from fused_resnet import models
from fused_resnet.training.data import TRAIN_CROPS, Augmentation
from fused_resnet.training.data import names as data_names
from fused_resnet.training.precision import PRECISIONS

SCHEDULES = ("one-cycle", "steps", "cosine")


@dataclass(frozen=True)
class Recipe:
    """What is trained, on what, and how; the defaults are the recipe ``digits``, `recipes.named` gives the paper's.

    Parameters
    ----------
    model : str
        A name that `fused_resnet.models.create` knows.
    shortcut : str, optional
        The model's option of section 3.3 of the paper, where it has one; its own default otherwise.
    data : str
        A name that `fused_resnet.training.data.load` knows.
    data_dir : str, optional
        The folder of the data set; ``data/NAME`` by default.
    image_size : int
        Height and width in pixels of what ``imagenet``, ``folder`` and ``synthetic`` give; the others are 32x32.
    epochs, iterations : int, optional
        Length of the run, in one or the other.
    batch_size : int
        Images of a step.
    accumulate : int
        Parts that a batch is computed in, one after the other, to need less memory: the gradient is that of the whole
        batch, except that batch norm sees a part at a time.
    lr : float
        The schedule's highest learning rate.
    schedule : {"one-cycle", "steps", "cosine"}
        How the learning rate goes, see `fused_resnet.training.schedule.make_scheduler`.
    milestones : tuple of float
        For ``steps``: the parts of the run after which the learning rate is divided by ten.
    warmup : float, optional
        The part of all steps in which the learning rate is low; by default 0.2 for ``one-cycle``, else 0.
    momentum, weight_decay : float
        Of SGD; weights, biases and batch norm's parameters decay alike, as in the paper.
    nesterov : bool
        Whether the momentum is Nesterov's.
    label_smoothing : float
        The part of each label that is spread over all classes.
    max_shift, flip, crop
        See `fused_resnet.training.data.Augmentation`.
    seed : int
        Of the initial weights, the order of the images and their augmentation.
    device : str
        ``auto`` is the GPU where there is one, else the CPU; or a device as PyTorch names it.
    precision : {"fp32", "bf16", "fp16"}
        ``bf16`` and ``fp16`` train under autocast, ``fp16`` with a loss scale.
    channels_last : bool
        Whether activations and weights are stored NHWC.
    fuse : bool
        Whether the model's blocks are fused; otherwise it is trained as it is.
    engine, memory, chain : str
        As in `fused_resnet.fuse`.
    compile : bool
        Whether the model runs under ``torch.compile``.
    cuda_graph : bool
        Whether a whole step is captured into a CUDA graph and replayed; needs a GPU.
    threads : int, optional
        Of the CPU; PyTorch's own choice by default.
    workers : int, optional
        Processes that decode image files; one for each core by default.
    checkpoint_minutes : float
        Within an epoch, a checkpoint is written when this much time has passed since the last.

    Raises
    ------
    ValueError
        A value that no run can be made with.
    """

    model: str = "resnet20"
    shortcut: str | None = None
    data: str = "digits"
    data_dir: str | None = None
    image_size: int = 224
    epochs: int | None = 12
    iterations: int | None = None
    batch_size: int = 64
    accumulate: int = 1
    lr: float = 0.1
    schedule: str = "one-cycle"
    milestones: tuple[float, ...] = (0.5, 0.75)
    warmup: float | None = None
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    max_shift: int = 3
    flip: bool = False
    crop: str = "scale"
    seed: int = 0
    device: str = "auto"
    precision: str = "fp32"
    channels_last: bool = True
    fuse: bool = True
    engine: str = "auto"
    memory: str = "fast"
    chain: str = "auto"
    compile: bool = False
    cuda_graph: bool = False
    threads: int | None = None
    workers: int | None = None
    checkpoint_minutes: float = 10.0

    def __post_init__(self) -> None:
        known = self.model in models.names() or self.model.startswith(("torchvision:", "timm:"))
        require("model", self.model, known, f"one of {', '.join(models.names())}, torchvision:NAME or timm:NAME")
        for name, value, values in (
            ("data", self.data, data_names()),
            ("schedule", self.schedule, SCHEDULES),
            ("crop", self.crop, TRAIN_CROPS),
            ("precision", self.precision, PRECISIONS),
        ):
            require(name, value, value in values, f"one of {', '.join(values)}")
        require("image_size", self.image_size, self.image_size >= 32, "at least 32")
        length = (self.epochs, self.iterations)
        require("epochs, iterations", length, length.count(None) == 1, "one of the two")
        require("epochs", self.epochs, self.epochs is None or self.epochs >= 1, "at least 1")
        require("iterations", self.iterations, self.iterations is None or self.iterations >= 1, "at least 1")
        require("accumulate", self.accumulate, self.accumulate >= 1, "at least 1")
        require("batch_size", self.batch_size, self.batch_size >= 2, "at least 2, as batch norm needs")
        whole = self.batch_size % self.accumulate == 0 and self.batch_size // self.accumulate >= 2
        require(
            "batch_size", self.batch_size, whole, f"{self.accumulate} (accumulate) equal parts of at least 2 images"
        )
        require("lr", self.lr, self.lr > 0, "above 0")
        milestones = (0.0, *self.milestones, 1.0)
        rising = all(a < b for a, b in pairwise(milestones))
        require("milestones", self.milestones, rising, "parts of the run between 0 and 1, rising")
        low = self.warmup_part
        require("warmup", low, 0 <= low < 1 and (low > 0 or self.schedule != "one-cycle"), "between 0 and 1")
        require("momentum", self.momentum, 0 < self.momentum < 1, "between 0 and 1")
        require("weight_decay", self.weight_decay, self.weight_decay >= 0, "at least 0")
        require("label_smoothing", self.label_smoothing, 0 <= self.label_smoothing < 1, "at least 0 and below 1")
        require("max_shift", self.max_shift, self.max_shift >= 0, "at least 0")
        require("seed", self.seed, self.seed >= 0, "at least 0")
        require("threads", self.threads, self.threads is None or self.threads >= 1, "at least 1")
        require("workers", self.workers, self.workers is None or self.workers >= 0, "at least 0")
        require("checkpoint_minutes", self.checkpoint_minutes, self.checkpoint_minutes > 0, "above 0")

    @property
    def warmup_part(self) -> float:
        """The part of all steps in which the learning rate is low."""
        if self.warmup is None:
            return 0.2 if self.schedule == "one-cycle" else 0.0
        return self.warmup

    @property
    def data_folder(self) -> Path | None:
        """The folder of the data set, where one is named."""
        return None if self.data_dir is None else Path(self.data_dir)

    @property
    def augmentation(self) -> Augmentation:
        """What chance does to a training image."""
        return Augmentation(self.max_shift, self.flip, self.crop)


def require(name: str, value: object, holds: bool, wanted: str) -> None:
    """Raise a ValueError that names the field, what was wanted and what came, unless it holds."""
    if not holds:
        raise ValueError(f"{name} must be {wanted}; got {value!r}")
