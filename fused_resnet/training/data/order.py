"""Which images a step takes, and what chance does to them: a function of numbers that are written down, of no state.

A run that goes on after a break, or with another number of loader workers, sees the same images in the same order.
"""

import hashlib

import torch
from torch import Tensor


def seeded(*key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator whose numbers depend on `key` alone, such as (seed, epoch) or (seed, epoch, index)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))


def epoch_order(size: int, batch_size: int, seed: int, epoch: int) -> Tensor:
    """Return an epoch's whole batches in a new order: indices [steps, batch_size] in int64, each at most once.

    The images that are left over when `size` is no multiple of `batch_size` are left out of this epoch. Whoever trains
    on a part of each batch takes columns of it: the order does not depend on how many share it.
    """
    steps = size // batch_size
    shuffled = torch.randperm(size, generator=seeded(seed, epoch))
    return shuffled[: steps * batch_size].view(steps, batch_size)
