"""Whatever steers a forward is read in every call."""

import contextlib

import pytest
import torch

from tests.support.oracle import forward, images, load, make
from tests.support.steering import PLACES, STEERING, steered

CASES = [(name, PLACES[(i + shift) % 5], bool(shift)) for i, name in enumerate(STEERING) for shift in (0, 2)]


@pytest.fixture(autouse=True)
def _put_back(monkeypatch):
    monkeypatch.setenv("OWN_FLAG", "0")
    deterministic, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    yield
    torch.set_default_dtype(torch.float32)
    torch.use_deterministic_algorithms(deterministic)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", STEERING)
def test_what_steers_a_forward_changes_what_stock_gives(name, tmp_path):
    """Else the claim below would be none."""
    module = load(tmp_path, steered(name, "value"))
    model, results = make(module.Model), []
    around = getattr(module, "around", lambda model: contextlib.nullcontext())
    for on in (False, True):
        module.change(model, on)
        with around(model):
            results.append(model(images()).double())
    module.change(model, False)
    assert not torch.allclose(*results)


@pytest.mark.parametrize(("name", "place", "on"), CASES, ids=[f"{n}, {p}, fused {o}" for n, p, o in CASES])
def test_what_steers_a_forward_is_read_in_every_call(same, name, place, on):
    train_first = len(name) % 2 == 0  # one mode for each of a name's two places
    same(steered(name, place), fuse_on=on, modes=(train_first != on,))


@pytest.mark.parametrize(
    "asked",
    ["hasattr(x, 'tensors')", "getattr(h, 'later', None) is not None", "hasattr(self.c0(x), 'later')"],
)
def test_a_tensor_is_asked_for_what_none_has(same, asked):
    body = f"h = torch.relu(self.n0(self.c0(x)))\nif {asked}:\n    h = h * 2\nreturn torch.relu(self.n1(self.c1(h)))"
    same(forward(body))


@pytest.mark.parametrize(
    "asked",
    [
        "self.x and getattr(self.cfg, 'later')",
        "[getattr(m, 'inplace', True) for m in self.ms][0]",
    ],
)
def test_what_a_getattr_reads_is_known_where_it_is_reached(same, asked):
    init = "self.x, self.ms = False, nn.ModuleList([nn.ReLU(inplace=False)])"
    body = f"h = torch.relu(self.n0(self.c0(x)))\nif {asked}:\n    h = h * 2\nreturn torch.relu(self.n1(self.c1(h)))"
    same(forward(body, init=init), least=1)


READ_IN_A_CHAINS_FORWARD = [
    "getattr of a child",
    "hasattr of an item",
    "a flag",
    "a number",
    "a string",
    "a config object",
    "a class attribute",
    "a module global",
]


@pytest.mark.parametrize("name", READ_IN_A_CHAINS_FORWARD)
def test_a_forward_that_reads_plain_things_is_fused(same, name):
    same(steered(name, "if"), least=1)
