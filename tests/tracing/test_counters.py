"""Tensors and numbers that a forward changes: counters, averages, codebooks."""

import pytest

from tests.support.oracle import forward

BUFFERS = """
self.register_buffer("calls", torch.zeros((), dtype=torch.long))
self.register_buffer("mean", torch.zeros(4))
self.register_buffer("hits", torch.zeros(4))
self.register_buffer("last", torch.zeros(2, 4, 6, 6))
self.register_buffer("ready", torch.zeros((), dtype=torch.bool))
self.count, self.history, self.total = 0, [], 0.0
self.ema = nn.Parameter(torch.zeros(4), requires_grad=False)
self.sums = {"x": torch.zeros(())}
"""
WATCH = """
def watch(model):
    seen = model.count, list(model.history), model.total, float(model.sums["x"]), getattr(model, "fresh", None)
    return seen
"""
# before the chains, or behind them where they use h
STATEMENTS = [
    "self.calls += 1",
    "self.calls.add_(1)",
    "self.calls = self.calls + 1",
    "self.calls.data += 1",
    "self.calls.copy_(self.calls + 1)",
    "torch.add(self.calls, 1, out=self.calls)",
    "self._buffers['calls'] += 1",
    "calls = self.calls\ncalls += 1",
    "getattr(self, 'calls').add_(1)",
    "self.get_buffer('calls').add_(1)",
    "for b in self.n0.buffers():\n    b.add_(1)",
    "if self.training:\n    self.calls += 1",
    "self.n0.num_batches_tracked += 1",
    "self.n0.num_batches_tracked.zero_()",
    "self.n0.running_mean.zero_()",
    "self.n0.reset_running_stats()",
    "self.n0.momentum = 0.5",
    "self.n0.eval()",
    "self.n1.train(not self.training)",
    "self.c0.weight.data.mul_(0.5)",
    "with torch.no_grad():\n    self.c0.weight.mul_(0.5)",
    "self.c0.weight.requires_grad_(False)",
    "self.c0.bias = None",
    "self.calls[...] = 3",
    "self.count += 1",
    "self.count = self.count + 1",
    "setattr(self, 'count', self.count + 1)",
    "vars(self)['count'] += 1",
    "self.__dict__['count'] = self.count + 1",
    "object.__setattr__(self, 'count', self.count + 1)",
    "self.__setattr__('count', self.count + 1)",
    "self.fresh = 1",
    "del self.relu.inplace\nself.relu.inplace = False",
    "self.relu.calls = getattr(self.relu, 'calls', 0) + 1\nself.count = self.relu.calls",
    "type(self).shared = getattr(type(self), 'shared', 0) + 1",
    "self.register_buffer('calls', self.calls + 1)",
    "self.count, self.total = self.count + 1, self.total + 1",
    "for self.count in range(self.count + 2):\n    pass",
    "[setattr(self, 'count', self.count + i) for i in range(3)]",
    "(lambda: setattr(self, 'count', self.count + 1))()",
    "self.tick()",
    "global CALLS\nCALLS += 1\nself.count = CALLS if CALLS < 0 else 0",
    "tick(self)",
    "self.relu.train(not self.relu.training)",
    "self.relu = nn.ReLU()",
    "self.c1, self.c1 = self.c1, self.c1",
]
WITH_VALUES = [
    "self.mean.copy_(h.detach().mean((0, 2, 3)))",
    "self.mean.lerp_(h.detach().mean((0, 2, 3)), 0.1)",
    "self.mean.mul_(0.9).add_(h.detach().mean((0, 2, 3)), alpha=0.1)",
    "self.mean = 0.9 * self.mean + 0.1 * h.detach().mean((0, 2, 3))",
    "self.mean[:2] = h.detach().mean((0, 2, 3))[:2]",
    "self.mean.data = h.detach().mean((0, 2, 3))",
    "self.mean.set_(h.detach().mean((0, 2, 3)))",
    "self.ema.data.lerp_(h.detach().mean((0, 2, 3)), 0.1)",
    "with torch.no_grad():\n    self.ema.lerp_(h.mean((0, 2, 3)), 0.1)",
    "self.last[: h.size(0)] = h.detach()",
    "self.last = h.detach()",
    "self.hits.index_add_(0, h.detach().flatten(1).argmax(1) % 4, torch.ones(h.size(0), dtype=h.dtype))",
    "self.hits.scatter_(0, h.detach().flatten(1).argmax(1) % 4, 1.0)",
    "if not self.ready:\n    self.mean.copy_(h.detach().mean((0, 2, 3)))\n    self.ready.fill_(True)",
    "if self.training:\n    self.mean.copy_(h.detach().mean((0, 2, 3)))\nh = h - self.mean[:, None, None]",
    "h = h + self.calls\nself.calls.add_(1)",
    "self.calls.add_(1)\nh = h * self.calls",
    "self.calls.add_(1)\nh = h * (2 if self.calls.item() % 2 else 3)",
    "self.total += h.detach().mean().item()",
    "self.total = float(h.detach().mean())",
    "self.history.append(float(h.detach().mean()))",
    "self.sums['x'] += h.detach().mean()",
    "self.sums['x'] = h.detach().mean()",
    "self.sums.update(x=h.detach().mean())",
    "torch.lerp(self.mean, h.detach().mean((0, 2, 3)), 0.1, out=self.mean)",
    "torch._foreach_add_([self.mean], [h.detach().mean((0, 2, 3))])",
    "codes = (h.detach().mean((2, 3))[:, None] - self.mean).abs().argmin(2)\nself.hits[codes.flatten()] += 1",
]
TICKS = """
CALLS = 0

def tick(model):
    model.count += 1
"""
METHOD = """
def tick(self):
    self.count += 1
"""


