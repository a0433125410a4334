"""Where the time of a step goes: seconds by class of kernel, from torch's profiler."""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from fused_resnet.bench.kernel_classes import CLASSES, classify

GAPS = "launch gaps"


def seconds_by_class(
    run: Callable[[], object], device: torch.device, *, steps: int, trace: Path | None = None
) -> dict[str, float]:
    """Profile some steps and return the seconds of one by class.

    Parameters
    ----------
    run : callable
        A step that is warm.
    device : torch.device
        On a GPU its kernels are counted, on the CPU the operations of the dispatcher, each without those it calls.
    steps : int
        How many are profiled.
    trace : Path, optional
        Where a Chrome trace is written (for chrome://tracing or ui.perfetto.dev).

    Returns
    -------
    Every class of `kernel_classes.CLASSES` that took time, and `GAPS`: when nothing ran between the first kernel and
    the last (on the CPU, between operations: Python and the dispatcher).
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        for _ in range(steps):
            run()
        if on_gpu:
            torch.cuda.synchronize(device)
    if trace is not None:
        profiler.export_chrome_trace(str(trace))

    seconds = dict.fromkeys(CLASSES, 0.0)
    intervals: list[tuple[float, float]] = []
    for event in profiler.events():
        if on_gpu and event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            seconds[classify(event.name, "cuda")] += (event.time_range.end - event.time_range.start) * 1e-6
            intervals.append((event.time_range.start, event.time_range.end))
        elif not on_gpu and event.device_type == DeviceType.CPU:
            seconds[classify(event.name, "cpu")] += event.self_cpu_time_total * 1e-6
            if event.cpu_parent is None:
                intervals.append((event.time_range.start, event.time_range.end))
    seconds[GAPS] = idle(intervals) * 1e-6
    return {name: total / steps for name, total in seconds.items() if total > 0}


def idle(intervals: Iterable[tuple[float, float]]) -> float:
    """Return how long nothing ran between the first start and the last end; intervals may overlap."""
    gaps, busy_until = 0.0, None
    for start, end in sorted(intervals):
        if busy_until is not None and start > busy_until:
            gaps += start - busy_until
        busy_until = end if busy_until is None else max(busy_until, end)
    return gaps
