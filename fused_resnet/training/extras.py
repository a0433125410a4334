"""The packages that training needs and that ``import fused_resnet`` does not."""

from importlib.util import find_spec

# what is imported: what is installed
PACKAGES = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "tqdm": "tqdm", "numpy": "numpy"}


def require_extras() -> None:
    """Check, before anything is computed, that every package a run needs is installed.

    Raises
    ------
    ModuleNotFoundError
        Names what is missing, and the mend.
    """
    missing = [package for module, package in PACKAGES.items() if find_spec(module) is None]
    if missing:
        raise ModuleNotFoundError(
            f"training needs {', '.join(missing)}, not installed here; mend: pip install 'fused_resnet[train]'"
        )
