"""What the launch of a Triton kernel needs to know of its device."""

import functools

import torch

# In Triton's interpreter, which runs one program after the other.
INTERPRETED_MULTIPROCESSORS = 4


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors a device has."""
    if device.type != "cuda":
        return INTERPRETED_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count
