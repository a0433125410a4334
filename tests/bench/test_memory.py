import torch
from torch import nn

from fused_resnet.bench.memory import activation_bytes


def test_what_a_known_graph_saves():
    x = torch.randn(10, 100, requires_grad=True)
    # exp keeps its result; the multiplication keeps both factors, one of which is that result
    assert activation_bytes(lambda: x.exp() * x) == 2 * 10 * 100 * 4


def test_views_of_one_storage_count_once():
    x = torch.randn(10, 100, requires_grad=True)
    assert activation_bytes(lambda: (x[:5] * x[5:]).view(-1)) == 10 * 100 * 4


def test_nothing_is_saved_without_gradients():
    x = torch.randn(10, 100)
    assert activation_bytes(lambda: x.exp() * x) == 0


def test_parameters_are_no_activations():
    layer = nn.Linear(100, 30)
    x = torch.randn(10, 100)
    assert activation_bytes(lambda: layer(x), layer.parameters()) == 10 * 100 * 4
    assert activation_bytes(lambda: layer(x.requires_grad_())) == (10 * 100 + 30 * 100) * 4


def test_copies_of_parameters_by_autocast_are_no_activations():
    layer = nn.Linear(100, 30)
    x = torch.randn(10, 100, requires_grad=True)

    def forward():
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x)

    assert activation_bytes(forward, layer.parameters()) == 10 * 100 * 2


def test_what_a_convolution_with_batch_norm_and_relu_saves():
    block = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    x = torch.randn(2, 3, 16, 16)
    image, activation = 2 * 3 * 16 * 16 * 4, 2 * 8 * 16 * 16 * 4
    statistics = 2 * 8 * 4  # mean and 1/std of the batch: of the parameters' shape, so left out
    saved = activation_bytes(lambda: block(x), [*block.parameters(), *block.buffers()])
    assert saved in (image + 2 * activation, image + 2 * activation + statistics)