@pytest.mark.parametrize("statement", STATEMENTS)
def test_a_forward_counts(same, statement):
    body = f"{statement}\nreturn torch.relu(self.n1(self.c1(self.relu(self.n0(self.c0(x))))))"
    same(forward(body, init=BUFFERS, more=WATCH, top=TICKS, methods=METHOD))


@pytest.mark.parametrize("statement", WITH_VALUES)
def test_a_forward_keeps_what_it_saw(same, statement):
    body = f"h = torch.relu(self.n0(self.c0(x)))\n{statement}\nreturn torch.relu(self.n1(self.c1(h)))"
    same(forward(body, init=BUFFERS, more=WATCH))


CHILDREN = {
    "a child that counts": "self.calls += 1\nreturn torch.relu(x)",
    "a child that averages": "self.mean.lerp_(x.detach().mean((0, 2, 3)), 0.1)\nreturn torch.relu(x)",
    "a child that counts in Python": "self.count += 1\nreturn torch.relu(x)",
}


@pytest.mark.parametrize("name", CHILDREN)
def test_a_child_counts(same, name):
    lines = "\n        ".join(CHILDREN[name].split("\n"))
    top = f"""
class Child(nn.Module):
    def __init__(self):
        super().__init__()
        self.count = 0
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        {lines}

def watch(model):
    return model.relu.count
"""
    same(forward("return self.relu(self.n0(self.c0(x)))", top=top, init="self.relu = Child()"))


NORMS = {
    "counts by itself": """
    def forward(self, x):
        self.num_batches_tracked += 1
        return F.relu(F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training))
    """,
    "counts in place, as timm's": """
    def forward(self, x):
        if self.training:
            self.num_batches_tracked.add_(1)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1)
    """,
    "goes on to its base": """
    def forward(self, x):
        return super().forward(x) * 2
    """,
    "changes nothing": "",
    "checks otherwise": """
    def _check_input_dim(self, x):
        self.num_batches_tracked += 1
    """,
}


@pytest.mark.parametrize("name", NORMS)
def test_a_subclass_of_the_norm(same, name):
    top = "class Norm(nn.BatchNorm2d):\n    own = 1\n" + NORMS[name]
    same(forward("return torch.relu(self.n0(self.c0(x)))", top=top, init="self.n0 = Norm(4)"))


@pytest.mark.parametrize("count", [None, 0, 7])
@pytest.mark.parametrize("momentum", [None, 0.0, 0.3, 1.0])
def test_running_statistics_and_counter(same, momentum, count):
    """Without running statistics the counter still moves; without a counter and momentum, stock's rule."""
    init = f"""
    self.n0.momentum = {momentum}
    self.n1.running_mean = self.n1.running_var = None
    self.n1.momentum = {momentum}
    """
    init += "self.n0.num_batches_tracked = None" if count is None else f"self.n0.num_batches_tracked += {count}"
    same(forward("return torch.relu(self.n1(self.c1(torch.relu(self.n0(self.c0(x))))))", init=init))
