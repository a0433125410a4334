"""A model is written as source text, and its fused copy is held against a stock one that ``fuse`` never saw.

The text defines ``Model``, and where it needs them:

- ``change(model, on)`` flips what steers the forward; what it does to a global it can do twice;
- ``watch(model)`` takes what the forward left outside of its output, and empties it;
- ``around(model)`` is a context manager that the call is made in;
- ``inputs()`` gives what the model is called with.
"""

import contextlib
import copy
import dataclasses
import importlib.util
import io
import itertools
import random
import sys
import textwrap
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_resnet
from fused_resnet.surgery import NothingToFuse
from fused_resnet.verification.accuracy import gradient_for
from tests.support.norms import draw_norms

PRELUDE = """\
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tests.support.oracle import Basic, Net
"""
_numbers = itertools.count()


class Net(nn.Module):
    """Two convolutions, two norms, a ReLU, and a forward that uses them all; the texts override it."""

    def __init__(self):
        super().__init__()
        self.c0, self.n0 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.c1, self.n1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.relu = nn.ReLU()

    def forward(self, x):
        return torch.relu(self.n1(self.c1(self.relu(self.n0(self.c0(x))))))


class Basic(nn.Module):
    """A residual block with nothing strange in it."""

    def __init__(self, channels: int = 4):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + x)


def forward(body: str, *, top: str = "", init: str = "", methods: str = "", more: str = "") -> str:
    """Write a ``Model`` with this forward; ``h`` is not there yet, ``x`` is the input."""

    def indented(text: str, n: int) -> str:
        return textwrap.indent(textwrap.dedent(text).strip("\n"), " " * n)

    lines = [textwrap.dedent(top), "", "class Model(Net):"]
    if init:
        lines += ["    def __init__(self):", "        super().__init__()", indented(init, 8), ""]
    if methods:
        lines += [indented(methods, 4), ""]
    lines += ["    def forward(self, x):", indented(body, 8), "", textwrap.dedent(more)]
    return "\n".join(lines)


def behind_a_chain(body: str, **parts: str) -> str:
    """Write a ``Model`` whose forward starts with a chain that ends in ``h``."""
    return forward("h = torch.relu(self.n0(self.c0(x)))\n" + textwrap.dedent(body), **parts)


def load(folder: Path, source: str) -> Any:
    """Write the text into a file and import it: what asks for the source of a forward finds it."""
    name = f"written_{next(_numbers)}"
    path = folder / f"{name}.py"
    source = textwrap.dedent(source)
    future = "from __future__ import annotations\n"
    if source.lstrip().startswith(future):
        path.write_text(future + PRELUDE + source.lstrip().removeprefix(future))
    else:
        path.write_text(PRELUDE + source)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def make(build: Any) -> nn.Module:
    """Build a model in float64 with norms that are not the identity."""
    torch.manual_seed(0)
    model = build()
    draw_norms(model)
    return model.double()


