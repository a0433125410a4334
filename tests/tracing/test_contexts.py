"""What a forward does in a context: grad modes, autocast, hooks of saved tensors, anyone's context managers."""

import pytest
import torch

from tests.support.oracle import forward, fuse, load, make, tensors_of

CHAIN0 = "x = torch.relu(self.n0(self.c0(x)))"
CHAIN1 = "return torch.relu(self.n1(self.c1(x)))"


def inside(context: str, first: str = CHAIN0, rest: str = CHAIN1) -> str:
    return f"with {context}:\n    {first}\n{rest}"


MODE_CONTEXTS = [
    "torch.no_grad()",
    "torch.autograd.no_grad()",
    "torch.set_grad_enabled(False)",
    "torch.set_grad_enabled(not self.training)",
    "torch.set_grad_enabled(self.training)",
    "torch.no_grad(), torch.enable_grad()",
    "torch.no_grad(), torch.autograd.profiler.record_function('stem')",
    "torch.autograd.set_grad_enabled(mode=False)",
    "NO_GRAD",
    "self.mode()",
]


@pytest.mark.parametrize("context", MODE_CONTEXTS)
@pytest.mark.parametrize("part", ["the first chain", "the last chain", "all", "nothing of a chain"])
def test_a_grad_mode_around_a_part_of_a_forward(same, context, part):
    body = {
        "the first chain": inside(context),
        "the last chain": f"{CHAIN0}\n" + inside(context, CHAIN1, "pass"),
        "all": f"with {context}:\n    {CHAIN0}\n    {CHAIN1}",
        "nothing of a chain": f"{CHAIN0}\nwith {context}:\n    scale = x.mean()\n{CHAIN1} * scale",
    }[part]
    same(forward(body, top="NO_GRAD = torch.no_grad()", init="self.mode = torch.no_grad"))


