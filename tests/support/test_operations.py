"""The operations that run are listed in order, with their arguments."""

import torch

from fused_resnet.functional import batch_norm_act
from tests.support.operations import Operations


def test_operations_come_in_order_with_their_arguments():
    x = torch.ones(2)
    with Operations() as operations:
        x.relu().add(x, alpha=2).mul_(3)
    x.sin()
    assert operations.names == ["aten::relu", "aten::add", "aten::mul_"]
    func, (first, second), keywords = operations.calls[1]
    assert func is torch.ops.aten.add.Tensor
    assert torch.equal(first, x)
    assert second is x
    assert keywords == {"alpha": 2}


def test_a_namespace_leaves_out_all_others():
    with Operations("fused_resnet") as operations:
        batch_norm_act(torch.randn(2, 3, 4, 4)).sum()
    assert operations.names
    assert {name.partition("::")[0] for name in operations.names} == {"fused_resnet"}
