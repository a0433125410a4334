"""Models that pickle: their classes can be imported."""

import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self, channels: int = 4):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + x)

    def extra_repr(self):
        return "own=1"


class Outer:
    class Inner(Block):
        """Its qualified name has a dot."""


class Network(nn.Module):
    def __init__(self, block=Block, n: int = 2):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
        self.layers = nn.Sequential(*(block() for _ in range(n)))
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(self.layers(self.stem(x)).mean((2, 3)))
