import pytest
import torch

from fused_resnet import models
from fused_resnet.bench.accuracy import OUTPUT, WrongResult, check
from fused_resnet.bench.block import BlockStep, distinct_blocks
from fused_resnet.bench.network import NetworkStep, Workload
from fused_resnet.bench.operation import SHORTCUTS, STOCK_ACTS, Operation
from fused_resnet.bench.peers import COMPILED, DTYPES, EXACT_PEER, STOCK_PEER, TIMM, Peer, forget_compiled
from fused_resnet.bench.settings import Settings
from fused_resnet.ops.activation import BY_NAME, value

CPU = torch.device("cpu")
FUSED_PEER = Peer("fused", "auto")
CONTEST = (FUSED_PEER, STOCK_PEER, EXACT_PEER)


def tiny(dtype="fp32", mode="train", model="resnet20"):
    return Workload(model, 2, 32 if model == "resnet18" else 16, dtype, CPU, mode)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shortcut", SHORTCUTS)
@pytest.mark.parametrize("act", STOCK_ACTS)
def test_the_fused_operation_is_what_stock_computes(act, shortcut, dtype):
    stock = Operation.make((2, 8, 7, 5), shortcut, DTYPES[dtype], CPU, act=act)
    check("fused", *(stock.by(peer).result() for peer in CONTEST))


@pytest.mark.parametrize("act", STOCK_ACTS)
def test_the_fused_operation_has_an_activation_of_its_own(act):
    fused, relu = (
        Operation.make((2, 8, 7, 5), "residual", torch.float32, CPU, act=name).by(FUSED_PEER).forward()
        for name in (act, "relu")
    )
    assert torch.equal(fused, relu) == (act == "relu")


def test_every_activation_has_one_of_torch():
    v = torch.linspace(-5, 5, 101)
    for name, act in BY_NAME.items():
        torch.testing.assert_close(STOCK_ACTS[name](v.clone()), value(act, v), rtol=0, atol=0)
    assert STOCK_ACTS.keys() == BY_NAME.keys()


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_stock_is_relu_of_batch_norm_plus_shortcut(shortcut):
    operation = Operation.make((2, 8, 7, 5), shortcut, torch.float32, CPU)

    def batch_norm(x, norm):
        layer = torch.nn.BatchNorm2d(8)
        layer.load_state_dict(norm._asdict(), strict=False)
        return layer(x)

    z = batch_norm(operation.x, operation.norm)
    if shortcut == "residual":
        z = z + operation.residual
    if shortcut == "dual":
        z = z + batch_norm(operation.residual, operation.residual_norm)
    torch.testing.assert_close(operation.forward(), z.relu())


def test_inputs_are_random_and_channels_last():
    operation = Operation.make((2, 8, 7, 5), "dual", torch.bfloat16, CPU)
    for tensor in (operation.x, operation.residual, operation.grad):
        assert tensor.is_contiguous(memory_format=torch.channels_last)
        assert tensor.float().std() > 0.5
    assert not torch.equal(operation.x, operation.residual)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_fused_step_is_what_stock_computes(dtype, mode):
    check("fused", *(NetworkStep(tiny(dtype, mode), peer).result() for peer in CONTEST))


def test_a_step_in_eval_has_no_gradient_and_moves_nothing():
    step = NetworkStep(tiny(mode="eval"), FUSED_PEER)
    before = [tensor.clone() for tensor in step.state()]
    step()
    assert step.result().keys() == {OUTPUT}
    assert all(map(torch.equal, before, step.state()))
    assert all(parameter.grad is None for parameter in step.model.parameters())


