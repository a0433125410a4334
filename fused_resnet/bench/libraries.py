"""Networks of timm and torchvision, ``timm:NAME`` and ``torchvision:NAME``: are they there, and what are they given.

They get random weights; nothing is downloaded.
"""

import difflib
import importlib
from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from fused_resnet import models

LIBRARIES = ("timm", "torchvision")
CLASSES = 1000
# of a clip, at half the size of images: 16 × 112 × 112 for 224, as in Tran et al., "A Closer Look at Spatiotemporal
# Convolutions for Action Recognition", 2018
FRAMES = 16


def is_library_name(model: str) -> bool:
    """Whether a name says which library it is from."""
    return ":" in model


def check_name(model: str) -> None:
    """Find out before anything is measured whether a library has a network that classifies images or clips.

    Raises
    ------
    ValueError, ImportError
        It has none of that name, or is not installed; the message names ``--model``, and what to do.
    """
    library, _, name = model.partition(":")
    if library not in LIBRARIES:
        raise ValueError(f"--model must be NAME, timm:NAME or torchvision:NAME, got {model!r}")
    if find_spec(library) is None:
        raise ModuleNotFoundError(f"--model {model} needs {library}, not installed here; mend: pip install {library}")
    known = _names(library)
    if name not in known:
        close = ", ".join(f"{library}:{found}" for found in difflib.get_close_matches(name, known, n=3))
        hint = f"is it {close}?" if close else f"{_LISTS[library]} lists them"
        raise ValueError(
            f"--model {library}:NAME must be one of {library}'s {len(known)} classifiers, got {name!r}; {hint}"
        )


_LISTS = {"timm": "timm.list_models()", "torchvision": "torchvision.models.list_models()"}


def _names(library: str) -> list[str]:
    if library == "timm":
        return list(importlib.import_module("timm").list_models())
    zoo = importlib.import_module("torchvision.models")
    return [*zoo.list_models(module=zoo), *zoo.list_models(module=zoo.video)]


def is_of_clips(model: str) -> bool:
    """Whether a network reads clips [N, 3, T, H, W] rather than images."""
    library, _, name = model.partition(":")
    if library != "torchvision":
        return False
    zoo = importlib.import_module("torchvision.models")
    return name in zoo.list_models(module=zoo.video)


def input_shape(model: str, image_size: int) -> tuple[int, ...]:
    """Return the shape of what a network is given, without the batch."""
    return (3, FRAMES, image_size // 2, image_size // 2) if is_of_clips(model) else (3, image_size, image_size)


def channels_last(shape: Sequence[int]) -> torch.memory_format:
    """Return the memory format of a batch of inputs of some shape, and of the weights that meet it."""
    return torch.channels_last_3d if len(shape) == 4 else torch.channels_last


def check_input(model: str, image_size: int) -> None:
    """Find out before anything is measured whether a library's network trains on such images: two of them, forward.

    Raises
    ------
    ValueError
        It does not, or gives more than logits; the message names ``--model``.
    """
    shape = input_shape(model, image_size)
    given = "x".join(map(str, shape))
    try:
        with torch.no_grad():
            logits = create(model)(torch.zeros(2, *shape))
    except Exception as error:
        raise ValueError(f"--model {model} does not take inputs of {given}, set by --image-size: {error}") from error
    if not isinstance(logits, Tensor) or logits.shape != (2, CLASSES):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"--model must give logits [N, {CLASSES}] in training and nothing else, got {model}: {got}")


def create(model: str) -> nn.Module:
    """Return a library's network in training, with random weights."""
    return models.create(model, num_classes=CLASSES).train()
