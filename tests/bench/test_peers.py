import pytest
import torch

from fused_resnet.bench.accuracy import WrongResult, check
from fused_resnet.bench.harness import STOCK
from fused_resnet.bench.peers import DTYPES, EXACT, FUSED, SHORTCUTS, Operation, TrainingStep, Workload

CPU = torch.device("cpu")


def tiny(dtype="fp32", engine="auto"):
    return Workload("resnet20", 2, 16, dtype, CPU, engine)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_the_fused_operation_is_what_stock_computes(shortcut, dtype):
    stock = Operation.make((2, 8, 7, 5), shortcut, DTYPES[dtype], CPU, "auto")
    check("fused", *(stock.by(peer).result() for peer in (FUSED, STOCK, EXACT)))


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_stock_is_relu_of_batch_norm_plus_shortcut(shortcut):
    operation = Operation.make((2, 8, 7, 5), shortcut, torch.float32, CPU, "auto")

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
    operation = Operation.make((2, 8, 7, 5), "dual", torch.bfloat16, CPU, "auto")
    for tensor in (operation.x, operation.residual, operation.grad):
        assert tensor.is_contiguous(memory_format=torch.channels_last)
        assert tensor.float().std() > 0.5
    assert not torch.equal(operation.x, operation.residual)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_fused_step_is_what_stock_computes(dtype):
    check("fused", *(TrainingStep(tiny(dtype), peer).result() for peer in (FUSED, STOCK, EXACT)))


def test_peers_start_from_the_same_network_and_images():
    stock, fused = TrainingStep(tiny(), STOCK), TrainingStep(tiny(), FUSED)
    assert torch.equal(stock.images, fused.images)
    assert torch.equal(stock.labels, fused.labels)
    assert all(map(torch.equal, stock.state(), fused.state()))
    assert stock.images.is_contiguous(memory_format=torch.channels_last)


def test_a_step_moves_the_weights():
    step = TrainingStep(tiny(), STOCK)
    before = [parameter.detach().clone() for parameter in step.model.parameters()]
    step()
    assert not any(map(torch.equal, before, step.model.parameters()))


def test_a_wrong_gradient_is_noticed():
    step = TrainingStep(tiny(), FUSED)
    step.model.layer1[0].conv1.weight.register_hook(lambda gradient: 1.1 * gradient)
    with pytest.raises(WrongResult, match=r"gradient of layer1\.0\.conv1\.weight"):
        check("fused", step.result(), TrainingStep(tiny(), STOCK).result(), TrainingStep(tiny(), EXACT).result())
