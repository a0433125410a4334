"""Fused models under DDP and FSDP2: the gradients of one process, in every mode of the wrapper."""

import contextlib
import copy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import fused_resnet
from tests.support.accuracy import assert_as_accurate_as_stock
from tests.support.chains import make

RANKS = 2
IMAGES = 2  # of a rank in a micro-batch
# how DDP is asked for, and how many micro-batches a step has
MODES = {
    "plain": ({}, 1),
    "static_graph": ({"static_graph": True}, 1),
    "find_unused_parameters": ({"find_unused_parameters": True}, 1),
    "gradient_as_bucket_view": ({"gradient_as_bucket_view": True}, 1),
    "no_sync": ({}, 3),
    "compiled": ({}, 1),
}


class Network(nn.Module):
    """A stem, a stage of two blocks and a classifier; ``unused`` has a parameter without a gradient."""

    def __init__(self, unused: bool = False):
        super().__init__()
        self.stem, self.stage = make("stem"), nn.Sequential(make("bottleneck, stride 2"), make("basic"))
        self.classifier = nn.Linear(16, 4)
        self.unused = nn.Linear(4, 4) if unused else None

    def forward(self, x):
        return self.classifier(self.stage(self.stem(x)).mean((2, 3)))


def batch(micro_batches: int) -> list[tuple[Tensor, Tensor]]:
    """Images and labels of all ranks, in micro-batches."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(micro_batches, RANKS * IMAGES, 3, 24, 24, generator=generator)
    labels = torch.randint(4, (micro_batches, RANKS * IMAGES), generator=generator)
    return list(zip(x, labels, strict=True))


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """Every gradient, whole."""
    whole = {name: p.grad for name, p in model.named_parameters()}
    return {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in whole.items()}


def one_process(mode: str, synchronized: bool, dtype: torch.dtype) -> dict[str, Tensor | None]:
    """Return the gradients that one process has, from whole batches, or from each rank's part by itself."""
    _, micro_batches = MODES[mode]
    torch.manual_seed(0)
    model = Network(mode == "find_unused_parameters").to(dtype)
    for x, labels in batch(micro_batches):
        parts = 1 if synchronized else RANKS
        for few, their_labels in zip(x.to(dtype).chunk(parts), labels.chunk(parts), strict=True):
            (nn.functional.cross_entropy(model(few), their_labels) / parts).backward()
    return gradients(model)


def train(model, wrapped, rank, micro_batches, sync=lambda last: contextlib.nullcontext()):
    """Run two steps, of which the second counts: what a wrapper learns in the first, it uses there."""
    state = copy.deepcopy(model.state_dict())
    for _ in range(2):
        model.load_state_dict(state)
        wrapped.zero_grad()
        for i, (x, labels) in enumerate(batch(micro_batches)):
            with sync(i == micro_batches - 1):
                output = wrapped(x.chunk(RANKS)[rank])
                nn.functional.cross_entropy(output, labels.chunk(RANKS)[rank]).backward()
    return gradients(model)


def ddp_gradients(rank, mode, synchronized):
    options, micro_batches = MODES[mode]
    torch.manual_seed(0)
    model = fused_resnet.fuse(Network(mode == "find_unused_parameters"), chain="stage")
    dist._DEFAULT_FIRST_BUCKET_BYTES = 4096  # so that there are several buckets, at which a compiled graph is cut
    wrapped = ddp = DistributedDataParallel(model, bucket_cap_mb=0.01, **options)
    if synchronized:  # not before: DDP, too, refuses them on the CPU
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if mode == "compiled":
        wrapped = torch.compile(ddp, backend="aot_eager")
    return train(model, wrapped, rank, micro_batches, lambda last: contextlib.nullcontext() if last else ddp.no_sync())


@pytest.mark.parametrize("synchronized", [False, True], ids=["batch norm", "synchronized"])
@pytest.mark.parametrize("mode", MODES)
def test_ddp_has_the_gradients_of_one_process(mode, synchronized, run_ranks):
    exact, stock = (one_process(mode, synchronized, dtype) for dtype in (torch.float64, torch.float32))
    ranks = run_ranks(RANKS, ddp_gradients, mode, synchronized)
    for ours in ranks:
        assert_as_accurate_as_stock(ours, stock, exact)
    assert all(ranks[0][name] is None or torch.equal(ranks[0][name], ranks[1][name]) for name in stock)


def fsdp_gradients(rank, inner):
    torch.manual_seed(0)
    model = fused_resnet.fuse(Network(), chain="stage")  # which the blocks' hooks divide
    if inner:  # its block is stock then, and stock refuses synchronised norms on the CPU
        fully_shard(model.stage[1].body[0])
    else:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for block in (model.stem, *model.stage):
        fully_shard(block)
    fully_shard(model)
    return train(model, model, rank, 1), str(fused_resnet.explain(model))


@pytest.mark.parametrize("inner", [False, True], ids=["per block", "an inner convolution, too"])
def test_fsdp_has_the_gradients_of_one_process(inner, run_ranks):
    exact, stock = (one_process("plain", not inner, dtype) for dtype in (torch.float64, torch.float32))
    for ours, report in run_ranks(RANKS, fsdp_gradients, inner):
        assert_as_accurate_as_stock(ours, stock, exact)
        assert ("2 chains fused, 2 places left stock" if inner else "3 chains fused, 1 places left stock") in report
        assert "stage    stock: 0 has a hook" in report
