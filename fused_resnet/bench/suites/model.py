"""Suites ``model``, ``memory`` and ``profile``: a step of a whole network."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import torch

from fused_resnet.bench.accuracy import Result
from fused_resnet.bench.harness import make_clock, take_turns
from fused_resnet.bench.kernel_classes import CLASSES
from fused_resnet.bench.libraries import is_library_name
from fused_resnet.bench.memory import activation_bytes, peak_bytes
from fused_resnet.bench.network import NetworkStep, Workload
from fused_resnet.bench.peers import COMPILING, STOCK_PEER, Peer, forget_compiled
from fused_resnet.bench.profile import GAPS, seconds_by_class
from fused_resnet.bench.roofline import count, network_shapes
from fused_resnet.bench.rows import BYTES, PROFILED_SECONDS, Row
from fused_resnet.bench.settings import Settings
from fused_resnet.bench.suites.contest import of_each, refusals, rows_by_engine
from fused_resnet.verification.runs import DRAWS

# Float64 is slow and large: a step is checked on no more images than this.
CHECKED_IMAGES = 4
# of the GPU's memory, that the float64 step's activations and as much again for its gradients may take
CHECKED_MEMORY_PART = 0.6

BATCHES = 4  # that take turns: more images than a cache holds
WARMUP = 2  # rounds; on a GPU what compiles has compiled for this batch when it was checked
PROFILED_STEPS = 3
WHOLE_STEP = "whole step"


def workloads(settings: Settings) -> Iterator[Workload]:
    """Yield every network in every dtype."""
    for model in settings.models:
        for dtype in settings.dtypes:
            yield Workload(
                model,
                settings.batch_size,
                settings.image_size,
                dtype,
                settings.device,
                settings.mode,
                settings.cuda_graph,
            )


def measure_model(settings: Settings) -> Iterator[Row]:
    """Time a step of every network."""
    clock = make_clock(settings.device)
    for workload in workloads(settings):
        peers = settings.contenders(workload.dtype)
        refused = dict(step_refusals(workload, tuple(peers)))
        steps = of_each(peers, refused, partial(warm_step, workload, batches=BATCHES))
        values = take_turns(steps, clock, warmup=WARMUP, repeats=settings.model_repeats)
        del steps  # their memory is the next check's
        case = {"model": workload.model, "dtype": workload.dtype}
        yield from rows_by_engine("model", case, peers, values, refused, images=workload.batch_size)


def measure_memory(settings: Settings) -> Iterator[Row]:
    """Count what a training step of every network keeps for its backward, and on a GPU its peak, without a graph."""
    for workload in workloads(replace(settings, mode="train", cuda_graph=False)):
        peers = settings.contenders(workload.dtype)
        refused = dict(step_refusals(workload, tuple(peers)))
        measures: dict[str, Callable[[Callable[[], NetworkStep]], int]] = {"activations": saved_bytes}
        if workload.device.type == "cuda":
            measures["peak"] = partial(peak_bytes, device=workload.device)
        for name, measure in measures.items():
            # one network lives at a time
            values = of_each(peers, refused, partial(measure_alone, measure, workload))
            case = {"model": workload.model, "dtype": workload.dtype, "memory": name}
            yield from rows_by_engine("memory", case, peers, values, refused, quantity=BYTES)


def measure_alone(measure: Callable[[Callable[[], NetworkStep]], int], workload: Workload, peer: Peer) -> tuple[float]:
    """Return one measurement of a step that `measure` makes."""
    return (float(measure(partial(NetworkStep, workload, peer))),)


def saved_bytes(make: Callable[[], NetworkStep]) -> int:
    """Return the bytes of the activations that a step's forward keeps."""
    step = make()
    return activation_bytes(lambda: step.loss(step.logits()), step.state())


def measure_profile(settings: Settings) -> Iterator[Row]:
    """Split the time of a step of every network by class of kernel."""
    for workload in workloads(settings):
        peers = settings.contenders(workload.dtype)
        refused = dict(step_refusals(workload, tuple(peers)))
        profiles = of_each(peers, refused, partial(profile_step, workload, settings.trace))
        for profile in profiles.values():
            profile[WHOLE_STEP] = sum(profile.values())
        for kind in (*CLASSES, GAPS, WHOLE_STEP):
            values = {peer: (profile.get(kind, 0.0),) for peer, profile in profiles.items()}
            if any(seconds for (seconds,) in values.values()):
                case = {"model": workload.model, "dtype": workload.dtype, "kernels": kind}
                yield from rows_by_engine("profile", case, peers, values, refused, quantity=PROFILED_SECONDS)


def profile_step(workload: Workload, trace: Path | None, peer: Peer) -> dict[str, float]:
    """Return the seconds of a peer's step by class, and write its trace where one is asked for."""
    step, file = warm_step(workload, peer), trace_file(trace, workload, peer)
    return seconds_by_class(step, workload.device, steps=PROFILED_STEPS, trace=file)


def warm_step(workload: Workload, peer: Peer, *, batches: int = 1) -> NetworkStep:
    """Return a step that has run, and is captured where the workload wants it."""
    step = NetworkStep(workload, peer, batches=batches)
    for _ in range(WARMUP):
        step()
    if workload.graphed:
        step.capture()
    return step


def trace_file(path: Path | None, workload: Workload, peer: Peer) -> Path | None:
    """Return where a peer's trace goes: the file that was asked for, with model, dtype and peer in its name."""
    if path is None:
        return None
    name = "-".join([path.stem, *workload.model.split(":"), workload.dtype, *str(peer).split()])
    return path.with_name(name + (path.suffix or ".json"))


@cache
def step_refusals(workload: Workload, peers: tuple[Peer, ...]) -> dict[Peer, str]:
    """Return whose step is wrong and why; asked by several suites, computed once."""
    forget_compiled()
    checked = replace(workload, batch_size=checked_images(workload, peers))
    noise = partial(own_noise, checked) if is_library_name(workload.model) else tuple
    return refusals(partial(NetworkStep, checked), peers, noise)


def own_noise(workload: Workload) -> Iterator[Result]:
    """Yield what a network of stock computes from images one rounding away, draw by draw."""
    for seed in range(DRAWS):
        yield NetworkStep(workload, STOCK_PEER, moved=seed).result()


def checked_images(workload: Workload, peers: tuple[Peer, ...]) -> int:
    """Return on how many images a step is checked: few, but on a GPU all, if they fit, where somebody compiles.

    What compiles would compile for the few, too, which takes longer than a large step in float64.
    """
    few = min(workload.batch_size, CHECKED_IMAGES)
    if workload.device.type != "cuda" or not any(peer.name in COMPILING for peer in peers):
        return few
    if is_library_name(workload.model):  # whose memory nobody has counted
        return few
    shapes = network_shapes(workload.model, workload.image_size)
    saved = count(shapes, "eager", element_size=8, batch_size=workload.batch_size).saved
    memory = torch.cuda.get_device_properties(workload.device).total_memory
    return workload.batch_size if 2 * saved * workload.batch_size < CHECKED_MEMORY_PART * memory else few
