"""Which engine serves, and what is said where one cannot."""

import pytest
import torch

import fused_resnet
from fused_resnet import engines, ops
from fused_resnet.functional import batch_norm_act


@pytest.fixture
def fresh_engines(monkeypatch):
    """Forget which engines can serve, before and after."""
    caches = [engines.choose, engines.load_cpu_library, ops.kernels]

    def clear():
        for cache in caches:
            cache.cache_clear()

    clear()
    yield monkeypatch
    monkeypatch.undo()
    clear()


@pytest.fixture
def without_library(fresh_engines, tmp_path):
    fresh_engines.setattr(engines, "CPU_LIBRARY", tmp_path / "libfused_resnet_cpu.so")


def test_the_native_kernels_serve_the_cpu():
    for dtype in engines.CPU_DTYPES:
        assert engines.choose("auto", "cpu", dtype) == "cpu"


def test_the_reference_serves_what_the_native_kernels_do_not():
    assert engines.choose("auto", "cpu", torch.float16) == "reference"
    assert engines.choose("auto", "meta", torch.float32) == "reference"


@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
def test_the_reference_serves_everything(device):
    assert engines.why_not("reference", device, torch.float16) is None
    assert engines.choose("reference", device, torch.float16) == "reference"


def test_an_engine_by_name_that_cannot_serve_says_why_and_what_to_do():
    with pytest.raises(engines.EngineError, match=r"engine='cpu' cannot serve: .*not torch.float16; use engine='auto'"):
        engines.choose("cpu", "cpu", torch.float16)
    with pytest.raises(engines.EngineError, match="run on the CPU, the activations are on 'cuda'"):
        engines.choose("cpu", "cuda", torch.float32)


def test_an_unknown_engine_is_refused_with_those_that_exist():
    with pytest.raises(ValueError, match="engine must be one of 'auto', 'cpu', 'reference', got 'tpu'"):
        engines.choose("tpu", "cpu", torch.float32)


def test_without_the_library_the_reference_serves_and_says_why(without_library):
    assert engines.choose("auto", "cpu", torch.float32) == "reference"
    assert "libfused_resnet_cpu.so is missing" in engines.why_not("cpu", "cpu", torch.float32)
    with pytest.raises(engines.EngineError, match=r"libfused_resnet_cpu\.so is missing"):
        batch_norm_act(torch.randn(2, 4, 3, 3), engine="cpu")
    x = torch.randn(2, 4, 3, 3)
    expected = batch_norm_act(x, engine="reference")
    assert torch.equal(batch_norm_act(x), expected)


def test_without_the_library_explain_names_the_reference(without_library):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
    assert [row.engine for row in fused_resnet.explain(fused_resnet.fuse(model)).fused] == ["reference"]
    with pytest.raises(engines.EngineError, match="is missing"):
        fused_resnet.fuse(model, engine="cpu")


def test_why_the_build_left_the_library_out_is_passed_on(without_library):
    without_library_reason = {"left_out": "no C++ compiler was found; install g++ and reinstall"}
    engines.load_cpu_library.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "build_record", lambda: without_library_reason)
        assert "no C++ compiler was found" in engines.why_not("cpu", "cpu", torch.float32)


def test_a_library_that_does_not_load_is_a_reason_not_an_error(fresh_engines, tmp_path):
    broken = tmp_path / "libfused_resnet_cpu.so"
    broken.write_bytes(b"not a library")
    fresh_engines.setattr(engines, "CPU_LIBRARY", broken)
    assert engines.choose("auto", "cpu", torch.float32) == "reference"
    assert f"does not load under torch {torch.__version__}" in engines.why_not("cpu", "cpu", torch.float32)


def test_the_engines_agree():
    x = torch.randn(2, 16, 5, 5)
    torch.testing.assert_close(batch_norm_act(x, engine="cpu"), batch_norm_act(x, engine="reference"))
