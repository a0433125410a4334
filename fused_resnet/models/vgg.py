"""VGG networks in plain PyTorch, the baseline of the residual-learning paper's table 3.

Simonyan, Zisserman: *Very Deep Convolutional Networks for Large-Scale Image Recognition*, 2014 (arXiv:1409.1556).
Modules bear torchvision's names and are made in its order, as those of `fused_resnet.models.resnet` are.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from fused_resnet.models.initialization import initialize_convolutions

WIDTHS = (64, 128, 256, 512, 512)


class VGG(nn.Module):
    """Five stages of 3x3 convolutions, each with a max pool behind, and three linear layers.

    Parameters
    ----------
    depths : sequence of int
        Convolutions of each stage.
    batch_norm : bool
        Whether a batch norm follows each convolution: with it they are fused, the paper's have none.
    in_channels : int
        Channels of an image.
    num_classes : int
        Outputs of the classifier.
    dropout : float
        Probability by which an activation between the linear layers is dropped in training.
    init : str
        How convolutions are initialized, see `initialize_convolutions`.

    Raises
    ------
    ValueError
        `depths` has another number of stages, or `init` is unknown.
    """

    def __init__(
        self,
        depths: Sequence[int],
        *,
        batch_norm: bool = False,
        in_channels: int = 3,
        num_classes: int = 1000,
        dropout: float = 0.5,
        init: str = "he_fan_out",
    ) -> None:
        super().__init__()
        if len(depths) != len(WIDTHS):
            raise ValueError(f"depths must hold one entry for each of {len(WIDTHS)} stages, got {depths}")
        layers: list[nn.Module] = []
        for depth, width in zip(depths, WIDTHS, strict=True):
            for _ in range(depth):
                layers.append(nn.Conv2d(in_channels, width, kernel_size=3, padding=1))
                if batch_norm:
                    layers.append(nn.BatchNorm2d(width))
                layers.append(nn.ReLU(inplace=True))
                in_channels = width
            layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(7)
        self.classifier = nn.Sequential(
            nn.Linear(in_channels * 7 * 7, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(4096, num_classes),
        )
        initialize_convolutions(self, init)
        for module in self.classifier:
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N, in_channels, H, W], of at least 32x32 pixels, to logits [N, num_classes]."""
        return self.classifier(self.avgpool(self.features(x)).flatten(1))  # type: ignore[no-any-return]
