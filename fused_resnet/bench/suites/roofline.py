"""Suite ``roofline``: what a training step of a network must cost, by scheme; counted and traced, not measured."""

from collections.abc import Iterator

from fused_resnet import models
from fused_resnet.bench.peers import DTYPES, FUSINGS
from fused_resnet.bench.roofline import PASSES, count, network_shapes, traced
from fused_resnet.bench.rows import BYTES, IMAGES_PER_SECOND, Row
from fused_resnet.bench.settings import Settings
from fused_resnet.bench.suites.ceilings import ceilings

DRAM, SAVED = "DRAM bytes per image", "activations per image"
IN_TURN, AT_ONCE = "speed, no overlap", "speed, full overlap"


def measure_roofline(settings: Settings) -> Iterator[Row]:
    """Count every network in every dtype; the ceilings are given or measured."""
    batch, size = settings.batch_size, settings.image_size
    for model in settings.models:
        shapes = network_shapes(model, size)
        network = models.create(model).to(settings.device)
        for dtype in settings.dtypes:
            limits = ceilings(settings, dtype)
            schemes = {s: count(shapes, s, element_size=DTYPES[dtype].itemsize, batch_size=batch) for s in PASSES}
            for s in FUSINGS:
                input_shape = (batch, 3, size, size)
                schemes[s] = traced(
                    network, shapes, s, input_shape=input_shape, dtype=DTYPES[dtype], engine=settings.engines[0]
                )
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