def images(*shape: int) -> Tensor:
    return torch.randn(shape or (2, 3, 6, 6), generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def fuse(model: nn.Module, **options: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NothingToFuse)
        return fused_resnet.fuse(model, **options)


# ---- what is compared ------------------------------------------------------------------------------------------------


class Seen(NamedTuple):
    """A tensor as it was when it was looked at."""

    value: Tensor
    what: tuple


def look(value: Any) -> Any:
    """Return what can be compared later of anything that a forward returned or left."""
    if isinstance(value, Tensor):
        what = (type(value), value.dtype, tuple(value.shape), value.requires_grad, value.is_inference())
        return Seen(value.detach().as_subclass(Tensor).clone(), what)
    if isinstance(value, Mapping):
        return type(value).__name__, {key: look(v) for key, v in value.items()}, list(value)
    if isinstance(value, (tuple, list)):
        return type(value).__name__, [look(v) for v in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return type(value).__name__, {f.name: look(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (bool, int, float, str, type(None), torch.dtype, type)):
        return value
    return type(value)


def compare(ours: Any, theirs: Any, exact: bool, path: str) -> None:
    """Raise AssertionError where two looks differ; tensors may differ by the default tolerances unless ``exact``."""
    if isinstance(ours, Seen) and isinstance(theirs, Seen):
        assert ours.what == theirs.what, f"{path}: fused {ours.what}, stock {theirs.what}"
        if torch.equal(ours.value, theirs.value):  # faster than assert_close
            return
        tolerances = {"rtol": 0.0, "atol": 0.0} if exact else {}
        torch.testing.assert_close(
            ours.value, theirs.value, equal_nan=True, **tolerances, msg=lambda message: f"{path}: {message}"
        )
    elif isinstance(ours, dict) and isinstance(theirs, dict):
        assert list(ours) == list(theirs), f"{path}: fused has {list(ours)}, stock {list(theirs)}"
        for key in theirs:
            compare(ours[key], theirs[key], exact, f"{path}.{key}")
    elif isinstance(ours, (list, tuple)) and type(ours) is type(theirs) and not isinstance(ours, Seen):
        assert len(ours) == len(theirs), f"{path}: fused has {len(ours)} items, stock {len(theirs)}"
        for i, pair in enumerate(zip(ours, theirs, strict=True)):
            compare(*pair, exact, f"{path}[{i}]")
    else:
        assert type(ours) is type(theirs), f"{path}: fused is {ours!r}, stock {theirs!r}"
        assert ours == theirs or ours != ours, f"{path}: fused is {ours!r}, stock {theirs!r}"


def tensors_of(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = [getattr(value, f.name) for f in dataclasses.fields(value)]
    values = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return [t for v in values for t in tensors_of(v)]


def run(model: nn.Module, inputs: Any, *, around: Any = None, watch: Any = None, call: Any = None) -> dict[str, Any]:
    """Run a step and look at everything that it did."""
    for parameter in model.parameters():
        parameter.grad = None
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point() and not x.is_inference()) for x in inputs]
    torch.manual_seed(5)
    random.seed(5)
    seen: dict[str, Any] = {"error": None, "output": None}
    printed = io.StringIO()
    with warnings.catch_warnings(record=True) as warned, contextlib.redirect_stdout(printed):
        warnings.simplefilter("always")
        try:
            with around(model) if around is not None else contextlib.nullcontext():
                output = (model if call is None else call)(*leaves)
            seen["output"] = look(output)
            ends = [t for t in tensors_of(output) if t.requires_grad]
            if ends:
                torch.autograd.backward(ends, [gradient_for(t.detach()) for t in ends])
        except Exception as error:
            seen["error"] = (type(error), str(error))
    seen["printed"] = printed.getvalue()
    seen["warned"] = [(w.category, str(w.message)) for w in warned if str(w.message).startswith("user: ")]
    seen["gradients"] = {f"input {i}": look(x.grad) for i, x in enumerate(leaves)}
    seen["gradients"].update({name: look(p.grad) for name, p in model.named_parameters()})
    seen["parameters"] = {name: look(p.detach()) for name, p in model.named_parameters()}
    seen["buffers"] = {name: look(b) for name, b in model.named_buffers()}
    seen["random"] = torch.rand(()).item(), random.random()
    seen["left"] = look(watch(model)) if watch is not None else None
    return seen


# ---- what fuse, explain and unfuse must leave alone ------------------------------------------------------------------


def state_of(model: nn.Module, ignore: str | None = "_fused") -> list[Any]:
    """Everything in a model and around it: bytes and versions, modes, attributes, random numbers, grad mode."""

    def inner(value: Any) -> Any:
        if isinstance(value, dict):
            return [(key, id(v)) for key, v in value.items()]
        return [id(v) for v in value] if isinstance(value, (list, tuple)) else None

    state: list[Any] = [bytes(torch.get_rng_state().numpy()), random.getstate(), torch.is_grad_enabled()]
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        version = None if t.is_inference() else t._version
        state.append((name, id(t), version, t.detach().clone(), t.requires_grad, id(t.grad)))
    for name, module in model.named_modules():
        attributes = {k: v for k, v in vars(module).items() if ignore is None or not k.startswith(ignore)}
        state.append((name, module.training, [(k, id(v), inner(v)) for k, v in attributes.items()]))
    return state


def assert_unchanged(before: list[Any], after: list[Any], what: str) -> None:
    assert len(before) == len(after), what
    for then, now in zip(before, after, strict=True):
        if isinstance(then, tuple) and any(isinstance(v, Tensor) for v in then):
            assert all(
                torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(then, now, strict=True)
            ), f"{what} changed {then[0]}: {then} became {now}"
        else:
            assert then == now, f"{what} changed {then if isinstance(then, tuple) else 'a mode or the random numbers'}"


class Oracle:
    """Holds fused models against stock ones; knows by ``chains_run`` whether a chain ran."""

    def __init__(self, folder: Path, chains_run: list):
        self.folder, self.chains_run = folder, chains_run

    def __call__(
        self,
        source: str,
        *,
        fuse_on: bool = False,
        modes: tuple[bool, ...] = (True, False),
        compiled: bool = False,
        least: int | None = None,
    ) -> nn.Module:
        """Compare runs before a change, behind it and (in train) when it was taken back; two runs where there is none.

        ``fuse_on``: fused in the changed state; ``least``: so many chains at least run in the first call.
        """
        module = load(self.folder, source)
        change, watch, around, inputs = (
            getattr(module, name, None) for name in ("change", "watch", "around", "inputs")
        )
        flipped = [fuse_on, not fuse_on, fuse_on] if change is not None else [fuse_on]
        for training in modes:
            stock = make(module.Model).train(training)
            twin = make(module.Model).train(training)
            try:
                if change is not None:
                    change(stock, fuse_on)
                    change(twin, fuse_on)
                if watch is not None:
                    watch(stock)
                before = state_of(twin)
                fused = fuse(twin)
                assert_unchanged(before, state_of(fused), "fuse")
                if watch is not None:  # fuse itself has no side effect
                    compare(look(watch(fused)), look(watch(stock)), True, "left by fuse")
                call = torch.compile(fused, backend="eager") if compiled else None
                ran_before = len(self.chains_run)
                for i, on in enumerate(flipped if training else flipped[:2]):
                    if change is not None:
                        change(stock, on)
                        change(fused, on)
                    for again in range(2 if change is None and training and not compiled else 1):
                        xs = (images(),) if inputs is None else inputs()
                        where = f"{'train' if training else 'eval'}, {'changed' if on else 'unchanged'}, call {again}"
                        theirs = run(stock, xs, around=around, watch=watch)
                        ours = run(fused, xs, around=around, watch=watch, call=call)
                        ran = len(self.chains_run) - ran_before  # a chain leaves statistics one rounding away
                        if theirs["error"] and ours["error"] and (compiled or ran):  # these word it their own way
                            theirs["error"], ours["error"] = (
                                (None, None) if compiled else (theirs["error"][0], ours["error"][0])
                            )
                        compare(ours, theirs, ran == 0 and not compiled, where)
                        if i == again == 0 and least is not None:
                            assert ran >= least, f"{where}: {ran} chains ran\n{fused_resnet.explain(fused)}"
                before = state_of(fused, None)
                fused_resnet.explain(fused)
                assert_unchanged(before, state_of(fused, None), "explain")
                if watch is not None:
                    compare(look(watch(fused)), look(watch(stock)), True, "left by explain")
                before = state_of(fused)
                fused_resnet.unfuse(fused)
                assert_unchanged(before, state_of(fused, None), "unfuse")
            finally:
                if change is not None:
                    change(stock, False)
        return stock


def twins(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Return a stock copy that is never fused, and a fused one."""
    return copy.deepcopy(model), fuse(copy.deepcopy(model))


def assert_same_step(fused: nn.Module, stock: nn.Module, *inputs: Tensor, exact: bool = False) -> None:
    """Compare one step of both."""
    inputs = inputs or (images(),)
    theirs = run(stock, inputs)
    compare(run(fused, inputs), theirs, exact, "step")
