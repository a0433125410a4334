"""Each rank is a process of its own; what it returns comes back, and its error is the test's."""

import os

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import ProcessRaisedException


def process_and_sum(rank, start):
    total = torch.tensor(start + rank)
    dist.all_reduce(total)
    return os.getpid(), total


def test_ranks_return_in_order_what_they_computed_together(run_ranks):
    (first, total), (second, same_total) = run_ranks(2, process_and_sum, 10)
    assert len({first, second, os.getpid()}) == 3
    assert total == same_total == 10 + 11


def uninitialised(rank):
    return torch.empty(3)


def test_uninitialised_memory_is_poisoned_in_ranks_too(run_ranks):
    assert all(result.isnan().all() for result in run_ranks(2, uninitialised))


def fails(rank):
    raise ValueError(f"rank {rank} has failed")


def test_the_error_of_a_rank_is_the_error_of_the_test(run_ranks):
    # one alone: of several, those that wait for it may fail before its own error is read
    with pytest.raises(ProcessRaisedException, match="rank 0 has failed"):
        run_ranks(1, fails)
