"""How much memory a forward keeps for its backward."""

import gc
from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def activation_bytes(forward: Callable[[], Tensor], state: Iterable[Tensor] = ()) -> int:
    """Return the bytes of the activations that autograd saves while `forward` runs.

    Parameters
    ----------
    forward : callable
        Returns the tensor that backward would start from.
    state : iterable of Tensor
        Parameters and buffers: neither they nor their copies in another dtype, which autocast makes and which are
        known by their shape (a linear layer keeps a transposed view), are activations.

    Returns
    -------
    The size of the storages, each counted once, however many saved tensors are views of it.
    """
    state = list(state)
    shapes = {_shape(tensor) for tensor in state}
    # the storages are held on to: a freed one's address would be another one's
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        if _shape(tensor) not in shapes:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage
        return tensor

    def unpack(tensor: Tensor) -> Tensor:
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        forward()
    existing = {tensor.untyped_storage().data_ptr() for tensor in state}
    return sum(storage.nbytes() for address, storage in storages.items() if address not in existing)


def _shape(tensor: Tensor) -> tuple[int, ...]:
    """Return the sizes without their order."""
    return tuple(sorted(tensor.shape))


def peak_bytes(make: Callable[[], Callable[[], object]], device: torch.device) -> int:
    """Return the largest amount of CUDA memory that a step needs at one time, its network included.

    Parameters
    ----------
    make : callable
        Returns the step, whose second call is measured: the first makes what stays, gradients, the optimizer's
        buffers and workspaces.
    device : torch.device
        Where it runs; what is allocated there before `make` is not counted.
    """
    gc.collect()
    existing = torch.cuda.memory_allocated(device)
    step = make()
    step()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - existing
