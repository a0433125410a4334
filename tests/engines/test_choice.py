"""Which engine serves, and what is said where one cannot."""

import re
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fused_resnet
from fused_resnet import engines, ops
from fused_resnet.engines import choice, libraries
from fused_resnet.functional import batch_norm_act
from fused_resnet.ops.self_check import self_check
from fused_resnet.surgery import swap


@pytest.fixture
def fresh_engines(monkeypatch):
    """Forget which engines can serve, before and after."""
    caches = [engines.choose, libraries.load_cpu_library, libraries.load_cuda_library, ops.kernels]

    def clear():
        for cache in caches:
            cache.cache_clear()

    clear()
    yield monkeypatch
    monkeypatch.undo()
    clear()


@pytest.fixture
def without_library(fresh_engines, tmp_path):
    fresh_engines.setattr(libraries, "CPU_LIBRARY", tmp_path / "libfused_resnet_cpu.so")


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
    with pytest.raises(
        ValueError, match="engine must be one of 'auto', 'cpu', 'triton', 'cuda', 'reference', got 'tpu'"
    ):
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
    libraries.load_cpu_library.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(libraries, "build_record", lambda: without_library_reason)
        assert "no C++ compiler was found" in engines.why_not("cpu", "cpu", torch.float32)


def test_a_library_that_does_not_load_is_a_reason_not_an_error(fresh_engines, tmp_path):
    broken = tmp_path / "libfused_resnet_cpu.so"
    broken.write_bytes(b"not a library")
    fresh_engines.setattr(libraries, "CPU_LIBRARY", broken)
    assert engines.choose("auto", "cpu", torch.float32) == "reference"
    assert f"does not load under torch {torch.__version__}" in engines.why_not("cpu", "cpu", torch.float32)


def test_the_engines_agree():
    x = torch.randn(2, 16, 5, 5)
    torch.testing.assert_close(batch_norm_act(x, engine="cpu"), batch_norm_act(x, engine="reference"))


def test_the_environment_names_the_engine_that_auto_takes(fresh_engines):
    fresh_engines.setenv("FUSED_RESNET_ENGINE", "reference")
    assert engines.choose("auto", "cpu", torch.float32) == "reference"
    assert engines.choose("cpu", "cpu", torch.float32) == "cpu"


def test_the_environments_engine_must_exist(fresh_engines):
    fresh_engines.setenv("FUSED_RESNET_ENGINE", "tpu")
    with pytest.raises(ValueError, match=r"FUSED_RESNET_ENGINE must be one of .*, got 'tpu'"):
        engines.choose("auto", "cpu", torch.float32)


def wrong_affine(x, weight, bias, eps):
    moments, affine = ops.batch_norm_act.reference.batch_norm_stats(x, weight, bias, eps)
    return moments, affine + 1e-2


def wrong_channel(x, affine, residual, residual_affine, act, alpha, beta, residual_channel=0):
    return ops.batch_norm_act.reference.batch_norm_act(x, affine, residual, residual_affine, act, alpha, beta)


@pytest.mark.parametrize(("name", "wrong"), [("batch_norm_stats", wrong_affine), ("batch_norm_act", wrong_channel)])
def test_the_self_check_finds_a_wrong_kernel_and_can_be_skipped(name, wrong, fresh_engines):
    right = ops.kernels("cpu", "cpu", torch.float32)
    broken = type(right)(**{**vars(right), name: wrong})
    fresh_engines.setattr(ops, "kernels", lambda engine, *_: right if engine == "reference" else broken)
    fresh_engines.setattr(ops.kernels, "cache_clear", lambda: None, raising=False)
    fresh_engines.setattr(choice, "_wrong", {})
    check = self_check.__wrapped__
    assert f"{name} in torch.float32 is off" in check("cpu")["cpu"]
    assert "self-check failed" in engines.why_not("cpu", "cpu")
    assert engines.choose("auto", "cpu", torch.float32) == "reference"
    fresh_engines.setenv("FUSED_RESNET_SELF_TEST", "0")
    assert check("cpu") == {}


