"""The chains that tests are made of: every kind of block, by name, stages of several, and images for them."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.norms import draw_norms


class Block(nn.Module):
    """A BasicBlock or a Bottleneck, by the kernel sizes of its convolutions."""

    def __init__(
        self,
        c_in,
        widths,
        kernels,
        *,
        stride=1,
        dilation=1,
        groups=1,
        bias=False,
        norm=nn.BatchNorm2d,
        before=None,
        act=nn.ReLU,
    ):
        super().__init__()
        layers, c = [], c_in
        strided = kernels.index(3)
        for i, (width, kernel) in enumerate(zip(widths, kernels, strict=True)):
            options = {"stride": stride} if i == strided else {}
            if kernel == 3:
                options |= {"padding": dilation, "dilation": dilation, "groups": groups}
            layers += [nn.Conv2d(c, width, kernel, bias=bias, **options), norm(width), act(inplace=True)]
            c = width
        self.body = nn.Sequential(*layers[:-1])
        self.stride, self.before, self.after = stride, before, None if before is None else c - c_in - before
        self.project = None
        if before is None and (stride != 1 or c != c_in):
            self.project = nn.Sequential(nn.Conv2d(c_in, c, 1, stride, bias=bias), norm(c))
        self.relu = act(inplace=True)

    def forward(self, x):
        out = self.body(x)
        if self.before is not None:
            out += F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))
        else:
            out += x if self.project is None else self.project(x)
        return self.relu(out)


class Stem(nn.Module):
    def __init__(self, pool, act=None):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 16, 7, 2, 3, bias=False), nn.BatchNorm2d(16)
        self.relu, self.pool = act or nn.ReLU(inplace=True), pool

    def forward(self, x):
        return self.pool(self.relu(self.bn(self.conv(x))))


class PreActivation(nn.Module):
    """The first unit has no convolution; nothing comes behind the add."""

    def __init__(self, act=None):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(16), nn.BatchNorm2d(8)
        self.conv1, self.conv2 = nn.Conv2d(16, 8, 1, bias=False), nn.Conv2d(8, 16, 3, padding=1, bias=False)
        self.relu = act or nn.ReLU()

    def forward(self, x):
        return x + self.conv2(self.relu(self.bn2(self.conv1(self.relu(self.bn1(x))))))


class OtherSource(Block):
    """The shortcut starts from another tensor than the chain."""

    def forward(self, x):
        shortcut, out = self.source(x), self.main(x)
        for layer in self.body:
            out = layer(out)
        shortcut = shortcut[:, :, :: self.stride, :: self.stride]
        return self.relu(out + F.pad(shortcut, (0, 0, 0, 0, self.before, self.after)))

    def main(self, x):
        return x.sin()

    def source(self, x):
        return x.cos()


class DetachedMain(OtherSource):
    def main(self, x):
        return x.sin().detach()


class DetachedSource(OtherSource):
    def source(self, x):
        return x.cos().detach()


class MixedSource(OtherSource):
    """The sum has another dtype than the chain."""

    def source(self, x):
        return x.double().cos()


class PreActivationA(PreActivation):
    """With a stride, and channels of zeros around the shortcut's."""

    def __init__(self):
        super().__init__()
        self.conv2 = nn.Conv2d(8, 21, 3, 2, padding=1, bias=False)

    def forward(self, x):
        out = self.conv2(self.relu(self.bn2(self.conv1(self.relu(self.bn1(x))))))
        return F.pad(x[..., ::2, ::2], [0, 0, 0, 0, 2, 3], value=0.0) + out


