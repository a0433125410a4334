"""Several processes: each rank is one, on this machine, over gloo."""

import datetime
import multiprocessing
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

LIMIT = 120  # seconds

# ranks fork from a process that has imported once what takes seconds, and has run nothing
multiprocessing.set_forkserver_preload(["torch", "torch._dynamo", "fused_resnet", "pytest"])


def run_rank(rank: int, world_size: int, folder: Path, claim: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Run a claim in one rank and leave what it returns in a file."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # torch.empty is filled with NaN
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=LIMIT),
    )
    try:
        torch.save(claim(rank, *args), folder / f"{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def run_ranks(folder: Path, world_size: int, claim: Callable[..., Any], *args: Any) -> list[Any]:
    """Run ``claim(rank, *args)``, a function of a module, in processes; return what each returned.

    The error of a rank is the error of the test.
    """
    processes = torch.multiprocessing.start_processes(
        run_rank, (world_size, folder, claim, args), world_size, join=False, start_method="forkserver"
    )
    begin = time.monotonic()
    while not processes.join(timeout=1):
        if time.monotonic() - begin > LIMIT:
            for process in processes.processes:
                process.kill()
            pytest.fail(f"{world_size} ranks of {claim.__name__} took more than {LIMIT} s")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world_size)]
