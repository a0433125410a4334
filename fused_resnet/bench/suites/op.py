"""Suite ``op``: ``act(batch_norm(x) + shortcut)`` at the shapes of a ResNet-50."""

from collections.abc import Callable, Iterator
from itertools import product

from fused_resnet.bench.harness import make_clock, take_turns
from fused_resnet.bench.operation import Operation
from fused_resnet.bench.peers import DTYPES, forget_compiled
from fused_resnet.bench.roofline import operation_bytes
from fused_resnet.bench.rows import Row
from fused_resnet.bench.settings import Settings
from fused_resnet.bench.suites.ceilings import ceilings
from fused_resnet.bench.suites.contest import Runs, capture_all, refusals, rows_by_engine

# What a ResNet-50 of 224x224 images normalises most often: channels and size inside its blocks, and at their ends.
INSIDE = ((64, 112), (64, 56), (128, 28), (256, 14), (512, 7))
ENDS = ((256, 56), (512, 28), (1024, 14), (2048, 7))

PASSES: dict[str, Callable[[Operation], object]] = {
    "fwd": Operation.forward,
    "fwd+bwd": Operation.forward_backward,
}


def op_cases(settings: Settings) -> Iterator[tuple[tuple[int, int, int, int], str]]:
    """Yield the shapes [N, C, H, W], each with its shortcut."""

    def shapes(kind: tuple[tuple[int, int], ...]) -> Iterator[tuple[int, int, int, int]]:
        for channels, size in kind[:1] if settings.largest_only else kind:
            scaled = max(1, round(size * settings.image_size / 224))
            yield settings.batch_size, channels, scaled, scaled

    for shortcut, kind in (("none", INSIDE), ("residual", ENDS), ("dual", ENDS)):
        for shape in shapes(kind):
            yield shape, shortcut


def measure_op(settings: Settings) -> Iterator[Row]:
    """Time the operation at every shape; the rows name its activation where any but ReLU is asked for."""
    clock = make_clock(settings.device)
    for act, dtype in product(settings.acts, settings.dtypes):
        peers = settings.contenders(dtype)
        for shape, shortcut in op_cases(settings):
            forget_compiled()
            stock = Operation.make(shape, shortcut, DTYPES[dtype], settings.device, act=act)
            refused = refusals(stock.by, peers)
            operations = {peer: stock.by(peer) for peer in peers if peer not in refused}
            for name, run in PASSES.items():
                runs: Runs = {peer: _bind(run, operation) for peer, operation in operations.items()}
                if settings.cuda_graph:
                    runs = capture_all(runs, settings.device, refused)
                values = take_turns(runs, clock, warmup=3, repeats=settings.op_repeats)
                counted = operation_bytes(stock.x.numel(), shortcut, stock.x.itemsize, backward=name != "fwd", act=act)
                case = {"shape": "x".join(map(str, shape[1:])), "shortcut": shortcut, "dtype": dtype, "pass": name}
                if settings.acts != ("relu",):
                    case = {"act": act, **case}
                limit = ceilings(settings, dtype).limit(counted, 0)
                yield from rows_by_engine("op", case, peers, values, refused, limit=limit, images=shape[0])


def _bind(run: Callable[[Operation], object], operation: Operation) -> Callable[[], object]:
    return lambda: run(operation)