SPELLINGS = {
    "the mode is set by hand": (
        f"torch._C._set_grad_enabled(False)\n{CHAIN0}\ntorch._C._set_grad_enabled(True)\n{CHAIN1}",
        "",
    ),
    "a convolution alone": ("with torch.no_grad():\n    y = self.c0(x)\nreturn torch.relu(self.n0(y)) + x.mean()", ""),
    "a norm alone": ("y = self.c0(x)\nwith torch.no_grad():\n    y = self.n0(y)\nreturn torch.relu(y) + x.mean()", ""),
    "a ReLU alone": ("y = self.n0(self.c0(x))\nwith torch.no_grad():\n    y = torch.relu(y)\nreturn y + x.mean()", ""),
    "enable_grad inside": (
        f"with torch.no_grad():\n    {CHAIN0}\n    with torch.enable_grad():\n        {CHAIN1}",
        "",
    ),
    "inference mode": (f"with torch.inference_mode():\n    {CHAIN0}\n    y = x.mean()\nreturn y", ""),
    "inference mode, left again": (
        f"with torch.inference_mode():\n    x = x * 2\n    with torch.inference_mode(False):\n        z = 3\n{CHAIN1}",
        "",
    ),
    "inference mode off": (inside("torch.inference_mode(False)"), ""),
    "on a method": ("x = self.stem(x)\n" + CHAIN1, f"@torch.no_grad()\ndef stem(self, x):\n    {CHAIN0}\n    return x"),
    "on a method, without brackets": (
        "x = self.stem(x)\n" + CHAIN1,
        f"@torch.no_grad\ndef stem(self, x):\n    {CHAIN0}\n    return x",
    ),
    "in a method": (
        "x = self.stem(x)\n" + CHAIN1,
        f"def stem(self, x):\n    with torch.no_grad():\n        {CHAIN0}\n    return x",
    ),
    "called on a method": (
        "x = torch.no_grad()(self.stem)(x)\n" + CHAIN1,
        f"def stem(self, x):\n    {CHAIN0}\n    return x",
    ),
    "in try and finally": (
        f"before = torch.is_grad_enabled()\ntorch.set_grad_enabled(False)\ntry:\n    {CHAIN0}\n"
        f"finally:\n    torch.set_grad_enabled(before)\n{CHAIN1}",
        "",
    ),
    "by hand": (
        f"mode = torch.no_grad()\nmode.__enter__()\n{CHAIN0}\nmode.__exit__(None, None, None)\n{CHAIN1}",
        "",
    ),
    "by an exit stack": (
        "import contextlib\nwith contextlib.ExitStack() as stack:\n    if self.training:\n"
        f"        stack.enter_context(torch.no_grad())\n    {CHAIN0}\n{CHAIN1}",
        "",
    ),
    "in a generator": (
        f"x = next(self.stem(x))\n{CHAIN1}",
        f"def stem(self, x):\n    with torch.no_grad():\n        {CHAIN0}\n        yield x",
    ),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_grad_mode_in_other_words(same, name):
    body, methods = SPELLINGS[name]
    same(forward(body, methods=methods))


@pytest.mark.parametrize(
    "decorator",
    [
        "torch.no_grad()",
        "torch.no_grad",
        "torch.enable_grad()",
        "torch.inference_mode()",
        "torch.set_grad_enabled(False)",
        "torch.autocast('cpu', enabled=False)",
        "torch.autocast('cpu', dtype=torch.bfloat16)",
        "torch.compiler.disable",
        "doubled",
        "doubled_with_wraps",
        "cast_inputs",
    ],
)
def test_a_decorator_on_the_forward(same, decorator):
    same(
        f"""
        import functools

        def doubled(f):
            return lambda self, x: 2 * f(self, x)

        def doubled_with_wraps(f):
            @functools.wraps(f)
            def wrapper(*args, **kwargs):
                return 2 * f(*args, **kwargs)
            return wrapper

        def cast_inputs(f):
            @functools.wraps(f)
            def wrapper(self, x):
                with torch.autocast("cpu", enabled=False):
                    return f(self, x.to(self.c0.weight.dtype))
            return wrapper

        class Model(Net):
            @{decorator}
            def forward(self, x):
                {CHAIN0}
                {CHAIN1}
        """
    )


# ---- around the call -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mode", ["torch.no_grad()", "torch.inference_mode()", "torch.set_grad_enabled(False)", "torch.enable_grad()"]
)
def test_a_grad_mode_around_the_call(same, mode):
    more = f"""
    def around(model):
        return {mode}
    """
    same(forward(f"{CHAIN0}\n{CHAIN1}", more=more))


AUTOCAST = """
def around(model):
    return torch.autocast("cpu", dtype=torch.bfloat16)

def inputs():
    return (torch.linspace(-3, 3, 2 * 3 * 6 * 6).view(2, 3, 6, 6).sin(),)
"""


