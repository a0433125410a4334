"""What a forward leaves outside of its output, and of which types its output is."""

import gc

import pytest
import torch

from tests.support.oracle import forward, fuse, images, load, make

H = "h = self.relu(self.n0(self.c0(x)))"
END = "return torch.relu(self.n1(self.c1(h)))"
TOP = """
import collections, dataclasses, io, logging, sys, warnings
from typing import NamedTuple, Optional

SEEN = []
TABLE = {}
DEFAULT = collections.defaultdict(list)
LOG = logging.getLogger(__name__)
LOG.propagate = False
LOG.setLevel(logging.DEBUG)

class Handler(logging.Handler):
    def emit(self, record):
        SEEN.append(record.getMessage())

LOG.addHandler(Handler())

class Recorder:
    def __init__(self):
        self.items = []

    def __call__(self, value):
        self.items.append(value)
        return value

    def __iadd__(self, value):
        self.items.append(value)
        return self

    def __setitem__(self, key, value):
        self.items.append((key, value))

RECORDER = Recorder()

class Slot:
    last = None

def note(value):
    SEEN.append(value)
    return value

def remember(value, seen=[]):
    seen.append(value)
    return len(seen)

def watch(model):
    own = [v for k, v in vars(model).items() if k.startswith("own_")]
    own = [o.items[:] if isinstance(o, Recorder) else o for o in own]
    seen = SEEN[:], dict(TABLE), RECORDER.items[:], Slot.last, own
    SEEN.clear(), TABLE.clear(), RECORDER.items.clear(), setattr(Slot, "last", None)
    DEFAULT.clear(), remember.__defaults__[0].clear()
    return seen
"""
INIT = """
self.own_list, self.own_dict, self.own_recorder = [], {}, Recorder()
self.own_features = None
"""
EFFECTS = [
    "self.own_list.append(1)",
    "self.own_list.append(h)",
    "self.own_list += [h.mean()]",
    "self.own_list.extend([h, x])",
    "self.own_list[:] = [h]",
    "self.own_list.insert(0, h.shape)",
    "append = self.own_list.append\nappend(tuple(h.shape))",
    "seen = self.own_list\nseen.append(h)",
    "list.append(self.own_list, h)",
    "self.own_dict['h'] = h",
    "self.own_dict.update(h=h)",
    "self.own_dict.setdefault('h', h)",
    "self.own_default = collections.defaultdict(list)\nself.own_default['h'].append(h)",
    "DEFAULT['never']\nSEEN.append(len(DEFAULT))",
    "self.own_features = h",
    "self.own_features, y = h, x",
    "self.own_features = h.detach()",
    "setattr(self, 'own_features', h)",
    "vars(self).update(own_features=h)",
    "self.own_recorder(h)",
    "h = self.own_recorder(h)",
    "self.own_recorder += h",
    "self.own_recorder['h'] = h",
    "self.own_recorder.items.append(h)",
    "self.relu.own = h\nself.own_features = self.relu.own",
    "SEEN.append(1)",
    "SEEN.append(h)",
    "SEEN.append((x.shape, [h.mean()]))",
    "note(1)",
    "h = note(h)",
    "[note(i) for i in range(3)]",
    "any(note(i) for i in range(3))",
    "self.own_list.append(remember(1))",
    "TABLE['h'] = h",
    "TABLE[self.training] = TABLE.get(self.training, 0) + 1",
    "RECORDER(h)",
    "Slot.last = h",
    "Slot.last = 1",
    "global LAST\nLAST = 1\nSEEN.append(LAST)",
    "print('forward')",
    "print(tuple(h.shape))",
    "print('h', end='', file=sys.stdout)",
    "sys.stdout.write('forward')",
    "LOG.info('forward')",
    "LOG.debug('%s', tuple(h.shape))",
    "logging.getLogger(__name__).warning(f'{h.dim()}')",
    "warnings.warn('user: forward')",
    "warnings.warn('user: forward', DeprecationWarning, stacklevel=2)",
    "warnings.warn(f'user: {h.dim()}')",
    "h.register_hook(lambda g: SEEN.append(1)) if h.requires_grad else None",
    "h.register_hook(lambda g: g * 2) if h.requires_grad else None",
    "self.c1.register_forward_hook(lambda m, a, o: SEEN.append(1)) if not self.c1._forward_hooks else None",
    "h.own = 3\nSEEN.append(h.own)",
    "SEEN.append(id(h) == id(h))",
    "SEEN.append(h is x)",
    "SEEN.append(str(h.dtype))",
    "SEEN.append(float(h.detach().mean().round(decimals=6)))",
    "for i, item in enumerate(h):\n    SEEN.append(i)",
    "def inner(v):\n    SEEN.append(v)\n    return v\nh = inner(h)",
    "class Local:\n    SEEN.append('class')\n",
    "import math\nSEEN.append(math.floor(2.5))",
    "(lambda: SEEN.append(1))()",
    "torch.manual_seed(7)",
    "torch.rand(1)",
    "import random; random.random()",
]


@pytest.mark.parametrize("place", ["before", "between"])
@pytest.mark.parametrize("effect", EFFECTS)
def test_a_side_effect_happens_in_every_call_and_never_in_fuse(same, effect, place):
    if place == "before" and any(word in effect for word in ("h", "x")):
        body = f"h = x\n{effect}\n{H.replace('(x)', '(h)')}\n{END}" if "h" in effect else f"{effect}\n{H}\n{END}"
        body = f"x = x * 1\n{body}"
    else:
        body = f"{effect}\n{H}\n{END}" if place == "before" else f"{H}\n{effect}\n{END}"
    same(forward(body, top=TOP, init=INIT), modes=(place == "before",))


