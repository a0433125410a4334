"""What the C library does with memory that a training step on the CPU has freed."""

import ctypes
import functools
import os

# malloc.h
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3

# what says that somebody has decided already
_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")


@functools.cache
def keep_freed_memory() -> str:
    """Let glibc keep freed memory for this process instead of handing it back page by page.

    A training step on the CPU frees and takes hundreds of megabytes.  By default glibc returns the top of its heap to
    the kernel as soon as some tens of megabytes are free there, and the next step faults every page in again: up to a
    quarter of the step, or nothing, by where small allocations happen to lie.  The process never holds more than its
    own peak.

    Left alone where ``FUSED_RESNET_KEEP_FREED_MEMORY=0``, where the environment holds malloc settings of its own or
    preloads another allocator, and where there is no glibc.

    Returns
    -------
    What was done, for a report.
    """
    if os.environ.get("FUSED_RESNET_KEEP_FREED_MEMORY") == "0":
        return "glibc's default: FUSED_RESNET_KEEP_FREED_MEMORY=0"
    for name in _SETTINGS:
        if name in os.environ:
            return f"left alone: {name} is set"
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return "left alone: no glibc"
    kept = mallopt(_M_TRIM_THRESHOLD, 2**31 - 1) and mallopt(_M_MMAP_THRESHOLD, 32 << 20)
    return "kept for the process" if kept else "left alone: mallopt refused"
