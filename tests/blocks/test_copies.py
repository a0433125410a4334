"""Copies, files and references: a fused model is its own, and what others hold of it stays what it was."""

import copy

import pytest
import torch
from torch import nn

import fused_resnet
from fused_resnet import blocks, models
from fused_resnet.blocks.mixin import FusedModule
from tests.support.hand_written import Basic, images, make
from tests.support.networks import through_file, through_pickle


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_file], ids=lambda f: f.__name__)
def test_a_copy_is_fused_too_and_independent(duplicate, chains_run):
    padded = models.BasicBlock(16, 24, 1, models.ZeroPadded(8))
    model = fused_resnet.fuse(make(nn.Sequential, Basic(), Basic(8, 16, 2), padded))
    twin = duplicate(model)
    assert torch.equal(twin(images()), model(images()))
    assert len(chains_run) == 6
    assert not {id(t) for t in twin.state_dict(keep_vars=True).values()} & {
        id(t) for t in model.state_dict(keep_vars=True).values()
    }
    fused_resnet.unfuse(twin)
    assert isinstance(model[0], FusedModule)
    assert type(twin[0]) is Basic


def test_a_model_remains_what_others_hold_of_it():
    model = make(nn.Sequential, Basic(), Basic(8, 16, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    modules, parameters = list(model.modules()), list(model.parameters())
    keys = list(model.state_dict())
    fused = fused_resnet.fuse(model)
    assert fused is model
    assert all(a is b for a, b in zip(modules, fused.modules(), strict=True))
    assert all(a is b for a, b in zip(parameters, fused.parameters(), strict=True))
    assert list(fused.state_dict()) == keys
    assert isinstance(fused[0], Basic)
    before = fused[0].conv1.weight.detach().clone()
    fused(images()).sum().backward()
    optimizer.step()
    assert not torch.equal(fused[0].conv1.weight, before)


def test_state_dicts_go_both_ways():
    stock, fused = make(Basic), fused_resnet.fuse(make(Basic))
    nn.init.normal_(stock.conv1.weight)
    fused.load_state_dict(stock.state_dict(), strict=True)
    stock.load_state_dict(fused.state_dict(), strict=True)
    assert torch.equal(fused.conv1.weight, stock.conv1.weight)


def test_averaged_models_work(chains_run):
    averaged = torch.optim.swa_utils.AveragedModel(fused_resnet.fuse(make(Basic)))
    averaged.update_parameters(make(Basic))
    torch.optim.swa_utils.update_bn([images()], averaged)
    assert len(chains_run) == 1


def test_the_names_in_pickles_of_fused_models_are_there():
    """They have been in ``fused_resnet.blocks`` since before it was a package."""
    for name in ("BlockPaths", "Container", "Fusion", "UnitPaths", "_restore_plan", "restore"):
        assert callable(getattr(blocks, name))
