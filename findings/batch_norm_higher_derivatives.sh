#!/usr/bin/env bash
# torch 2.13.0, CPU: two higher derivatives of torch.nn.functional.batch_norm are wrong without a word.
#
# 1. With a bias and no weight, the gradient of a gradient leaves out the bias: its gradient does not depend on the
#    gradient that came in. In training and in eval. With a weight, or without both, gradgradcheck passes.
# 2. In training the third derivative with respect to the input differs from that of the same formula written out in
#    elementary operations, in float64, with and without weight and bias; first and second derivatives agree to 1e-12.
#
# Seen where a chain's backward with create_graph=True was made of stock operations: a gradient penalty needs second
# derivatives only, so a weight of ones beside a lone bias is enough; a third derivative is not to be had.
# The first is the fault that pytorch #79705 tells of layer norm.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 'numpy<2.4'
"$folder/venv/bin/python" - <<'PYTHON'
import torch
import torch.nn.functional as F
from torch.autograd import gradgradcheck
from torch.autograd.gradcheck import GradcheckError

torch.manual_seed(0)
print("torch", torch.__version__)
x = torch.randn(3, 2, 2, 2, dtype=torch.float64, requires_grad=True)
weight = (torch.rand(2, dtype=torch.float64) + 0.5).requires_grad_()
bias = torch.randn(2, dtype=torch.float64, requires_grad=True)
mean, var = torch.randn(2, dtype=torch.float64), torch.rand(2, dtype=torch.float64) + 0.5


def agrees(function, *inputs):
    try:
        return gradgradcheck(function, inputs)
    except GradcheckError:
        return False


second = {
    "training, weight and bias": agrees(lambda x, w, b: F.batch_norm(x, None, None, w, b, True), x, weight, bias),
    "training, neither": agrees(lambda x: F.batch_norm(x, None, None, None, None, True), x),
    "training, bias alone": agrees(lambda x, b: F.batch_norm(x, None, None, None, b, True), x, bias),
    "eval, bias alone": agrees(lambda x, b: F.batch_norm(x, mean, var, None, b, False), x, bias),
}
for case, right in second.items():
    print(f"second derivatives, {case}: {'right' if right else 'WRONG'}")
assert list(second.values()) == [True, True, False, False], "this has changed: see the head of this file"


def written_out(x):
    centred = x - x.mean((0, 2, 3), keepdim=True)
    return centred * (centred.square().mean((0, 2, 3), keepdim=True) + 1e-5).rsqrt()


def derivatives(norm):
    """Directional derivatives of sum(sin(norm(x))), the first to the third, with respect to x."""
    value, found = norm(x).sin().sum(), []
    direction = torch.cos(torch.arange(x.numel(), dtype=x.dtype)).view_as(x)
    for _ in range(3):
        (gradient,) = torch.autograd.grad(value, x, create_graph=True)
        found.append(gradient.detach())
        value = (gradient * direction).sum()
    return found


by_torch = derivatives(lambda x: F.batch_norm(x, None, None, None, None, True))
errors = [((a - b).norm() / b.norm()).item() for a, b in zip(by_torch, derivatives(written_out), strict=True)]
for order, error in enumerate(errors, 1):
    print(f"derivative {order} against the formula written out: relative error {error:.1e}")
assert errors[0] < 1e-12 and errors[1] < 1e-12 and errors[2] > 1e-2, "this has changed: see the head of this file"
PYTHON
