"""What the kernels' tests share: what is off fails."""

import pytest
import torch

from tests.support.problem import PARTS, Problem, assert_close


@pytest.fixture
def expected():
    return torch.randn(8, 16).index_fill(0, torch.tensor([3]), float("nan"))


def test_a_rounding_is_close(expected):
    assert_close(expected, expected)
    assert_close(expected * (1 + torch.finfo(torch.float32).eps), expected)


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda t: t * (1 + 8 * torch.finfo(torch.float32).eps), id="eight units in the last place"),
        pytest.param(lambda t: t.nan_to_num(), id="a number for a NaN"),
        pytest.param(lambda t: t * float("nan"), id="NaN for a number"),
        pytest.param(lambda t: t.flip(1), id="another order"),
        pytest.param(lambda t: t.double(), id="another dtype"),
        pytest.param(lambda t: t[None], id="another shape"),
    ],
)
def test_what_is_off_is_not_close(spoil, expected):
    with pytest.raises(AssertionError):
        assert_close(spoil(expected), expected)


@pytest.mark.parametrize(("shape", "channels", "first"), PARTS, ids=str)
def test_a_part_of_the_residual_is_dense(shape, channels, first):
    x, residual, grad = (torch.randn(shape).contiguous(memory_format=torch.channels_last) for _ in range(3))
    part = Problem(x, residual, grad).part(channels, first)
    assert part.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(part, residual[:, first : first + channels])
