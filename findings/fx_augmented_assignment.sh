#!/usr/bin/env bash
# torch 2.13.0: torch.fx traces `x += y` as an addition that makes a new tensor, so a traced module does not write.
#
# A Proxy has no __iadd__, and Python falls back to __add__: `kept = h; h += 1; return kept` returns another value after
# symbolic_trace, and `buffer += 1` in a forward no longer counts (the buffer kept as a node: proxy_buffer_attributes).
# No warning comes. ResNet's `out += identity` is traced as an add, too, and only its result hides it.
# h.add_(1) is recorded as it is.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 'numpy<2.4'
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch import fx, nn


class Kept(nn.Module):
    def forward(self, x):
        h = x * 1
        kept = h
        h += 1
        return kept


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        calls = self.calls
        calls += 1
        return x + calls


class Tracer(fx.Tracer):
    proxy_buffer_attributes = True


print("torch", torch.__version__)
x = torch.zeros(2)
traced = fx.symbolic_trace(Kept())
print("kept:   ", Kept()(x).tolist(), "traced:", traced(x).tolist(), "by", [n.name for n in traced.graph.nodes])
assert Kept()(x).tolist() == [1, 1] and traced(x).tolist() == [0, 0], "this has changed: see the head of this file"

stock, source = Counter(), Counter()
traced = fx.GraphModule(source, Tracer().trace(source))
for _ in range(3):
    stock(x), traced(x)
print("calls counted in three calls: stock", stock.calls.item(), "traced", traced.calls.item())
assert (stock.calls, traced.calls) == (3, 0), "this has changed: see the head of this file"
PYTHON
