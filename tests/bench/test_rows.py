import json

import pytest

from fused_resnet.bench.rows import BYTES, PROFILED_SECONDS, SECONDS, Limit, Row, Spread


def row(quantity=SECONDS, **values):
    return Row("model", {"model": "resnet18", "dtype": "fp32"}, "cpu", quantity, values)


def test_a_spread_is_the_median_and_the_percentiles():
    assert Spread.of([5.0, 1.0, 3.0, 2.0, 4.0, 6.0]) == (3.5, 2.0, 5.0)


def test_one_value_is_its_own_spread():
    assert Spread.of([7.0]) == (7.0, 7.0, 7.0)


def test_a_speed_up_is_that_within_the_rounds():
    # the machine slows down by the round: the rounds' ratios agree, though the times do not
    ratio = row(stock=(2.0, 4.0, 12.0), fused=(1.0, 2.0, 6.0)).ratio("fused")
    assert ratio == (2.0, 2.0, 2.0)


def test_one_disturbed_round_moves_neither_median_nor_ratio():
    ratio = row(stock=(3.0, 3.0, 3.0, 3.0, 3.0, 900.0), fused=(2.0,) * 6).ratio("fused")
    assert ratio == (1.5, 1.5, 1.5)


def test_memory_is_compared_as_a_part_of_stock():
    assert row(BYTES, stock=(8.0,), fused=(6.0,)).ratio("fused").median == 0.75


def test_a_peer_is_compared_with_any_other():
    assert row(stock=(8.0,), fused=(2.0,), compile=(6.0,)).ratio("fused", "compile").median == 3.0


def test_peers_are_compared_with_stock_and_where_there_is_none_with_pytorchs_parts_of_it():
    assert row(stock=(8.0,), torch=(4.0,), fused=(2.0,)).ratio("fused").median == 4.0
    parts = row(torch=(4.0,), fused=(2.0,), matmul=(1.0,))
    assert parts.compared() == ["fused", "matmul"]
    assert parts.ratio("fused").median == 2.0
    assert row(fused=(2.0,), matmul=(1.0,)).compared() == []


def test_a_class_of_kernels_that_one_peer_has_not_has_no_ratio():
    assert row(PROFILED_SECONDS, stock=(8.0,), fused=(0.0,)).compared() == []


def test_the_part_of_the_limit():
    limited = Row("op", {}, "", SECONDS, {"stock": (2.0,)}, limit=Limit(100, 0, 1.5))
    assert limited.part_of_limit("stock") == 0.75
    assert row(stock=(2.0,)).part_of_limit("stock") is None


def test_the_record_of_a_row_holds_every_value():
    record = row(stock=(2.0, 2.0), fused=(1.0, 1.0)).record()
    assert record["case"] == {"model": "resnet18", "dtype": "fp32"}
    assert record["quantity"] == "seconds"
    assert record["peers"]["stock"] == {"median": 2.0, "p20": 2.0, "p80": 2.0, "values": [2.0, 2.0]}
    assert record["peers"]["fused"]["speed-up"] == {"median": 2.0, "p20": 2.0, "p80": 2.0}


@pytest.mark.parametrize("limit", [None, Limit(100, 10, 1.5)])
def test_a_row_is_read_as_it_was_written(limit):
    written = Row("op", {"shape": "1x1x1"}, "cpu", SECONDS, {"stock": (2.0, 3.0)}, {"fused": "is wrong"}, limit, 8)
    assert Row.read(json.loads(json.dumps(written.record()))) == written


def test_a_row_of_the_first_format_is_read():
    old = row(stock=(2.0,), fused=(1.0,)).record() | {"refused": "fused is wrong: output z", "peers": {}}
    del old["limit"], old["images"]
    assert Row.read(old).refused == {"fused": "fused is wrong: output z"}
