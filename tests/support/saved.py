"""What autograd keeps of a forward."""

import torch
from torch import Tensor, nn


def kept_for_backward(model: nn.Module, x: Tensor, autocast: torch.dtype | None = None) -> dict[int, Tensor]:
    """Every tensor that autograd keeps, parameters, buffers and x left out, by the address of its memory."""
    outside = {t.untyped_storage().data_ptr() for t in (x, *model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in outside:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        torch.autocast("cpu", dtype=autocast, enabled=autocast is not None),
    ):
        kept_alive = model(x)
    assert kept_alive.requires_grad
    return kept
