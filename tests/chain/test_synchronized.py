"""Fused synchronised batch norm: several processes do what one does with all of their batches."""

import copy
import itertools
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fused_resnet
from fused_resnet import ops
from fused_resnet.chain import synchronized
from tests.support.accuracy import assert_as_accurate_as_stock, gradient_for, record
from tests.support.chains import images, make
from tests.support.operations import Operations

convert = nn.SyncBatchNorm.convert_sync_batchnorm

CHAINS = [
    "basic, stride 2",
    "basic, conv bias",
    "bottleneck, stride 2",
    "wide, stride 2",
    "option A",
    "pre-activation",
    "stem",
    "one unit",
    "norm, momentum None",
    "norm, not affine",
    "norm, untracked",
    "stage: basic",
    "stage: bottleneck",
]
# images of each rank
SPLITS = {"2 ranks": (3, 1), "an empty rank": (0, 4), "4 ranks": (2, 0, 1, 1)}
DRAWS = 7


def counted(operations: Operations) -> list[int]:
    """How often something was gathered, and how often summed up."""
    return [operations.names.count(f"fused_resnet::{name}") for name in ("all_gather", "all_reduce_")]


def step(call, model, x: Tensor, part: slice, autocast: torch.dtype | None = None) -> dict[str, Tensor]:
    """Record what a rank's part of a batch gives: its images' outputs and gradients, and what it adds to the others."""
    mine = x[part].clone().requires_grad_()
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        output = call(mine)
    whole = gradient_for(output.new_empty(len(x), *output.shape[1:]))
    output.backward(whole[part])
    results = {"output 0": output.detach(), "x.grad": mine.grad}
    results.update({f"{name}.grad": parameter.grad for name, parameter in model.named_parameters()})
    results.update({name: buffer.clone() for name, buffer in model.named_buffers()})
    return results


