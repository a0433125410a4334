"""Suite ``pointwise``: every distinct 1×1 convolution with its batch norm, part by part."""

from collections.abc import Iterator

from fused_resnet.bench.harness import make_clock, take_turns
from fused_resnet.bench.peers import DTYPES, Peer
from fused_resnet.bench.pointwise import STEPS, Pointwise, PointwiseShape, Step, distinct_pointwise
from fused_resnet.bench.rows import FUSED, MATMUL, TORCH, Row
from fused_resnet.bench.settings import Settings
from fused_resnet.bench.suites.ceilings import ceilings
from fused_resnet.bench.suites.contest import Runs, capture_all, refusals, rows_by_engine


def pointwise_cases(settings: Settings) -> Iterator[tuple[PointwiseShape, Step]]:
    """Yield every shape with each of its steps; where one shape is enough, every step once."""
    seen: set[Step] = set()
    for shape, places in distinct_pointwise(settings.models, settings.image_size).items():
        for step in STEPS:
            if set(step.places) & set(places) and not (settings.largest_only and step in seen):
                seen.add(step)
                yield shape, step


def measure_pointwise(settings: Settings) -> Iterator[Row]:
    """Time every step of every convolution; who is wrong gets no figure."""
    clock, batch = make_clock(settings.device), settings.batch_size
    for dtype in settings.dtypes:
        engines = settings.serving_engines(dtype)
        for shape, step in pointwise_cases(settings):
            drawn = Pointwise.make(step, shape, batch, DTYPES[dtype], settings.device)
            peers = [Peer(name, e) for e in engines for name in (TORCH, FUSED)] if step.fused else [Peer(TORCH)]
            refused = refusals(drawn.by, peers)
            runs: Runs = {peer: drawn.by(peer).result for peer in peers if peer not in refused}
            runs = {**runs, Peer(MATMUL): drawn.products}
            if settings.cuda_graph:
                runs = capture_all(runs, settings.device, refused)
            values = take_turns(runs, clock, warmup=3, repeats=settings.op_repeats)
            limit = ceilings(settings, dtype).limit(
                step.bytes(shape, batch, DTYPES[dtype].itemsize), step.flop(shape, batch)
            )
            case = {"shape": str(shape), "dtype": dtype, "step": step.name}
            yield from rows_by_engine(
                "pointwise", case, [*peers, Peer(MATMUL)], values, refused, limit=limit, images=batch
            )
