import functools
import os
import sys

import pytest
import torch

if not torch.cuda.is_available():  # Triton decides when it is first imported
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ["FUSED_RESNET_TUNING"] = "0"  # what was measured on this machine decides nothing here

from fused_resnet.blocks import module
from tests.support import ranks
from tests.support.oracle import Oracle


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill what ``torch.empty`` allocates, in Python and in the native kernels alike, with NaN (integers: the largest).

    An element that no kernel wrote then fails loudly.
    """
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def one_thread():
    """Run small tensors on one thread: beside other work on the machine, threads wait for each other a hundredfold.

    Tests of threads set their number themselves.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def one_seed():
    """Start every test from the same random numbers, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def first_arguments(monkeypatch):
    """Return a function that lists what a module's function is called with first, from then on."""

    def of(module, name: str) -> list:
        seen: list = []
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda first, *args: seen.append(first) or function(first, *args))
        return seen

    return of


@pytest.fixture
def chains_run(first_arguments):
    """Count the chains that fused modules run: a list of their signatures."""
    return first_arguments(module, "run_chain")


@pytest.fixture
def same(tmp_path, chains_run):
    """The fused model behaves as the stock one: see :class:`tests.support.oracle.Oracle`."""
    yield Oracle(tmp_path, chains_run)
    for name in [name for name in sys.modules if name.startswith("written_")]:
        del sys.modules[name]


@pytest.fixture
def run_ranks(tmp_path):
    """Run a function in several processes: see :func:`tests.support.ranks.run_ranks`."""
    return functools.partial(ranks.run_ranks, tmp_path)
