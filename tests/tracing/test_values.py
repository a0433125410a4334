"""What a forward asks of a value past its arithmetic: its class, identity, hash and text."""

import pytest

from tests.support.oracle import forward

# h = relu(norm(conv(x))), [2, 4, 6, 6]; self.idn is an Identity, self.give(kind) a child of its own that returns one
ASKED = [
    "hasattr(x, 'keys')", "hasattr(h, 'items')", "getattr(h, 'keys', None) is not None", "callable(x)", "callable(h)",
    "callable(h.relu)", "self.idn(h) is h", "x is h", "self.idn(h) is self.idn(h)", "h in [h]",
    "h.dtype is torch.float64", "h.shape[0] is self.two", "self.two is h.shape[0]", "h.requires_grad is True",
    "h.grad_fn is None", "h.grad is None", "str(h.dim()) == '4'", "f'{h.dim()}' == '4'", "f'{h.dim():>2}' == ' 4'",
    "f'{h.dim()!r}' == '4'", "'{}'.format(h.shape[0]) == '2'", "'%s' % h.shape[0] == '2'", "'%d' % h.shape[0] == '2'",
    "f'{h.shape}'[-2] == ']'", "len(f'{h.dim()}') == 1", "str(h.dtype).endswith('64')", "repr(h.dim()) == '4'",
    "{'2': True}.get(str(h.shape[0]), False)", "{2: True}.get(h.shape[0], False)", "h.shape[0] in {2: 1}",
    "h.dim() in {4}", "h.dtype in {torch.float64}", "{h: 1}[h] == 1", "h.__class__ is torch.Tensor",
    "h.shape[0].__class__ is int", "isinstance(h.shape, tuple)", "isinstance(h.shape[0], int)",
    "isinstance(h.dim(), int)", "isinstance(h.dtype, torch.dtype)", "isinstance(self.c0.weight, nn.Parameter)",
    "isinstance(self.n0.running_mean, torch.nn.Buffer)", "isinstance(h, torch.Tensor)",
    "isinstance(self.idn(h), torch.Tensor)", "isinstance(h + 1, (list, torch.Tensor))",
    "isinstance(self.give('tuple'), tuple)", "isinstance(self.give('none'), torch.Tensor)",
    "isinstance(self.give('dict'), dict)", "self.give('none') is None", "None is self.give('none')",
    "self.none(self.give('none'))", "self.none(h)", "self.none(None)", "(lambda t: t is None)(h)", "h is not None",
    "torch.is_tensor(h)", "torch.is_tensor(h.shape)", "torch.is_tensor(self.give('none'))",
    "round(h.shape[0] / 3) == 1", "abs(h.shape[0]) == 2", "divmod(h.shape[0], 2)[1] == 0",
    "[0, 1, 2, 3][h.shape[0]] == 2", "[1, 2, 3].index(h.shape[0])", "h.shape[0] == 2", "h.shape == (2, 4, 6, 6)",
    "tuple(h.shape)[0] == 2", "len(h.shape) == 4", "len(h) == 2", "any(h.shape)", "max(h.shape) > 5",
    "sorted([h.shape[0], 1])[0] == 1", "sum(h.shape) == 18", "h.size(0) in (1, 2)", "not h.is_cuda",
    "slice(h.shape[0]) == slice(2)", "(h.shape[0],) == (2,)", "[h.dim()] == [4]", "{'a': h.dim()} == {'a': 4}",
]  # fmt: skip
CHAIN = "h = torch.relu(self.n0(self.c0(x)))"
METHODS = """
def give(self, kind):
    return self.own(kind)

def none(self, value):
    return value is None
"""
TOP = """
class Own(nn.Module):
    def forward(self, kind):
        return {'tuple': (kind, kind), 'none': None, 'dict': {'a': kind}}[kind]
"""


def asking(asked: str, *, taken: bool) -> str:
    """A chain, a question, and a chain; the branch that stock takes, or the other, is the one without the second."""
    answer = f"({asked})" if taken else f"not ({asked})"
    body = (
        f"h = torch.relu(self.n0(self.c0(x)))\nif {answer}:\n    return h * 2\nreturn torch.relu(self.n1(self.c1(h)))"
    )
    return forward(body, top=TOP, init="self.idn, self.own, self.two = nn.Identity(), Own(), 2", methods=METHODS)


@pytest.mark.parametrize("taken", [True, False])
@pytest.mark.parametrize("asked", ASKED)
def test_a_value_answers_as_a_tensor_does_or_the_forward_is_stock(same, asked, taken):
    same(asking(asked, taken=taken), modes=(taken,))


@pytest.mark.parametrize(
    "asked", ["isinstance(h, torch.Tensor)", "isinstance(self.idn(h), torch.Tensor)", "h is not None"]
)
def test_what_is_known_of_a_value_is_answered(same, asked):
    same(asking(asked, taken=False), least=1)


@pytest.mark.parametrize(
    "text", ["f'{{{h.dim()}}} of {h.shape!r}'", "'%s' % h.size(1)", "str(h.dtype)", "f'{h.dim():>3}'"]
)
def test_the_text_of_an_assertion_is_made_in_every_call(same, text):
    body = f"{CHAIN}\ntorch._assert(x.shape[2] == self.size, {text})\nreturn h"
    change = "def change(model, on):\n    model.size = 5 if on else 6\n"
    same(forward(body, init="self.size = 6", more=change), least=1)


@pytest.mark.parametrize("pattern", ["torch.Tensor()", "[_, *_]", "{'a': _}", "4"])
def test_a_match_of_a_value(same, pattern):
    matched = "h.dim()" if pattern == "4" else "h"
    same(forward(f"{CHAIN}\nmatch {matched}:\n    case {pattern}:\n        h = h * 2\nreturn h"))
