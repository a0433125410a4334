"""A step of a whole network, as each peer runs it: forward, cross entropy, backward and SGD, or a forward in eval."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_resnet import models
from fused_resnet.bench.accuracy import GRADIENT, OUTPUT, STATISTIC, Result
from fused_resnet.bench.graphs import capture
from fused_resnet.bench.libraries import CLASSES, channels_last, input_shape
from fused_resnet.bench.peers import DTYPES, EXACT_PEER, TIMM, Peer, compiled, fused
from fused_resnet.verification.accuracy import one_rounding_away

MODES = ("train", "eval")
RESIDUAL_SCALE = 0.1

# A throughput run needs no GradScaler, whose search for a scale is no part of a step's cost worth timing: a constant
# keeps float16's gradients away from its smallest numbers, and the learning rate takes it back.
LOSS_SCALE = {"fp32": 1.0, "bf16": 1.0, "fp16": 1024.0}


@dataclass(frozen=True)
class Workload:
    """A network, and the images that it is run on.

    Attributes
    ----------
    model
        A name that `fused_resnet.models.create` knows.
    batch_size, image_size
        Images of a step, and their height and width; of clips twice theirs.
    dtype
        ``"fp32"``, or ``"bf16"`` or ``"fp16"`` for autocast.
    device
        Where it runs.
    mode
        ``"train"`` for a whole step, ``"eval"`` for a forward by the running statistics, without gradients.
    graphed
        Whether a step is captured into a CUDA graph.
    """

    model: str
    batch_size: int
    image_size: int
    dtype: str
    device: torch.device
    mode: str = "train"
    graphed: bool = False


class NetworkStep:
    """A step of one network on random images.

    Parameters
    ----------
    workload : Workload
        What is run.
    peer : Peer
        Who runs it.
    batches : int
        How many batches take turns, so that the images of a step are in no cache.
    moved : int, optional
        Moves the images by a rounding, drawn by this seed: what a step then computes shows the network's own noise.
    """

    def __init__(self, workload: Workload, peer: Peer, *, batches: int = 1, moved: int | None = None) -> None:
        self.workload = workload
        self.peer = peer
        dtype = torch.float64 if peer == EXACT_PEER else torch.float32
        self.model = make_network(workload, peer).to(workload.device, dtype)
        shape = input_shape(workload.model, workload.image_size)
        layout = channels_last(shape)
        self.model = self.model.to(memory_format=layout)  # type: ignore[call-overload]
        self.model.train(workload.mode == "train")
        fused(peer, self.model)
        self._call: Callable[[Tensor], Tensor] = compiled(peer, self.model, graphed=workload.graphed)

        torch.manual_seed(1)  # of the images and the labels: the same for every peer
        device, count = workload.device, workload.batch_size
        self._batches = [
            (
                torch.randn(count, *shape, device=device).to(dtype, memory_format=layout),
                torch.randint(CLASSES, (count,), device=device),
            )
            for _ in range(batches)
        ]
        self.images, self.labels = self._batches[0]
        if moved is not None:
            self.images = one_rounding_away(self.images, DTYPES[workload.dtype], moved)
        self._turn = 0
        self._replay: Callable[[], object] | None = None

        self.loss_scale = 1.0 if peer == EXACT_PEER else LOSS_SCALE[workload.dtype]
        # a learning rate at which random labels do no harm over any number of steps
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=1e-3 / self.loss_scale, momentum=0.9, weight_decay=1e-4, fused=True
        )

    def logits(self) -> Tensor:
        """Run the network."""
        autocast = self.workload.dtype != "fp32" and self.peer != EXACT_PEER
        with torch.autocast(self.workload.device.type, DTYPES[self.workload.dtype], enabled=autocast):
            return self._call(self.images)

    def loss(self, logits: Tensor) -> Tensor:
        """Return the cross entropy times `loss_scale`, in float32 as under autocast."""
        loss = F.cross_entropy(logits if self.peer == EXACT_PEER else logits.float(), self.labels)
        return loss if self.loss_scale == 1 else loss * self.loss_scale

    def __call__(self) -> None:
        """Run a whole step on the next batch."""
        self._turn = (self._turn + 1) % len(self._batches)
        images, labels = self._batches[self._turn]
        if self._replay is None:
            self.images, self.labels = images, labels
            self._step()
        else:
            # a graph reads where it read when it was captured: a new batch is copied there, as a data loader's is
            self.images.copy_(images)
            self.labels.copy_(labels)
            self._replay()

    def _step(self) -> None:
        if self.workload.mode == "eval":
            with torch.no_grad():
                self.logits()
            return
        self.optimizer.zero_grad(set_to_none=True)
        self.loss(self.logits()).backward()
        self.optimizer.step()

    def capture(self) -> None:
        """Capture a step into a CUDA graph; from now on a call replays it."""
        self.images, self.labels = self.images.clone(), self.labels.clone()
        self._replay = capture(self._step, self.workload.device)

    def state(self) -> list[Tensor]:
        """Return what exists whether or not a step runs: parameters and buffers."""
        return [*self.model.parameters(), *self.model.buffers()]

    def result(self) -> Result:
        """Return all that a step computes: logits and, in training, every gradient and the moved running statistics."""
        torch.manual_seed(2)  # of what a step drops: the same for every peer
        if self.workload.mode == "eval":
            with torch.no_grad():
                return {OUTPUT: {"logits": self.logits()}}
        self.optimizer.zero_grad(set_to_none=True)
        logits = self.logits()
        self.loss(logits).backward()
        gradients = {n: p.grad / self.loss_scale for n, p in self.model.named_parameters() if p.grad is not None}
        statistics = {name: buffer for name, buffer in self.model.named_buffers() if buffer.is_floating_point()}
        return {OUTPUT: {"logits": logits.detach()}, GRADIENT: gradients, STATISTIC: statistics}


def make_network(workload: Workload, peer: Peer) -> nn.Module:
    """Return a workload's network with the same weights for every peer; timm's has its own forward.

    Raises
    ------
    ValueError, ImportError
        timm has no network of that name, or is not installed.
    """
    torch.manual_seed(0)
    model = models.create(workload.model, num_classes=CLASSES)
    for module in model.modules():
        if isinstance(module, models.BasicBlock | models.Bottleneck):
            # at full scale, rounding errors grow from block to block until no gradient in bfloat16 means anything
            nn.init.constant_(module.last_norm.weight, RESIDUAL_SCALE)
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) and is_zero(module.weight):
            # as some begin at the end of a branch: no gradient would reach what is in front, and nothing be checked
            nn.init.constant_(module.weight, RESIDUAL_SCALE)
    if peer.name != TIMM:
        return model
    theirs = models.create(f"timm:{workload.model}", num_classes=CLASSES)
    theirs.load_state_dict(model.state_dict())
    return theirs


def is_zero(tensor: Tensor | None) -> bool:
    """Whether nothing but zeros is in it."""
    return tensor is not None and not bool(tensor.any())
