"""What is fastest on a device: the built-in figures, or what ``fused-resnet tune`` measured there.

Where ``fuse`` is left to choose, by ``engine="auto"`` or ``memory="fast"``, it goes by a :class:`Tuning`.  Nothing is
measured unasked, and nothing in the middle of a training.
"""

import contextlib
import functools
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fused_resnet.system.atomic import replacing
from fused_resnet.system.environment import cpu_model

FORMAT = 1


@dataclass(frozen=True)
class Tuning:
    """What was measured on one device.

    Attributes
    ----------
    engines
        Those that can serve it, the fastest first.
    most_inputs
        By engine and bytes of an activation's element: up to how many inputs of the 1×1 convolution at a block's end
        it costs no time to do without that convolution's output.  An engine that is not there keeps every output.
        Up to so many channels Triton's own products also take the place of a library's at a block's beginning.
    """

    engines: tuple[str, ...]
    most_inputs: Mapping[tuple[str, int], int]


BUILT_IN = {
    # 2 cores with AVX-512, 8 and 32 images; in half precision the sums, made in float32, cost more than is saved
    "cpu": Tuning(("cpu",), {("cpu", 4): 64}),
    # not measured yet: the order is a guess, and every output is kept
    "cuda": Tuning(("triton", "cuda"), {}),
}

_used: dict[str, Tuning] = {}


def tuning(device_type: str) -> Tuning:
    """Return what decides on devices of this type."""
    return _used.get(device_type) or _read(device_type)


@contextlib.contextmanager
def using(device_type: str, tuning: Tuning) -> Iterator[None]:
    """Let ``tuning`` decide inside about outputs that are kept; the engines in use stay the same."""
    before = _used.get(device_type)
    _used[device_type] = tuning
    try:
        yield
    finally:
        _used.pop(device_type)
        if before is not None:
            _used[device_type] = before


def device_name(device_type: str) -> str:
    """Return the name of the GPU that is in use, or of the processor."""
    return torch.cuda.get_device_name() if device_type == "cuda" else cpu_model()


def path(device_type: str) -> Path | None:
    """Return where the figures of this machine's device are kept, there or not; None where none are to be read."""
    given = os.environ.get("FUSED_RESNET_TUNING")
    if given == "0" or (device_type == "cuda" and not torch.cuda.is_available()):
        return None
    if given:
        return Path(given)
    slug = re.sub(r"[^a-z0-9]+", "-", device_name(device_type).lower()).strip("-")
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "fused_resnet" / f"tuning-{slug}.json"


def write(device_type: str, tuning: Tuning, record: Mapping[str, Any]) -> Path:
    """Keep a tuning for later processes, with the record of how it came about, and return where.

    Raises
    ------
    OSError
        The file cannot be written.
    """
    file = path(device_type)
    if file is None:
        raise OSError("FUSED_RESNET_TUNING=0 says that no tuning is used: unset it, or name a file")
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "format": FORMAT,
        "device": device_name(device_type),
        "engines": tuning.engines,
        "most_inputs": [[engine, size, inputs] for (engine, size), inputs in tuning.most_inputs.items()],
        **record,
    }
    with replacing(file) as stream:
        stream.write((json.dumps(content, indent=1) + "\n").encode())
    return file


@functools.cache
def _read(device_type: str) -> Tuning:
    built_in = BUILT_IN.get(device_type, Tuning((), {}))
    file = path(device_type) if device_type in BUILT_IN else None
    if file is None or not file.exists():
        return built_in
    try:
        content = json.loads(file.read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']}, this version reads {FORMAT}")
        if content["device"] != device_name(device_type):
            raise ValueError(f"it was measured on {content['device']}, this is {device_name(device_type)}")
        most_inputs = {(str(engine), int(size)): int(inputs) for engine, size, inputs in content["most_inputs"]}
        return Tuning(tuple(map(str, content["engines"])), most_inputs)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        warnings.warn(f"fused_resnet: {file} is not used: {reason}; mend: fused-resnet tune", stacklevel=2)
        return built_in
