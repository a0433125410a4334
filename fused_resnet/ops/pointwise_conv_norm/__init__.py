"""A 1×1 convolution with the batch norm behind it, whose raw output is never kept."""

from fused_resnet.ops.pointwise_conv_norm import composed, reference

__all__ = ["OPERATIONS", "composed", "reference"]

# Functions that only a chain calls, without a schema: what is traced is the chain, as one operation.
OPERATIONS = ("pointwise_conv_norm_act", "pointwise_conv_norm_backward")
