"""The packages that training and evaluation need and that ``import fused_resnet`` does not."""

from importlib.util import find_spec

# what is imported: what is installed, and the extra that has it
PACKAGES = {"numpy": ("numpy", "train"), "tqdm": ("tqdm", "train")}
OF_A_RUN = {"matplotlib": ("matplotlib", "train")}
OF_DATA = {
    **{name: {"sklearn": ("scikit-learn", "train")} for name in ("digits", "digits8x8")},
    **{name: {"torchvision": ("torchvision", "vision")} for name in ("cifar10", "cifar100", "imagenet", "folder")},
}


def require_extras(data: str, *, run: bool) -> None:
    """Check, before anything is computed, that every package that a data set and a run need is installed.

    Raises
    ------
    ModuleNotFoundError
        Names what is missing, and the mend.
    """
    needed = {**PACKAGES, **(OF_A_RUN if run else {}), **OF_DATA.get(data, {})}
    missing = [needed[module] for module in needed if find_spec(module) is None]
    if missing:
        packages, extras = (sorted(set(names)) for names in zip(*missing, strict=True))
        raise ModuleNotFoundError(
            f"data {data} needs {', '.join(packages)}, not installed here; "
            f"mend: pip install 'fused_resnet[{','.join(extras)}]'"
        )
