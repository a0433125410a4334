"""Suite ``conv``: every distinct convolution of some networks, fprop, dgrad and wgrad."""

from collections.abc import Iterator

from fused_resnet.bench.convolution import DGRAD, PASSES, Convolution, distinct_convolutions
from fused_resnet.bench.graphs import capture
from fused_resnet.bench.harness import make_clock, take_turns
from fused_resnet.bench.peers import DTYPES
from fused_resnet.bench.rows import MATMUL, SECONDS, STOCK, Row
from fused_resnet.bench.settings import Settings
from fused_resnet.bench.suites.ceilings import ceilings


def measure_conv(settings: Settings) -> Iterator[Row]:
    """Time every convolution, and the product of matrices of its size where it is one."""
    clock = make_clock(settings.device)
    for dtype in settings.dtypes:
        shapes = distinct_convolutions(settings.models, settings.image_size)
        for shape in shapes[: 1 if settings.largest_only else None]:
            conv = Convolution(shape, settings.batch_size, DTYPES[dtype], settings.device)
            for run in PASSES:
                if run == DGRAD and shape.input[0] == 3:
                    continue  # nobody asks for the gradient of an image
                runs = {STOCK: conv.by_library(run)}
                if shape.is_product:
                    runs[MATMUL] = conv.as_product(run)
                if settings.cuda_graph:
                    runs = {name: capture(call, settings.device) for name, call in runs.items()}
                values = take_turns(runs, clock, warmup=3, repeats=settings.op_repeats)
                counted = shape.bytes(settings.batch_size, DTYPES[dtype].itemsize)
                limit = ceilings(settings, dtype).limit(counted, shape.flop(settings.batch_size))
                kernel = f"{shape.weight[0]} {'x'.join(map(str, shape.weight[2:]))}"
                case = {
                    "input": "x".join(map(str, shape.input)),
                    "kernel": kernel + (f"/{shape.stride}" if shape.stride > 1 else ""),
                    "dtype": dtype,
                    "pass": run,
                }
                yield Row("conv", case, "", SECONDS, values, limit=limit, images=settings.batch_size)
