"""The network of a run or of an evaluation, for a data set."""

from typing import Any

from torch import nn

from fused_resnet import models


def make_network(name: str, *, channels: int, num_classes: int, **options: Any) -> nn.Module:
    """Make a network for images of `channels` channels and `num_classes` labels.

    Parameters
    ----------
    name : str
        A name that `fused_resnet.models.create` knows.
    channels, num_classes : int
        Of the data set.
    **options
        The model's own, such as ``shortcut``; those that are None are left to its defaults.

    Raises
    ------
    ValueError
        No model has that name, or this one cannot be made like that.
    """
    options = {option: value for option, value in options.items() if value is not None}
    if channels != 3:  # those of other packages have no such option, or call it otherwise
        options["in_channels"] = channels
    try:
        return models.create(name, num_classes=num_classes, **options)
    except (TypeError, KeyError) as error:  # of other packages: no such option, no weights of that name
        asked = ", ".join(f"{option}={value!r}" for option, value in options.items())
        raise ValueError(f"model {name} cannot be made with {asked}: {error}") from error