BASIC, BOTTLENECK = ((16, 16), (3, 3)), ((8, 8, 16), (1, 3, 1))
CHAINS = {
    "basic": lambda: Block(16, *BASIC),
    "basic, projection": lambda: Block(8, *BASIC),
    "basic, stride 2": lambda: Block(16, *BASIC, stride=2),
    "basic, dilation 2": lambda: Block(16, *BASIC, dilation=2),
    "basic, conv bias": lambda: Block(8, *BASIC, bias=True),
    "bottleneck": lambda: Block(16, *BOTTLENECK),
    "bottleneck, projection": lambda: Block(8, *BOTTLENECK),
    "bottleneck, stride 2": lambda: Block(16, *BOTTLENECK, stride=2),
    "bottleneck, groups 4": lambda: Block(16, *BOTTLENECK, groups=4),
    "bottleneck, dilation 2, stride 2, groups 2": lambda: Block(8, *BOTTLENECK, dilation=2, stride=2, groups=2),
    "bottleneck, depthwise": lambda: Block(16, *BOTTLENECK, groups=8),
    "one unit": lambda: nn.Sequential(nn.Conv2d(16, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
    "one unit without relu": lambda: nn.Sequential(nn.Conv2d(16, 8, 3), nn.BatchNorm2d(8)),
    "option A": lambda: Block(8, *BASIC, stride=2, before=4),
    "option A, odd channels": lambda: Block(5, (16, 19), (3, 3), stride=2, before=3),
    "option A, stride 3, bottleneck": lambda: Block(8, *BOTTLENECK, stride=3, before=0),
    "option A, stride 1": lambda: Block(8, *BASIC, before=8),
    "option A, other source": lambda: OtherSource(8, *BASIC, stride=2, before=4),
    "option A, other source, stride 1": lambda: OtherSource(8, *BASIC, before=3),
    "option A, other source alone": lambda: DetachedMain(8, *BASIC, stride=2, before=4),
    "option A, other source detached": lambda: DetachedSource(8, *BASIC, stride=2, before=4),
    "option A, mixed source": lambda: MixedSource(8, *BASIC, stride=2, before=4),
    "option A, pre-activation": lambda: PreActivationA(),
    "five units": lambda: nn.Sequential(
        *itertools.chain(*((nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()) for _ in range(5)))
    ),
    "wide, stride 2": lambda: Block(12, (24, 24, 96), (1, 3, 1), stride=2),
    "pre-activation": PreActivation,
    "stem": lambda: Stem(nn.MaxPool2d(3, 2, 1)),
    "stem, pool 2x3": lambda: Stem(nn.MaxPool2d((2, 3), (1, 2), (1, 0))),
    "silu, basic": lambda: Block(16, *BASIC, act=nn.SiLU),
    "silu, bottleneck, projection": lambda: Block(8, *BOTTLENECK, stride=2, act=nn.SiLU),
    "silu, option A": lambda: Block(5, (16, 19), (3, 3), stride=2, before=3, act=nn.SiLU),
    "hardswish, pool": lambda: Stem(nn.MaxPool2d(3, 2, 1), nn.Hardswish()),
    "relu6, basic": lambda: Block(8, *BASIC, act=nn.ReLU6),
    "leaky relu, bottleneck": lambda: Block(16, *BOTTLENECK, act=nn.LeakyReLU),
    "gelu, bottleneck": lambda: Block(16, *BOTTLENECK, act=lambda inplace: nn.GELU()),
    "gelu by tanh, pre-activation": lambda: PreActivation(nn.GELU("tanh")),
    "norm, momentum None": lambda: Block(8, *BASIC, norm=lambda c: nn.BatchNorm2d(c, momentum=None)),
    "norm, not affine": lambda: Block(8, *BASIC, norm=lambda c: nn.BatchNorm2d(c, affine=False)),
    "norm, untracked": lambda: Block(8, *BASIC, norm=lambda c: nn.BatchNorm2d(c, track_running_stats=False)),
}
BASIC_24 = ((24, 24), (3, 3))
STAGES = {
    "basic": lambda: [Block(8, *BASIC, stride=2), Block(16, *BASIC), Block(16, *BASIC)],
    "basic, identity first": lambda: [Block(16, *BASIC), Block(16, *BASIC)],
    "basic, conv bias": lambda: [Block(16, *BASIC, bias=True), Block(16, *BASIC, bias=True)],
    "bottleneck": lambda: [Block(8, *BOTTLENECK), Block(16, *BOTTLENECK), Block(16, *BOTTLENECK)],
    "bottleneck, stride 2": lambda: [Block(12, (24, 24, 96), (1, 3, 1), stride=2), Block(96, (24, 24, 96), (1, 3, 1))],
    "two projections": lambda: [Block(8, *BOTTLENECK), Block(16, (8, 8, 24), (1, 3, 1), stride=2), Block(24, *BASIC)],
    "option A": lambda: [
        Block(16, *BASIC),
        Block(16, (24, 24), (3, 3), stride=2, before=4),
        Block(24, (24, 24), (3, 3)),
    ],
    "option A, stride 1": lambda: [Block(16, *BASIC), Block(16, *BASIC_24, before=0)],
    "silu": lambda: [Block(8, *BOTTLENECK, act=nn.SiLU), Block(16, *BASIC, act=nn.SiLU)],
    "basic behind bottleneck": lambda: [Block(16, *BOTTLENECK), Block(16, *BASIC)],
}


def make(name: str, clear: bool = False) -> nn.Module:
    """Make a chain of one block, or of several: ``"stage: NAME"``.

    ``clear`` keeps what ReLUs read away from 0, where a rounding decides what passes; a norm without a shift cannot.
    """
    if name.startswith("stage: "):
        return make_stage(name.removeprefix("stage: "), clear)
    torch.manual_seed(0)
    return drawn(CHAINS[name](), clear)


def make_stage(name: str, clear: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    return drawn(nn.Sequential(*STAGES[name]()), clear)


def drawn(model: nn.Module, clear: bool) -> nn.Module:
    draw_norms(model)
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    added = {end for block in blocks for end in (block.body[-1], block.project and block.project[-1])}
    for module in model.modules():
        if clear and isinstance(module, nn.BatchNorm2d) and module.affine:
            module.bias.data.add_(12)
            if module not in added:  # some channels are off; behind an add all are on
                module.bias.data[::3] -= 24
    return model


def images(
    model: nn.Module, size: int = 12, layout: torch.memory_format = torch.channels_last, seed: int = 2
) -> Tensor:
    channels = next(m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d)))
    c = channels.in_channels if isinstance(channels, nn.Conv2d) else channels.num_features
    x = torch.randn(4, c, size, size - 1, generator=torch.Generator().manual_seed(seed))
    return x.contiguous(memory_format=layout)
