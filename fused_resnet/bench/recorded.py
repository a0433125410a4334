"""What a training step of any network moves and computes: it runs, and every kernel that it asks for is noted.

For the networks of other libraries, whose layers nobody has counted (`fused_resnet.bench.roofline`): their gates, pools
and concatenations are there, too.  What a kernel reads or writes counts once; a batch norm of stock's, which is one
operation, as the passes that it makes: x for its statistics and x for z; g, x for its sums and g, x for dx.
"""

from collections.abc import Sequence

from torch import Tensor

from fused_resnet.bench.memory import activation_bytes
from fused_resnet.bench.network import NetworkStep
from fused_resnet.bench.roofline import OPTIMIZER_BYTES, Traffic
from fused_resnet.surgery.steps import Recorder

# operation of stock's -> how many of its first operands it reads twice
READ_TWICE = {
    "native_batch_norm": 1,
    "cudnn_batch_norm": 1,
    "native_batch_norm_backward": 2,
    "cudnn_batch_norm_backward": 2,
}


class _Kernels(Recorder):
    """Notes bytes and FLOP of every kernel."""

    def __init__(self) -> None:
        super().__init__(())
        self.kernels: list[tuple[float, float]] = []

    def note(self, name: str, reads: Sequence[Tensor], writes: Sequence[Tensor], flop: int = 0) -> None:
        if name in ("mm", "addmm"):
            a, b = reads[-2:]
            flop = 2 * a.numel() * b.shape[1]
        moved = (*reads, *reads[: READ_TWICE.get(name, 0)], *writes)
        self.kernels.append((sum(t.numel() * t.itemsize for t in moved), flop))


def recorded(step: NetworkStep) -> Traffic:
    """Run forward and backward of a step and return what one image costs, SGD included.

    Parameters
    ----------
    step : NetworkStep
        In training; on the device whose engine serves.
    """
    images = step.workload.batch_size
    step.optimizer.zero_grad(set_to_none=True)
    with _Kernels() as recorder:
        step.loss(step.logits()).backward()
    kernels = [(bytes / images, flop / images) for bytes, flop in recorder.kernels]
    kernels.append((OPTIMIZER_BYTES * sum(p.numel() for p in step.model.parameters()) / images, 0))
    saved = activation_bytes(lambda: step.loss(step.logits()), step.state())
    return Traffic(tuple(kernels), saved / images)
