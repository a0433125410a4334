"""Training by several processes: torchrun starts them, and PyTorch's DistributedDataParallel adds up their gradients.

Each *rank* is one process on a GPU of its own, or on a share of the CPU. A rank computes its columns of every batch, so
that together they take the steps of a single process.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

# before there is a group: its functions' default arguments would keep that alive, beyond `World.leave` (torch 2.11)
import torch.distributed.nn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fused_resnet.training.device import resolve_device
from fused_resnet.training.recipe import Recipe, require

T = TypeVar("T")

# what torchrun tells each process, in the order of `World`'s fields
PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


class RankFailed(ValueError):
    """Another rank cannot go on."""


class ContactLost(RuntimeError):
    """Another rank is gone, or does not answer."""


@dataclass(frozen=True)
class World:
    """The processes that share a run, and which of them this one is; by default it is alone.

    Parameters
    ----------
    rank, world_size : int
        The number of this process, and how many there are.
    local_rank, local_world_size : int
        The same on this node.
    max_restarts : int
        How often torchrun starts them all again when it loses one.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    max_restarts: int = 0

    @classmethod
    def join(cls, timeout: float) -> "World":
        """Meet the other processes, if this is one of many.

        Parameters
        ----------
        timeout : float
            Seconds that a process waits for the others, here and whenever they exchange something, before it gives up.

        Raises
        ------
        ValueError
            The environment is not torchrun's.
        ContactLost
            The others did not come.
        """
        require("timeout", timeout, timeout > 0, "above 0")
        max_restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            return cls(max_restarts=max_restarts)
        missing = [name for name in PLACE if name not in os.environ]
        if missing:
            raise ValueError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']} but {', '.join(missing)} are not set: start the processes "
                f"with torchrun, or unset WORLD_SIZE to train in this one alone"
            )
        rank, world_size, local_rank, local_world_size = (int(os.environ[name]) for name in PLACE)
        world = cls(rank, world_size, local_rank, local_world_size, max_restarts)
        if max_restarts > 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # the store outlives the processes, and so do the addresses of the dead in it: pytorch/pytorch#135712
            raise ValueError(
                "torchrun's --max-restarts needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment, and "
                "--standalone or --rdzv-backend c10d: otherwise processes that start again look for those that are gone"
            )
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        with world.contact():
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
        return world

    def leave(self) -> None:
        """Part from the others in peace."""
        if self.world_size > 1:
            dist.destroy_process_group()

    def abandon(self, status: int) -> int:
        """Exit with a status at once; alone, return it.

        The others may wait for this rank where it will not come: to destroy the group could wait for them, and an
        interpreter that ends with gloo's threads alive may abort (torch 2.11).
        """
        if self.world_size > 1:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        return status

    @property
    def first(self) -> bool:
        """Whether this rank is the one that prints and writes."""
        return self.rank == 0

    def device(self, name: str) -> torch.device:
        """Return this rank's device: of the GPUs, one of its own.

        Raises
        ------
        ValueError
            There is none of that name, or not one for each.
        """
        device = resolve_device(name)
        if self.world_size == 1 or device.type != "cuda":
            return device
        require(
            "device", name, device.index is None, "auto, cuda or cpu under torchrun, where each rank has its own GPU"
        )
        gpus = torch.cuda.device_count()
        wanted = f"at most {gpus}, the GPUs that torch {torch.__version__} sees on this node (or take --device cpu)"
        require("nproc-per-node of torchrun", self.local_world_size, self.local_world_size <= gpus, wanted)
        device = torch.device("cuda", self.local_rank)
        torch.cuda.set_device(device)
        return device

    def check(self, recipe: Recipe, device: torch.device) -> None:
        """Refuse a recipe that so many ranks cannot follow.

        Raises
        ------
        ValueError
            Names the field, and why.
        """
        if self.world_size == 1:
            return
        ranks, parts = f"there are {self.world_size} ranks", self.world_size * recipe.accumulate
        require(
            "batch_size",
            recipe.batch_size,
            recipe.batch_size % parts == 0 and recipe.batch_size // parts >= 2,
            f"{parts} equal parts of at least 2 images: {ranks}, each of which takes {recipe.accumulate} (accumulate)",
        )
        # what is captured has no timeout
        why = f"off: {ranks}, and those of a captured step would wait for ever for one that is lost"
        require("cuda_graph", recipe.cuda_graph, not recipe.cuda_graph, why)
        synchronizes = not recipe.sync_batch_norm or recipe.fuse or device.type == "cuda"
        why = "off: on the CPU only fused blocks have it, torch.nn.SyncBatchNorm itself takes GPU tensors alone"
        require("sync_batch_norm", recipe.sync_batch_norm, synchronizes, why)

    def columns(self, batches: Tensor) -> Tensor:
        """Return this rank's part of each batch, of indices [steps, batch_size]."""
        part = batches.shape[1] // self.world_size
        return batches[:, self.rank * part : (self.rank + 1) * part]

    @property
    def share(self) -> slice:
        """The part of a sequence that is this rank's, where the ranks take one after the other."""
        return slice(self.rank, None, self.world_size)

    def parallel(self, model: nn.Module, *, broadcast_buffers: bool) -> nn.Module:
        """Return a model whose gradients are the mean over the ranks, and whose weights begin as rank 0's.

        Parameters
        ----------
        model : nn.Module
            On this rank's device.
        broadcast_buffers : bool
            Whether rank 0's running statistics are taken in front of each step.
        """
        if self.world_size == 1:
            return model
        device = next(model.parameters()).device
        return DistributedDataParallel(
            model,
            device_ids=[device] if device.type == "cuda" else None,
            broadcast_buffers=broadcast_buffers,
            gradient_as_bucket_view=True,
        )

    def sum(self, tensor: Tensor) -> Tensor:
        """Return a tensor's sum over the ranks, in its place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def share_buffers(self, model: nn.Module) -> None:
        """Give every rank the running statistics of rank 0."""
        if self.world_size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def of_first(self, value: T) -> T:
        """Return rank 0's value."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values, 0)
        return values[0]

    def gather(self, value: T) -> list[T]:
        """Return every rank's value."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    @contextmanager
    def agreement(self) -> Iterator[None]:
        """Let an error of one rank be an error of all, so that none waits for one that will not come.

        Raises
        ------
        RankFailed
            Another rank raised an exception in here; its own is raised as it is.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as own:
            error = own
        messages = self.gather(None if error is None else str(error) or repr(error))
        if error is not None:
            raise error
        for rank, message in enumerate(messages):
            if message is not None:
                raise RankFailed(f"rank {rank}: {message}")

    @contextmanager
    def contact(self) -> Iterator[None]:
        """Say it clearly when another rank is lost.

        Raises
        ------
        ContactLost
            Instead of what gloo and NCCL raise.
        """
        try:
            yield
        except RuntimeError as error:
            # gloo's are bare RuntimeErrors
            if isinstance(error, dist.DistError) or "gloo" in str(error):
                reason = " ".join(str(error).split())
                others = f"another of the {self.world_size} ranks"
                raise ContactLost(f"rank {self.rank} has lost {others}, or waited too long for it: {reason}") from error
            raise