def join(ranks: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Make the ranks' records the record of one process; buffers must be the same in all, to the bit."""
    joined = {}
    for name, first in ranks[0].items():
        parts = [rank[name] for rank in ranks]
        if name in ("output 0", "x.grad"):
            joined[name] = torch.cat(parts)
        elif name.endswith(".grad"):
            joined[name] = torch.stack(parts).double().sum(0).to(first.dtype)
        else:
            assert all(torch.equal(part, first) for part in parts), name
            joined[name] = first
    return joined


def parts_of(split: tuple[int, ...]) -> list[slice]:
    ends = list(itertools.accumulate(split, initial=0))
    return [slice(*bounds) for bounds in itertools.pairwise(ends)]


def draws_of(model: nn.Module, half: bool) -> list[Tensor]:
    """Inputs: several in half precision, where one rounding is luck, and cast where no convolution reads them."""
    cast = half and getattr(model, "project", model) is None
    return [
        images(model, seed=seed).to(torch.bfloat16 if cast else torch.float32) for seed in range(DRAWS if half else 1)
    ]


def fused_steps(rank, name, split, half, compiled=False):
    part = parts_of(split)[rank]
    fused = fused_resnet.fuse(convert(make(name, clear=half)), chain="stage")
    call = torch.compile(fused, fullgraph=True, backend="aot_eager") if compiled else fused
    state = copy.deepcopy(fused.state_dict())
    norms = sum(isinstance(module, nn.SyncBatchNorm) for module in fused.modules())
    records = []
    for x in draws_of(fused, half):
        fused.load_state_dict(state)
        fused.zero_grad()
        # a compiler wants no mode around it
        with nullcontext() if compiled else Operations("fused_resnet") as operations:
            records.append(step(call, fused, x, part, torch.bfloat16 if half else None))
        assert compiled or counted(operations) == [norms, norms]
    return records


def assert_as_accurate_as_the_whole_batch(ranks, name, half=False):
    autocast = torch.bfloat16 if half else None
    model = make(name, clear=half)
    draws = draws_of(model, half)
    exact = [record(copy.deepcopy(model).double(), x.double()) for x in draws]
    stock = [record(copy.deepcopy(model), x, autocast=autocast) for x in draws]
    assert_as_accurate_as_stock([join(records) for records in zip(*ranks, strict=True)], stock, exact)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", CHAINS)
def test_ranks_together_are_as_accurate_as_stock_with_the_whole_batch(name, split, run_ranks):
    split = SPLITS[split]
    assert_as_accurate_as_the_whole_batch(run_ranks(len(split), fused_steps, name, split, False), name)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", ["basic, stride 2", "wide, stride 2", "option A", "stem", "stage: bottleneck"])
def test_ranks_together_are_as_accurate_in_half_precision(name, split, run_ranks):
    split = SPLITS[split]
    assert_as_accurate_as_the_whole_batch(run_ranks(len(split), fused_steps, name, split, True), name, True)


def gpu_steps(rank):
    device = torch.device("cuda", rank % torch.cuda.device_count())
    records = []
    for model in (make("bottleneck, stride 2"), fused_resnet.fuse(make("bottleneck, stride 2"))):
        x = images(model).to(device)
        model = convert(model).to(device, memory_format=torch.channels_last)
        results = step(model, model, x, parts_of((3, 1))[rank])
        records.append({name: result.cpu() for name, result in results.items()})
    return records


@pytest.mark.skipif(not torch.cuda.is_available(), reason="stock synchronizes batch norm on GPUs only")
def test_ranks_are_as_accurate_as_stock_ranks(run_ranks):
    stock, ours = (join(records) for records in zip(*run_ranks(2, gpu_steps), strict=True))
    model = make("bottleneck, stride 2").double()
    assert_as_accurate_as_stock(ours, stock, record(model, images(model).double()))


def test_compiled_ranks_together_are_as_accurate(run_ranks):
    ranks = run_ranks(2, fused_steps, "bottleneck, stride 2", (3, 1), False, True)
    assert_as_accurate_as_the_whole_batch(ranks, "bottleneck, stride 2")


def steps_in_groups(rank):
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    model = fused_resnet.fuse(convert(make("basic, stride 2"), groups[rank // 2]))
    x = images(model, seed=rank // 2)
    report = str(fused_resnet.explain(model, x.shape))
    return [step(model, model, x, slice(2) if rank % 2 == 0 else slice(2, 4))], report


def test_a_process_group_has_statistics_of_its_own(run_ranks):
    ranks = run_ranks(4, steps_in_groups)
    for pair in (0, 1):
        model = make("basic, stride 2")
        x = images(model, seed=pair)
        exact, stock = record(copy.deepcopy(model).double(), x.double()), record(model, x)
        ours = join([records[0] for records, _ in ranks[2 * pair : 2 * pair + 2]])
        assert_as_accurate_as_stock(ours, stock, exact)
    assert "batch norm synchronized, which stock PyTorch refuses on the CPU" in ranks[0][1]


class MixedNorms(nn.Module):
    """Its last 1×1 convolution has a batch norm of each rank's own, behind one that is synchronised."""

    def __init__(self):
        super().__init__()
        self.block = make("bottleneck")
        self.block.body[1] = convert(self.block.body[1])

    def forward(self, x):
        return self.block(x)


def mixed_norms(rank):
    model = fused_resnet.fuse(MixedNorms(), memory="lean")
    x = images(model)
    results = step(model, model, x, slice(0) if rank == 0 else slice(4))
    return results["output 0"], model.block.body[1].running_mean


def test_an_empty_rank_takes_part_also_where_other_norms_are_its_own(run_ranks):
    (output, running_mean), (whole_output, whole_mean) = run_ranks(2, mixed_norms)
    assert len(output) == 0
    assert torch.equal(running_mean, whole_mean)
    torch.testing.assert_close(whole_output, MixedNorms()(images(MixedNorms())))


def rank_sees_one_value(rank):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    x = torch.randn(2, 3, 3, 3)
    output = fused_resnet.fuse(convert(copy.deepcopy(model)))(x[rank : rank + 1])
    return output.detach(), model(x)[rank : rank + 1].detach()


def test_one_value_of_a_channel_is_enough_where_other_ranks_have_more(run_ranks):
    for output, expected in run_ranks(2, rank_sees_one_value):
        torch.testing.assert_close(output, expected)


def collectives(rank):
    model = fused_resnet.fuse(convert(make("basic, projection")))
    outsiders = dist.new_group([0])
    x = images(model)
    counts = {}
    for name, change in {
        "training": lambda: None,
        "first convolution frozen": lambda: model.body[0].requires_grad_(False),
        "a group of one": lambda: [
            setattr(m, "process_group", outsiders) for m in model.modules() if isinstance(m, nn.SyncBatchNorm)
        ],
        "eval": lambda: model.eval(),
    }.items():
        change()
        with Operations("fused_resnet") as operations:
            model(x).sum().backward()
        counts[name] = counted(operations)
    return counts


def test_collectives_run_only_where_they_are_needed(run_ranks):
    expected = {"training": [3, 3], "first convolution frozen": [3, 2], "a group of one": [0, 0], "eval": [0, 0]}
    assert run_ranks(2, collectives) == [expected] * 2


def schedule_without_data(rank):
    k = ops.kernels("reference", "cpu", torch.float32)
    group = dist.group.WORLD.group_name
    with FakeTensorMode():
        y, weight = torch.empty(2, 8, 5, 5), torch.empty(8)
        moments, affine = synchronized.batch_norm_stats(y, weight, weight, 1e-5, group, k)
        merged, _ = k.batch_norm_merge(torch.empty(2, 17), weight, weight, 1e-5)
        sums = synchronized.mean_sums(torch.empty(2, 8), 50, group)
    return [list(t.shape) for t in (moments, affine, merged, sums)]


def test_the_host_reads_no_value_of_the_device(run_ranks):
    # a tensor without data raises where one is read
    assert run_ranks(2, schedule_without_data) == [[[3, 8], [2, 8], [3, 8], [2, 8]]] * 2
