"""Residual networks in plain PyTorch: what ``fused_resnet.fuse`` is given, and what it is measured against.

He, Zhang, Ren, Sun: *Deep Residual Learning for Image Recognition*, 2015 (arXiv:1512.03385). Modules bear
torchvision's names, so that weights travel between the two, and are made in torchvision's order, so that one seed gives
one network.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from fused_resnet.models.initialization import initialize_convolutions

# a batch norm of so many channels
NormLayer = Callable[[int], Any]

SHORTCUTS = ("A", "B", "C", "none")


def conv3x3(in_channels: int, out_channels: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    """Return a 3x3 convolution that keeps the size at stride 1."""
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=dilation, dilation=dilation, bias=False)


def conv1x1(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """Return a 1x1 convolution."""
    return nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False)


class ZeroPadded(nn.Module):
    """Every ``stride``-th pixel, with channels of zeros behind: ``pad(x[:, :, ::stride, ::stride])``.

    The shortcut without parameters: option A of section 3.3, "extra zero entries padded for increasing dimensions".

    Parameters
    ----------
    channels : int
        Channels of zeros.
    stride : int
        Distance of the pixels that are kept.
    """

    def __init__(self, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.channels = channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to [N, C + channels, H / stride, W / stride]."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.channels))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut (figure 5, left): ``relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))``.

    Parameters
    ----------
    in_channels : int
        Channels of the input.
    channels : int
        Channels of the convolutions, and of the output.
    stride : int
        Stride of the first convolution.
    downsample : nn.Module, optional
        The shortcut, where it is not the identity.
    dilation : int
        Of both convolutions.
    norm_layer : callable
        Makes a batch norm from a number of channels.
    residual : bool
        Whether there is a shortcut; without it the block is the same layers of a plain network.
    """

    expansion: ClassVar[int] = 1

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        *,
        dilation: int = 1,
        norm_layer: NormLayer = nn.BatchNorm2d,
        residual: bool = True,
    ) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, channels, stride, dilation)
        self.bn1 = norm_layer(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(channels, channels, dilation=dilation)
        self.bn2 = norm_layer(channels)
        self.downsample = downsample
        self.stride = stride
        self.residual = residual

    @property
    def last_norm(self) -> Any:
        """The batch norm whose output is added to the shortcut."""
        return self.bn2

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, in_channels, H, W] to [N, channels, H / stride, W / stride]."""
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.residual:
            out += shortcut
        return self.relu(out)  # type: ignore[no-any-return]


class Bottleneck(nn.Module):
    """1x1, 3x3 and an expanding 1x1 convolution beside a shortcut (figure 5, right).

    It strides in its 3x3, which is known as "v1.5": the first 1x1 then reads every pixel.

    Parameters
    ----------
    in_channels : int
        Channels of the input.
    channels : int
        Channels of the 3x3 convolution; the output has ``expansion`` times as many.
    stride : int
        Stride of the 3x3 convolution.
    downsample : nn.Module, optional
        The shortcut, where it is not the identity.
    dilation : int
        Of the 3x3 convolution.
    norm_layer : callable
        Makes a batch norm from a number of channels.
    residual : bool
        Whether there is a shortcut; without it the block is the same layers of a plain network.
    """

    expansion: ClassVar[int] = 4
    stride_in_1x1: ClassVar[bool] = False

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        *,
        dilation: int = 1,
        norm_layer: NormLayer = nn.BatchNorm2d,
        residual: bool = True,
    ) -> None:
        super().__init__()
        first, second = (stride, 1) if self.stride_in_1x1 else (1, stride)
        self.conv1 = conv1x1(in_channels, channels, first)
        self.bn1 = norm_layer(channels)
        self.conv2 = conv3x3(channels, channels, second, dilation)
        self.bn2 = norm_layer(channels)
        self.conv3 = conv1x1(channels, channels * self.expansion)
        self.bn3 = norm_layer(channels * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride
        self.residual = residual

    @property
    def last_norm(self) -> Any:
        """The batch norm whose output is added to the shortcut."""
        return self.bn3

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, in_channels, H, W] to [N, 4 channels, H / stride, W / stride]."""
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.residual:
            out += shortcut
        return self.relu(out)  # type: ignore[no-any-return]


class BottleneckV1(Bottleneck):
    """The paper's bottleneck, which strides in its first 1x1: fewer multiply-adds, and a little less accurate."""

    stride_in_1x1 = True


