"""Run a model stock, fused and in float64, on the user's own network and inputs."""

import copy
import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fused_resnet.surgery import NothingToFuse, explain, fuse, unfuse
from fused_resnet.system import generators
from fused_resnet.verification.accuracy import gradient_for, one_rounding_away
from fused_resnet.verification.report import Row, Verification, failed, row_of, said, with_noise

# Draws of a network's own noise at most, of which the worst counts.  Where activations are few, few ReLUs flip: with
# one draw, 1 of 8 ResNet-18s (bfloat16, 4 images of 32×32, evaluation) were called inaccurate, with 4 none; ShuffleNets
# (float32, 4 images of 32×32), in which 1 step in 10 has a ReLU that flips, want more.
DRAWS = 16
NOTHING_TO_COMPARE = "there is nothing to compare with"


def verify(model: nn.Module, *inputs: Any, dtype: torch.dtype | None = None, **keywords: Any) -> Verification:
    """Say whether a model, fused, computes what stock PyTorch computes: one step forward and backward, printable.

    From one state and the same random numbers it runs stock, fused and stock in float64, each in the modes that the
    modules are in.  A fused result's error against float64 may be twice stock's and 4 units in the last place;
    integers, and what has no gradient, must be the same.  Where a row breaks that, stock runs again, up to 4 times, by
    inputs one rounding away: in a deep network such a rounding decides on which side of 0 an activation falls.  A row
    is fine, and says so, where fused is no farther off than twice the worst of that.

    All of it happens on deep copies: the model, its gradients and the random number generators stay as they are.

    Parameters
    ----------
    model
        Fused, or stock: then a copy of it is fused, by default options.
    *inputs, **keywords
        What the model is called with.  Gradients are taken of the tensors that require one; where none does, of all
        floating-point ones.
    dtype
        Of autocast, ``torch.bfloat16`` or ``torch.float16``, for stock and fused; default: no autocast.

    Returns
    -------
    ``.ok``, ``.rows``, ``.chains``.  What the model raises is in the rows, too: fused must raise what stock raises.

    Raises
    ------
    TypeError
        Where ``model`` is no module or is wrapped in DDP or the like, where ``dtype`` is none, where there is no input.
    ValueError
        Where ``dtype`` is not one that autocast computes in.

    Examples
    --------
    >>> print(fused_resnet.verify(model, images, dtype=torch.bfloat16))
    >>> assert fused_resnet.verify(model, images).ok
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not inputs and not keywords:
        raise TypeError("inputs must be what the model is called with, got none: verify(model, images)")
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype or None, got {dtype!r}")
    if dtype not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype must be torch.bfloat16 or torch.float16, which autocast computes in, got {dtype}")
    with generators.restored(), warnings.catch_warnings():
        warnings.simplefilter("ignore", NothingToFuse)  # the report says it
        try:
            stock, exact, fused = (copy.deepcopy(model) for _ in range(3))
        except Exception as error:
            return failed(0, f"the model cannot be deep-copied: {said(error)}")
        try:
            chains = len(explain(fused).fused) or len(explain(fuse(fused)).fused)
        except TypeError:
            raise
        except Exception as error:
            return failed(0, f"fuse raises {said(error)}")
    call = (inputs, keywords)
    counts = {name: t.clone() for name, t in stock.named_buffers() if name.rpartition(".")[2] == "num_batches_tracked"}
    by_stock = _run(unfuse(stock), call, dtype)
    by_fused = _run(fused, call, dtype)
    if isinstance(by_stock, Exception) or isinstance(by_fused, Exception):
        return _raised(chains, by_fused, by_stock)
    by_exact = _run(unfuse(exact), call, None, exact=True)
    if isinstance(by_exact, Exception):
        return failed(chains, f"{NOTHING_TO_COMPARE}: in float64 stock raises {said(by_exact)}")
    once = _counted_once(counts, by_fused, by_stock)
    by_stock, by_exact = _as_counted(by_stock, once), _as_counted(by_exact, once)
    rows = [_output_types(by_fused, by_stock), *_rows(by_fused, by_stock, by_exact, once)]
    for seed in range(DRAWS):
        if all(row.ok or row.fused is None for row in rows):
            break
        moved = _run(unfuse(copy.deepcopy(model)), call, dtype, moved=seed)
        if not isinstance(moved, Exception):
            noise = {row.name: row.fused for row in _rows(_as_counted(moved, once), by_stock, by_exact, once)}
            rows = [with_noise(row, noise.get(row.name)) for row in rows]
    return Verification(tuple(rows), chains)


# the arguments of a model, and those by name
_Call = tuple[tuple[Any, ...], dict[str, Any]]


class _Run(NamedTuple):
    """What a step left: tensors by name, the types of the outputs by name, and the buffers as forward left them."""

    tensors: dict[str, Tensor | None]
    types: dict[str, str]
    after_forward: dict[str, Tensor]


def _run(
    model: nn.Module, call: _Call, dtype: torch.dtype | None, *, exact: bool = False, moved: int | None = None
) -> _Run | Exception:
    """Run a model one step, in float64, or with inputs moved by a rounding, drawn by a seed; return what it raises."""
    try:
        with generators.restored(), torch.inference_mode(False), torch.enable_grad():
            return _step(model.double() if exact else model, *_prepare(call, dtype, exact, moved), dtype)
    except Exception as error:
        return error


def _prepare(call: _Call, dtype: torch.dtype | None, exact: bool, moved: int | None) -> tuple[_Call, dict[str, Tensor]]:
    """Return what a model is called with, and the leaves in it that are to have a gradient."""
    given, structure = pytree.tree_flatten(call)
    floating = {i: t for i, t in enumerate(given) if isinstance(t, Tensor) and t.is_floating_point()}
    asked = any(t.requires_grad for t in floating.values())
    leaves = {}
    for i, t in enumerate(given):
        if isinstance(t, Tensor):
            leaf = t.detach().clone()
            if moved is not None and i in floating:
                leaf = one_rounding_away(leaf, dtype, moved)
            if i in floating:
                leaf = leaf.double() if exact else leaf
                if t.requires_grad or not asked:
                    leaves[f"input {i}.grad"] = leaf.requires_grad_()
            given[i] = leaf.clone()  # the model may write to its input, as it may where no gradient is asked for
    return pytree.tree_unflatten(given, structure), leaves


def _step(model: nn.Module, call: _Call, leaves: dict[str, Tensor], dtype: torch.dtype | None) -> _Run:
    for parameter in model.parameters():
        parameter.grad = None
    inputs, keywords = call
    device = next((t.device.type for t in (*model.parameters(), *leaves.values())), "cpu")
    with torch.autocast(device, dtype=dtype, enabled=dtype is not None):
        found = list(_flatten(model(*inputs, **keywords), "output"))
    outputs = {name: value for name, value in found if isinstance(value, Tensor)}
    tensors: dict[str, Tensor | None] = {name: output.detach().clone() for name, output in outputs.items()}
    after_forward = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    with_gradient = [output for output in outputs.values() if output.requires_grad]
    if with_gradient:
        torch.autograd.backward(with_gradient, [gradient_for(output) for output in with_gradient])
    tensors.update({name: leaf.grad for name, leaf in leaves.items()})
    tensors.update({f"{name}.grad": parameter.grad for name, parameter in model.named_parameters()})
    tensors.update({name: buffer.detach() for name, buffer in model.named_buffers()})
    return _Run(tensors, {name: _type_of(value) for name, value in found}, after_forward)


def _flatten(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield everything in what a model returned, by name: containers, and what is in them."""
    inner: dict[str, Any] = {}
    if isinstance(value, float):
        value = torch.tensor(value, dtype=torch.float64)
    elif isinstance(value, Mapping):
        inner = {f"[{key!r}]": v for key, v in value.items()}
    elif isinstance(value, (tuple, list)):
        inner = {f"[{i}]": v for i, v in enumerate(value)}
    elif dataclasses.is_dataclass(value):
        inner = {f".{field.name}": getattr(value, field.name) for field in dataclasses.fields(value)}
    yield name, value
    for key, v in inner.items():
        yield from _flatten(v, name + key)