def test_what_is_printed_is_printed(tmp_path, capsys):
    module = load(tmp_path, forward(f"{H}\nprint('forward')\n{END}"))
    fused = fuse(make(module.Model))
    assert capsys.readouterr().out == ""
    for _ in range(2):
        fused(images())
        assert capsys.readouterr().out == "forward\n"


def plain(value, seen):
    """Every object that can be reached from a user's, without torch's own."""
    if id(value) in seen or isinstance(value, (torch.Tensor, type, str)):
        return
    seen[id(value)] = value
    items = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    for item in items:
        plain(item, seen)
    if hasattr(value, "__dict__") and not callable(value):
        plain(vars(value), seen)


@pytest.mark.parametrize("effect", [e for e in EFFECTS if "h)" in e or "= h" in e])
def test_nothing_of_the_tracer_is_left(tmp_path, effect):
    module = load(tmp_path, forward(f"{H}\n{effect}\n{END}", top=TOP, init=INIT))
    model = make(module.Model)
    fuse(model)
    gc.collect()
    seen: dict = {}
    for value in (module.SEEN, module.TABLE, module.RECORDER.items, module.Slot.last, vars(model.relu)):
        plain(value, seen)
    plain({k: v for k, v in vars(model).items() if k.startswith("own_")}, seen)
    strange = [v for v in seen.values() if "Proxy" in type(v).__name__ or "fused_resnet" in type(v).__module__]
    assert not strange
    assert not module.SEEN
    assert module.Slot.last is None


OUTPUTS = [
    "collections.OrderedDict(out=h, aux=x)",
    "collections.OrderedDict([('b', h), ('a', h.mean())])",
    "Data(h, x)",
    "Data(a=h)",
    "FrozenData(h)",
    "Pair(h, x)",
    "Pair(h, None)",
    "collections.namedtuple('Late', 'a')(h)",
    "[h, x]",
    "[h]",
    "(h,)",
    "(h, None, 3, 'text', 2.5, True)",
    "{'h': h, 'none': None}",
    "{0: h, True: x, 'n': 1}",
    "collections.defaultdict(list, h=[h])",
    "MyDict(h=h)",
    "MyList([h])",
    "((h, (x, [h])), {'a': (h,)})",
    "h, h",
    "h, h.detach()",
    "h, x",
    "x",
    "None",
    "h.shape",
    "h.mean().item()",
    "h.shape[0]",
    "h.dtype",
    "torch.max(h, 1)",
    "h.sort(1)",
    "h.unbind(0)",
    "h.split(1, 1)",
    "(t for t in (h, x))",
    "self.c0.weight",
    "nn.Parameter(h.detach())",
    "h.requires_grad",
    "iter([h])",
    "range(h.shape[0])",
    "slice(0, h.shape[0])",
    "lambda: h",
    "self",
]
TYPES = """
import collections, dataclasses
from typing import NamedTuple, Optional

@dataclasses.dataclass
class Data:
    a: Tensor
    b: Optional[Tensor] = None

@dataclasses.dataclass(frozen=True)
class FrozenData:
    a: Tensor

class Pair(NamedTuple):
    a: Tensor
    b: Optional[Tensor]

class MyDict(dict):
    pass

class MyList(list):
    pass
"""


@pytest.mark.parametrize("output", OUTPUTS)
def test_an_output_has_stocks_type(same, output):
    same(forward(f"h = torch.relu(self.n0(self.c0(x)))\nreturn {output}", top=TYPES))


def test_a_container_is_a_new_one_in_every_call(tmp_path):
    module = load(tmp_path, forward("h = self.relu(self.n0(self.c0(x)))\nout = [h]\nout.append(x)\nreturn out"))
    fused = fuse(make(module.Model))
    first, second = fused(images()), fused(images())
    assert first is not second
    assert len(first) == len(second) == 2


ARGUMENTS = {
    "a default": ("x, scale=2.0", "x", "scale"),
    "a keyword": ("x, *, scale=2.0", "x", "scale"),
    "a tensor by default": ("x, y=None", "x", "1 if y is None else y"),
    "more arguments": ("*xs", "xs[0]", "len(xs)"),
    "keywords": ("x, **options", "x", "options.get('scale', 3)"),
    "a mutable default": ("x, seen=[]", "x", "len(seen) + (seen.append(1) or 0)"),
    "positions only": ("x, /", "x", "2"),
    "two tensors": ("x, y", "x", "y.mean()"),
    "a default that is a module global": ("x, scale=SCALE", "x", "scale"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_forward_with_other_arguments(same, name):
    arguments, x, scale = ARGUMENTS[name]
    more = "def inputs():\n    x = torch.linspace(-1, 1, 216, dtype=torch.float64).sin().view(2, 3, 6, 6)\n"
    source = f"""
SCALE = 3.0

class Model(Net):
    def forward(self, {arguments}):
        return torch.relu(self.n0(self.c0({x}))) * ({scale})

DEFAULTS = Model.forward.__defaults__ or ()

def watch(model):  # two models share what is a default
    seen = list(DEFAULTS[0]) if DEFAULTS and isinstance(DEFAULTS[0], list) else []
    DEFAULTS[0].clear() if seen else None
    return seen

{more}    return (x, x * 2) if {name!r} == "two tensors" else (x,)
"""
    same(source)