def test_a_model_on_the_cpu_leaves_the_gpu_alone(monkeypatch):
    asked = []
    monkeypatch.setattr(swap, "self_check", asked.append)
    fused_resnet.fuse(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4)))
    assert asked == ["cpu"]


@pytest.mark.parametrize("engine", engines.GPU_NAMES)
def test_without_a_gpu_its_engines_say_so(engine):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert re.search("without CUDA|no CUDA device", engines.why_not(engine, "cuda", torch.bfloat16))
    assert "take float32, bfloat16, float16, not torch.float64" in engines.why_not(engine, "cuda", torch.float64)
    assert "run on a GPU, the activations are on 'cpu'" in engines.why_not(engine, "cpu", torch.float32)


@pytest.mark.parametrize(
    ("capability", "architectures", "served"),
    [
        ((8, 0), "8.0 9.0", True),
        ((8, 6), "8.0 9.0", True),
        ((7, 5), "8.0 9.0+PTX", False),
        ((10, 0), "8.0 9.0", False),
        ((10, 0), "8.0 9.0+PTX", True),
        ((9, 0), "9.0a", True),
        ((12, 1), "12.0f", True),
        ((10, 3), "10.0a+PTX", False),
    ],
)
def test_which_devices_a_build_has_code_for(capability, architectures, served):
    assert libraries.has_code_for(capability, architectures) == served


def test_a_mismatch_of_the_build_and_the_gpu_is_named(fresh_engines):
    record = {"cuda": {"version": "12.8.1", "architectures": "8.0"}}
    fresh_engines.setattr(libraries, "_why_no_gpu", lambda: None)
    fresh_engines.setattr(libraries, "build_record", lambda: record)
    fresh_engines.setattr(torch.version, "cuda", "13.0")
    fresh_engines.setattr(torch.cuda, "get_device_capability", lambda: (11, 0))
    reason = engines.why_not("cuda", "cuda")
    assert "was built with CUDA 12.8.1, torch with 13.0: install the wheel with +cu13" in reason
    record["cuda"]["version"] = "13.0.88"
    libraries.load_cuda_library.cache_clear()
    assert "no code for sm_110 (built for 8.0)" in engines.why_not("cuda", "cuda")


@pytest.fixture
def pretended_gpu(fresh_engines):
    """Let the Triton kernels be chosen for tensors on a GPU that is not there."""
    fresh_engines.setattr(libraries, "load_triton", lambda: None)
    ops.fakes.cache_clear()
    yield
    ops.fakes.cache_clear()


def test_explain_says_where_a_contiguous_model_is_copied(pretended_gpu):
    with FakeTensorMode(), torch.device("cuda"):
        model = fused_resnet.fuse(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)))
        (row,) = fused_resnet.explain(model).fused
        assert row.engine == "triton"
        assert "copies a contiguous input to channels_last" in row.reason
        model[0].weight.data = model[0].weight.data.contiguous(memory_format=torch.channels_last)
        assert fused_resnet.explain(model).fused[0].reason == ""


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=["NHWC", "NCHW"])
def test_a_traced_chain_on_a_gpu_is_channels_last(pretended_gpu, memory_format, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with FakeTensorMode(), torch.device("cuda"):
        model = fused_resnet.models.resnet20()
        for p in model.parameters():
            if p.dim() == 4:
                p.data = p.data.contiguous(memory_format=memory_format)
        fused_resnet.fuse(model)
        x = torch.empty(2, 3, 32, 32).to(memory_format=memory_format)
        z = model.layer2(model.layer1(model.relu(model.bn1(model.conv1(x)))))
        assert z.is_contiguous(memory_format=torch.channels_last)


def test_a_step_checks_and_loads_nothing(monkeypatch):
    model = fused_resnet.fuse(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4)))

    def refuse(*_):
        raise AssertionError("in the middle of a step")

    monkeypatch.setattr(sys.modules["fused_resnet.ops.self_check"], "self_check", refuse)
    monkeypatch.setattr(torch.ops, "load_library", refuse)
    for name in ("exists", "open", "read_text"):
        monkeypatch.setattr(Path, name, refuse)
    for _ in range(2):
        model(torch.randn(2, 3, 5, 5)).sum().backward()
