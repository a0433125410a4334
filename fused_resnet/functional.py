"""The fused operations as functions with autograd.

They are chains of one unit: what :mod:`fused_resnet.chain.schedule` does for a block, for one's own forward.
"""

from typing import Any

from torch import Tensor

from fused_resnet.chain.autograd import run_chain, update_running_stats_
from fused_resnet.chain.spec import IDENTITY, act_signature
from fused_resnet.engines import check_name
from fused_resnet.ops.activation import BY_NAME, NONE, Act

# running_mean, running_var, weight, bias
Norm = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def batch_norm_act(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    residual_norm: Norm | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    act: str | Act = "relu",
    engine: str = "auto",
) -> Tensor:
    """Batch norm, residual add and activation in one forward and one backward: ``act(batch_norm(x) + residual)``.

    Parameters
    ----------
    x
        Activations [N, C, H, W]; float32, bfloat16, float16 or float64; channels_last or contiguous.
    running_mean, running_var
        [C]; read in eval, moved in training (unbiased variance), as in ``torch.nn.functional.batch_norm``.
    weight, bias
        γ and β, [C], or None.
    residual
        Added before the activation; the shape and dtype of ``x``.
    residual_norm
        ``(running_mean, running_var, weight, bias)`` of the residual's own batch norm, as behind a projection
        shortcut: ``act(batch_norm(x) + batch_norm(residual))``.
    training
        Normalise by the batch's statistics; otherwise by the running ones, which then are needed.
    momentum
        How far the running statistics move: ``running = (1 − momentum)·running + momentum·batch``.
    eps
        Added to the variance.
    act
        ``"relu"``, ``"relu6"``, ``"leaky_relu"``, ``"hardtanh"``, ``"silu"``, ``"hardswish"``, ``"gelu"``,
        ``"gelu_tanh"`` or ``"none"``, with the constants that torch's functions default to; with others, an
        :class:`fused_resnet.ops.activation.Act`, such as ``Act(Kind.LEAKY_RELU, 0.2)``.
    engine
        ``"auto"`` or the name of an engine.

    Returns
    -------
    [N, C, H, W], in the dtype and memory format of ``x``; channels_last from the kernels of a GPU.

    Raises
    ------
    ValueError
        Where a shape, a dtype or an option does not fit; names the argument, what was wanted and what came.

    References
    ----------
    Ioffe and Szegedy, "Batch Normalization", 2015, algorithm 1; He et al., "Deep Residual Learning for Image
    Recognition", 2015, equations 1 and 2.
    """
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"x must be floating-point activations [N, C, H, W], got {tuple(x.shape)} {x.dtype}")
    applied = act if isinstance(act, Act) else BY_NAME.get(act)
    if applied is None:
        raise ValueError(f"act must be an Act or one of {', '.join(map(repr, BY_NAME))}, got {act!r}")
    if residual_norm is not None and residual is None:
        raise ValueError("residual_norm normalises the residual: give residual, too")
    if residual_norm is not None and len(residual_norm) != 4:
        raise ValueError(
            f"residual_norm must be (running_mean, running_var, weight, bias), got {len(residual_norm)} values"
        )
    if residual is not None and (residual.shape, residual.dtype, residual.device) != (x.shape, x.dtype, x.device):
        raise ValueError(
            f"residual must have the shape, dtype and device of x, {tuple(x.shape)} {x.dtype} on {x.device}, "
            f"got {tuple(residual.shape)} {residual.dtype} on {residual.device}"
        )
    check_name(engine)
    norms = [(running_mean, running_var, weight, bias)]
    names = [""]
    if residual_norm is not None:
        norms.append(residual_norm)
        names.append("residual_norm: ")
    for name, norm in zip(names, norms, strict=True):
        _check_norm(name, norm, x, training)

    def unit(norm: Norm, act: Act) -> tuple[Any, ...]:
        return None, norm[2] is not None, norm[3] is not None, training, None, float(eps).hex(), act_signature(act)

    main = unit(norms[0], applied)
    shortcut = None if residual is None else IDENTITY if residual_norm is None else unit(residual_norm, NONE)
    parameters = [p for norm in norms for p in norm[2:] if p is not None]
    running = [] if training else [p for norm in norms for p in norm[:2] if p is not None]
    signature = (((main,), shortcut, None),), (engine, "fast")
    z, moments = run_chain(signature, x, residual, parameters, running)
    for (mean, var, *_), new in zip(norms, moments, strict=True):
        if training and mean is not None and var is not None:
            update_running_stats_(engine, [mean], [var], [], [new], momentum)
    return z


def _check_norm(prefix: str, norm: Norm, x: Tensor, training: bool) -> None:
    channels = x.shape[1]
    for name, vector in zip(("running_mean", "running_var", "weight", "bias"), norm, strict=True):
        if vector is not None and vector.shape != (channels,):
            raise ValueError(f"{prefix}{name} must have shape [C] = [{channels}], as x has, got {list(vector.shape)}")
        if vector is not None and vector.device != x.device:
            raise ValueError(
                f"{prefix}{name} must be on the device of x, {x.device}, got {vector.device}; move it with .to()"
            )
    if (norm[0] is None) != (norm[1] is None):
        raise ValueError(f"{prefix}running_mean and running_var must be given both or neither")
    if not training and norm[0] is None:
        raise ValueError(f"{prefix}running_mean and running_var are needed with training=False")
