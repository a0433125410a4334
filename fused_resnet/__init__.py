"""Fused convolution, batch norm, ReLU and residual add: residual networks trained in less memory and time.

>>> model = fused_resnet.fuse(model)       # the same parameters, keys and numbers
>>> print(fused_resnet.explain(model))     # what was fused, by which engine, and what was left and why
>>> model = fused_resnet.unfuse(model)     # and back
"""

from fused_resnet import functional, models
from fused_resnet.surgery import explain, fuse, unfuse
from fused_resnet.verification import verify
from fused_resnet.version import __version__ as __version__

__all__ = ["explain", "functional", "fuse", "models", "unfuse", "verify"]
