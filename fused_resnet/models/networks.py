"""The networks of the residual-learning paper: a constructor for each.

Tables, figures and sections are those of arXiv:1512.03385.
"""

from collections.abc import Sequence
from typing import Any

from fused_resnet.models.registry import registered
from fused_resnet.models.resnet import BasicBlock, Bottleneck, BottleneckV1, ResNet
from fused_resnet.models.vgg import VGG

IMAGENET, CIFAR = registered(image_size=224), registered(image_size=32)


@IMAGENET
def resnet18(**kwargs: Any) -> ResNet:
    """ResNet-18 of table 1, for 224x224 images."""
    return ResNet(BasicBlock, (2, 2, 2, 2), **kwargs)


@IMAGENET
def resnet34(**kwargs: Any) -> ResNet:
    """ResNet-34 of table 1, for 224x224 images."""
    return ResNet(BasicBlock, (3, 4, 6, 3), **kwargs)


def _bottlenecks(depths: Sequence[int], *, stride_in_1x1: bool = False, **kwargs: Any) -> ResNet:
    """Table 1's deeper networks; ``stride_in_1x1=True`` gives the paper's own ("v1"), the default is torchvision's."""
    return ResNet(BottleneckV1 if stride_in_1x1 else Bottleneck, depths, **kwargs)


@IMAGENET
def resnet50(**kwargs: Any) -> ResNet:
    """ResNet-50 of table 1, for 224x224 images."""
    return _bottlenecks((3, 4, 6, 3), **kwargs)


@IMAGENET
def resnet101(**kwargs: Any) -> ResNet:
    """ResNet-101 of table 1, for 224x224 images."""
    return _bottlenecks((3, 4, 23, 3), **kwargs)


@IMAGENET
def resnet152(**kwargs: Any) -> ResNet:
    """ResNet-152 of table 1, for 224x224 images."""
    return _bottlenecks((3, 8, 36, 3), **kwargs)


@IMAGENET
def plain18(**kwargs: Any) -> ResNet:
    """ResNet-18's layers without its shortcuts (figure 4, left)."""
    return resnet18(shortcut="none", **kwargs)


@IMAGENET
def plain34(**kwargs: Any) -> ResNet:
    """ResNet-34's layers without its shortcuts (figure 3, middle)."""
    return resnet34(shortcut="none", **kwargs)


@IMAGENET
def vgg16(**kwargs: Any) -> VGG:
    """VGG-16 without batch norm, the baseline of table 3, for 224x224 images."""
    return VGG((2, 2, 3, 3, 3), **kwargs)


@IMAGENET
def vgg16_bn(**kwargs: Any) -> VGG:
    """VGG-16 with a batch norm behind each convolution, for 224x224 images."""
    return VGG((2, 2, 3, 3, 3), batch_norm=True, **kwargs)


@IMAGENET
def vgg19(**kwargs: Any) -> VGG:
    """VGG-19 without batch norm (figure 3, left), for 224x224 images."""
    return VGG((2, 2, 4, 4, 4), **kwargs)


@IMAGENET
def vgg19_bn(**kwargs: Any) -> VGG:
    """VGG-19 with a batch norm behind each convolution, for 224x224 images."""
    return VGG((2, 2, 4, 4, 4), batch_norm=True, **kwargs)


def _cifar(depth: int, *, num_classes: int = 10, **kwargs: Any) -> ResNet:
    """Section 4.2: a 3x3 stem and three stages of n basic blocks, 6n + 2 weighted layers in all.

    The paper's have ``shortcut="A"``; the default is ``"B"``, whose projections are trained, too.
    """
    blocks, remainder = divmod(depth - 2, 6)
    assert remainder == 0, f"a CIFAR ResNet has 6n + 2 layers, not {depth}"
    return ResNet(BasicBlock, (blocks,) * 3, widths=(16, 32, 64), small_images=True, num_classes=num_classes, **kwargs)


@CIFAR
def resnet20(**kwargs: Any) -> ResNet:
    """ResNet-20 of section 4.2, for 32x32 images."""
    return _cifar(20, **kwargs)


@CIFAR
def resnet32(**kwargs: Any) -> ResNet:
    """ResNet-32 of section 4.2, for 32x32 images."""
    return _cifar(32, **kwargs)


@CIFAR
def resnet44(**kwargs: Any) -> ResNet:
    """ResNet-44 of section 4.2, for 32x32 images."""
    return _cifar(44, **kwargs)


@CIFAR
def resnet56(**kwargs: Any) -> ResNet:
    """ResNet-56 of section 4.2, for 32x32 images."""
    return _cifar(56, **kwargs)


@CIFAR
def resnet110(**kwargs: Any) -> ResNet:
    """ResNet-110 of section 4.2, for 32x32 images."""
    return _cifar(110, **kwargs)


@CIFAR
def resnet1202(**kwargs: Any) -> ResNet:
    """ResNet-1202 of section 4.2, for 32x32 images."""
    return _cifar(1202, **kwargs)


@CIFAR
def plain20(**kwargs: Any) -> ResNet:
    """ResNet-20's layers without its shortcuts (figure 6, left)."""
    return resnet20(shortcut="none", **kwargs)


@CIFAR
def plain32(**kwargs: Any) -> ResNet:
    """ResNet-32's layers without its shortcuts (figure 6, left)."""
    return resnet32(shortcut="none", **kwargs)


@CIFAR
def plain44(**kwargs: Any) -> ResNet:
    """ResNet-44's layers without its shortcuts (figure 6, left)."""
    return resnet44(shortcut="none", **kwargs)


@CIFAR
def plain56(**kwargs: Any) -> ResNet:
    """ResNet-56's layers without its shortcuts (figure 6, left)."""
    return resnet56(shortcut="none", **kwargs)


@CIFAR
def plain110(**kwargs: Any) -> ResNet:
    """ResNet-110's layers without its shortcuts (figure 6, left)."""
    return resnet110(shortcut="none", **kwargs)
