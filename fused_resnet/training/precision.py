"""A forward pass in fp32, bf16 or fp16."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = tuple(DTYPES)


@dataclass(frozen=True)
class Forward:
    """Maps images [N, C, H, W] to logits [N, classes] in float32, computed in a precision and a memory format.

    Parameters
    ----------
    model : callable
        A module, or one compiled.
    precision : {"fp32", "bf16", "fp16"}
        The last two by autocast.
    channels_last : bool
        Whether the images are stored NHWC.
    """

    model: Callable[[Tensor], Tensor]
    precision: str
    channels_last: bool

    def __call__(self, images: Tensor) -> Tensor:
        """Return the logits."""
        images = images.contiguous(memory_format=memory_format(self.channels_last))
        with torch.autocast(images.device.type, DTYPES[self.precision], enabled=self.precision != "fp32"):
            logits = self.model(images)
        return logits.float()


def memory_format(channels_last: bool) -> torch.memory_format:
    """Return how images and weights are stored."""
    return torch.channels_last if channels_last else torch.contiguous_format
