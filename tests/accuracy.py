"""The rule of accuracy, which has no hand-picked tolerance.

A fused result is compared with float64 on the same inputs.  It passes where its error (root mean square) is at most
``FACTOR`` times the error of stock PyTorch in the same dtype, plus ``ULPS`` units in the last place of the result's own
dtype.  NaN on either side fails; so does another shape, dtype, or a gradient where stock has none.
"""

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import fused_resnet

FACTOR = 2
ULPS = 4

Results = Mapping[str, Tensor | None]


def rms(t: Tensor) -> float:
    """Root mean square."""
    return t.double().square().mean().sqrt().item() if t.numel() else 0.0


def why_inaccurate(fused: Tensor | None, stock: Tensor | None, exact: Tensor | None) -> str | None:
    """Return in what a fused result is worse than the rule allows, or None."""
    if fused is None or stock is None or exact is None:
        present = {"fused": fused, "stock": stock, "exact": exact}
        missing = [name for name, t in present.items() if t is None]
        return None if len(missing) == len(present) else f"only {', '.join(missing)} has none"
    if fused.shape != stock.shape or fused.dtype != stock.dtype or fused.device != stock.device:
        return f"{tuple(fused.shape)} {fused.dtype} {fused.device}, stock has {tuple(stock.shape)} {stock.dtype}"
    if not fused.is_floating_point():
        return None if torch.equal(fused, stock) else f"{fused}, stock has {stock}"
    error, stock_error = rms(fused.double() - exact.double()), rms(stock.double() - exact.double())
    if math.isnan(error) or math.isnan(stock_error):
        return f"NaN: error {error}, stock's {stock_error}"
    allowed = FACTOR * stock_error + ULPS * torch.finfo(fused.dtype).eps * rms(exact)
    return None if error <= allowed else f"error {error:.3g}, stock's {stock_error:.3g}, allowed {allowed:.3g}"


def assert_as_accurate_as_stock(fused: Results, stock: Results, exact: Results) -> None:
    """Hold every result against the rule; the error lists all that break it."""
    assert list(fused) == list(stock) == list(exact)
    reasons = {name: why_inaccurate(fused[name], stock[name], exact[name]) for name in stock}
    broken = [f"{name}: {reason}" for name, reason in reasons.items() if reason is not None]
    assert not broken, f"{len(broken)} of {len(reasons)} results are less accurate than stock:\n" + "\n".join(broken)


def outputs_of(value: Any) -> list[Tensor]:
    """Every tensor in what a model returned, in order."""
    if isinstance(value, Tensor):
        return [value]
    values = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return [t for v in values for t in outputs_of(v)]


def gradient_for(output: Tensor) -> Tensor:
    """A gradient that depends on the shape alone, and that every floating-point dtype holds exactly."""
    noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    like = torch.empty_like(output, dtype=torch.bfloat16).copy_(noise)
    return like.to(output.dtype)


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


def assert_fused_is_as_accurate_as_stock(
    model: nn.Module,
    *draws: Tensor,
    dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
    compile: Callable[[nn.Module], Callable[..., Any]] | None = None,
    **options: Any,
) -> nn.Module:
    """Hold a model after ``fuse`` against itself before, one step forward and backward; returns the fused one.

    Where a rounding decides which side of 0 an activation falls on, one draw of inputs is luck in half precision: the
    rule is then asked of several together.
    """
    model = copy.deepcopy(model).to(dtype)
    fused = fused_resnet.fuse(copy.deepcopy(model), **options)
    call = fused if compile is None else compile(fused)
    state = copy.deepcopy(model.state_dict())
    exact, stock, ours = [], [], []
    for x in (draw.to(dtype) for draw in draws):
        for module in (model, fused):
            module.load_state_dict(state)
            module.zero_grad()
        exact.append(record(copy.deepcopy(model).double(), x.double()))
        stock.append(record(model, x, autocast=autocast))
        ours.append(record(fused, x, autocast=autocast, call=call))
    assert_as_accurate_as_stock(stacked(ours), stacked(stock), stacked(exact))
    return fused


def stacked(runs: list[dict[str, Tensor | None]]) -> dict[str, Tensor | None]:
    """Results of several draws as one."""
    return {name: t if t is None else torch.stack([run[name] for run in runs]) for name, t in runs[0].items()}
