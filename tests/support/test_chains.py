"""The chains are the same ones each time, and where they are clear, no ReLU reads anything near 0."""

import pytest
import torch
from torch import nn

from tests.support.chains import CHAINS, STAGES, images, make, make_stage

NAMES = [*CHAINS, *(f"stage: {name}" for name in STAGES)]


@pytest.mark.parametrize("name", NAMES)
def test_a_chain_is_made_the_same_each_time_and_takes_its_images(name):
    first, again = make(name), make(name)
    x = images(first)
    assert torch.equal(first(x), again(images(again)))
    assert not torch.equal(first(x), first(images(first, seed=3)))


def test_a_stage_has_two_names():
    for a, b in zip(make("stage: basic").parameters(), make_stage("basic").parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "norm, not affine"])
def test_where_a_chain_is_clear_no_relu_reads_a_number_near_zero(name):
    model, read = make(name, clear=True), []
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_pre_hook(lambda m, args: read.append(args[0].abs().min().item()))
    model(images(model))
    assert min(read, default=9) > 1


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_images_have_the_channels_and_the_layout_that_are_wanted(layout):
    model = make("pre-activation")
    x = images(model, size=8, layout=layout)
    assert x.shape == (4, 16, 8, 7)
    assert x.is_contiguous(memory_format=layout)
