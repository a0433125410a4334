"""Sizes of the input in functions written in C, values in functions of any kind, and return annotations."""

import pytest

from tests.support.oracle import behind_a_chain, forward

# what follows h = relu(norm(conv(x))), [2, 4, 6, 6]
SIZES = [
    "F.avg_pool2d(h, h.size(3))",
    "F.avg_pool2d(h, h.size()[2:])",
    "F.avg_pool2d(h, h.shape[2:])",
    "F.avg_pool2d(h, (h.shape[-2], h.shape[-1]))",
    "F.avg_pool2d(h, kernel_size=h.size(3)).flatten(1)",
    "F.avg_pool2d(h, int(h.size(3) / 2))",
    "F.adaptive_avg_pool2d(h, h.shape[2] // 2)",
    "F.max_pool2d(h, h.size(2))",
    "F.interpolate(h, size=x.shape[2:])",
    "F.pad(h, (0, h.size(3) % 4, 0, h.size(2) % 4))",
    "h + torch.zeros(h.size(0), h.size(1), 1, 1, dtype=h.dtype)",
    "h + torch.ones(h.shape[:2], dtype=h.dtype)[:, :, None, None]",
    "h * torch.arange(h.size(3), dtype=h.dtype)",
    "h * torch.linspace(0, 1, h.size(3), dtype=h.dtype)",
    "h + sum(torch.meshgrid(torch.arange(h.size(2)), torch.arange(h.size(3)), indexing='ij'))",
    "torch.cat([h, h.new_zeros(h.size(0), 2, h.size(2), h.size(3))], 1)",
    "torch.reshape(h, (h.size(0), -1))",
    "h.view(h.size(0), -1)",
    "h.view(h.size(0), 2, h.size(1) // 2, *h.shape[2:]).transpose(1, 2).reshape(h.shape)",
    "torch.narrow(h, 1, 0, h.size(1) // 2)",
    "h.narrow(1, h.size(1) // 2, h.size(1) // 2)",
    "torch.split(h, h.size(1) // 2, dim=1)[1]",
    "torch.chunk(h, h.size(0), 0)[0]",
    "torch.topk(h.flatten(1), h.size(3), dim=1)[0]",
    "h.flatten(1)[:, : h.size(1)] * F.one_hot(torch.arange(h.size(0)), h.size(1))",
    "F.conv2d(h, torch.ones(h.size(1), 1, 3, 3, dtype=h.dtype), groups=h.size(1))",
    "torch.broadcast_to(h.mean((2, 3), keepdim=True), h.shape)",
    "h.mean((2, 3), keepdim=True).expand(-1, -1, h.size(2), h.size(3))",
    "h.sum() / h.numel()",
    "torch.eye(h.size(3), dtype=h.dtype) @ h",
    "torch.roll(h, h.size(3) // 2, 3)",
    "F.layer_norm(h, h.shape[1:])",
    "h.flatten(2) @ h.flatten(2).transpose(1, 2) * h.size(1) ** -0.5",
    "h[:, :, : h.shape[2] // 2, : h.shape[3] // 2]",
    "h.repeat(1, h.size(0), 1, 1)",
    "F.unfold(h, h.size(2) // 3, stride=h.size(2) // 3)",
    "h * (h.size(0) if h.size(0) > 1 else 3)",
    "h * float(len(h)) + h.dim() + h.ndim",
    "h * max(h.shape) - min(*h.shape)",
    "torch.full((h.size(0),), h.size(1), dtype=h.dtype)[:, None, None, None] * h",
    "h.permute(*range(h.dim())[::-1])",
]


@pytest.mark.parametrize("expression", SIZES)
def test_a_size_of_the_input_goes_into_a_function(same, expression):
    same(behind_a_chain(f"return {expression}"))


@pytest.mark.parametrize("expression", ["F.avg_pool2d(h, h.size(3))", "h.view(h.size(0), -1)", "h * h.shape[2]"])
def test_a_size_is_that_of_every_call(same, expression):
    """Other sizes than those of the first call, and of the trace."""
    sizes = "SIZES = iter([4, 6, 8, 5, 7, 9, 3, 6, 5, 4] * 9)\n"
    inputs = """
    def inputs():
        n = next(SIZES)
        return (torch.linspace(-1, 1, 6 * n * n, dtype=torch.float64).sin().view(2, 3, n, n),)
    """
    same(behind_a_chain(f"return {expression}", top=sizes, more=inputs))


