"""Under ``torch.compile`` what a forward does and reads is stock's too."""

import pytest
import torch

from tests.support.oracle import forward
from tests.support.steering import steered

CHAINS = "x = torch.relu(self.n0(self.c0(x)))\n"
END = "return torch.relu(self.n1(self.c1(x)))"
BODIES = {
    "no_grad around a chain": (f"with torch.no_grad():\n    {CHAINS}{END}", ""),
    "set_grad_enabled by the mode": (f"with torch.set_grad_enabled(not self.training):\n    {CHAINS}{END}", ""),
    "a counter in a buffer": (f"self.calls += 1\n{CHAINS}{END}", ""),
    "a counter in Python": (f"self.count += 1\n{CHAINS}{END} * self.count", ""),
    "an average": (f"{CHAINS}self.mean.lerp_(x.detach().mean((0, 2, 3)), 0.1)\n{END}", ""),
    "a list": (f"{CHAINS}self.seen.append(1)\n{END}", ""),
}
INIT = """
self.register_buffer("calls", torch.zeros(()))
self.register_buffer("mean", torch.zeros(4))
self.count, self.seen = 0, []
"""
WATCH = """
def watch(model):
    return model.count, list(model.seen)
"""
STEERED = ["a flag", "a config object", "a class attribute", "a module global", "a dict of dicts", "a norm's eps"]


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("name", BODIES)
def test_what_a_compiled_forward_does(same, name):
    body, top = BODIES[name]
    same(forward(body, init=INIT, more=WATCH, top=top), compiled=True)


@pytest.mark.parametrize("name", STEERED)
def test_what_steers_a_compiled_forward(same, name):
    same(steered(name, "if"), compiled=True, modes=(True,))
