"""How the Triton kernels cut a max pool into tiles of positions × channels."""

from fused_resnet.ops.batch_norm_act import config as batch_norm

POOL_ELEMENTS, POOL_WARPS = 1024, 4


def tile(channels: int) -> batch_norm.Tile:
    """Return a program's tile: half as large where no vector divides the channels, and every element has an address."""
    return batch_norm.tile(channels, POOL_ELEMENTS if channels % 8 == 0 else POOL_ELEMENTS // 2, POOL_WARPS)
