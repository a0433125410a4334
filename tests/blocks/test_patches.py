"""Methods and functions patched after fuse, and modes and subclasses through which torch's calls are seen."""

import pytest

from tests.support.oracle import forward

BODY = "h = F.relu(self.n0(self.c0(x)))\nreturn torch.relu(self.n1(self.c1(h)) + h)"
POOLED = "return self.pool(self.relu(self.n0(self.c0(x))))"
# name: (patched object, attribute, the new value given the old one as `old`)
PATCHES = {
    "the class's forward": ("own(model)", "forward", "lambda self, x: old(self, x) * 2"),
    "Conv2d.forward": ("nn.Conv2d", "forward", "lambda self, x: old(self, x) * 2"),
    "Conv2d._conv_forward": ("nn.Conv2d", "_conv_forward", "lambda self, x, w, b: old(self, x, w, b) * 2"),
    "BatchNorm2d.forward": ("nn.BatchNorm2d", "forward", "lambda self, x: old(self, x) * 2"),
    "_BatchNorm.forward": ("nn.modules.batchnorm._BatchNorm", "forward", "lambda self, x: old(self, x) * 2"),
    "BatchNorm2d._check_input_dim": ("nn.BatchNorm2d", "_check_input_dim", "check"),
    "ReLU.forward": ("nn.ReLU", "forward", "lambda self, x: old(self, x) * 2"),
    "Module.__call__": ("nn.Module", "__call__", "called"),
    "Conv2d.__call__": ("nn.Conv2d", "__call__", "lambda self, x: nn.Module.__call__(self, x) * 2"),
    "F.conv2d": ("F", "conv2d", "lambda *a, **k: old(*a, **k) * 2"),
    "torch.conv2d": ("torch", "conv2d", "lambda *a, **k: old(*a, **k) * 2"),
    "F.batch_norm": ("F", "batch_norm", "lambda *a, **k: old(*a, **k) * 2"),
    "torch.batch_norm": ("torch", "batch_norm", "lambda *a, **k: old(*a, **k) * 2"),
    "F.relu": ("F", "relu", "lambda *a, **k: old(*a, **k) * 2"),
    "torch.relu": ("torch", "relu", "lambda *a, **k: old(*a, **k) * 2"),
    "F.max_pool2d": ("F", "max_pool2d", "lambda *a, **k: old(*a, **k) * 2"),
    "MaxPool2d.forward": ("nn.MaxPool2d", "forward", "lambda self, x: old(self, x) * 2"),
    "an instance's _conv_forward": ("model.c1", "_conv_forward", "types.MethodType(circular, model.c1)"),
    "an instance's forward": ("model.c1", "forward", "lambda x: old(x) * 2"),
    "a norm's forward": ("model.n0", "forward", "lambda x: old(x) * 2"),
    "a norm's _check_input_dim": ("model.n0", "_check_input_dim", "lambda x: SEEN.append(1)"),
    "a ReLU's forward": ("model.relu", "forward", "torch.tanh"),
    "the model's forward": ("model", "forward", "lambda x: old(x) * 2"),
    "the model's _call_impl": ("model.c1", "_call_impl", "lambda x: nn.Module._call_impl(model.c1, x) * 2"),
    "the model's _wrapped_call_impl": ("model.c1", "_wrapped_call_impl", "lambda x: model.c1.forward(x) * 2"),
    "__class__": ("model.relu", "__class__", "nn.Tanh"),
    "a global name": ("THIS", "F", "Functions"),
    "a hook": ("model.c1", "_forward_hooks", "{0: lambda m, a, out: out * 2}"),
    "a global hook": ("nn.modules.module", "_global_forward_hooks", "{0: lambda m, a, out: out * 2}"),
    "a global pre-hook": ("nn.modules.module", "_global_forward_pre_hooks", "{0: lambda m, a: (a[0] * 2,)}"),
}
TOP = """
import sys, types
SEEN = []
THIS = sys.modules[__name__]
MISSING = object()

def circular(self, x, w, b):
    return F.conv2d(F.pad(x, self._reversed_padding_repeated_twice, mode="circular"), w, b, self.stride)

def check(self, x):
    SEEN.append(tuple(x.shape))

def called(self, *args):
    SEEN.append(type(self).__name__ if isinstance(self, (nn.Conv2d, nn.BatchNorm2d)) else "module")
    return self._wrapped_call_impl(*args)

class Functions:
    relu = staticmethod(torch.sigmoid)
    max_pool2d = F.max_pool2d

def own(model):
    fused = [c for c in type(model).__mro__ if "FusedModule" in {base.__name__ for base in c.__bases__}]
    return next(c for c in type(model).__mro__ if c.__module__ == __name__ and c not in fused)

def watch(model):
    seen = SEEN[:]
    SEEN.clear()
    return seen
"""
CHANGE = """
OLD = {{}}

def change(model, on):
    target = {target}
    place, key = vars(target) if not isinstance(target, type) else target.__dict__, {attribute!r}
    patched = OLD.get(id(target))
    if on and patched is None:
        OLD[id(target)] = target, place.get(key, MISSING)
        old = getattr(target, key)
        setattr(target, key, {value})
    elif not on and patched is not None:
        del OLD[id(target)]
        if patched[1] is not MISSING:
            setattr(target, key, patched[1])
        elif key == "__class__":
            target.__class__ = nn.ReLU
        else:
            delattr(target, key)
"""


