from collections import deque

import pytest
import torch

from fused_resnet.bench.graphs import capture
from fused_resnet.bench.harness import make_clock, take_turns


class ScriptedClock:
    """Runs what it is given, and says what it is told to."""

    def __init__(self, seconds):
        self.seconds = deque(seconds)

    def time(self, run):
        run()
        return self.seconds.popleft()


def test_peers_take_turns_and_the_warm_up_does_not_count():
    calls = []
    peers = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    values = take_turns(peers, ScriptedClock([90, 91, 1, 2, 3, 4]), warmup=1, repeats=2)
    assert calls == ["a", "b"] * 3
    assert values == {"a": (1, 3), "b": (2, 4)}


def test_garbage_is_collected_again_after_a_peer_failed():
    import gc

    def fail():
        assert not gc.isenabled()
        raise RuntimeError("a peer")

    with pytest.raises(RuntimeError, match="a peer"):
        take_turns({"a": fail}, ScriptedClock([]), warmup=0, repeats=1)
    assert gc.isenabled()


def test_the_cpu_clock_measures_the_call():
    import time

    assert make_clock(torch.device("cpu")).time(lambda: time.sleep(0.02)) >= 0.02


def test_only_a_gpu_captures_graphs():
    with pytest.raises(ValueError, match="a CUDA graph needs a CUDA device, got cpu"):
        capture(lambda: None, torch.device("cpu"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_cuda_clock_measures_the_device_not_the_launch():
    device = torch.device("cuda")
    a = torch.randn(4096, 4096, device=device)
    clock = make_clock(device)

    def matmuls(count):
        return clock.time(lambda: [a @ a for _ in range(count)])

    matmuls(1)
    assert matmuls(40) > 10 * matmuls(1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_replay_does_the_work_again():
    x = torch.zeros(1000, device="cuda")
    replay = capture(lambda: x.add_(1), x.device)
    before = x[0].item()
    replay()
    assert (x == before + 1).all()
