"""A kernel of a 1×1 convolution and its batch norm that is off does not pass."""

from types import SimpleNamespace

import pytest
import torch

from fused_resnet.ops.activation import RELU
from fused_resnet.ops.pointwise_conv_norm import reference
from tests.support.pointwise_problem import Problem, assert_backward, assert_forward

OPERATIONS = ("pointwise_conv_norm_act", "pointwise_conv_norm_backward")


def spoiled(operation: str, result: int) -> SimpleNamespace:
    """The definition, but for one result of one operation."""
    k = SimpleNamespace(**{name: getattr(reference, name) for name in OPERATIONS})
    right = getattr(k, operation)

    def wrong(*args):
        results = list(right(*args))
        results[result] = results[result] * 1.001
        return tuple(results)

    setattr(k, operation, wrong)
    return k


@pytest.fixture
def problem():
    return Problem.draw((2, 16, 9, 5, 24), torch.float32, "relu", "affine")


def test_the_definition_passes(problem):
    assert_forward(reference, problem, RELU)
    assert_backward(reference, problem)


@pytest.mark.parametrize("result", range(3), ids=["z", "moments", "affine"])
def test_a_wrong_forward_fails(problem, result):
    with pytest.raises(AssertionError, match="less accurate than stock"):
        assert_forward(spoiled(OPERATIONS[0], result), problem, RELU)


@pytest.mark.parametrize("result", range(4), ids=["du", "dW", "dγ", "sums"])
def test_a_wrong_backward_fails(problem, result):
    k = spoiled(OPERATIONS[1], result)
    with pytest.raises(AssertionError):
        assert_backward(k, problem)
