"""Batch norms that are not the identity, so that a result without one of them is another."""

from torch import nn


def draw_norms(model: nn.Module) -> None:
    """Give every batch norm a scale, a shift and running statistics as training leaves them."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                if module.bias is not None:
                    nn.init.normal_(module.bias)
            if module.running_mean is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
