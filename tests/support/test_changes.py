import torch
from torch import nn

from tests.support.changes import double_forward


def test_one_modules_forward_is_doubled_and_no_other_ones():
    x = torch.ones(2)
    one, other = nn.ReLU(), nn.ReLU()
    double_forward(one)
    assert torch.equal(one(x), 2 * x)
    assert torch.equal(other(x), x)
