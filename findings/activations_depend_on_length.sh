#!/usr/bin/env bash
# torch 2.13.0, CPU with AVX2 or more: what an activation or its gradient is at a NaN or an infinity depends on how many
# elements the tensor has, since the vector code and the code of its remainder differ.
#
# 1. The gradient at a NaN: relu6 and hardtanh pass it (1) in a tensor of 7 elements and stop it (0) in one of 64;
#    hardswish gives 1 and NaN.
# 2. gelu(inf) is inf in a tensor of one element and NaN in one of 7, in float32; in float64 it is inf.
# 3. The gradient of gelu(approximate="tanh") is NaN at 1e30 in float32, at every length; in float64 it is 1.
#
# Seen where kernels that fuse these activations were held to stock's at special values: there is no stock value to be
# equal to, so that float64's is taken, and a NaN's gradient is left open.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 'numpy<2.4'
"$folder/venv/bin/python" - <<'PYTHON'
import functools
import math

import torch
import torch.nn.functional as F

print("torch", torch.__version__, torch.backends.cpu.get_cpu_capability())


def at(function, value, length, dtype=torch.float32):
    """The value and the gradient of the first of equal elements."""
    x = torch.full((length,), value, dtype=dtype, requires_grad=True)
    z = function(x)
    z.backward(torch.ones_like(z))
    return z[0].item(), x.grad[0].item()


for name, function in {"relu6": F.relu6, "hardtanh": F.hardtanh, "hardswish": F.hardswish}.items():
    gradients = [at(function, math.nan, length)[1] for length in (7, 64)]
    print(f"{name}'(NaN) in a tensor of 7 and of 64 elements: {gradients}")
    assert str(gradients) == ("[1.0, nan]" if name == "hardswish" else "[1.0, 0.0]"), "this has changed"

values = [at(F.gelu, math.inf, length)[0] for length in (1, 7)] + [at(F.gelu, math.inf, 7, torch.float64)[0]]
print(f"gelu(inf) in a tensor of 1 and of 7 elements, and of 7 in float64: {values}")
assert str(values) == "[inf, nan, inf]", "this has changed"

by_tanh = functools.partial(F.gelu, approximate="tanh")
gradients = [at(by_tanh, 1e30, length)[1] for length in (1, 64)] + [at(by_tanh, 1e30, 64, torch.float64)[1]]
print(f"the gradient of gelu by tanh at 1e30, of 1 and of 64 elements, and of 64 in float64: {gradients}")
assert str(gradients) == "[nan, nan, 1.0]", "this has changed"
PYTHON
