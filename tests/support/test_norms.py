"""Drawn norms compute something else than they did."""

import pytest
import torch
from torch import nn

from tests.support.norms import draw_norms


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("cls", [nn.BatchNorm2d, nn.SyncBatchNorm])
def test_a_drawn_norm_is_another_one(cls, training):
    model, x = nn.Sequential(nn.Identity(), cls(4)).train(training), torch.randn(2, 4, 3, 3)

    def result():
        state = {name: t.clone() for name, t in model.state_dict().items()}
        z = nn.functional.batch_norm(
            x, state["1.running_mean"], state["1.running_var"], state["1.weight"], state["1.bias"], training
        )
        return z, state["1.running_mean"], state["1.running_var"]

    before = result()
    draw_norms(model)
    assert not any(map(torch.allclose, before, result()))


def test_what_a_norm_does_not_have_is_not_given_to_it():
    norm = nn.BatchNorm2d(4, affine=False, track_running_stats=False)
    draw_norms(norm)
    assert norm.state_dict() == {}