class ResNet(nn.Module):
    """A stem, stages of residual blocks, global average pooling and a linear classifier.

    Each stage but the first halves the size of its input; ``widths`` and ``depths`` hold one entry a stage.

    Parameters
    ----------
    block : type
        `BasicBlock`, `Bottleneck` or `BottleneckV1`.
    depths : sequence of int
        Blocks of each stage.
    widths : sequence of int
        Channels of each stage, before the block's expansion; the stem has the first stage's.
    small_images : bool
        False: the ImageNet stem, a 7x7 convolution and a max pool, which shrink the image fourfold.
        True: the CIFAR stem, a 3x3 convolution, which keeps its size.
    in_channels : int
        Channels of an image.
    num_classes : int
        Outputs of the classifier.
    shortcut : str
        Section 3.3's option. ``"A"``: the identity, padded by zeros where the shape changes, which adds no parameters;
        the paper's on CIFAR-10. ``"B"``: a projection where the shape changes. ``"C"``: projections everywhere.
        ``"none"``: no shortcuts, the plain twin of section 3.3.
    replace_stride_with_dilation : sequence of bool, optional
        For each stage but the first, whether it keeps the size of its input and dilates its 3x3 convolutions, and those
        of the stages behind it, by the stride that it leaves out.
    norm_layer : callable
        Makes a batch norm from a number of channels: ``torchvision.ops.FrozenBatchNorm2d`` for frozen ones.
    init : str
        How convolutions are initialized, see `initialize_convolutions`; the paper's is ``"he_fan_in"``.
    zero_init_residual : bool
        Begin with the last batch norm of each block at zero, so that each block begins as its shortcut
        (Goyal et al. 2017, arXiv:1706.02677, section 5.1).
    features_only : bool
        Return the output of every stage, ``{"layer1": [N, C, H, W], ...}``, and leave the classifier out.

    Raises
    ------
    ValueError
        An option is none of its values, or two do not fit each other.
    """

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        depths: Sequence[int],
        *,
        widths: Sequence[int] = (64, 128, 256, 512),
        small_images: bool = False,
        in_channels: int = 3,
        num_classes: int = 1000,
        shortcut: str = "B",
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: NormLayer = nn.BatchNorm2d,
        init: str = "he_fan_out",
        zero_init_residual: bool = False,
        features_only: bool = False,
    ) -> None:
        super().__init__()
        if shortcut not in SHORTCUTS:
            raise ValueError(f"shortcut must be one of {', '.join(map(repr, SHORTCUTS))}, got {shortcut!r}")
        if zero_init_residual and shortcut == "none":
            raise ValueError(
                "zero_init_residual needs shortcuts, got shortcut='none': a plain block would begin as zero"
            )
        if len(depths) != len(widths):
            raise ValueError(
                f"depths and widths must hold one entry a stage, got {len(depths)} depths and {len(widths)} widths"
            )
        dilated = [False] * (len(depths) - 1) if replace_stride_with_dilation is None else replace_stride_with_dilation
        if len(dilated) != len(depths) - 1:
            raise ValueError(
                "replace_stride_with_dilation must hold one entry for each stage but the first, "
                f"{len(depths) - 1} in all, got {dilated}"
            )

        channels = widths[0]
        if small_images:
            self.conv1 = conv3x3(in_channels, channels)
        else:
            self.conv1 = nn.Conv2d(in_channels, channels, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = norm_layer(channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if small_images else nn.MaxPool2d(kernel_size=3, stride=2, padding=1)

        self.shortcut = shortcut
        self.stage_names = [f"layer{index}" for index in range(1, len(depths) + 1)]
        dilation = 1
        for name, depth, width, dilates in zip(self.stage_names, depths, widths, (False, *dilated), strict=True):
            stride, before = 1 if name == "layer1" else 2, dilation
            if dilates:
                stride, dilation = 1, 2 * dilation
            geometry = [(stride, before), *[(1, dilation)] * (depth - 1)]
            self.add_module(name, make_stage(block, channels, width, geometry, shortcut, norm_layer))
            channels = width * block.expansion

        self.features_only = features_only
        if not features_only:
            self.avgpool = nn.AdaptiveAvgPool2d(1)
            self.fc = nn.Linear(channels, num_classes)
        initialize_convolutions(self, init)
        if zero_init_residual:
            self.zero_residuals()

    def zero_residuals(self) -> None:
        """Set the scale of every block's last batch norm to zero."""
        for module in self.modules():
            if isinstance(module, BasicBlock | Bottleneck):
                nn.init.zeros_(module.last_norm.weight)

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor]:
        """Map images [N, in_channels, H, W] to logits [N, num_classes], or to the output of every stage."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        features = {}
        for name in self.stage_names:
            x = self.get_submodule(name)(x)
            if self.features_only:
                features[name] = x
        if self.features_only:
            return features
        return self.fc(self.avgpool(x).flatten(1))  # type: ignore[no-any-return]


def make_stage(
    block: type[BasicBlock | Bottleneck],
    in_channels: int,
    channels: int,
    geometry: Iterable[tuple[int, int]],
    shortcut: str,
    norm_layer: NormLayer,
) -> nn.Sequential:
    """Return a block for each stride and dilation of `geometry`; the first changes the number of channels."""
    out_channels = channels * block.expansion
    blocks = []
    for stride, dilation in geometry:
        downsample = make_shortcut(in_channels, out_channels, stride, shortcut, norm_layer)
        blocks.append(
            block(
                in_channels,
                channels,
                stride,
                downsample,
                dilation=dilation,
                norm_layer=norm_layer,
                residual=shortcut != "none",
            )
        )
        in_channels = out_channels
    return nn.Sequential(*blocks)


def make_shortcut(
    in_channels: int, out_channels: int, stride: int, shortcut: str, norm_layer: NormLayer
) -> nn.Module | None:
    """Return what an option of section 3.3 puts beside a block; None is the identity, or a plain network's nothing."""
    if shortcut == "none" or (shortcut != "C" and stride == 1 and in_channels == out_channels):
        return None
    if shortcut == "A":
        return ZeroPadded(out_channels - in_channels, stride)
    return nn.Sequential(conv1x1(in_channels, out_channels, stride), norm_layer(out_channels))
