"""A 1×1 convolution with the batch norm behind it, whose raw output is never kept."""

from fused_resnet.ops.pointwise_conv_norm import reference

__all__ = ["OPERATIONS", "reference"]

# They allocate what the dispatcher's operations do not: no schema of their own, see composed.py.
OPERATIONS = ("pointwise_conv_norm_act", "pointwise_conv_norm_backward")
