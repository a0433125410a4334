"""The rule of accuracy, which has no hand-picked tolerance.

It is :mod:`fused_resnet.verification.accuracy`'s, for results of several draws and for the tests of single kernels.
"""

import copy
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import fused_resnet
from fused_resnet.verification.accuracy import allowed_error, gradient_for, measure
from fused_resnet.verification.accuracy import rms as rms  # what the tests take from here

Results = Mapping[str, Tensor | None]


def why_inaccurate(fused: Tensor | None, stock: Tensor | None, exact: Tensor | None) -> str | None:
    """Return in what one fused result breaks the rule, or None."""
    return why_inaccurate_together([fused], [stock], [exact])


def why_inaccurate_together(
    fused: Sequence[Tensor | None], stock: Sequence[Tensor | None], exact: Sequence[Tensor | None]
) -> str | None:
    """Return in what a result of several draws breaks the rule, or None; the medians of its errors are compared."""
    draws = []
    for results in zip(fused, stock, exact, strict=True):
        if any(t is not None and t.is_floating_point() and t.isinf().any() for t in results):
            return "infinite"  # which a user's network may be, and a kernel in a test is not
        errors = measure(*results)
        if isinstance(errors, str):
            return errors
        if errors is not None:
            draws.append(errors)
    if not draws:
        return None
    error, stock_error = statistics.median(e.fused for e in draws), statistics.median(e.stock for e in draws)
    allowed = allowed_error(stock_error, statistics.median(e.ulp for e in draws))
    return None if error <= allowed else f"error {error:.3g}, stock's {stock_error:.3g}, allowed {allowed:.3g}"


def assert_as_accurate_as_stock(
    fused: Results | list[Results], stock: Results | list[Results], exact: Results | list[Results]
) -> None:
    """Hold every result, of one draw of inputs or of several, against the rule; the error lists all that break it."""
    fused, stock, exact = ([runs] if isinstance(runs, Mapping) else runs for runs in (fused, stock, exact))
    names = list(stock[0])
    assert all(list(run) == names for run in (*fused, *stock, *exact))
    reasons = {
        name: why_inaccurate_together(*([run[name] for run in r] for r in (fused, stock, exact))) for name in names
    }
    broken = [f"{name}: {reason}" for name, reason in reasons.items() if reason is not None]
    assert not broken, f"{len(broken)} of {len(reasons)} results are less accurate than stock:\n" + "\n".join(broken)


def outputs_of(value: Any) -> list[Tensor]:
    """Every tensor in what a model returned, in order."""
    if isinstance(value, Tensor):
        return [value]
    values = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return [t for v in values for t in outputs_of(v)]


def record(
    model: nn.Module, x: Tensor, *, autocast: torch.dtype | None = None, call: Callable[..., Any] | None = None
) -> dict[str, Tensor | None]:
    """Run a model forward and backward once; return outputs, gradients and buffers by name."""
    x = x.detach().clone().requires_grad_()
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        outputs = outputs_of(model(x) if call is None else call(x))
    if any(output.requires_grad for output in outputs):
        torch.autograd.backward(outputs, [gradient_for(output) for output in outputs])
    results: dict[str, Tensor | None] = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    results["x.grad"] = x.grad
    results.update({f"{name}.grad": parameter.grad for name, parameter in model.named_parameters()})
    results.update({name: buffer.clone() for name, buffer in model.named_buffers()})
    return results


def outputs_and_gradients(model: nn.Module, x: Tensor, x_wants: bool) -> dict[str, Tensor | None]:
    """What a step gives, a gradient or None for every parameter, and for ``x`` where it wants one."""
    x = x.clone().requires_grad_(x_wants)
    z = model(x)
    assert z.requires_grad == (x_wants or any(p.requires_grad for p in model.parameters()))
    if z.requires_grad:
        z.backward(gradient_for(z))
    return {"z": z.detach(), "x": x.grad} | {n: p.grad for n, p in model.named_parameters()}


def assert_fused_is_as_accurate_as_stock(
    model: nn.Module,
    *draws: Tensor,
    dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
    compile: Callable[[nn.Module], Callable[..., Any]] | None = None,
    **options: Any,
) -> nn.Module:
    """Hold a model after ``fuse`` against itself before, one step forward and backward; returns the fused one.

    With several draws of inputs the medians of the errors are compared: where a rounding decides on which side of 0 an
    activation falls, one draw is luck.
    """
    model = copy.deepcopy(model).to(dtype)
    fused = fused_resnet.fuse(copy.deepcopy(model), **options)
    call = fused if compile is None else compile(fused)
    state = copy.deepcopy(model.state_dict())
    exact, stock, ours = [], [], []
    for x in (draw.to(dtype) if autocast is None else draw for draw in draws):
        for module in (model, fused):
            module.load_state_dict(state)
            module.zero_grad()
        exact.append(record(copy.deepcopy(model).double(), x.double()))
        stock.append(record(model, x, autocast=autocast))
        ours.append(record(fused, x, autocast=autocast, call=call))
    assert_as_accurate_as_stock(ours, stock, exact)
    return fused
