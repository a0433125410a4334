"""The random number generators of Python, torch and NumPy: what they are at, and back again."""

import contextlib
import random
import sys
from collections.abc import Iterator
from typing import Any

import torch

State = dict[str, Any]


def state() -> State:
    """Return the states of the generators on the host, by whose they are, as what compares by value."""
    found = {"Python's": random.getstate(), "torch's": bytes(torch.get_rng_state().tolist())}
    if "numpy" in sys.modules:
        name, keys, *rest = sys.modules["numpy"].random.get_state()
        found["NumPy's"] = (name, tuple(keys), *rest)
    return found


def restore(before: State) -> None:
    """Put the generators on the host back."""
    random.setstate(before["Python's"])
    torch.set_rng_state(torch.frombuffer(bytearray(before["torch's"]), dtype=torch.uint8))
    if "NumPy's" in before:
        sys.modules["numpy"].random.set_state(before["NumPy's"])


@contextlib.contextmanager
def restored() -> Iterator[None]:
    """Put the generators back behind what runs inside, those of GPUs, too: each time it draws the same."""
    before = state()
    of_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        restore(before)
        if of_gpus:
            torch.cuda.set_rng_state_all(of_gpus)
