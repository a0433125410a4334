"""A class is traced once for all instances that its trace could not tell apart, and again for any other."""

import copy
import itertools
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from fused_resnet.surgery import finder
from fused_resnet.surgery.finder import Finder
from tests.support.changes import double_forward
from tests.support.networks import Network
from tests.support.oracle import Basic, assert_same_step, fuse, make

OPTIONS = ("auto", "fast")


class Scaled(Basic):
    """A block whose forward is steered by all that a forward is usually steered by."""

    plain = None

    def __init__(self):
        super().__init__()
        self.scale, self.flag, self.widths, self.function = 1.0, True, [1, 2], F.relu
        self.options = {"add": True}
        self.act, self.extra, self.listed = nn.ReLU(), None, nn.ModuleList([nn.Identity()])
        self.register_buffer("shift", None)

    def helped(self, out):
        return out

    def forward(self, x):
        out = self.helped(x)
        out = self.function(self.bn1(self.conv1(out))) * self.scale
        out = self.bn2(self.conv2(out))
        if self.flag and self.conv1.stride == (1, 1):
            out = out * sum(self.widths)
        if self.options["add"]:
            out = out + x
        if self.extra is not None:
            out = self.extra(out)
        for module in self.listed:
            out = module(out)
        if self.training:
            out = out + getattr(self, "late", 0.0)
        if self.plain is not None:
            out = out + self.plain
        if self.shift is not None:
            out = out + self.shift
        return self.act(out)


def scale(block):
    block.scale = 2.0


def another_type_of_number(block):
    block.scale = 1


def flag(block):
    block.flag = False


def an_item_of_a_list(block):
    block.widths[1] = 5


def an_item_of_a_dict(block):
    block.options["add"] = False


def a_function(block):
    block.function = torch.tanh


def a_layer(block):
    block.act = nn.GELU()


def a_layer_in_place(block):
    block.act = nn.ReLU(inplace=True)


def a_child_that_was_none(block):
    block.extra = nn.BatchNorm2d(4)


def a_longer_list_of_modules(block):
    block.listed.append(nn.ReLU())


def the_same_layer_twice(block):
    block.bn2 = block.bn1


def an_attribute_by_name(block):
    block.late = 0.5


def an_attribute_of_a_layer(block):
    block.conv1 = nn.Conv2d(4, 4, 3, stride=(1, 1), padding=1)
    block.conv1.stride = [1, 1]


def a_buffer_that_was_none(block):
    block.shift = torch.ones(())


def a_tensor_that_is_no_buffer(block):
    block.plain = torch.ones(())


def a_hook(block):
    block.bn2.register_forward_hook(lambda m, args, out: out * 2)


def a_forward_of_its_own(block):
    double_forward(block)


def a_method_of_its_own(block):
    block.helped = types.MethodType(lambda self, out: out * 2, block)


def one_weight_for_two_layers(block):
    block.conv2.weight = block.conv1.weight


def a_parametrization(block):
    nn.utils.parametrizations.weight_norm(block.conv2)


def pruned(block):
    prune.l1_unstructured(block.conv1, "weight", amount=0.3)


def nothing(block):
    pass


CHANGES = [
    scale, another_type_of_number, flag, an_item_of_a_list, an_item_of_a_dict, a_function, a_layer, a_layer_in_place,
    a_child_that_was_none, a_longer_list_of_modules, the_same_layer_twice, an_attribute_by_name,
    an_attribute_of_a_layer, a_buffer_that_was_none, a_tensor_that_is_no_buffer, a_hook, a_forward_of_its_own,
    a_method_of_its_own, one_weight_for_two_layers, a_parametrization, pruned, nothing,
]  # fmt: skip


@pytest.fixture
def traces(first_arguments):
    """The modules that were traced."""
    return first_arguments(finder, "trace")


def two(change, changed):
    blocks = [make(Scaled), make(Scaled)]
    change(blocks[changed])
    return nn.Sequential(*blocks)


@pytest.mark.parametrize("changed", [0, 1])
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_what_is_found_together_is_found_alone(change, changed):
    together = Finder(OPTIONS)
    for block in two(change, changed):
        assert together.plans(block) == Finder(OPTIONS).plans(block)


@pytest.mark.parametrize("changed", [0, 1])
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_two_of_a_class_that_differ_compute_what_stock_does(change, changed):
    for training in (True, False):
        stock = two(change, changed).double().train(training)
        fused = fuse(two(change, changed).double().train(training))
        assert_same_step(fused, stock)


def test_equal_instances_are_traced_once(traces):
    fuse(Network(n=2))
    few = len(traces)
    traces.clear()
    fuse(Network(n=12))
    assert len(traces) == few


def test_a_forward_that_does_not_ask_for_its_mode_is_traced_for_both_at_once(traces):
    plans = Finder(OPTIONS).plans(Basic())
    assert len(traces) == 1
    assert plans[True] is plans[False]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_forward_that_asks_for_its_mode_has_a_plan_for_each(training):
    block = make(Scaled).train(training)
    plans = Finder(OPTIONS).plans(block)
    assert plans.keys() == {True, False}
    assert plans[True] != plans[False]
    fused, stock = fuse(copy.deepcopy(block)), block
    for mode in (training, not training):
        assert_same_step(fused.train(mode), stock.train(mode))


def test_the_mode_of_every_module_stays_what_it_was():
    model = Network(n=2)
    modules = list(model.modules())
    for mode, module in zip(itertools.cycle([True, False, False]), modules, strict=False):
        module.training = mode
    before = [module.training for module in modules]
    Finder(OPTIONS).plans(model)
    Finder(OPTIONS).plans(model.layers[0])
    assert [module.training for module in modules] == before


@pytest.mark.parametrize("name", ["densenet121", "mobilenet_v3_small", "mnasnet0_5", "resnet50", "shufflenet_v2_x0_5"])
def test_what_is_found_in_a_whole_network_is_found_in_every_module_alone(name):
    torchvision = pytest.importorskip("torchvision", reason="its networks are what is looked at")
    model = torchvision.models.get_model(name, weights=None)
    together = Finder(OPTIONS)
    for module in model.modules():
        assert together.plans(module) == Finder(OPTIONS).plans(module)
