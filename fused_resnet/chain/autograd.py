"""A chain as one autograd node: an ``autograd.Function`` in eager mode, dispatcher operations in a traced program.

Both run the bodies in :mod:`fused_resnet.chain.schedule`.  The Function costs a third of the operation's host time; the
operations are opaque to ``torch.compile`` and ``torch.export``, which must not trace into the Function (a Function
whose forward ends in a no-op ``.to`` or ``.contiguous`` has been seen to get all-zero gradients there).
"""

import contextlib
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fused_resnet import ops
from fused_resnet.chain import stock
from fused_resnet.chain.schedule import backward, forward
from fused_resnet.chain.spec import (
    Chain,
    make_chain,
    parse_chain,
    split_kept,
    split_parameters,
    wants_input,
)
from fused_resnet.ops.library import library

DOUBLE_BACKWARD = "fused_resnet: the gradient of a gradient (create_graph=True) is not implemented "
COMPILED = (
    f"{DOUBLE_BACKWARD}under torch.compile; run the model in eager mode, or call fused_resnet.unfuse(model) first"
)
SYNCHRONIZED = f"{DOUBLE_BACKWARD}for synchronised batch norms in fused chains; call fused_resnet.unfuse(model) first"


def run_chain(
    signature: tuple[Any, ...],
    x: Tensor,
    shortcut: Tensor | None,
    parameters: Sequence[Tensor],
    running: Sequence[Tensor],
) -> tuple[Tensor, Sequence[Tensor]]:
    """Run a chain with autograd.

    Parameters
    ----------
    signature
        The chain, as :func:`fused_resnet.chain.spec.make_chain` takes it.
    x, shortcut, parameters, running
        As in :func:`fused_resnet.chain.schedule.forward`.

    Returns
    -------
    The output [N, C', H', W'] and every unit's moments [3, C], which have no gradient.
    """
    if torch.compiler.is_compiling() or type(x) is not Tensor:
        output, moments, _ = torch.ops.fused_resnet.chain_forward(x, shortcut, parameters, running, repr(signature))
        return output, moments
    chain = make_chain(signature)
    if torch.is_grad_enabled():
        output, *moments = _ChainFunction.apply(  # type: ignore[no-untyped-call]
            chain, len(parameters), x, shortcut, *parameters, *running
        )
    else:
        output, moments, _ = _forward(chain, x, shortcut, parameters, running)
    return output, moments


def update_running_stats_(
    engine: str,
    means: list[Tensor],
    variances: list[Tensor],
    counters: list[Tensor],
    moments: list[Tensor],
    momentum: float | None,
) -> None:
    """Move running statistics by what :func:`run_chain` returned, see the operation of this name; no autograd."""
    if torch.compiler.is_compiling():  # the compiler fuses the plain definition into kernels of its own
        ops.batch_norm_act.reference.update_running_stats_(means, variances, counters, moments, momentum)
    else:
        k = ops.kernels(engine, moments[0].device.type, moments[0].dtype)
        k.update_running_stats_(means, variances, counters, moments, momentum)


def _forward(chain, x, shortcut, parameters, running) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    k = ops.kernels(chain.options.engine, x.device.type, x.dtype, x.dim())
    with _without_autocast(x), _on_device(x):
        return forward(chain, x, shortcut, parameters, running, k)


def _backward(chain, grad, x, shortcut, output, parameters, moments, saved, needs_grad) -> list[Tensor | None]:
    k = ops.kernels(chain.options.engine, x.device.type, x.dtype, x.dim())
    with _without_autocast(x), _on_device(x):
        return backward(chain, grad, x, shortcut, output, parameters, moments, saved, needs_grad, k)


def _without_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    if torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()


