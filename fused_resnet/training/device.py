"""The device that a run or an evaluation is on."""

import torch


def resolve_device(name: str) -> torch.device:
    """Return the device of that name; ``auto`` is the GPU where there is one, else the CPU.

    Raises
    ------
    ValueError
        PyTorch knows no such device, or sees none here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:0, cuda:1 ...; got {name!r}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {name!r} is not there: torch {torch.__version__} sees {torch.cuda.device_count()} GPUs "
            f"here; take cpu, or install a torch that is built for this machine's driver"
        )
    return device
