"""Residual blocks, stems and rows as people write them by hand, in all the spellings that there are."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.norms import draw_norms


def conv3x3(c_in: int, c_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)


class Basic(nn.Module):
    """The block as everyone writes it."""

    def __init__(self, c_in: int = 8, c_out: int = 8, stride: int = 1):
        super().__init__()
        self.conv1, self.bn1 = conv3x3(c_in, c_out, stride), nn.BatchNorm2d(c_out)
        self.conv2, self.bn2 = conv3x3(c_out, c_out), nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or c_in != c_out:
            self.downsample = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class Functional(Basic):
    """F.relu, keyword arguments, torch.add, the shortcut first in the sum."""

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = torch.add(shortcut, self.bn2(self.conv2(out)))
        return torch.relu(out)


class Method(Basic):
    def forward(self, x):
        out = self.bn1(self.conv1(x)).relu_()
        out = self.bn2(self.conv2(out)).add(x)
        return out.relu()


class PreActivation(Basic):
    """Identity mappings: bn → relu → conv, twice, and no ReLU behind the add."""

    def forward(self, x):
        out = self.conv1(F.relu(self.bn1(x)))
        out = self.conv2(F.relu(self.bn2(out)))
        return out + x


class PreActivationInPlace(Basic):
    def forward(self, x):
        out = self.conv1(self.relu(self.bn1(x)))
        out = self.conv2(self.relu(self.bn2(out)))
        return out + x


class OptionA(Basic):
    """The CIFAR shortcut without parameters: every other pixel, zeros for the new channels."""

    def __init__(self):
        super().__init__(8, 16, 2)
        self.downsample = None

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        return F.relu(out)


class OptionAOfAnother(OptionA):
    """The shortcut starts from another tensor than the convolutions."""

    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x.sin())))))
        return F.relu(out + F.pad(x.cos()[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)))


class Function(nn.Module):
    """A layer made of a function, as CIFAR networks have it."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class FunctionShortcut(Basic):
    def __init__(self, function=lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4), "constant", 0)):
        super().__init__(8, 16, 2)
        self.downsample = Function(function)


class LinearEnd(Basic):
    """No ReLU behind the add."""

    def forward(self, x):
        return self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x


class ChangesItsInput(Basic):
    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        x = x * 1
        x += out
        return self.relu(x)


class InPlaceBefore(Basic):
    """The in-place ReLU at the front changes the shortcut, too."""

    def forward(self, x):
        x = x + 0
        out = self.bn1(self.conv1(self.relu(x)))
        return self.relu(out + x)


class InnerOutput(Basic):
    """An inner activation has a second consumer."""

    def forward(self, x):
        inner = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(inner)) + x), inner


class RawOutput(Basic):
    """A convolution's output has a second consumer."""

    def forward(self, x):
        raw = self.conv1(x)
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(raw)))) + x + raw.mean())


class ConvTwice(Basic):
    """One convolution, two places."""

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv1(out)) + x)


class NormTwice(Basic):
    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn1(self.conv2(out)) + x)


class Scaled(Basic):
    """The residual is scaled: alpha belongs to the add."""

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(torch.add(x, self.bn2(self.conv2(out)), alpha=0.5))


class Broadcast(Basic):
    """What is added has another shape."""

    def __init__(self):
        super().__init__()
        self.position = nn.Parameter(torch.randn(1, 8, 1, 1))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.position)


class SqueezeExcite(Basic):
    def __init__(self):
        super().__init__()
        self.fc = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out = out * self.fc(F.adaptive_avg_pool2d(out, 1)).sigmoid()
        return F.relu(out + x)


class BranchOnShape(Basic):
    def forward(self, x):
        if x.shape[2] > 4:
            x = F.avg_pool2d(x, 2)
        return super().forward(x)


class BranchOnType(Basic):
    """Takes a tensor or a list of one: an isinstance that a tracer's stand-in must not answer wrongly."""

    def forward(self, x):
        x = x * 1 if isinstance(x, Tensor) else x[0]
        return super().forward(x)


class TensorConstant(Basic):
    def forward(self, x):
        return super().forward(x) * torch.tensor(2.0)


class InfiniteBound(Basic):
    def forward(self, x):
        return super().forward(x).clamp(0.5, float("inf"))


class LocalFunction(Basic):
    def forward(self, x):
        def twice(t):
            return t + t

        return twice(super().forward(x))


class Lambda(Basic):
    """An activation that is a function kept in an attribute."""

    def __init__(self, activation=F.relu):
        super().__init__()
        self.activation = activation

    def forward(self, x):
        out = self.activation(self.bn1(self.conv1(x)))
        return self.activation(self.bn2(self.conv2(out)) + x)


class Nested(nn.Module):
    """conv → norm → act triples in containers of their own."""

    class Triple(nn.Module):
        def __init__(self, act: bool):
            super().__init__()
            self.conv, self.norm = conv3x3(8, 8), nn.BatchNorm2d(8)
            self.act = nn.ReLU() if act else nn.Identity()

        def forward(self, x):
            return self.act(self.norm(self.conv(x)))

    def __init__(self):
        super().__init__()
        self.a, self.b, self.end = Nested.Triple(True), Nested.Triple(False), nn.ReLU()

    def forward(self, x):
        return self.end(self.b(self.a(x)) + x)


class Stem(nn.Module):
    def __init__(self, pool: nn.Module):
        super().__init__()
        self.conv, self.bn, self.relu, self.pool = nn.Conv2d(8, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(True), pool

    def forward(self, x):
        return self.pool(self.relu(self.bn(self.conv(x))))


class WithoutConvolution(nn.Module):
    """bn → relu → (+) without a convolution in front."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x):
        return F.relu(self.bn(x) + x)


class InSequential(nn.Sequential):
    def __init__(self, *rest):
        super().__init__(conv3x3(8, 8), nn.BatchNorm2d(8), nn.ReLU(), *rest)


def make(cls, *args) -> nn.Module:
    torch.manual_seed(0)
    model = cls(*args)
    draw_norms(model)
    return model


def images(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(shape or (2, 8, 6, 6), generator=torch.Generator().manual_seed(seed))
