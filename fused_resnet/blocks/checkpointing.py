"""Activation checkpointing (``torch.utils.checkpoint``): which forward is the second one of the same step.

A batch norm's running statistics are to move once a step, and a recomputation is no step.  Torch does not say that it
recomputes, but the interpreter does: reentrant checkpoints run the forward out of ``CheckpointFunction.backward``,
the others out of ``recompute_fn``, which unpacking a saved tensor calls.  Both are frames of Python on the thread that
runs the forward, be that the caller's (the CPU) or the autograd engine's own for a device, whose frames begin with
the node, or the hook, that it runs.
"""

import sys

import torch
from torch.utils import checkpoint

_RECOMPUTES = frozenset({"backward", "recompute_fn"})
_BACKWARD = frozenset({torch.autograd.backward.__code__, torch.autograd.grad.__code__})


def is_recomputation() -> bool:
    """Whether this is a forward that ``torch.utils.checkpoint`` runs again inside a backward.

    Whatever else runs a forward inside a backward, such as a tensor hook, is answered with False, also where that
    backward is the one that a reentrant checkpoint begins behind its recomputation.  Under nested checkpoints every
    forward but the first is a recomputation.  Not for traced programs: ask only outside ``torch.compile``.
    """
    if torch._C._current_graph_task_id() == -1:  # no backward runs on this thread: the answer to nearly every call
        return False
    frame = sys._getframe(1)
    # from the inside out; a backward that is met first runs in a recomputation or behind it, but what is asked about
    # is run by that backward
    while frame is not None and frame.f_code not in _BACKWARD:
        if frame.f_globals is checkpoint.__dict__ and frame.f_code.co_name in _RECOMPUTES:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
