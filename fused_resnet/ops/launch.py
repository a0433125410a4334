"""What the launch of a Triton kernel needs to know: of sizes, of its device and of torch's switches."""

import functools

import torch

# In Triton's interpreter, which runs one program after the other.
INTERPRETED_MULTIPROCESSORS = 4


def ceil_div(a: int, b: int) -> int:
    """Return ``a / b``, rounded up."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """Return the least power of two that is not below ``n``, at least 1."""
    return 1 << max(n - 1, 0).bit_length()


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors a device has."""
    if device.type != "cuda":
        return INTERPRETED_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def float32_precision() -> str:
    """Return how products of float32 are made, which torch's switch decides at every call."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
