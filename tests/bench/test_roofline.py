import pytest
import torch

from fused_resnet import models
from fused_resnet.bench.block import distinct_blocks
from fused_resnet.bench.ceilings import ARITHMETIC_PART, BANDWIDTH_PART, Ceilings
from fused_resnet.bench.memory import activation_bytes
from fused_resnet.bench.network import NetworkStep, Workload
from fused_resnet.bench.operation import Operation
from fused_resnet.bench.peers import DTYPES, FUSINGS, STOCK_PEER, Peer
from fused_resnet.bench.roofline import (
    block_shapes,
    count,
    network_shapes,
    operation_bytes,
    parameter_bytes,
    traced,
)
from fused_resnet.bench.settings import Settings
from fused_resnet.bench.suites.ceilings import ceilings, measure_ceilings
from fused_resnet.engines import why_not
from fused_resnet.surgery.steps import Recorder


def test_a_resnet50_is_that_of_the_paper():
    shapes = network_shapes("resnet50", 224)
    assert len(shapes.layers) == 53
    assert shapes.parameters == 25_557_032
    multiply_adds = sum(layer.flop for layer in shapes.layers) / 2 + shapes.classifier_flop / 2
    assert multiply_adds == pytest.approx(4.09e9, rel=0.005)  # v1.5: the stride stands in the 3x3
    assert [layer.name for layer in shapes.layers if layer.role == "dual"] == [f"layer{i}.0.conv3" for i in range(1, 5)]
    assert sum(layer.role == "end" for layer in shapes.layers) == 12
    assert [layer.role for layer in shapes.layers].count("stem") == 1


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("model", ["resnet18", "resnet50", "resnet20"])
@pytest.mark.parametrize(
    ("scheme", "peer"), [("eager", STOCK_PEER), ("fused", Peer("fused", "auto")), ("lean", Peer("lean"))]
)
def test_saved_activations_are_those_that_autograd_keeps(scheme, peer, model, dtype):
    size = 32 if model == "resnet20" else 128
    batch = 4
    step = NetworkStep(Workload(model, batch, size, dtype, torch.device("cpu")), peer)
    kept = activation_bytes(lambda: step.loss(step.logits()), step.state())
    shapes = network_shapes(model, size)
    if scheme in FUSINGS:
        input_shape = (batch, 3, size, size)
        counted = traced(
            models.create(model), shapes, scheme, input_shape=input_shape, dtype=DTYPES[dtype], engine="cpu"
        )
    else:
        counted = count(shapes, scheme, element_size=DTYPES[dtype].itemsize, batch_size=batch)
    # the classifier's input, the loss and vectors of channels are not counted
    assert batch * counted.saved == pytest.approx(kept, rel=0.03)


def test_traffic_of_one_block_by_hand():
    """ResNet-20's first block: two 3x3 convolutions of 16 channels, 32x32, an identity shortcut, float32."""
    shape = distinct_blocks("resnet20", 32)[0]
    shapes = block_shapes(shape)
    y = 16 * 32 * 32
    convolutions = 2 * 3 * 2  # two, three directions, each reads one and writes one
    batch = 8
    parameters = sum(shape.numel() for shape in (torch.empty(2, 16, 16, 3, 3), torch.empty(4, 16)))
    fixed = parameters * parameter_bytes(4) / batch
    for scheme, passes in {"eager": 13 + 16 + 3, "pointwise": 10 + 12 + 1}.items():
        traffic = count(shapes, scheme, element_size=4, batch_size=batch)
        assert traffic.bytes == 4 * y * (convolutions + passes) + fixed
        assert traffic.flop == 2 * 3 * 2 * y * 16 * 9
    # forward statistics 1, apply 2 or 3; backward reduce 2 or 3, apply 3 or 4, z on the side; dx, g, z → dx
    passes = (1 + 2) + (1 + 3) + (3 + 4) + (2 + 3 + 1) + 4
    for scheme in FUSINGS:
        block = models.create("resnet20").get_submodule(shape.name)
        traffic = traced(
            block, shapes, scheme, input_shape=(batch, *shape.input), dtype=torch.float32, engine="reference"
        )
        # weights and vectors of channels beside: each convolution reads or writes its weight
        assert traffic.bytes == pytest.approx(4 * y * (convolutions + passes) + fixed, rel=0.001)
        assert traffic.flop == 2 * 3 * 2 * y * 16 * 9


