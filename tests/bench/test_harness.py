from collections import deque

import pytest
import torch

from fused_resnet.bench.harness import BYTES, SECONDS, Row, Spread, make_clock, take_turns


class ScriptedClock:
    """Runs what it is given, and says what it is told to."""

    def __init__(self, seconds):
        self.seconds = deque(seconds)

    def time(self, run):
        run()
        return self.seconds.popleft()


def row(quantity=SECONDS, **values):
    return Row("model", {"model": "resnet18", "dtype": "fp32"}, "cpu", quantity, values)


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


def test_a_spread_is_the_median_and_the_quartiles():
    assert Spread.of([5.0, 1.0, 3.0, 2.0, 4.0]) == (3.0, 2.0, 4.0)


def test_one_value_is_its_own_spread():
    assert Spread.of([7.0]) == (7.0, 7.0, 7.0)


def test_a_speed_up_is_that_within_the_rounds():
    # the machine slows down by the round: the rounds' ratios agree, though the times do not
    ratio = row(stock=(2.0, 4.0, 12.0), fused=(1.0, 2.0, 6.0)).ratio("fused")
    assert ratio == (2.0, 2.0, 2.0)


def test_one_disturbed_round_moves_neither_median_nor_ratio():
    ratio = row(stock=(3.0, 3.0, 3.0, 3.0, 900.0), fused=(2.0,) * 5).ratio("fused")
    assert ratio == (1.5, 1.5, 1.5)


def test_memory_is_compared_as_a_part_of_stock():
    assert row(BYTES, stock=(8.0,), fused=(6.0,)).ratio("fused").median == 0.75


def test_the_record_of_a_row_holds_every_value():
    record = row(stock=(2.0, 2.0), fused=(1.0, 1.0)).record()
    assert record["case"] == {"model": "resnet18", "dtype": "fp32"}
    assert record["quantity"] == "seconds"
    assert record["peers"]["stock"] == {"median": 2.0, "low": 2.0, "high": 2.0, "values": [2.0, 2.0]}
    assert record["peers"]["fused"]["speed-up"] == {"median": 2.0, "low": 2.0, "high": 2.0}


def test_the_cpu_clock_measures_the_call():
    import time

    assert make_clock(torch.device("cpu")).time(lambda: time.sleep(0.02)) >= 0.02


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_cuda_clock_measures_the_device_not_the_launch():
    device = torch.device("cuda")
    a = torch.randn(4096, 4096, device=device)
    clock = make_clock(device)

    def matmuls(count):
        return clock.time(lambda: [a @ a for _ in range(count)])

    matmuls(1)
    assert matmuls(40) > 10 * matmuls(1)
