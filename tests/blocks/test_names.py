"""A fused module keeps its class's name, says that it is fused, goes through files and wrappers that go by names."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import fused_resnet
from tests.support.networks import Block, Network, Outer, through_file, through_pickle
from tests.support.oracle import assert_same_step, fuse, images, make


@pytest.mark.parametrize("block", [Block, Outer.Inner], ids=lambda c: c.__qualname__)
def test_a_class_keeps_its_names(block):
    stock, fused = make(lambda: Network(block)), fuse(make(lambda: Network(block)))
    assert len(fused_resnet.explain(fused).fused) == 3
    for a, b in zip(fused.modules(), stock.modules(), strict=True):
        for attribute in ("__name__", "__qualname__", "__module__", "__doc__"):
            assert getattr(type(a), attribute) == getattr(type(b), attribute)
        assert isinstance(a, type(b))
        assert a._get_name() == b._get_name()


def test_a_fused_block_says_so_in_its_repr_and_in_explain():
    stock, fused = make(Network), fuse(make(Network))
    assert "fused" not in repr(stock)
    assert "fused" in repr(fused.layers[0])
    assert "own=1" in repr(fused.layers[0])
    assert "fused" in repr(fused)
    assert repr(fused.fc) == repr(stock.fc)
    assert "fused" in str(fused_resnet.explain(fused))
    assert repr(fused_resnet.unfuse(fused)) == repr(stock)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, copy.copy, through_pickle, through_file], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_copy_is_fused_too(duplicate, training, chains_run):
    stock = make(lambda: Network(Outer.Inner)).train(training)
    fused = duplicate(fuse(copy.deepcopy(stock)))
    assert_same_step(fused, stock)
    assert len(chains_run) == 3
    assert [type(m).__name__ for m in fused.modules()] == [type(m).__name__ for m in stock.modules()]
    if duplicate is not copy.copy:
        assert_same_step(duplicate(fused_resnet.unfuse(fused)), copy.deepcopy(fused))


def test_a_pickle_names_the_stock_class():
    text = pickle.dumps(fuse(make(Block)), protocol=0).decode("latin1")
    assert "FusedBlock" not in text


@pytest.mark.parametrize("name", ["Block", "Inner"])
def test_wrapping_by_name_finds_the_blocks(name):
    """As ``no_split_modules`` of Accelerate and policies of FSDP do."""
    block = {"Block": Block, "Inner": Outer.Inner}[name]
    fused = fuse(make(lambda: Network(block)))
    assert [n for n, m in fused.named_modules() if m.__class__.__name__ == name] == ["layers.0", "layers.1"]


def test_wrapping_by_class_finds_the_blocks():
    from torch.distributed.fsdp.wrap import _module_wrap_policy, transformer_auto_wrap_policy

    fused = fuse(make(Network))
    for policy in (transformer_auto_wrap_policy, _module_wrap_policy):
        keyword = "transformer_layer_cls" if policy is transformer_auto_wrap_policy else "module_classes"
        found = [
            n for n, m in fused.named_modules() if policy(m, recurse=False, nonwrapped_numel=0, **{keyword: {Block}})
        ]
        assert found == ["layers.0", "layers.1"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_a_fused_model_is_stocks():
    fused = fuse(make(Block)).eval()
    scripted = torch.jit.script(fused)
    assert "fused_resnet::" not in str(scripted.inlined_graph)
    assert torch.equal(scripted(images(2, 4, 6, 6)), fused_resnet.unfuse(fused)(images(2, 4, 6, 6)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripting_after_unfuse_works():
    model = make(Block).eval()
    scripted = torch.jit.script(fused_resnet.unfuse(fuse(model)))
    torch.testing.assert_close(scripted(images(2, 4, 6, 6)), model(images(2, 4, 6, 6)))


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.filterwarnings("ignore")
def test_a_fused_model_is_exported_to_onnx_as_stock_is(training, dynamo):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    mode = torch.onnx.TrainingMode.TRAINING if training else torch.onnx.TrainingMode.EVAL

    def exported(model):
        file = io.BytesIO()
        torch.onnx.export(model, (images().float(),), file, dynamo=dynamo, training=mode, verbose=False)
        graph = onnx.load_from_string(file.getvalue()).graph
        return [(node.domain, node.op_type, [*node.input], [*node.output]) for node in graph.node]

    stock = make(Network).float().train(training)
    assert exported(fuse(copy.deepcopy(stock))) == exported(stock)


def test_a_subclass_of_a_fused_class_can_be_made_and_fused(chains_run):
    fused = fuse(make(Block))
    child = type("Child", (type(fused),), {})
    assert issubclass(child, Block)
    assert child.__name__ == "Child"
    assert_same_step(fuse(make(Block)), make(Block), images(2, 4, 6, 6))
    assert len(chains_run) == 1


def test_super_in_a_forward_is_the_stock_class(chains_run):
    class Child(Block):
        def forward(self, x):
            return super().forward(x) * 2

    class GrandChild(Child):
        def forward(self, x):
            return super().forward(x) + x

    for training in (True, False):
        stock = make(lambda: nn.Sequential(GrandChild())).train(training)
        assert_same_step(fuse(copy.deepcopy(stock)), stock, images(2, 4, 6, 6))
