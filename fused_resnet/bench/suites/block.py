"""Suite ``block``: forward and backward of every distinct residual block of a network."""

from collections.abc import Iterator
from functools import partial

from fused_resnet import models
from fused_resnet.bench.block import BlockStep, distinct_blocks
from fused_resnet.bench.harness import make_clock, take_turns
from fused_resnet.bench.peers import DTYPES, forget_compiled
from fused_resnet.bench.roofline import block_shapes, traced
from fused_resnet.bench.rows import FUSED, Row
from fused_resnet.bench.settings import Settings
from fused_resnet.bench.suites.ceilings import ceilings
from fused_resnet.bench.suites.contest import Runs, capture_all, refusals, rows_by_engine


def measure_block(settings: Settings) -> Iterator[Row]:
    """Time every distinct block of every network."""
    clock = make_clock(settings.device)
    for dtype in settings.dtypes:
        peers = settings.contenders(dtype)
        for model in settings.models:
            for shape in distinct_blocks(model, settings.image_size)[: 1 if settings.largest_only else None]:
                forget_compiled()
                drawn = BlockStep.make(shape, settings.batch_size, dtype, settings.device)

                refused = refusals(partial(BlockStep, *drawn), peers)
                runs: Runs = {peer: BlockStep(*drawn, peer) for peer in peers if peer not in refused}
                if settings.cuda_graph:
                    runs = capture_all(runs, settings.device, refused)
                values = take_turns(runs, clock, warmup=3, repeats=settings.op_repeats)
                traffic = traced(
                    models.create(model).get_submodule(shape.name).to(settings.device),
                    block_shapes(shape),
                    FUSED,
                    input_shape=(settings.batch_size, *shape.input),
                    dtype=DTYPES[dtype],
                    engine=settings.engines[0],
                )
                limit = ceilings(settings, dtype).limit(
                    settings.batch_size * traffic.bytes, settings.batch_size * traffic.flop
                )
                case = {
                    "model": model,
                    "block": shape.name,
                    "input": "x".join(map(str, shape.input)),
                    "dtype": dtype,
                }
                yield from rows_by_engine(
                    "block", case, peers, values, refused, limit=limit, images=settings.batch_size
                )
