"""Models that pickle, since their classes can be imported, and the ways through which a copy comes."""

import io
import pickle

import torch
from torch import nn

from tests.support.oracle import Basic


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


class Block(Basic):
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
