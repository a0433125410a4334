"""Weights from checkpoints: this package's, torchvision's, and whatever holds a state_dict under the same keys."""

import os
import textwrap
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present


def load_weights(model: nn.Module, name: str, weights: str | PathLike[str]) -> None:
    """Give a model the weights of a checkpoint, key for key.

    Parameters
    ----------
    model : nn.Module
        Gets the weights. Where it has ``features_only``, those of the classifier are left out.
    name : str
        Of the model, by which torchvision's weights are found.
    weights : str or path
        A file that holds a state_dict, alone or under the key ``"model"`` or ``"state_dict"``, as ``fused-resnet
        train`` and most training scripts write it, also from a model under DDP or ``torch.compile``; no code that it
        may hold is run. Or the name of torchvision's weights for this model, as
        ``"IMAGENET1K_V2"`` or ``"DEFAULT"``, which torchvision downloads once. Those are of bottlenecks that stride in
        their 3x3: a model with ``stride_in_1x1`` would take them, too, and compute another function.

    Raises
    ------
    FileNotFoundError
        `weights` is neither a file nor the name of torchvision's weights for this model.
    ValueError
        The file holds no state_dict, or one that does not fit the model.
    """
    state = _read(weights) if os.path.isfile(weights) else _download(name, os.fspath(weights))
    if getattr(model, "features_only", False):
        state = {key: value for key, value in state.items() if not key.startswith("fc.")}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = textwrap.shorten(str(error), width=500, placeholder=" ...")
        raise ValueError(
            f"weights {os.fspath(weights)} do not fit this {name}; make it with the options of the model that they are "
            f"of (num_classes, in_channels, shortcut, ...): {reason}"
        ) from error


def _read(path: str | PathLike[str]) -> dict[str, Tensor]:
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises what its many formats raise
        reason = textwrap.shorten(str(error), width=200, placeholder=" ...")
        raise ValueError(f"weights {os.fspath(path)} are damaged, or hold more than tensors: {reason}") from error
    for key in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(
            f"weights {os.fspath(path)} must be a state_dict, alone or under 'model' or 'state_dict'; found neither"
        )
    for prefix in ("_orig_mod.", "module."):  # torch.compile's, DDP's
        consume_prefix_in_state_dict_if_present(state, prefix)
    return state


def _download(name: str, weights: str) -> dict[str, Tensor]:
    """Return the state_dict of torchvision's weights for a model."""
    missing = f"weights {weights!r}: there is no such file"
    try:
        from torchvision.models import get_model_weights
    except ImportError as error:
        raise FileNotFoundError(
            f"{missing}; if it is the name of torchvision's weights: pip install torchvision"
        ) from error
    try:
        known = get_model_weights(name)
    except ValueError as error:
        raise FileNotFoundError(f"{missing}, and torchvision has no weights for {name}") from error
    if weights not in known.__members__:
        raise FileNotFoundError(f"{missing}, and torchvision's weights for {name} are {', '.join(known.__members__)}")
    state: dict[str, Tensor] = known[weights].get_state_dict(check_hash=True, weights_only=True)
    return state
