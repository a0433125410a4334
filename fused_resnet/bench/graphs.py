"""Work captured into a CUDA graph: its replay costs the host one launch, whoever's kernels are in it."""

from collections.abc import Callable

import torch

WARMUP = 3  # calls that make what stays: gradients, momentum, workspaces, compiled code, cuDNN's choices


def capture(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """Capture what ``run()`` asks of a GPU and return its replay.

    Parameters
    ----------
    run : callable
        Reads and writes the same tensors in every call, and never waits for the device.
    device : torch.device
        Where it runs.

    Raises
    ------
    ValueError
        The device is no GPU.
    """
    if device.type != "cuda":
        raise ValueError(f"a CUDA graph needs a CUDA device, got {device}")
    # one stream for the warm-up and the capture: autograd remembers the stream of a leaf's gradient
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARMUP):
            run()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    return graph.replay
