"""What autograd keeps is counted once, and what was there before is not."""

import pytest
import torch
from torch import nn

from tests.support.saved import kept_for_backward


def test_parameters_and_the_input_are_not_counted():
    assert kept_for_backward(nn.Linear(3, 4), torch.randn(2, 3)) == {}


def test_a_tensor_that_two_keep_is_counted_once():
    """The sigmoid keeps its output, and so does the layer behind it."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Sigmoid(), nn.Linear(3, 4), nn.Sigmoid())
    shapes = [tuple(t.shape) for t in kept_for_backward(model, torch.randn(2, 3)).values()]
    assert shapes == [(2, 3), (2, 4)]


def test_under_autocast_the_cast_ones_are_kept():
    kept = kept_for_backward(nn.Linear(3, 4), torch.randn(2, 3), torch.bfloat16).values()
    assert kept
    assert {t.dtype for t in kept} == {torch.bfloat16}


def test_without_a_gradient_there_is_nothing_to_ask():
    with pytest.raises(AssertionError):
        kept_for_backward(nn.ReLU(), torch.randn(2, 3))
