"""Suite ``roofline``: what a training step of a network must cost, by scheme; counted, traced or noted, not timed."""

from collections.abc import Iterator

from fused_resnet import models
from fused_resnet.bench.libraries import is_library_name
from fused_resnet.bench.network import NetworkStep, Workload
from fused_resnet.bench.peers import DTYPES, FUSINGS, STOCK_PEER, Peer
from fused_resnet.bench.recorded import recorded
from fused_resnet.bench.roofline import PASSES, Traffic, count, network_shapes, traced
from fused_resnet.bench.rows import BYTES, IMAGES_PER_SECOND, Row
from fused_resnet.bench.settings import Settings
from fused_resnet.bench.suites.ceilings import ceilings

DRAM, SAVED = "DRAM bytes per image", "activations per image"
IN_TURN, AT_ONCE = "speed, no overlap", "speed, full overlap"


def measure_roofline(settings: Settings) -> Iterator[Row]:
    """Count every network in every dtype; the ceilings are given or measured."""
    for model in settings.models:
        for dtype in settings.dtypes:
            schemes = (of_library if is_library_name(model) else of_package)(model, dtype, settings)
            limits = ceilings(settings, dtype)
            speeds = {o: {s: t.images_per_second(limits, overlap=o) for s, t in schemes.items()} for o in (False, True)}
            figures = (
                (DRAM, BYTES, {s: t.bytes for s, t in schemes.items()}),
                (SAVED, BYTES, {s: t.saved for s, t in schemes.items()}),
                (IN_TURN, IMAGES_PER_SECOND, speeds[False]),
                (AT_ONCE, IMAGES_PER_SECOND, speeds[True]),
            )
            for figure, quantity, values in figures:
                case = {"model": model, "dtype": dtype, "figure": figure}
                yield Row("roofline", case, "", quantity, {scheme: (float(v),) for scheme, v in values.items()})


def of_package(model: str, dtype: str, settings: Settings) -> dict[str, Traffic]:
    """Count this package's network from its shapes, and trace it fused."""
    batch, size, element_size = settings.batch_size, settings.image_size, DTYPES[dtype].itemsize
    shapes = network_shapes(model, size)
    schemes = {s: count(shapes, s, element_size=element_size, batch_size=batch) for s in PASSES}
    network = models.create(model).to(settings.device)
    for s in FUSINGS:
        schemes[s] = traced(
            network, shapes, s, input_shape=(batch, 3, size, size), dtype=DTYPES[dtype], engine=settings.engines[0]
        )
    return schemes


def of_library(model: str, dtype: str, settings: Settings) -> dict[str, Traffic]:
    """Run a library's network, stock's and fused; nobody has counted what a compiler makes of it."""
    workload = Workload(model, settings.batch_size, settings.image_size, dtype, settings.device)
    engine = settings.serving_engines(dtype)[0]
    peers = {"eager": STOCK_PEER, **{s: Peer(s, engine) for s in FUSINGS}}
    return {scheme: recorded(NetworkStep(workload, peer)) for scheme, peer in peers.items()}
