"""Forwards that nobody wrote: statements drawn from a grammar, against stock before and after flags are flipped."""

import tempfile
from pathlib import Path

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.oracle import compare, forward, fuse, images, load, look, make, run

FLAGS = ["flag", "cfg.a", "cfg.b", "table['x']"]
INIT = """
self.cfg, self.table, self.flag = Config(), {"x": False}, False
self.count, self.seen = 0, []
self.register_buffer("calls", torch.zeros(()))
self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))
self.blocks = nn.ModuleList([Basic(), Basic()])
self.c2, self.n2 = nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)
"""
METHODS = """
def unit(self, x):
    return F.relu(self.n1(self.c1(x)))

def scaled(self, x, by=2.0):
    if self.flag:
        return x * by
    return x

def both(self, x):
    return x, self.n2(self.c2(x))
"""
TOP = """
class Config:
    def __init__(self):
        self.a = self.b = False

def outside(x, scale=0.5):
    return x * scale
"""
MORE = """
def watch(model):
    return model.count, list(model.seen)
"""
NAMES = st.sampled_from(["h", "a", "b"])  # all [2, 4, n, n], all defined at the start
CONDITIONS = st.sampled_from(
    [
        *(f"self.{flag}" for flag in FLAGS),
        *(f"not self.{flag}" for flag in FLAGS),
        "self.training",
        "h.shape[0] > 1",
        "h.size(2) == 6",
        "a.dim() == 4 and self.flag",
        "torch.is_grad_enabled()",
        "len(self.blocks) > 1",
        "self.cfg.a or self.cfg.b",
        "getattr(self, 'later', None) is not None",
        "isinstance(a, Tensor)",
    ]
)
VALUES = st.one_of(
    NAMES,
    st.builds("self.relu(self.n0(self.c0({}[:, :3])))".format, NAMES),
    st.builds("F.relu(self.n1(self.c1({})))".format, NAMES),
    st.builds("torch.relu(self.norms[0](self.convs[0]({})))".format, NAMES),
    st.builds("self.n2(self.c2({}))".format, NAMES),
    st.builds("self.n2(self.c2({})).relu()".format, NAMES),
    st.builds("F.relu(self.n2(self.c2({})) + {})".format, NAMES, NAMES),
    st.builds("F.relu(self.n1(self.c1({})) + self.n2(self.c2({})))".format, NAMES, NAMES),
    st.builds("self.blocks[{}]({})".format, st.integers(0, 1), NAMES),
    st.builds("self.unit({})".format, NAMES),
    st.builds("self.scaled({}, by={})".format, NAMES, st.sampled_from(["0.5", "a.shape[1] / 8"])),
    st.builds("self.both({})[1]".format, NAMES),
    st.builds("outside({})".format, NAMES),
    st.builds("{} + {}".format, NAMES, NAMES),
    st.builds("{} * 0.5".format, NAMES),
    st.builds("torch.tanh({})".format, NAMES),
    st.builds("({} if {} else {})".format, NAMES, CONDITIONS, NAMES),
    st.builds("F.adaptive_avg_pool2d({0}, 1) + {0}".format, NAMES),
)
SIMPLE = st.one_of(
    st.builds("{} = {}".format, NAMES, VALUES),
    st.builds("{} = {}".format, NAMES, VALUES),
    st.builds("{}, {} = {}, {}".format, st.just("a"), st.just("b"), VALUES, VALUES),
    st.builds("a, b = self.both({})".format, NAMES),
    st.builds("{} = {} + {}".format, NAMES, NAMES, VALUES),
    st.builds("{} = {} * 1; {} += {}".format, st.just("a"), NAMES, st.just("a"), st.sampled_from(["h", "b"])),
    st.sampled_from(
        [
            "self.calls += 1",
            "self.count += 1",
            "self.seen.append(self.count)",
            "self.seen.append(tuple(h.shape))",
            "items = []\nitems.append(h)\nitems.append(a)\nh = sum(items)",
            "parts = {'h': h, 'a': a}\nh = parts['h'] * parts['a']",
            "n, c, *_ = h.shape\nb = b * (n / c)",
            "h = [h, a][int(self.flag)]",
            "self.calls.add_(1)\na = a * self.calls",
        ]
    ),
)


def block(head: st.SearchStrategy[str], inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    def written(head: str, lines: list[str]) -> str:
        return "\n".join([head, *("    " + line for text in lines for line in text.split("\n"))])

    return st.builds(written, head, st.lists(inner, min_size=1, max_size=2))


def branches(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    yes = block(st.builds("if {}:".format, CONDITIONS), inner)
    return st.builds("{}\n{}".format, yes, block(st.just("else:"), inner)) | yes


STATEMENTS = st.recursive(
    SIMPLE,
    lambda inner: st.one_of(
        branches(inner),
        block(st.just("for conv, norm in zip(self.convs, self.norms):\n    h = F.relu(norm(conv(h)))"), inner),
        block(st.just("for m in self.blocks:\n    h = m(h)"), inner),
        block(st.just("for i in range(2):\n    a = self.convs[i](a)"), inner),
        block(st.sampled_from(["with torch.no_grad():", "with torch.set_grad_enabled(self.flag):"]), inner),
    ),
    max_leaves=4,
)
RETURNS = st.sampled_from(
    ["return h", "return h, a", "return {'h': h, 'b': b}", "return F.relu(h + a), b", "return [h]"]
)
START = "h = torch.relu(self.n0(self.c0(x)))\na, b = h * 1, torch.tanh(h)"


@st.composite
def models(draw):
    body = "\n".join([START, *draw(st.lists(STATEMENTS, min_size=1, max_size=5)), draw(RETURNS)])
    flips = draw(st.lists(st.sampled_from([*FLAGS, "later", "mode", "grow"]), min_size=1, max_size=3))
    return forward(body, top=TOP, init=INIT, methods=METHODS, more=MORE), flips, draw(st.booleans())


def flip(model, what):
    if what == "mode":
        model.train(not model.training)
    elif what == "later":
        model.later = 1
    elif what == "grow":
        model.blocks.append(type(model.c0)(4, 4, 1).double().requires_grad_(False)) if len(model.blocks) < 3 else None
        torch.nn.init.constant_(model.blocks[-1].weight if len(model.blocks) == 3 else torch.empty(1), 0.1)
        torch.nn.init.constant_(model.blocks[-1].bias, 0.1)
    elif "[" in what:
        model.table["x"] = not model.table["x"]
    elif "." in what:
        name = what.partition(".")[2]
        setattr(model.cfg, name, not getattr(model.cfg, name))
    else:
        model.flag = not model.flag


@settings(
    max_examples=60, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
@given(models())
def test_a_generated_forward_is_the_same_as_stock(drawn):
    source, flips, training = drawn
    with tempfile.TemporaryDirectory() as folder:
        module = load(Path(folder), source)
        stock, fused = make(module.Model).train(training), fuse(make(module.Model).train(training))
        compare(look(module.watch(fused)), look(module.watch(stock)), True, "left by fuse")
        for i, what in enumerate([None, *flips]):
            if what is not None:
                flip(stock, what)
                flip(fused, what)
            where = f"step {i}, behind {flips[:i]}, of\n{source}\n"
            theirs = run(stock, [images()], watch=module.watch)
            ours = run(fused, [images()], watch=module.watch)
            if theirs["error"] and ours["error"]:
                theirs["error"], ours["error"] = theirs["error"][0], ours["error"][0]
            compare(ours, theirs, False, where)
