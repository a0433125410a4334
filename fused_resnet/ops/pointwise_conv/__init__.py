"""A 1×1 convolution whose output is kept, with the sums of a batch norm made where it is computed."""

from fused_resnet.ops.pointwise_conv import composed, reference

__all__ = ["OPERATIONS", "composed", "reference"]

# Functions that only a chain calls, without a schema: what is traced is the chain, as one operation.
OPERATIONS = ("pointwise_conv_stats", "pointwise_conv_add_grad_")
