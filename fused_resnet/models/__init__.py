"""The networks of the residual-learning paper, by name.

``models.resnet50()`` and ``models.create("resnet50")`` are the same; `names` lists what there is. The ImageNet family
(18, 34, 50, 101, 152) holds torchvision's parameters under torchvision's names; the CIFAR family (20, 32, 44, 56, 110,
1202) is that of the paper's section 4.2, where ``shortcut="A"`` gives the paper's shortcuts, without parameters. Their
plain twins (``plain34``, ``plain56``, ...) are the same layers without shortcuts; VGG is what the paper compares with.
All take the options of `ResNet` or `VGG` and ``weights``; ResNets from 50 layers on ``stride_in_1x1``, the paper's v1.
"""

from fused_resnet.models.networks import (
    plain18,
    plain20,
    plain32,
    plain34,
    plain44,
    plain56,
    plain110,
    resnet18,
    resnet20,
    resnet32,
    resnet34,
    resnet44,
    resnet50,
    resnet56,
    resnet101,
    resnet110,
    resnet152,
    resnet1202,
    vgg16,
    vgg16_bn,
    vgg19,
    vgg19_bn,
)
from fused_resnet.models.registry import create, names
from fused_resnet.models.resnet import BasicBlock, Bottleneck, BottleneckV1, ResNet, ZeroPadded
from fused_resnet.models.summary import Summary, summarize
from fused_resnet.models.vgg import VGG

__all__ = [
    "VGG",
    "BasicBlock",
    "Bottleneck",
    "BottleneckV1",
    "ResNet",
    "Summary",
    "ZeroPadded",
    "create",
    "names",
    "plain18",
    "plain20",
    "plain32",
    "plain34",
    "plain44",
    "plain56",
    "plain110",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet34",
    "resnet44",
    "resnet50",
    "resnet56",
    "resnet101",
    "resnet110",
    "resnet152",
    "resnet1202",
    "summarize",
    "vgg16",
    "vgg16_bn",
    "vgg19",
    "vgg19_bn",
]
