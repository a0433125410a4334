"""The 1×1 convolutions with their batch norms, part by part."""

import dataclasses
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fused_resnet import ops
from fused_resnet.bench.convolution import ConvShape
from fused_resnet.bench.peers import EXACT_PEER, Peer
from fused_resnet.bench.pointwise import END, FIRST, PROJECTION, STEPS, Pointwise, PointwiseShape, distinct_pointwise
from fused_resnet.bench.rows import FUSED, MATMUL, TORCH, Row
from fused_resnet.bench.settings import Settings
from fused_resnet.bench.suites import pointwise as suite
from fused_resnet.bench.suites.contest import refusals
from fused_resnet.bench.suites.pointwise import measure_pointwise, pointwise_cases
from tests.support.triton_engine import triton_kernels

CPU = torch.device("cpu")
HERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPE = PointwiseShape(6, 10, 5, 7)
FUSED_STEPS = [step for step in STEPS if step.fused]
SETTINGS = Settings(models=("resnet50",), batch_size=2, image_size=32, dtypes=("fp32",), copy=1e9, matmul=1e9)
SETTINGS = dataclasses.replace(SETTINGS, op_repeats=2, largest_only=True)


def draw(step, dtype=torch.float32, device=CPU):
    return Pointwise.make(step, SHAPE, 3, dtype, device)


@pytest.fixture(scope="module")
def rows():
    return list(measure_pointwise(SETTINGS))


def test_a_network_has_each_shape_once_and_the_largest_images_first():
    shapes = list(distinct_pointwise(("resnet18", "resnet50"), 224))
    assert len(shapes) == 18
    assert [shape.height for shape in shapes] == [56] * 4 + [28] * 5 + [14] * 5 + [7] * 4
    assert distinct_pointwise(("resnet50", "resnet152"), 224) == distinct_pointwise(("resnet50",), 224)


def test_a_shape_knows_its_places_in_a_block():
    shapes = distinct_pointwise(("resnet50",), 224)
    assert shapes[PointwiseShape(64, 64, 56, 56)] == [FIRST]
    assert sorted(shapes[PointwiseShape(64, 256, 56, 56)]) == [END, PROJECTION]
    assert shapes[PointwiseShape(256, 512, 28, 28)] == [PROJECTION]  # the pixels that its stride leaves
    assert shapes[PointwiseShape(512, 2048, 7, 7)] == [END]
    assert {place for places in distinct_pointwise(("resnet18",), 224).values() for place in places} == {PROJECTION}


@pytest.mark.parametrize("step", FUSED_STEPS, ids=lambda step: step.name)
def test_both_sides_of_a_step_compute_the_same(step):
    exact = draw(step, torch.float64)
    fused, apart = (exact.by(Peer(name, "reference")).result() for name in (FUSED, TORCH))
    assert fused.keys() == apart.keys()
    for group, tensors in fused.items():
        assert tensors.keys() == apart[group].keys()
        for name, tensor in tensors.items():
            torch.testing.assert_close(apart[group][name], tensor.to(apart[group][name].dtype))


@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # of Triton's interpreter
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("step", FUSED_STEPS, ids=lambda step: step.name)
def test_tritons_own_products_are_let_in(step, dtype, monkeypatch):
    triton, kernels = triton_kernels(monkeypatch), ops.kernels
    monkeypatch.setattr(ops, "kernels", lambda name, *where: triton if name == "triton" else kernels(name, *where))
    assert refusals(draw(step, dtype, HERE).by, [Peer(name, "triton") for name in (TORCH, FUSED)]) == {}


