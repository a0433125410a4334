"""Batch norm with an optional second branch and ReLU: statistics, apply, and the two passes of its backward."""

from typing import Any

import torch
from torch import Tensor

from fused_resnet.ops.activation import SCHEMA as ACT
from fused_resnet.ops.batch_norm_act import reference
from fused_resnet.ops.library import accumulation_dtype

__all__ = ["OPERATIONS", "reference"]


# The fakes name the arguments that their results have something of.


def _fake_stats(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    moments = x.new_empty(3, x.shape[1], dtype=accumulation_dtype(x.dtype))
    return moments, moments.new_empty(2, x.shape[1])


def _fake_merge(parts: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    moments = parts.new_empty(3, parts.shape[1] // 2)
    return moments, moments.new_empty(2, moments.shape[1])


def _fake_affine(moments: Tensor, *_: Any) -> Tensor:
    return moments.new_empty(2, moments.shape[1])


def _fake_act(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


def _fake_reduce(
    grad: Tensor, x: Tensor, moments: Tensor, affine: Tensor, z: Tensor | None, residual: Tensor | None, *_: Any
) -> Tensor:
    return moments.new_empty(2 if residual is None else 4, x.shape[1])


def _fake_coefficients(
    sums: Tensor, branch: int, moments: Tensor, weight: Tensor | None, eps: float, count: int, batch_stats: bool
) -> tuple[Tensor, Tensor, Tensor]:
    channels = moments.shape[1]
    return (
        moments.new_empty(channels),
        moments.new_empty(channels),
        moments.new_empty(4 if batch_stats else 1, channels),
    )


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    affine: Tensor,
    coefficients: Tensor,
    z: Tensor | None,
    residual: Tensor | None,
    residual_coefficients: Tensor | None,
    act: int,
    alpha: float,
    beta: float,
    masked_channels: int,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    if residual is not None:
        return torch.empty_like(x), torch.empty_like(residual)
    return torch.empty_like(x), torch.empty_like(grad[:, :masked_channels]) if masked_channels else grad.new_empty(0)


def _fake_backward_(
    grad: Tensor,
    x: Tensor,
    affine: Tensor,
    coefficients: Tensor,
    z: Tensor | None,
    act: int,
    alpha: float,
    beta: float,
    wants_activation: bool,
) -> Tensor:
    return torch.empty_like(x) if wants_activation else x.new_empty(0)


def _fake_masked_grad(grad: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(grad), _fake_masked_grad_(grad)


def _fake_masked_grad_(grad: Tensor, *_: Any) -> Tensor:
    return grad.new_empty(grad.shape[1], dtype=accumulation_dtype(grad.dtype))


def _fake_nothing(*_: Any) -> None:
    return None


# name -> (schema, fake)
OPERATIONS = {
    "batch_norm_stats": (
        "(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor)",
        _fake_stats,
    ),
    "batch_norm_merge": (
        "(Tensor parts, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor)",
        _fake_merge,
    ),
    "batch_norm_affine": ("(Tensor moments, Tensor? weight, Tensor? bias, float eps) -> Tensor", _fake_affine),
    "batch_norm_act": (
        f"(Tensor x, Tensor affine, Tensor? residual, Tensor? residual_affine, {ACT}, int residual_channel=0)"
        " -> Tensor",
        _fake_act,
    ),
    "batch_norm_act_": (
        f"(Tensor(a!) x, Tensor affine, Tensor? residual, Tensor? residual_affine, {ACT}) -> ()",
        _fake_nothing,
    ),
    "batch_norm_act_reduce": (
        "(Tensor grad, Tensor x, Tensor moments, Tensor affine, Tensor? z, Tensor? residual,"
        f" Tensor? residual_moments, {ACT}) -> Tensor",
        _fake_reduce,
    ),
    "batch_norm_coefficients": (
        "(Tensor sums, int branch, Tensor moments, Tensor? weight, float eps, SymInt count, bool batch_stats)"
        " -> (Tensor, Tensor, Tensor)",
        _fake_coefficients,
    ),
    "batch_norm_act_backward": (
        "(Tensor grad, Tensor x, Tensor affine, Tensor coefficients, Tensor? z, Tensor? residual,"
        f" Tensor? residual_coefficients, {ACT}, SymInt masked_channels, int masked_channel=0) -> (Tensor, Tensor)",
        _fake_backward,
    ),
    "batch_norm_act_backward_": (
        f"(Tensor(a!) grad, Tensor x, Tensor affine, Tensor coefficients, Tensor? z, {ACT}, bool wants_activation)"
        " -> Tensor",
        _fake_backward_,
    ),
    "update_running_stats_": (
        "(Tensor(a!)[] means, Tensor(b!)[] variances, Tensor(c!)[] counters, Tensor[] moments, float? momentum) -> ()",
        _fake_nothing,
    ),
    "masked_grad": ("(Tensor grad, Tensor z) -> (Tensor, Tensor)", _fake_masked_grad),
    "masked_grad_": ("(Tensor(a!) grad, Tensor? other, Tensor z) -> Tensor", _fake_masked_grad_),
    "add_masked_": ("(Tensor(a!) dx, Tensor grad, Tensor? z) -> ()", _fake_nothing),
}