def test_timm_trains_the_same_network():
    pytest.importorskip("timm")
    peers = (Peer(TIMM), STOCK_PEER, EXACT_PEER)
    theirs, *others = (NetworkStep(tiny(model="resnet18"), peer) for peer in peers)
    assert type(theirs.model).__module__.startswith("timm.")
    check(TIMM, *(step.result() for step in (theirs, *others)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Inductor's own
@pytest.mark.parametrize("act", ["relu", "silu"])
def test_the_compiled_operation_is_what_stock_computes(act):
    forget_compiled()
    stock = Operation.make((2, 8, 7, 5), "residual", torch.float32, CPU, act=act)
    check(COMPILED, *(stock.by(peer).result() for peer in (Peer(COMPILED), STOCK_PEER, EXACT_PEER)))


def test_peers_start_from_the_same_network_and_images():
    stock, fused = NetworkStep(tiny(), STOCK_PEER), NetworkStep(tiny(), FUSED_PEER)
    assert torch.equal(stock.images, fused.images)
    assert torch.equal(stock.labels, fused.labels)
    assert all(map(torch.equal, stock.state(), fused.state()))
    assert stock.images.is_contiguous(memory_format=torch.channels_last)


def test_a_step_moves_the_weights():
    step = NetworkStep(tiny(), STOCK_PEER)
    before = [parameter.detach().clone() for parameter in step.model.parameters()]
    step()
    assert not any(map(torch.equal, before, step.model.parameters()))


def test_a_constant_loss_scale_does_not_change_a_step():
    """Float16 gets it; applied to float32, the step is the same but for rounding and the weight decay."""
    plain, scaled = NetworkStep(tiny(), STOCK_PEER), NetworkStep(tiny(), STOCK_PEER)
    scaled.loss_scale = 1024.0
    for group in (*plain.optimizer.param_groups, *scaled.optimizer.param_groups):
        group["weight_decay"] = 0.0
    scaled.optimizer.param_groups[0]["lr"] /= 1024
    plain(), scaled()
    for a, b in zip(plain.model.parameters(), scaled.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_batches_take_turns():
    step = NetworkStep(tiny(), STOCK_PEER, batches=2)
    seen = [step.images]
    for _ in range(2):
        step()
        seen.append(step.images)
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])


def test_a_wrong_gradient_is_noticed():
    step = NetworkStep(tiny(), FUSED_PEER)
    step.model.layer1[0].conv1.weight.register_hook(lambda gradient: 1.1 * gradient)
    stock, exact = (NetworkStep(tiny(), peer).result() for peer in (STOCK_PEER, EXACT_PEER))
    with pytest.raises(WrongResult, match=r"gradient of layer1\.0\.conv1\.weight"):
        check("fused", step.result(), stock, exact)


def test_a_resnet50_has_eight_distinct_blocks():
    blocks = distinct_blocks("resnet50", 224)
    names = [block.name for block in blocks]
    assert names == [f"layer{stage}.{index}" for stage in (1, 2, 3, 4) for index in (0, 1)]
    assert [block.stride for block in blocks] == [1, 1, 2, 1, 2, 1, 2, 1]
    assert blocks[2].input == (256, 56, 56)
    assert blocks[2].output == 512


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index", [0, 1])
def test_the_fused_block_is_what_stock_computes(index, dtype):
    shape = distinct_blocks("resnet20", 32)[index + 1]  # the first of a stage, which has a projection, and the next
    drawn = BlockStep.make(shape, 8, dtype, CPU)
    check("fused", *(BlockStep(*drawn, peer).result() for peer in CONTEST))


def test_a_block_gets_every_gradient():
    shape = distinct_blocks("resnet20", 16)[1]
    block, x, grad = BlockStep.make(shape, 2, "fp32", CPU)
    gradients = BlockStep(block, x, grad, FUSED_PEER)()
    assert len(gradients) == 1 + len(list(block.parameters()))
    assert isinstance(block, models.BasicBlock)
    assert type(block) is models.BasicBlock  # stock's own is left alone


def test_contenders_are_stock_and_the_fused_peer_once_for_each_engine():
    settings = Settings(peers=("stock", "fused", "compile"), engines=("auto", "reference", "reference"))
    chosen = settings.serving_engines("fp32")
    assert chosen[-1] == "reference"
    expected = [STOCK_PEER, *(Peer("fused", engine) for engine in chosen), Peer("compile")]
    assert settings.contenders("fp32") == expected
