"""A snapshot of modules sees every change to what it was taken of."""

import copy

import pytest
import torch
from torch import nn

from fused_resnet.blocks.snapshot import Snapshot


@pytest.mark.parametrize("module", [nn.Conv2d(2, 3, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.Sequential(nn.ReLU())])
def test_a_snapshot_sees_every_attribute(module):
    snapshot = Snapshot.of([module])
    assert snapshot.holds()
    for name, value in list(vars(module).items()):
        vars(module)[name] = object()
        assert not snapshot.holds(), name
        vars(module)[name] = value
        assert snapshot.holds(), name
        del vars(module)[name]
        assert not snapshot.holds(), name
        vars(module)[name] = value
    vars(module)["more"] = 1
    assert not snapshot.holds()
    del module.more
    for group in ("_parameters", "_buffers", "_modules"):
        for name, value in list(vars(module)[group].items()):
            vars(module)[group][name] = copy.deepcopy(value)
            assert not snapshot.holds() or value is None, name
            vars(module)[group][name] = value
    assert snapshot.holds()


def test_what_cannot_be_compared_has_changed():
    module = nn.ReLU()
    module.tensor = torch.zeros(2)
    snapshot = Snapshot.of([module])
    assert snapshot.holds()
    module.tensor = torch.zeros(2)
    assert not snapshot.holds()
