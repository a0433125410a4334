"""Whose Python a trace need not look into."""

import os
from types import FrameType

import torch

from fused_resnet import blocks

TORCH = os.path.dirname(torch.__file__) + os.sep
PYTHON = os.path.dirname(os.__file__) + os.sep
# the tracer's files, and those of the fused modules that a forward may run
OWN = (os.path.dirname(__file__) + os.sep, os.path.dirname(blocks.__file__) + os.sep)
# what changes how torch runs, or runs code where a trace does not look
MODES = (
    "utils/_contextlib.py",
    "autograd/grad_mode.py",
    "autograd/function.py",
    "autograd/graph.py",
    "autograd/profiler.py",
    "amp/autocast_mode.py",
    "utils/checkpoint.py",
    "random.py",
)


def looks_up_like_transformers(name: str, module: str) -> bool:
    """Whether a function is the look-up of Hugging Face's configurations: of other names for what they hold."""
    return name in ("__getattribute__", "__getattr__") and module.startswith("transformers.")


def is_trusted(frame: FrameType) -> bool:
    """Whether a function is torch's own, but for the modes, or the tracer's, or runs on behalf of these."""
    if str(frame.f_globals.get("__name__")).startswith("namedtuple_"):  # which collections has generated
        return True
    if frame.f_code.co_filename.startswith("<frozen"):  # Python's own collections
        return True
    if looks_up_like_transformers(frame.f_code.co_name, str(frame.f_globals.get("__name__"))):
        return True
    file = frame.f_code.co_filename
    while file.startswith(PYTHON) and "site-packages" not in file and frame.f_back is not None:
        frame = frame.f_back
        file = frame.f_code.co_filename
    if file.startswith(TORCH):
        return file[len(TORCH) :] not in MODES
    return file.startswith(OWN)
