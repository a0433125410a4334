"""One step of training: forward, backward, and the optimizer's move."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from fused_resnet.training.precision import Forward

# maps images [N, C, H, W] and labels [N] to the sum of the loss and the count of wrong images, float64 [2]
Step = Callable[[Tensor, Tensor], Tensor]


class EagerStep:
    """A step, computed as it is written.

    Parameters
    ----------
    forward : Forward
        Maps images to logits.
    optimizer : torch.optim.Optimizer
        Moves the weights.
    scaler : GradScaler
        Scales the loss in fp16, and skips the steps whose gradients overflow; disabled otherwise.
    accumulate : int
        Parts that a batch is computed in.
    label_smoothing : float
        Of the cross entropy.
    """

    def __init__(
        self,
        forward: Forward,
        optimizer: torch.optim.Optimizer,
        scaler: GradScaler,
        *,
        accumulate: int,
        label_smoothing: float,
    ) -> None:
        self.forward = forward
        self.optimizer = optimizer
        self.scaler = scaler
        self.accumulate = accumulate
        self.label_smoothing = label_smoothing

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Take the step."""
        totals = self.gradients(images, labels)
        self.update()
        return totals

    def gradients(self, images: Tensor, labels: Tensor) -> Tensor:
        """Compute the gradient of the batch's mean loss, part by part."""
        self.optimizer.zero_grad()
        totals = torch.zeros(2, dtype=torch.float64, device=images.device)
        for part, part_labels in zip(images.chunk(self.accumulate), labels.chunk(self.accumulate), strict=True):
            logits = self.forward(part)
            loss = F.cross_entropy(logits, part_labels, label_smoothing=self.label_smoothing)
            self.scaler.scale(loss * (len(part) / len(images))).backward()
            wrong = (logits.argmax(1) != part_labels).sum()
            totals += torch.stack((loss.detach() * len(part), wrong))
        return totals

    def update(self) -> None:
        """Move the weights."""
        self.scaler.step(self.optimizer)
        self.scaler.update()


class GraphedStep:
    """A step on a GPU, captured once and replayed: one launch in the place of hundreds.

    By the recipe of PyTorch's notes (CUDA semantics, "whole-network capture"): the same tensors take in every batch,
    the first steps run on a side stream, the learning rate is a tensor on the device. In fp16 the scaler asks on the
    host whether to skip a step, so that the optimizer moves outside the graph.

    Parameters
    ----------
    step : EagerStep
        What is captured. Every batch must have the shape of the first.
    """

    WARMUP = 3  # steps that make what stays: momentum, workspaces, compiled code, cuDNN's choices

    def __init__(self, step: EagerStep) -> None:
        self.step = step
        self.captured = step.gradients if step.scaler.is_enabled() else step
        self.taken = 0

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Take the step; what is returned is overwritten by the next."""
        if self.taken == 0:
            self.images, self.labels = torch.empty_like(images), torch.empty_like(labels)
            self.stream = torch.cuda.Stream(images.device)
        self.images.copy_(images)
        self.labels.copy_(labels)
        if self.taken < self.WARMUP:
            self.warm_up()
        else:
            if self.taken == self.WARMUP:
                self.capture()
            self.graph.replay()
            if self.step.scaler.is_enabled():
                self.step.update()
        self.taken += 1
        return self.totals

    def warm_up(self) -> None:
        """Take the step on the side stream: autograd remembers the stream of a leaf's gradient."""
        current = torch.cuda.current_stream(self.images.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            self.totals = self.step(self.images, self.labels)
        current.wait_stream(self.stream)

    def capture(self) -> None:
        """Record the step without taking it."""
        self.step.optimizer.zero_grad()  # so that backward makes the gradients in the graph's own memory
        self.graph = torch.cuda.CUDAGraph()
        # only this thread is watched: a loader's may pin memory meanwhile
        with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
            self.totals = self.captured(self.images, self.labels)