def _on_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, whichever its tensors are on."""
    if x.device.type == "cuda" and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()


class _ChainFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, chain: Chain, n_parameters: int, x: Tensor, shortcut: Tensor | None, *tensors: Tensor):
        parameters, running = tensors[:n_parameters], tensors[n_parameters:]
        output, moments, saved = _forward(chain, x, shortcut, parameters, running)
        ctx.chain, ctx.n_parameters, ctx.n_running = chain, n_parameters, len(running)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*moments)
        masking = output if chain.masks_by_output else None
        ctx.save_for_backward(x, shortcut, masking, *parameters, *moments, *saved)
        return output, *moments

    @staticmethod
    def backward(ctx, grad, *_):
        none = (None,) * ctx.n_running
        if grad is None:
            return None, None, None, None, *((None,) * ctx.n_parameters), *none
        tensors = ctx.saved_tensors
        _, _, *needs_grad = ctx.needs_input_grad[: 4 + ctx.n_parameters]
        if not torch.is_grad_enabled():
            gradients = _run_backward
        elif any(block.synchronized for block in ctx.chain.blocks):
            gradients = _ChainBackward.apply
        else:
            gradients = _differentiable_backward
        return None, None, *gradients(ctx.chain, ctx.n_parameters, needs_grad, grad, *tensors), *none


def _run_backward(chain, n_parameters, needs_grad, grad, x, shortcut, output, *tensors) -> tuple[Tensor | None, ...]:
    parameters, moments, saved = _split(chain, n_parameters, tensors)
    return tuple(_backward(chain, grad, x, shortcut, output, parameters, moments, saved, needs_grad))


def _differentiable_backward(
    chain, n_parameters, needs_grad, grad, x, shortcut, output, *tensors
) -> tuple[Tensor | None, ...]:
    """Return what :func:`_run_backward` does, with a graph of its own: of the chain, computed again in stock torch.

    ``x``, ``shortcut`` and the parameters are as they were saved, in the graph that they came from, so that second
    derivatives reach it.
    """
    parameters, moments, _ = _split(chain, n_parameters, tensors)
    frozen = [of_unit for unit, of_unit in zip(chain.units, moments, strict=True) if not unit.batch_stats]
    running = [stat for mean, var, _ in frozen for stat in (mean, var)]
    # A gradient is of this use of a tensor alone: the shortcut may have been made of x, or a parameter be there twice.
    x, *parameters = [t.view_as(t) for t in (x, *parameters)]
    shortcut = None if shortcut is None else shortcut.view_as(shortcut)
    with _without_autocast(x):
        z = stock.forward(chain, x, shortcut, parameters, running)
        wanted = list(itertools.compress((x, shortcut, *parameters), needs_grad))
        gradients = iter(torch.autograd.grad(z, wanted, grad, create_graph=True))
    return tuple(next(gradients) if needed else None for needed in needs_grad)


def _split(chain: Chain, n_parameters: int, tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], ...]:
    """Split what a node kept, behind its inputs and its output, into parameters, moments and saved."""
    n_moments = n_parameters + len(chain.units)
    return tensors[:n_parameters], tensors[n_parameters:n_moments], tensors[n_moments:]


class _ChainBackward(torch.autograd.Function):
    """The gradients of a chain with synchronised norms, as a node that refuses to be differentiated.

    ``once_differentiable`` would go silently wrong.
    """

    @staticmethod
    def forward(ctx, *args):
        return _run_backward(*args)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(SYNCHRONIZED)


library.define(
    "chain_forward(Tensor x, Tensor? shortcut, Tensor[] parameters, Tensor[] running, str chain)"
    " -> (Tensor output, Tensor[] moments, Tensor[] saved)"
)
library.define(
    "chain_backward(Tensor grad, Tensor x, Tensor? shortcut, Tensor? output, Tensor[] parameters, Tensor[] moments,"
    " Tensor[] saved, bool[] needs_grad, str chain) -> Tensor[]"
)


def _chain_forward(x, shortcut, parameters, running, chain: str):
    return _forward(parse_chain(chain), x, shortcut, parameters, running)


def _chain_forward_fake(x, shortcut, parameters, running, chain: str):
    parsed = parse_chain(chain)
    return forward(
        parsed, x, shortcut, parameters, running, ops.fakes(parsed.options.engine, x.device.type, x.dtype, x.dim())
    )


def _chain_backward(grad, x, shortcut, output, parameters, moments, saved, needs_grad, chain: str):
    gradients = _backward(parse_chain(chain), grad, x, shortcut, output, parameters, moments, saved, needs_grad)
    return [gradient for gradient in gradients if gradient is not None]


def _chain_backward_fake(grad, x, shortcut, output, parameters, moments, saved, needs_grad, chain: str):
    parsed = parse_chain(chain)
    k = ops.fakes(parsed.options.engine, x.device.type, x.dtype, x.dim())
    gradients = backward(parsed, grad, x, shortcut, output, parameters, moments, saved, needs_grad, k)
    return [gradient for gradient in gradients if gradient is not None]


def _setup_context(ctx, inputs, output):
    x, shortcut, parameters, running, ctx.chain = inputs
    z, moments, saved = output
    ctx.n_parameters, ctx.n_running = len(parameters), len(running)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*moments, *saved)
    masking = z if parse_chain(ctx.chain).masks_by_output else None
    ctx.save_for_backward(x, shortcut, masking, *parameters, *moments, *saved)


def _chain_autograd(ctx, grad, *_):
    none = [None] * ctx.n_running
    if grad is None:
        return None, None, [None] * ctx.n_parameters, none, None
    x, shortcut, output, *tensors = ctx.saved_tensors
    kept = _split(parse_chain(ctx.chain), ctx.n_parameters, tensors)
    needs_x, needs_shortcut, needs_parameters, *_ = ctx.needs_input_grad
    needs_grad = [needs_x, needs_shortcut, *needs_parameters]
    computed = iter(torch.ops.fused_resnet.chain_backward(grad, x, shortcut, output, *kept, needs_grad, ctx.chain))
    dx, d_shortcut, *gradients = [next(computed) if needed else None for needed in needs_grad]
    return dx, d_shortcut, gradients, none, None


def _refuse(ctx, *_: Any):
    raise RuntimeError(COMPILED)


library.impl("chain_forward", _chain_forward, "CompositeExplicitAutograd")
library.impl("chain_backward", _chain_backward, "CompositeExplicitAutograd")
torch.library.register_fake("fused_resnet::chain_forward", _chain_forward_fake, lib=library)
torch.library.register_fake("fused_resnet::chain_backward", _chain_backward_fake, lib=library)
torch.library.register_autograd(
    "fused_resnet::chain_forward", _chain_autograd, setup_context=_setup_context, lib=library
)
torch.library.register_autograd("fused_resnet::chain_backward", _refuse, lib=library)


@register_flop_formula(torch.ops.fused_resnet.chain_forward, get_raw=True)
def _chain_forward_flop(x, shortcut, parameters, running, chain: str, *, out_val, **_) -> int:
    output, _, saved = out_val
    return sum(_conv_flops(parse_chain(chain), x, parameters, saved, output))


@register_flop_formula(torch.ops.fused_resnet.chain_backward, get_raw=True)
def _chain_backward_flop(grad, x, shortcut, output, parameters, moments, saved, needs_grad, chain: str, **_) -> int:
    parsed = parse_chain(chain)
    wanted = split_parameters(parsed, needs_grad[2:])
    passes = [
        bool(w.conv_weight) + bool(z) for w, z in zip(wanted, wants_input(parsed, needs_grad, shortcut), strict=True)
    ]
    flops = _conv_flops(parsed, x, parameters, saved, grad)
    return sum(n * flop for n, flop in zip(passes, flops, strict=True))


def _conv_flops(
    chain: Chain, x: Tensor, parameters: Sequence[Tensor], saved: Sequence[Tensor], output: Tensor
) -> list[int]:
    """Return the floating-point operations of every unit's convolution: 2·K for each output, K inputs behind it.

    They are those of the network; what is computed twice to keep less does not count.  A ``y`` that is not kept has
    the shape of its block's output.
    """
    by_unit = split_parameters(chain, parameters)
    units, _, outputs = split_kept(chain, x, by_unit, saved)
    ends = itertools.chain.from_iterable(
        [end] * len(block.all_units) for block, end in zip(chain.blocks, [*outputs, output], strict=True)
    )
    return [
        0 if kept.y is None else 2 * (end if kept.lacks_y else kept.y).numel() * p.conv_weight[0].numel()
        for p, kept, end in zip(by_unit, units, ends, strict=True)
    ]