@pytest.mark.parametrize("fuse_on", [False, True], ids=["patched after fuse", "patched before fuse"])
@pytest.mark.parametrize("name", PATCHES)
def test_a_patch_is_honoured(same, name, fuse_on):
    target, attribute, value = PATCHES[name]
    if "getattr" in name and fuse_on:
        pytest.skip("what fuse reads, it would see")
    change = CHANGE.format(target=target, attribute=attribute, value=value)
    body = POOLED if "ool" in name or "ReLU" in name or name == "__class__" else BODY
    same(forward(body, top=TOP, init="self.pool = nn.MaxPool2d(2)", more=change), fuse_on=fuse_on, modes=(not fuse_on,))


@pytest.mark.parametrize("module", ["c0", "n0"])
def test_a_patch_before_fuse_stays_when_it_is_in_the_model(same, module):
    init = f"own = self.{module}.forward\nself.{module}.forward = lambda x: own(x) * 2"
    same(forward(BODY, init=init))


MODES = """
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
SEEN = []
MODE = {"on": False}

class Functions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if not name.startswith("__get") and name not in ("dim", "size", "is_floating_point", "numel"):
            SEEN.append(name)
        return func(*args, **(kwargs or {}))

class Doubles(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return out * 2 if func is F.relu or func is torch.relu else out

class Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        SEEN.append(str(func))
        return func(*args, **(kwargs or {}))

def watch(model):
    seen = SEEN[:]
    SEEN.clear()
    return seen

def change(model, on):
    MODE["on"] = on
"""


@pytest.mark.parametrize("mode", ["Functions", "Doubles"])  # a TorchDispatchMode sees the chain's own kernels
def test_a_mode_sees_the_calls_of_stock(same, mode):
    more = f"""
    import contextlib

    def around(model):
        return {mode}() if MODE["on"] else contextlib.nullcontext()
    """
    same(forward(BODY, top=MODES, more=more))


@pytest.mark.parametrize("mode", ["Functions", "Doubles", "Dispatch"])
def test_a_mode_inside_of_a_forward_sees_the_calls_of_stock(same, mode):
    body = f"with {mode}():\n    h = F.relu(self.n0(self.c0(x)))\nreturn torch.relu(self.n1(self.c1(h)) + h)"
    same(forward(body, top=MODES))


SUBCLASSES = """
SEEN = []

class Logged(Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in ("conv2d", "batch_norm", "relu", "add"):
            SEEN.append(name)
        return super().__torch_function__(func, types, args, kwargs or {})

class Weight(nn.Parameter):
    pass

class LoggedWeight(Logged, nn.Parameter):
    pass

class Metadata(Tensor):
    pass

def watch(model):
    seen = SEEN[:]
    SEEN.clear()
    return seen
"""


@pytest.mark.parametrize("cls", ["Logged", "Metadata"])
def test_an_input_of_a_subclass(same, cls):
    body = f"return super().forward(x.as_subclass({cls}))"
    same(forward(body, top=SUBCLASSES))
    same(forward(f"h = torch.relu(self.n0(self.c0(x.as_subclass({cls}))))\nreturn h", top=SUBCLASSES))


@pytest.mark.parametrize("cls", ["Logged", "Metadata"])
def test_an_argument_of_a_subclass(same, cls):
    more = f"""
    def around(model):
        import contextlib
        return contextlib.nullcontext()

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = Inner()

        def forward(self, x):
            return self.model(x.as_subclass({cls}))

    Inner, Model = Model, Outer
    """
    same(forward(BODY, top=SUBCLASSES, more=more))


@pytest.mark.parametrize("cls", ["Weight", "LoggedWeight"])
@pytest.mark.parametrize("name", ["c0.weight", "n0.weight", "n1.bias"])
def test_a_parameter_of_a_subclass(same, cls, name):
    module, _, attribute = name.partition(".")
    more = f"""
    class Late(Model):
        def double(self):
            super().double()
            old = self.{name}
            self.{module}._parameters[{attribute!r}] = old.detach().as_subclass({cls}).requires_grad_()
            return self

    Model = Late
    """
    same(forward(BODY, top=SUBCLASSES, more=more))
