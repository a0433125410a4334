"""The operations that a model runs."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Operations(TorchDispatchMode):
    """The operations that run inside, in order, with their arguments; those of one namespace where one is named."""

    def __init__(self, namespace: str | None = None):
        super().__init__()
        self.namespace = namespace
        self.calls: list[tuple[Any, tuple, dict]] = []

    @property
    def names(self) -> list[str]:
        return [func.name().partition(".")[0] for func, _, _ in self.calls]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.namespace in (None, func.namespace):
            self.calls.append((func, args, kwargs))
        return func(*args, **kwargs)