@pytest.mark.parametrize(
    "context",
    [
        "torch.autocast('cpu', enabled=False)",
        "torch.autocast(device_type='cpu', enabled=False)",
        "torch.amp.autocast('cpu', enabled=False)",
        "torch.autocast(x.device.type, enabled=False)",
        "torch.autocast('cpu', dtype=torch.float16)",
        "torch.autocast('cpu', enabled=self.training)",
        "ISLAND",
    ],
)
@pytest.mark.parametrize("autocast", [False, True], ids=["outside of autocast", "under autocast"])
def test_an_island_of_another_precision(tmp_path, context, autocast):
    """Under autocast chains round otherwise than stock: types are compared, and values within bfloat16's rounding."""
    body = f"{CHAIN0}\nwith {context}:\n    y = torch.relu(self.n1(self.c1(x.float())))\nreturn x, y, x + y"
    module = load(tmp_path, forward(body, top="ISLAND = torch.autocast('cpu', enabled=False)", more=AUTOCAST))
    for training in (True, False):
        stock = make(module.Model).float().train(training)
        fused = fuse(make(module.Model).float().train(training))
        ours, theirs = [], []
        for model, found in ((fused, ours), (stock, theirs)):
            (x,) = module.inputs()
            x.requires_grad_()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                outputs = tensors_of(model(x))
            sum(t.float().square().sum() for t in outputs).backward()
            found += [*outputs, x.grad, *(p.grad for p in model.parameters())]
        for a, b in zip(ours, theirs, strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(
                a.float(), b.float(), rtol=0.1, atol=0.1 * float(b.detach().float().abs().max()) + 1e-4
            )


OWN = """
import contextlib
EVENTS = []

class Timed:
    def __enter__(self):
        EVENTS.append("enter")
        return self

    def __exit__(self, *error):
        EVENTS.append("exit")

class Swallows(Timed):
    def __exit__(self, *error):
        return True

class Decorates(contextlib.ContextDecorator, Timed):
    pass

@contextlib.contextmanager
def generator(value=1):
    EVENTS.append(value)
    yield value
    EVENTS.append(-value)

class Pack(torch.autograd.graph.saved_tensors_hooks):
    def __init__(self):
        super().__init__(self.pack, lambda t: t)

    def pack(self, t):
        EVENTS.append(tuple(t.shape))
        return t

def watch(model):
    events = list(EVENTS)
    EVENTS.clear()
    return events
"""
OWN_CONTEXTS = [
    "torch.autograd.graph.saved_tensors_hooks(lambda t: t * 2, lambda t: t)",
    "torch.autograd.graph.saved_tensors_hooks(lambda t: EVENTS.append('pack') or t, lambda t: t)",
    "torch.autograd.graph.save_on_cpu()",
    "torch.autograd.graph.disable_saved_tensors_hooks('none here')",
    "Pack()",
    "torch.autograd.profiler.record_function('chain')",
    "torch.profiler.record_function('chain')",
    "contextlib.nullcontext()",
    "contextlib.nullcontext(3) as three",
    "contextlib.suppress(ValueError)",
    "Timed()",
    "Timed() as timed",
    "Swallows()",
    "Decorates()",
    "generator()",
    "generator(5), Timed()",
    "contextlib.ExitStack() as stack",
    "contextlib.closing(open('/dev/null'))",
    "torch.random.fork_rng(devices=[])",
    "torch.device('cpu')",
    "torch.autograd.set_detect_anomaly(False)",
    "torch.autograd.forward_ad.dual_level()",
]


@pytest.mark.parametrize("context", OWN_CONTEXTS)
def test_any_other_context(same, context):
    """Outputs are stock's, events are stock's, what is saved for backward is packed as by stock."""
    same(forward(f"x = x * 1\n{inside(context)}", top="import torch.autograd.forward_ad" + OWN))


@pytest.mark.parametrize("context", ["Swallows()", "contextlib.suppress(ValueError)"])
def test_an_error_that_a_context_takes(same, context):
    same(forward(f"with {context}:\n    {CHAIN0}\n    raise ValueError('user')\n{CHAIN1}", top=OWN))


@pytest.mark.parametrize(
    "body",
    [
        "raise ValueError('user: no')",
        f"{CHAIN0}\nraise ValueError('user: no')",
        f"{CHAIN0}\nassert x.shape[0] == 3, x.shape",
        f"{CHAIN0}\nif x.shape[0] != 3:\n    raise RuntimeError(f'user: {{x.shape}}')\n{CHAIN1}",
        f"{CHAIN0}\ntry:\n    raise KeyError\nexcept KeyError:\n    x = x * 2\n{CHAIN1}",
        f"try:\n    {CHAIN1}\nexcept RuntimeError:\n    pass\n{CHAIN0}\n{CHAIN1}",
        f"{CHAIN0}\nreturn self.missing(x)",
        f"{CHAIN0}\nreturn missing(x)",
        f"{CHAIN0}\nif not self.training:\n    raise NotImplementedError\n{CHAIN1}",
    ],
)
def test_an_error_comes_where_stock_has_it(same, body):
    same(forward(body))
