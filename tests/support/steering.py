"""What may steer a forward, in every spelling, and models that are steered by it."""

from tests.support.oracle import forward

# name: (what is asked, __init__, how it is flipped, the top of the file, methods)
STEERING = {
    "a flag": ("self.flag", "self.flag = False", "model.flag = on"),
    "a flag that is None": ("self.flag is not None", "self.flag = None", "model.flag = 1 if on else None"),
    "a flag of another type": ("self.flag == 1", "self.flag = '1'", "model.flag = True if on else '1'"),
    "a number": ("self.n > 2", "self.n = 1", "model.n = 3 if on else 1"),
    "a string": ("self.kind == 'b'", "self.kind = 'a'", "model.kind = 'b' if on else 'a'"),
    "a tuple": ("self.sizes[1] == 3", "self.sizes = (1, 2)", "model.sizes = (1, 3) if on else (1, 2)"),
    "a config object": ("self.cfg.x", "self.cfg = Config()", "model.cfg.x = on"),
    "a config object swapped": ("self.cfg.x", "self.cfg = Config()", "model.cfg = Config(on)"),
    "a config in a config": (
        "self.cfg.inner.x",
        "self.cfg = Config()\nself.cfg.inner = Config()",
        "model.cfg.inner.x = on",
    ),
    "a simple namespace": ("self.cfg.x", "self.cfg = types.SimpleNamespace(x=False)", "model.cfg.x = on"),
    "a dict": ("self.d['x']", "self.d = {'x': False}", "model.d['x'] = on"),
    "a dict's get": ("self.d.get('x', False)", "self.d = {}", "model.d.update(x=on)"),
    "a dict's key added": ("'x' in self.d", "self.d = {}", "model.d.update(x=1) if on else model.d.pop('x', None)"),
    "a dict's length": ("len(self.d)", "self.d = {}", "model.d.update(x=1) if on else model.d.clear()"),
    "a dict of dicts": ("self.d['a']['x']", "self.d = {'a': {'x': False}}", "model.d['a']['x'] = on"),
    "a dict unpacked": ("dict(**self.d)['x']", "self.d = {'x': False}", "model.d['x'] = on"),
    "a dict iterated": ("any(v for k, v in self.d.items())", "self.d = {'x': False}", "model.d['x'] = on"),
    "a list": ("self.l[0]", "self.l = [False]", "model.l[0] = on"),
    "a list's slice": ("self.l[-1:][0]", "self.l = [0, 0]", "model.l[1] = on"),
    "a list in a list": ("self.l[0][0]", "self.l = [[False]]", "model.l[0][0] = on"),
    "a list's length": ("len(self.l) > 1", "self.l = [1]", "model.l[:] = [1, 2] if on else [1]"),
    "a list iterated": ("[v for v in self.l if v]", "self.l = [0]", "model.l[0] = int(on)"),
    "a set": ("'x' in self.s", "self.s = set()", "model.s.add('x') if on else model.s.discard('x')"),
    "a deque": ("self.q[0]", "self.q = collections.deque([False])", "model.q[0] = on"),
    "a class attribute": ("self.shared", "", "type_of(model).shared = on", "", "shared = False"),
    "a class attribute by type": ("type(self).shared", "", "type_of(model).shared = on", "", "shared = False"),
    "a class attribute by name": ("Model.shared", "", "Model.shared = on", "", "shared = False"),
    "a class attribute by __class__": ("self.__class__.shared", "", "type_of(model).shared = on", "", "shared = False"),
    "a class attribute that an instance hides": (
        "self.shared",
        "",
        "vars(model).update(shared=on)",
        "",
        "shared = False",
    ),
    "an attribute of a base class": ("self.shared", "", "Net.shared = on", "Net.shared = False"),
    "an enum": ("self.kind is Kind.B", "self.kind = Kind.A", "model.kind = Kind.B if on else Kind.A"),
    "an enum's value": ("self.kind.value == 2", "self.kind = Kind.A", "model.kind = Kind.B if on else Kind.A"),
    "a dtype": ("self.dt is torch.int8", "self.dt = torch.int32", "model.dt = torch.int8 if on else torch.int32"),
    "a device": (
        "self.dev.type == 'meta'",
        "self.dev = torch.device('cpu')",
        "model.dev = torch.device('meta' if on else 'cpu')",
    ),
    "a size": ("self.sz[0] == 2", "self.sz = torch.Size([1])", "model.sz = torch.Size([2 if on else 1])"),
    "a range": ("len(self.r) == 2", "self.r = range(1)", "model.r = range(2 if on else 1)"),
    "a function": ("self.f(1) == 2", "self.f = one", "model.f = two if on else one"),
    "a lambda": ("self.f()", "self.f = lambda: False", "model.f = (lambda: True) if on else (lambda: False)"),
    "a partial": (
        "self.p() == 2",
        "self.p = functools.partial(max, 1)\nself.p = functools.partial(one, 1)",
        "model.p = functools.partial(two if on else one, 1)",
    ),
    "a partial's keywords": (
        "self.p.keywords['b'] == 2",
        "self.p = functools.partial(one, b=1)",
        "model.p.keywords['b'] = 2 if on else 1",
    ),
    "a partial's argument": (
        "self.p()",
        "self.p = functools.partial(bool, 0)",
        "model.p = functools.partial(bool, int(on))",
    ),
    "a callable object": ("self.c()", "self.c = Caller()", "model.c.x = on"),
    "a module global": ("FLAG", "", "globals().update(FLAG=on)", "FLAG = False"),
    "a global dict": ("D['x']", "", "D.update(x=on)", "D = {'x': False}"),
    "a global object": ("CFG.x", "", "setattr(CFG, 'x', on)", "CFG = Config()"),
    "a global that appears": (
        "'LATER' in globals()",
        "",
        "globals().update(LATER=1) if on else globals().pop('LATER', 0)",
    ),
    "a global of another module": ("math.own", "", "setattr(math, 'own', on)", "import math\nmath.own = False"),
    "an attribute of a listed module": (
        "self.many[0].on",
        "self.many = nn.ModuleList([nn.Identity()])\nself.many[0].on = False",
        "setattr(model.many[0], 'on', on)",
    ),
    "an attribute in a loop": (
        "any([m.on for m in self.many])",
        "self.many = nn.ModuleList([nn.Identity()])\nself.many[0].on = False",
        "setattr(model.many[0], 'on', on)",
    ),
    "an attribute of another self": (
        "again(self)",
        "",
        "setattr(model.relu, 'on', on)",
        "def again(self):\n    self = self.relu\n    return getattr(self, 'on', False)",
    ),
    "an attribute of self in a lambda": ("(lambda: self.on)()", "self.on = False", "setattr(model, 'on', on)"),
    "an attribute of an alias": (
        "(lambda c: c.x)(self.cfg)",
        "self.cfg = Config()",
        "setattr(model.cfg, 'x', on)",
        "class Config:\n    x = False",
    ),
    "a global function swapped": ("ask()", "", "globals().update(ask=yes if on else no)", "ask = no"),
    "a global read by a function": ("ask()", "", "globals().update(FLAG=on)", "FLAG = False\ndef ask(): return FLAG"),
    "a builtin hidden by a global": (
        "len([1]) == 5",
        "",
        "globals().update(len=lambda x: 5) if on else globals().pop('len', 0)",
    ),
    "a closure cell": ("CELL_READ()", "", "CELL_SET(on)", "CELL_READ, CELL_SET = cell()"),
    "a function's default": ("ask()", "", "setattr(ask, '__defaults__', (on,))", "def ask(x=False): return x"),
    "a function's keyword default": ("ask()", "", "ask.__kwdefaults__.update(x=on)", "def ask(*, x=False): return x"),
    "a function's code": (
        "ask()",
        "",
        "setattr(ask, '__code__', (yes if on else no).__code__)",
        "def ask(): return False",
    ),
    "a function's attribute": ("ask.x", "", "setattr(ask, 'x', on)", "def ask(): pass\nask.x = False"),
    "another module's attribute": (
        "self.drop.p > 0.5",
        "self.drop = nn.Dropout(0.1)",
        "model.drop.p = 0.9 if on else 0.1",
    ),
    "another module's mode": ("not self.n1.training", "", "model.n1.train(model.training != on)"),
    "a norm's eps": ("self.n0.eps > 0.1", "", "model.n0.eps = 0.5 if on else 1e-5"),
    "a convolution's stride": ("self.c1.stride[0] == 2", "", "model.c1.stride = (2, 2) if on else (1, 1)"),
    "its own mode": ("self.training", "", "model.train(not on)"),
    "a buffer's item": ("self.b.item() > 0", "self.register_buffer('b', torch.zeros(()))", "model.b.fill_(int(on))"),
    "a bool buffer": ("self.b", "self.register_buffer('b', torch.zeros((), dtype=torch.bool))", "model.b.fill_(on)"),
    "a buffer by int": ("int(self.b)", "self.register_buffer('b', torch.zeros(()))", "model.b.fill_(int(on))"),
    "a buffer by data": ("self.b.any()", "self.register_buffer('b', torch.zeros(2))", "model.b.data.fill_(int(on))"),
    "a buffer by list": ("self.b.tolist()[0]", "self.register_buffer('b', torch.zeros(2))", "model.b.fill_(int(on))"),
    "a buffer that is None": (
        "self.b is None",
        "self.register_buffer('b', torch.zeros(2))",
        "model._buffers.update(b=None if on else torch.zeros(2))",
    ),
    "a tensor attribute": ("self.t > 0", "self.t = torch.zeros(())", "model.t = torch.tensor(float(on))"),
    "a parameter's value": ("self.c1.weight[0, 0, 0, 0] > 5", "", "model.c1.weight.data[0, 0, 0, 0] = 9 if on else 0"),
    "a parameter's requires_grad": ("not self.c1.weight.requires_grad", "", "model.c1.weight.requires_grad_(not on)"),
    "a parameter that is None": (
        "self.c0.bias is None",
        "",
        "model.c0.register_parameter('bias', None) if on else "
        "model.c0.register_parameter('bias', nn.Parameter(torch.ones(4).double()))",
    ),
    "the environment": ("os.environ.get('OWN_FLAG') == '1'", "", "os.environ.update(OWN_FLAG=str(int(on)))"),
    "getenv": ("os.getenv('OWN_FLAG') == '1'", "", "os.environ.update(OWN_FLAG=str(int(on)))"),
    "a property": (
        "self.prop",
        "self._x = False",
        "model._x = on",
        "",
        "@property\ndef prop(self):\n    return self._x",
    ),
    "a property of a config": ("self.cfg.prop", "self.cfg = Config()", "model.cfg.x = on"),
    "a cached property": (
        "self.prop",
        "self._x = False",
        "vars(model).update(prop=on)",
        "",
        "@functools.cached_property\ndef prop(self):\n    return self._x",
    ),
    "a method": ("self.ask()", "self._x = False", "model._x = on", "", "def ask(self):\n    return self._x"),
    "a static method": (
        "self.ask()",
        "",
        "FLAGS.update(x=on)",
        "FLAGS = {'x': False}",
        "@staticmethod\ndef ask():\n    return FLAGS['x']",
    ),
    "a class method": (
        "self.ask()",
        "",
        "type_of(model).update(on)",
        "",
        "s = False\n@classmethod\ndef ask(cls):\n    return cls.s\n@classmethod\ndef update(cls, on):\n    cls.s = on",
    ),
    "a method swapped on the instance": (
        "self.ask()",
        "",
        "vars(model).update(ask=(lambda: True) if on else (lambda: False))",
        "",
        "def ask(self):\n    return False",
    ),
    "a method swapped on the class": (
        "self.ask()",
        "",
        "setattr(type_of(model), 'ask', yes_m if on else no_m)",
        "",
        "def ask(self):\n    return False",
    ),
    "__getattr__": (
        "self.magic",
        "self.store = {'magic': False}",
        "model.store.update(magic=on)",
        "",
        "def __getattr__(self, k):\n    return self.__dict__['store'][k] if k == 'magic' else super().__getattr__(k)",
    ),
    "a slots object": ("self.cfg.x", "self.cfg = Slots()", "model.cfg.x = on"),
    "a frozen dataclass replaced": (
        "self.cfg.x",
        "self.cfg = Frozen()",
        "model.cfg = dataclasses.replace(model.cfg, x=on)",
    ),
    "a named tuple replaced": ("self.cfg.x", "self.cfg = Named(False)", "model.cfg = Named(on)"),
    "vars": ("vars(self)['x']", "self.x = False", "model.x = on"),
    "vars of a config": ("vars(self.cfg)['x']", "self.cfg = Config()", "model.cfg.x = on"),
    "__dict__": ("self.__dict__['x']", "self.x = False", "model.x = on"),
    "__dict__.get": ("self.__dict__.get('x')", "", "model.__dict__.update(x=on)"),
    "getattr": ("getattr(self, 'x')", "self.x = False", "model.x = on"),
    "getattr with a default": (
        "getattr(self, 'x', False)",
        "",
        "vars(model).update(x=1) if on else vars(model).pop('x', 0)",
    ),
    "getattr of a name": (
        "getattr(self, self.name)",
        "self.a, self.b, self.name = False, True, 'a'",
        "model.name = 'b' if on else 'a'",
    ),
    "getattr of a child": (
        "getattr(self.relu, 'on', False)",
        "",
        "vars(model.relu).update(on=1) if on else vars(model.relu).pop('on', 0)",
    ),
    "getattr of a layer's own": ("getattr(self.c0, 'tag')", "self.c0.tag = False", "model.c0.tag = on"),
    "hasattr of an item": (
        "any(hasattr(m, 'on') for m in self.ms)",
        "self.ms = nn.ModuleList([nn.ReLU(), nn.Sequential()])",
        "vars(model.ms[1]).update(on=1) if on else vars(model.ms[1]).pop('on', 0)",
    ),
    "getattr of an item of a dict": (
        "{n: getattr(m, 'on', False) for n, m in self.md.items()}['a']",
        "self.md = nn.ModuleDict({'a': nn.ReLU()})",
        "model.md['a'].on = on",
    ),
    "an item's attribute that values have, too": (
        "[m.names for m in self.ms][0]",
        "self.ms = nn.ModuleList([nn.ReLU()])\nself.ms[0].names = False",
        "model.ms[0].names = on",
    ),
    "a class attribute of an item that values have, too": (
        "any(m.real for m in [*self.children()][-1:])",
        "self.own = type('Own', (nn.ReLU,), {'real': False})()",
        "setattr(type(model.own), 'real', on)",
    ),
    "a variable's attribute that values have, too": (
        "(lambda m: m.layout)(self.relu)",
        "self.relu.layout = False",
        "model.relu.layout = on",
    ),
    "getattr of a class": ("getattr(Config, 'later', False)", "", "Config.later = on"),
    "getattr of a module of functions": ("getattr(types, 'later', False)", "", "types.later = on"),
    "getattr under another name": ("ask(self, 'x')", "self.x = False", "model.x = on", "ask = getattr"),
    "getattr handed on": ("list(map(getattr, [self], ['x']))[0]", "self.x = False", "model.x = on"),
    "object.__getattribute__": ("object.__getattribute__(self, 'x')", "self.x = False", "model.x = on"),
    "operator.attrgetter": ("operator.attrgetter('cfg.x')(self)", "self.cfg = Config()", "model.cfg.x = on"),
    "hasattr": ("hasattr(self, 'later')", "", "vars(model).update(later=1) if on else vars(model).pop('later', 0)"),
    "hasattr of a config": (
        "hasattr(self.cfg, 'later')",
        "self.cfg = Config()",
        "vars(model.cfg).update(later=1) if on else vars(model.cfg).pop('later', 0)",
    ),
    "isinstance of a child": (
        "isinstance(self.act, nn.GELU)",
        "self.act = nn.ReLU()",
        "model.act = nn.GELU() if on else nn.ReLU()",
    ),
    "isinstance of an item": (
        "any(isinstance(m, nn.GELU) for m in self.ms)",
        "self.ms = nn.ModuleList([nn.ReLU()])",
        "model.ms.__setitem__(0, nn.GELU() if on else nn.ReLU())",
    ),
    "isinstance of an item of a dict": (
        "isinstance(self.md['a'], nn.GELU)",
        "self.md = nn.ModuleDict({'a': nn.ReLU()})",
        "model.md.update({'a': nn.GELU() if on else nn.ReLU()})",
    ),
    "isinstance of a variable": (
        "(lambda m: isinstance(m, nn.GELU))(self.sq[0])",
        "self.sq = nn.Sequential(nn.ReLU())",
        "model.sq.__setitem__(0, nn.GELU() if on else nn.ReLU())",
    ),
    "isinstance of children": (
        "any(isinstance(m, nn.GELU) for m in self.children())",
        "self.act = nn.ReLU()",
        "setattr(model, 'act', nn.GELU() if on else nn.ReLU())",
    ),
    "isinstance and the length of one child": (
        "isinstance(self.sq, nn.Sequential) and len(self.sq) == 2",
        "self.sq = nn.Sequential(nn.ReLU())",
        "model.sq.append(nn.ReLU()) if on else model.sq.__delitem__(slice(1, None))",
    ),
    "the identity of two children": (
        "self.a is self.b",
        "self.a, self.b = nn.ReLU(), nn.ReLU()",
        "setattr(model, 'b', model.a if on else nn.ReLU())",
    ),
    "isinstance of a config": (
        "isinstance(self.cfg, Slots)",
        "self.cfg = Config()",
        "model.cfg = Slots() if on else Config()",
    ),
    "isinstance of a number": ("isinstance(self.n, tuple)", "self.n = 1", "model.n = (1,) if on else 1"),
    "a type": ("self.cls is nn.GELU", "self.cls = nn.ReLU", "model.cls = nn.GELU if on else nn.ReLU"),
    "callable": ("callable(self.f)", "self.f = 1", "model.f = one if on else 1"),
    "a ModuleList's length": (
        "len(self.ms) > 1",
        "self.ms = nn.ModuleList([nn.ReLU()])",
        "model.ms.append(nn.ReLU()) if on else model.ms.__delitem__(slice(1, None))",
    ),
    "a ModuleDict's key": (
        "'x' in self.md",
        "self.md = nn.ModuleDict()",
        "model.md.update({'x': nn.ReLU()}) if on else model.md.clear()",
    ),
    "named children": (
        "'later' in dict(self.named_children())",
        "",
        "model.add_module('later', nn.ReLU()) if on else model._modules.pop('later', 0)",
    ),
    "a child that is None": (
        "self.m is not None",
        "self.register_module('m', None)",
        "model._modules.update(m=nn.ReLU() if on else None)",
    ),
    "the grad mode": (
        "not torch.is_grad_enabled()",
        "",
        "MODE.update(grad=not on)",
        "MODE = {}",
        "",
        "def around(model):\n    return torch.set_grad_enabled(MODE['grad'])",
    ),
    "autocast": (
        "torch.is_autocast_enabled('cpu')",
        "",
        "MODE.update(on=on)",
        "MODE = {}",
        "",
        "def around(model):\n    return torch.autocast('cpu', dtype=torch.bfloat16, enabled=MODE['on'])",
    ),
    "inference mode": (
        "torch.is_inference_mode_enabled()",
        "",
        "MODE.update(on=on)",
        "MODE = {}",
        "",
        "def around(model):\n    return torch.inference_mode(MODE['on'])",
    ),
    "the default dtype": (
        "torch.get_default_dtype() is torch.float64",
        "",
        "torch.set_default_dtype(torch.float64 if on else torch.float32)",
    ),
    "the number of threads": ("torch.get_num_threads() == 2", "", "torch.set_num_threads(2 if on else 1)"),
    "determinism": (
        "not torch.are_deterministic_algorithms_enabled()",
        "",
        "torch.use_deterministic_algorithms(not on)",
    ),
    "and, or, not": (
        "self.a and not self.cfg.x or self.b",
        "self.a, self.b, self.cfg = False, False, Config()",
        "model.a = on",
    ),
    "a chained comparison": ("0 < self.n < self.m", "self.n, self.m = 0, 5", "model.n = int(on)"),
    "a walrus": ("(n := self.n) and n > 2", "self.n = 0", "model.n = 3 if on else 0"),
    "an f-string": ("f'{self.n:02}' == '03'", "self.n = 0", "model.n = 3 if on else 0"),
}
TOP = """
import collections, dataclasses, enum, functools, operator, os, types
from typing import NamedTuple

class Config:
    def __init__(self, x=False):
        self.x = x

    @property
    def prop(self):
        return self.x

class Caller(Config):
    def __call__(self):
        return self.x

class Slots:
    __slots__ = ("x",)

    def __init__(self):
        self.x = False

@dataclasses.dataclass(frozen=True)
class Frozen:
    x: bool = False

class Named(NamedTuple):
    x: bool

class Kind(enum.Enum):
    A, B = 1, 2

def one(*args, **kwargs): return 1
def two(*args, **kwargs): return 2
def yes(): return True
def no(): return False
def yes_m(self): return True
def no_m(self): return False

def cell():
    x = False
    def read(): return x
    def write(on):
        nonlocal x
        x = on
    return read, write

def type_of(model):
    return next(c for c in type(model).__mro__ if c.__module__ == __name__)
"""


PLACES = ["if", "within", "first", "last", "value"]


def steered(name: str, place: str) -> str:
    """Write a model that asks at one of ``PLACES`` what is steering it, and whose ``change`` flips the answer."""
    asked, init, flip, top, methods, more = (*STEERING[name], "", "", "")[:6]
    body = {
        "if": f"h = self.relu(self.n0(self.c0(x)))\nif {asked}:\n    h = h * 2\nreturn torch.relu(self.n1(self.c1(h)))",
        "within": f"y = self.n1(self.c1(F.relu(self.n0(self.c0(x)))))\nreturn F.relu(y + y.mean() if {asked} else y)",
        "first": f"y = self.n0(self.c0(x))\nif not ({asked}):\n    return torch.relu(y)\nreturn torch.tanh(y)",
        "last": f"h = torch.relu(self.n0(self.c0(x)))\nreturn (h, h) if {asked} else h",
        "value": f"return torch.relu(self.n0(self.c0(x))) * (1 + 2 * bool({asked}))",
    }[place]
    change = f"def change(model, on):\n    {flip}\n"
    return forward(body, top=f"{TOP}\n{top}", init=init, methods=methods, more=f"{more}\n{change}")