def _type_of(value: Any) -> str:
    if isinstance(value, (bool, int, str, type(None))):
        return repr(value)
    gradient = " without gradient" if isinstance(value, Tensor) and not value.requires_grad else ""
    return type(value).__name__ + gradient


def _output_types(fused: _Run, stock: _Run) -> Row:
    """Compare what is in the outputs, apart from numbers."""
    for name in stock.types | fused.types:
        ours, theirs = (run.types.get(name, "nothing") for run in (fused, stock))
        if ours != theirs:
            return Row("output types", False, f"{name} is {ours}, stock's is {theirs}")
    in_order = list(fused.types) == list(stock.types)
    return Row("output types", in_order, "" if in_order else "in another order than stock's")


def _counted_once(before: dict[str, Tensor], fused: _Run, stock: _Run) -> set[str]:
    """Return the norms whose statistics stock moved again when activation checkpointing ran their forward again."""
    norms = set()
    for name, count in before.items():
        ours, theirs, first = fused.tensors.get(name), stock.tensors.get(name), stock.after_forward.get(name)
        if ours is None or theirs is None or first is None or torch.equal(ours, theirs):
            continue
        if torch.equal(ours, first) and torch.equal(theirs - count, 2 * (ours - count)):
            norms.add(name.rpartition(".")[0])
    return norms


def _as_counted(run: _Run, once: set[str]) -> _Run:
    """Return a run with the statistics of these norms as forward left them."""
    tensors = dict(run.tensors)
    tensors.update({name: t for name, t in run.after_forward.items() if name.rpartition(".")[0] in once})
    return run._replace(tensors=tensors)


def _rows(fused: _Run, stock: _Run, exact: _Run, once: set[str]) -> Iterator[Row]:
    for name in stock.tensors | fused.tensors:
        row = row_of(name, *(run.tensors.get(name) for run in (fused, stock, exact)))
        if name in stock.after_forward and name.rpartition(".")[0] in once:
            row = row._replace(note="; ".join(filter(None, ("stock counted the recomputation, too", row.note))))
        yield row


def _raised(chains: int, fused: _Run | Exception, stock: _Run | Exception) -> Verification:
    """Report a step that did not come to its end: fused must raise what stock raises."""
    ours, theirs = (said(run) if isinstance(run, Exception) else "nothing" for run in (fused, stock))
    ok = type(fused) is type(stock) and ours == theirs
    note = f"stock raises {theirs}, and so does fused" if ok else f"fused raises {ours}; stock raises {theirs}"
    return failed(chains, note, ok)