def test_traffic_of_a_block_end_without_its_output_by_hand():
    """ResNet-50's second block: 256 → 64 → 64 → 256 at 56x56, an identity shortcut, on a GPU."""
    shape = distinct_blocks("resnet50", 224)[1]
    shapes = block_shapes(shape)
    y, x = 256 * 56 * 56, 64 * 56 * 56
    fused, lean = (
        traced(
            models.create("resnet50").get_submodule(shape.name),
            shapes,
            scheme,
            input_shape=(8, *shape.input),
            dtype=torch.bfloat16,
            engine="triton",
        )
        for scheme in ("fused", "lean")
    )
    # fused: z of the unit before and y written, both read, statistics, also of the first unit, which lean makes in its
    # product; lean: x read for statistics, again for z
    forward = 2 * x + (x + y) + y + 3 * y + x, x + (x + 2 * y)
    # fused: reduce; apply, with G for the shortcut; dgrad, wgrad; of the unit before the sums, and z on the side
    # lean: G; wgrad; dgrad with the sums of the unit before
    backward = 3 * y + 5 * y + 2 * (x + y) + 2 * x + x, 3 * y + (x + y) + (2 * x + y)
    saves = forward[0] - forward[1] + backward[0] - backward[1]
    assert fused.bytes - lean.bytes == pytest.approx(2 * saves, rel=0.01)
    assert lean.flop - fused.flop == 2 * 56 * 56 * 2 * 64 * 64
    assert fused.saved - lean.saved == pytest.approx(2 * y, rel=0.01)


@pytest.mark.parametrize(("shortcut", "forward", "both"), [("none", 3, 8), ("residual", 4, 12), ("dual", 5, 13)])
def test_bytes_of_the_operation(shortcut, forward, both):
    assert operation_bytes(1000, shortcut, 2, backward=False) == forward * 2000
    assert operation_bytes(1000, shortcut, 2, backward=True) == both * 2000


@pytest.mark.parametrize(("shortcut", "forward", "both"), [("none", 3, 8), ("residual", 4, 9), ("dual", 5, 13)])
def test_bytes_of_the_operation_without_an_activation(shortcut, forward, both):
    assert operation_bytes(1000, shortcut, 2, backward=False, act="none") == forward * 2000
    assert operation_bytes(1000, shortcut, 2, backward=True, act="none") == both * 2000


MORE_PASSES = {
    ("relu", "none"): 0,
    ("relu", "residual"): 0,
    ("relu", "dual"): 2,
    ("silu", "none"): 0,
    ("silu", "residual"): 3,
    ("silu", "dual"): 5,
}


@pytest.mark.skipif(why_not("cpu", "cpu") is not None, reason="the CPU's engine was not built")
@pytest.mark.parametrize(("act", "shortcut"), MORE_PASSES)
def test_what_the_schedule_moves_more_than_the_fewest_bytes(act, shortcut):
    operation = Operation.make((2, 8, 64, 64), shortcut, torch.float32, torch.device("cpu"), act=act)
    operation = operation.by(Peer("fused", "cpu"))
    with Recorder(()) as recorder:
        operation.forward_backward()
    moved = sum(step.bytes for step in recorder.take()) / (4 * operation.x.numel())
    fewest = operation_bytes(1, shortcut, 1, backward=True, act=act)
    assert moved == pytest.approx(fewest + MORE_PASSES[act, shortcut], rel=0.001)


def test_the_limit_is_the_longer_of_two_times():
    machine = Ceilings(copy=100.0, matmul=1000.0)
    assert machine.limit(200, 1000).seconds == 2
    assert machine.limit(200, 5000).seconds == 5


def test_overlap_hides_the_shorter_time_of_each_kernel():
    machine = Ceilings(copy=1 / BANDWIDTH_PART, matmul=1 / ARITHMETIC_PART)
    traffic = count(network_shapes("resnet20", 32), "eager", element_size=2, batch_size=8)
    in_turn = traffic.images_per_second(machine, overlap=False)
    at_once = traffic.images_per_second(machine, overlap=True)
    assert 1 / in_turn == pytest.approx(traffic.bytes + traffic.flop)
    assert 1 / at_once == pytest.approx(sum(map(max, traffic.kernels)))


def test_given_ceilings_are_not_measured():
    settings = Settings(copy=4.3e12, matmul=7.9e14, dtypes=("bf16",))
    assert ceilings(settings, "bf16") == Ceilings(4.3e12, 7.9e14)
    assert [list(row.values) for row in measure_ceilings(settings)] == [["given"], ["given"]]


def test_measured_ceilings_are_measured_once():
    settings = Settings(dtypes=("fp32",)).quick()
    first = [row.values for row in measure_ceilings(settings)]
    assert [list(values) for values in first] == [["measured"], ["measured"]]
    assert [row.values for row in measure_ceilings(settings)] == first
    assert all(value > 0 for values in first for value in values["measured"])