@pytest.mark.parametrize(
    "body",
    [
        "return F.avg_pool2d(x, x.size(3))",
        "n, c, height, width = x.shape\nreturn torch.zeros(n, c, height, width).reshape(n, -1) + x.view(n, -1)",
        "return torch.utils.checkpoint.checkpoint(torch.sin, x, use_reentrant=True)",
    ],
)
def test_without_a_chain_or_a_norm(same, body):
    same(forward(body, top="import torch.utils.checkpoint"))


FUNCTION = """
class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, n=2):
        ctx.n = n
        return h * n

    @staticmethod
    def backward(ctx, g):
        return g * ctx.n * 3, None
"""
SCRIPTED = """
import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    @torch.jit.script
    def scripted(h: Tensor, n: int) -> Tensor:
        return h * n + 1
"""
CALLS = {
    "an autograd function": ("Doubled.apply(h)", FUNCTION),
    "an autograd function, of the input": ("Doubled.apply(x).sum() + h", FUNCTION),
    "an autograd function, with a size": ("Doubled.apply(h, h.size(1))", FUNCTION),
    "an autograd function kept in a global": ("doubled(h)", FUNCTION + "\ndoubled = Doubled.apply\n"),
    "checkpoint, reentrant": ("checkpoint(torch.sin, h, use_reentrant=True)", ""),
    "checkpoint, not reentrant": ("checkpoint(torch.sin, h, use_reentrant=False)", ""),
    "checkpoint of a chain": (
        "checkpoint(lambda t: torch.relu(self.n1(self.c1(t))), h.detach(), use_reentrant=False)",
        "",
    ),
    "a scripted function": ("scripted(h, 3)", SCRIPTED),
    "a scripted function, with a size": ("scripted(h, h.size(1))", SCRIPTED),
    "stochastic depth": ("stochastic_depth(h, 0.5, 'row', self.training) + x.mean()", ""),
    "stochastic depth, by the batch": ("stochastic_depth(h, 0.5, 'batch', self.training) + x.mean()", ""),
    "stochastic depth, never": ("stochastic_depth(h, 0.0, 'row', self.training) + x.mean()", ""),
    "dropout": ("F.dropout(h, 0.5, self.training)", ""),
    "einsum": ("torch.einsum('nchw,nkhw->nck', h, h)", ""),
    "torch.func": ("torch.func.vmap(torch.sin)(h)", ""),
    "torch.cond-like where": ("torch.where(h > h.mean(), h, h.new_tensor(0.5))", ""),
    "numpy-like item": ("h * h.detach().mean().item()", ""),
    "a list of it": ("h * h.detach().sum((0, 2, 3)).tolist()[0]", ""),
    "numpy": ("h + float(h.detach().numpy().mean())", ""),
    "len, iteration and zip": ("sum(a * b for a, b in zip(h, h.unbind(0)))", ""),
    "a value as a condition": ("h * 2 if h.sum() > 0 else h * 3", ""),
    "isinstance": ("h * 2 if isinstance(h, Tensor) else h * 3", ""),
    "its type": ("h * 2 if type(h) is Tensor else h * 3", ""),
    "its dtype and device": ("h.to(torch.zeros(1, dtype=x.dtype, device=x.device)) * 2", ""),
    "does it require grad": ("h * (2 if h.requires_grad else 3) * (5 if x.is_leaf else 7)", ""),
    "its grad_fn": ("h * (2 if h.grad_fn is None else 3)", ""),
    "data": ("h + h.data * 2", ""),
    "detach": ("h + h.detach() * 2", ""),
    "an index put": ("torch.index_put(h, (torch.tensor([0]),), h[1:] * 2)", ""),
    "a hook on a value": ("(h.register_hook(lambda g: g * 3), h * 2)[1]", ""),
    "retain_grad": ("(h.retain_grad() if h.requires_grad else None, h * 2)[1]", ""),
    "requires_grad_": ("h.detach().requires_grad_() * 2 + h", ""),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", CALLS)
def test_a_value_goes_into_a_function_of_any_kind(same, name):
    expression, top = CALLS[name]
    imports = "from torch.utils.checkpoint import checkpoint\n"
    if "stochastic" in expression:
        pytest.importorskip("torchvision")
        imports += "from torchvision.ops import stochastic_depth\n"
    same(behind_a_chain(f"return {expression}", top=imports + top))


IN_PLACE = [
    "h[0] = 0\nreturn h",
    "h[:, 1:2] = h[:, :1] * 2\nreturn h",
    "h[h > 1] = 1\nreturn h",
    "h.mul_(2)\nreturn h",
    "h *= 2\nreturn h",
    "h.view(2, -1)[0] += 1\nreturn h",
    "torch.sin(h, out=out) if (out := torch.empty(0, dtype=h.dtype)) is None else None\nreturn h * 2",
    "y = x * 1\ny[0] = h.mean()\nreturn self.n1(self.c1(h)) + y.mean()",
    "h2 = h\nh += 1\nreturn h2 * 2 + h",
    "y = h * 2\ny += h\nh += y\nreturn torch.relu(y) + h",
    "del x\nreturn h",
]


@pytest.mark.parametrize("body", IN_PLACE)
def test_a_value_is_written_to(same, body):
    """The value is a norm's, which stock can differentiate afterwards."""
    same(forward("h = self.n1(self.c1(torch.relu(self.n0(self.c0(x)))))\n" + body))


def test_an_item_of_a_relu_is_written_to_which_stock_cannot_differentiate(same):
    # written to whole, a chain's output still has its gradient, where stock's backward raises
    same(behind_a_chain("h[0] = 0\nreturn h + x.mean()"))


# ---- return annotations ----------------------------------------------------------------------------------------------

TYPES = """
from __future__ import annotations

from typing import TYPE_CHECKING, Any, Callable, Generic, Literal, NamedTuple, Optional, Protocol, TypeVar, Union
import typing
if TYPE_CHECKING:
    from nowhere import Missing

T = TypeVar("T", bound=Tensor)
"""
ANNOTATIONS = [
    "'Tensor'", "'torch.Tensor'", "'NotDefinedAnywhere'", "Optional[Tensor]", "Optional['Tensor']", "Tensor | None",
    "Union[Tensor, tuple[Tensor, ...]]", "T", "'T'", "Literal['a']", "Callable[[Tensor], Tensor]",
    "typing.Callable[..., Any]", "list[Tensor]", "typing.List[Tensor]", "dict[str, Tensor]", "Any", "None", "'None'",
    "type[Tensor]", "Tensor.__class__", "1", "'not python ('", "typing.Annotated[Tensor, 3]", "typing.NoReturn",
]  # fmt: skip
CLASS = """
class Model(Net):
    def forward(self, x: {argument}) -> {returned}:
        inner: {returned} = self.relu(self.n0(self.c0(x)))
        return F.relu(self.n1(self.c1(inner)))
"""


@pytest.mark.parametrize("annotation", ANNOTATIONS)
def test_a_return_annotation_says_nothing_of_what_is_done(same, annotation):
    top = TYPES.replace("from __future__ import annotations\n", "")
    same(top + CLASS.format(argument="Tensor", returned=annotation), least=1)


@pytest.mark.parametrize("annotation", ["Tensor", "Missing", "Optional[Missing]", "Tensor | None", "T", "1 / 0"])
def test_annotations_are_never_evaluated(same, annotation):
    same(TYPES.lstrip() + CLASS.format(argument=annotation, returned=annotation), least=1)


@pytest.mark.parametrize("size", ["x.shape", "getattr(x, 'shape')", "x.size()"])
def test_a_forward_that_hands_sizes_on_is_fused(same, size):
    sizes = f"n, *rest = [{size}[i] for i in range(4)]"
    body = f"{sizes}\nh = torch.relu(self.n0(self.c0(x)))\nreturn h.reshape(n, -1, *rest[1:])"
    same(forward(body), least=1)


def test_a_forward_that_compares_with_what_an_enum_holds_is_fused(same):
    top = "import enum\n\nclass Format(str, enum.Enum):\n    A, B = 'a', 'b'\n"
    change = "def change(model, on):\n    model.format = Format.B if on else Format.A\n"
    body = "h = torch.relu(self.n0(self.c0(x)))\nreturn h * 2 if self.format != Format.A else h"
    same(forward(body, top=top, init="self.format = Format.A", more=change), least=1)
