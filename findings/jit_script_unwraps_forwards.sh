#!/usr/bin/env bash
# torch 2.13.0: torch.jit.script of a module whose forward is a wrapper made with functools.wraps scripts what is wrapped.
#
# The source that it compiles is found through __wrapped__, and the wrapper is left out without a word: a forward that a
# decorator scales, checks or logs is scripted as if it had none, and gives another value. The same decorator without
# functools.wraps is an error, since its *args cannot be compiled. A class with a forward put in front of another's, as
# surgery on models makes them, is so scripted as the class behind it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 'numpy<2.4'
cat > "$folder/scripted.py" <<'PYTHON'
import functools
import warnings

import torch
from torch import Tensor, nn

warnings.simplefilter("ignore")  # of torch.jit's age


def doubled(forward):
    @functools.wraps(forward)
    def call(*args, **kwargs):
        return 2 * forward(*args, **kwargs)

    return call


def doubled_by_name(forward):
    def call(*args, **kwargs):
        return 2 * forward(*args, **kwargs)

    return call


class Wrapped(nn.Module):
    @doubled
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


class Hidden(nn.Module):
    @doubled_by_name
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


print("torch", torch.__version__)
x = torch.zeros(2)
eager, scripted = Wrapped()(x).tolist(), torch.jit.script(Wrapped())(x).tolist()
print("functools.wraps: eager", eager, "scripted", scripted)
assert eager == [2, 2] and scripted == [1, 1], "this has changed: see the head of this file"
try:
    torch.jit.script(Hidden())
except Exception as error:
    print("without: eager", Hidden()(x).tolist(), "scripted:", type(error).__name__)
else:
    raise AssertionError("this has changed: see the head of this file")
PYTHON
"$folder/venv/bin/python" "$folder/scripted.py"