def test_steps_differ_by_what_their_names_say():
    parts = {step.name: step for step in STEPS}

    def results(name):
        return {key for tensors in draw(parts[name]).result().values() for key in tensors}

    assert results("fprop+stats") - results("fprop") == {"moments", "affine"}
    assert results("dgrad+mask") - results("dgrad+add") == {"sums"}
    assert results("dgrad+wgrad") - results("dgrad+mask") == {"weight"}
    assert results("bwd") - results("wgrad") == results("end bwd") - results("end wgrad") == {"x"}
    assert results("end bwd+sums") - results("end bwd") == {"sums"}
    raw, prologue, residual = (draw(parts[name]) for name in ("end", "end+prologue", "end+residual"))
    assert raw.x_affine is raw.residual is prologue.residual is None
    assert prologue.x_affine is not None is not residual.residual


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_every_peer_gets_the_drawn_tensors_whatever_others_wrote(step):
    drawn = draw(step)
    first, second = (drawn.by(Peer(TORCH, "reference")).result() for _ in range(2))
    for group, tensors in first.items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(second[group][name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_the_arithmetic_is_that_of_the_products(step):
    drawn = draw(step)
    drawn.products()  # makes what a product is of
    with FlopCounterMode(display=False) as counter:
        drawn.products()
    assert step.flop(SHAPE, 3) == counter.get_total_flops()


def test_bytes_are_those_of_the_convolution_and_of_what_a_part_adds():
    parts, (k, n, height, width) = {step.name: step for step in STEPS}, SHAPE
    conv = ConvShape((k, height, width), (n, k, 1, 1), 1, 0, 1)
    x, y = (3 * channels * height * width * 2 for channels in (k, n))

    def bytes(name):
        return parts[name].bytes(SHAPE, 3, 2)

    assert bytes("fprop") == bytes("fprop+stats") == bytes("end wgrad") == conv.bytes(3, 2)
    assert bytes("wgrad") - bytes("end wgrad") == x  # whose forward makes the Gram matrix
    assert bytes("dgrad+wgrad") == bytes("dgrad+mask")
    assert bytes("dgrad+add") - bytes("fprop") == x  # read as well as written
    assert bytes("dgrad+mask") - bytes("dgrad+add") == x
    assert bytes("end") - bytes("fprop") == x  # a pass for the statistics
    assert bytes("end+residual") - bytes("end+prologue") == y
    assert bytes("bwd") - bytes("wgrad") == bytes("end bwd") - bytes("end wgrad") == 2 * x + y
    assert bytes("end bwd+sums") == bytes("end bwd")  # they are made of what is there


def test_the_suite_has_every_step_and_compares_with_pytorchs_convolutions(rows):
    assert {row.case["step"] for row in rows} == {step.name for step in STEPS}
    for row in rows:
        fused = row.case["step"] not in ("fprop", "dgrad+add")
        assert list(row.values) == ([TORCH, FUSED, MATMUL] if fused else [TORCH, MATMUL])
        assert row.engine == (SETTINGS.serving_engines("fp32")[0] if fused else "")
        assert row.compared() == list(row.values)[1:]
        assert row.ratio(MATMUL).median == row.ratio(MATMUL, TORCH).median
        assert row.limit.seconds > 0


def test_a_row_is_read_as_it_was_written_and_holds_the_ratio(rows):
    for row in rows:
        record = json.loads(json.dumps(row.record()))
        assert Row.read(record) == row
        assert "speed-up" in record["peers"][MATMUL]


def test_a_rehearsal_has_every_step_once():
    steps = [step for _, step in pointwise_cases(SETTINGS)]
    assert sorted(step.name for step in steps) == sorted(step.name for step in STEPS)
    everything = list(pointwise_cases(dataclasses.replace(SETTINGS, image_size=224, largest_only=False)))
    assert len(everything) == len(set(everything)) == 83
    assert [str(shape) for shape, _ in everything[:4]] == ["64>256 56x56"] * 4


def test_engines_have_a_row_each_and_share_the_products():
    settings = dataclasses.replace(SETTINGS, engines=("auto", "reference"))
    rows = [row for row in measure_pointwise(settings) if row.case["step"] == "end"]
    assert [row.engine for row in rows] == [*settings.serving_engines("fp32")]
    assert rows[0].values[MATMUL] == rows[1].values[MATMUL]
    assert rows[0].values[TORCH] != rows[1].values[TORCH]


def test_a_wrong_result_is_refused_and_the_others_keep_their_figures(monkeypatch):
    right = Pointwise._conv_stats

    def wrong(self):
        y, moments, affine = right(self)
        return y, moments, affine * (1.01 if self.peer.name == TORCH else 1)

    monkeypatch.setattr(Pointwise, "_conv_stats", wrong)
    monkeypatch.setattr(suite, "STEPS", [step for step in STEPS if step.name == "end"])
    (row,) = measure_pointwise(SETTINGS)
    assert row.refused.keys() == {TORCH}
    assert "is wrong: output z" in row.refused[TORCH]
    assert list(row.values) == [FUSED, MATMUL]
    assert row.compared() == []


def test_the_exact_one_is_float64_throughout():
    for step in STEPS:
        result = draw(step, torch.bfloat16).by(EXACT_PEER).result()
        assert {t.dtype for tensors in result.values() for t in tensors.values()} == {torch.float64}
