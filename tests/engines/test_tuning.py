"""What ``fused-resnet tune`` measured decides what auto and fast mean, on the device where it was measured."""

import json
import warnings

import pytest
import torch

import fused_resnet
from fused_resnet import cli, engines, models
from fused_resnet.bench.tune import Measured, decide
from fused_resnet.engines import choice, tuning
from fused_resnet.engines.tuning import BUILT_IN, Tuning
from fused_resnet.ops.pointwise_conv.config import LEAN
from fused_resnet.ops.pointwise_conv_norm.config import pays


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Yield where this process looks for the figures of its processor."""
    monkeypatch.setenv("FUSED_RESNET_TUNING", str(tmp_path / "cache" / "tuning.json"))
    tuning._read.cache_clear()
    engines.choose.cache_clear()
    yield tmp_path / "cache" / "tuning.json"
    tuning._read.cache_clear()
    engines.choose.cache_clear()


def test_what_is_written_is_read(file):
    written = Tuning(("cpu",), {("cpu", 4): 128, ("cpu", 2): 64})
    assert tuning.write("cpu", written, {"measured": []}) == file
    assert tuning.tuning("cpu") == written


def test_a_tuning_decides_which_outputs_are_kept(file):
    block = fused_resnet.fuse(models.resnet50()).get_submodule("layer2.1")
    assert fused_resnet.explain(block).fused[0].reason == ""
    tuning._read.cache_clear()
    tuning.write("cpu", Tuning(("cpu",), {("cpu", 4): 128}), {})
    assert fused_resnet.explain(block).fused[0].reason == "conv3 not kept"


def test_a_tuning_decides_which_engine_is_auto(file, monkeypatch):
    monkeypatch.setattr(choice, "why_not", lambda name, *_: None if name in ("triton", "cuda") else "not here")
    monkeypatch.setitem(tuning._used, "cuda", Tuning(("cuda", "triton"), {}))
    assert engines.choose("auto", "cuda", torch.bfloat16) == "cuda"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "is not used: Expecting"),
        ("[]", "is not used"),
        (json.dumps({"format": 99}), "its format is 99, this version reads 1"),
        (json.dumps({"format": 1, "device": "another"}), "it was measured on another, this is "),
        (json.dumps({"format": 1, "device": tuning.device_name("cpu")}), "it has no 'most_inputs'"),
    ],
    ids=["cut off", "no object", "newer", "another device", "incomplete"],
)
def test_a_file_that_is_of_no_use_is_named_once_and_left_alone(file, content, reason):
    file.parent.mkdir()
    file.write_text(content)
    with pytest.warns(UserWarning, match=r"tuning\.json is not used") as warned:
        assert tuning.tuning("cpu") == BUILT_IN["cpu"]
    assert reason in str(warned[0].message)
    assert "mend: fused-resnet tune" in str(warned[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuning.tuning("cpu") == BUILT_IN["cpu"]


def test_without_a_file_the_built_in_figures_decide(file):
    assert tuning.tuning("cpu") == BUILT_IN["cpu"]
    assert tuning.tuning("mps") == Tuning((), {})


def test_every_device_has_a_file_of_its_own(monkeypatch):
    monkeypatch.delenv("FUSED_RESNET_TUNING")
    monkeypatch.setenv("XDG_CACHE_HOME", "/home/somebody/.cache")
    monkeypatch.setattr(tuning, "device_name", lambda _: "NVIDIA H200 (MIG 1g)")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert str(tuning.path("cuda")) == "/home/somebody/.cache/fused_resnet/tuning-nvidia-h200-mig-1g.json"
    monkeypatch.setenv("FUSED_RESNET_TUNING", "0")
    assert tuning.path("cuda") is None


def test_lean_asks_no_tuning():
    with tuning.using("cpu", Tuning(("cpu",), {})):
        assert pays("cpu", "lean", LEAN, 4 * LEAN, 4)
        assert not pays("cpu", "fast", 16, 64, 4)


def test_no_output_is_left_out_unless_all_smaller_ones_may_be():
    rows = [
        Measured("bf16", 64, "triton", 1.0, 0.9),
        Measured("bf16", 128, "triton", 1.0, 1.0),
        Measured("bf16", 256, "triton", 1.0, 1.1),
        Measured("fp16", 64, "triton", 1.0, 0.8),
        Measured("fp16", 128, "triton", 1.0, 1.2),
        Measured("fp16", 256, "triton", 1.0, 0.7),
        Measured("bf16", 64, "cuda", 0.5, 0.6),
        Measured("bf16", 128, "cuda", 0.5, 0.4),
    ]
    assert decide(rows) == Tuning(("cuda", "triton"), {("triton", 2): 64})


def test_tune_measures_shows_and_keeps(file, capsys):
    small = ["--image-size", "32", "--batch-size", "2", "--dtype", "fp32", "--repeats", "1"]
    assert cli.main(["tune", *small, "--dry-run"]) == 0
    assert not file.exists()
    assert cli.main(["tune", *small]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"kept in {file}"
    kept = json.loads(file.read_text())
    assert [(row["dtype"], row["inputs"], row["engine"]) for row in kept["measured"]] == [
        ("fp32", inputs, "cpu") for inputs in (64, 128, 256)
    ]
    assert kept["engines"] == ["cpu"]
    assert kept["environment"]["torch"] == torch.__version__
    tuning._read.cache_clear()
    assert tuning.tuning("cpu").engines == ("cpu",)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cuda:99"], "--device cuda:99 is not there"),
        (["--repeats", "0"], "--repeats must be at least 1, got 0"),
        (["--image-size", "8"], "--image-size must be at least 32, got 8"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_input_is_answered_in_one_line(capsys, arguments, message):
    assert cli.main(["tune", *arguments]) == 2
    assert f"fused-resnet tune: error: {message}" in capsys.readouterr().err


def test_where_nothing_is_to_be_read_nothing_is_kept(monkeypatch):
    monkeypatch.setenv("FUSED_RESNET_TUNING", "0")
    with pytest.raises(OSError, match="FUSED_RESNET_TUNING=0 says"):
        tuning.write("cpu", BUILT_IN["cpu"], {})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_built_in_figures_decide_for_gpus(monkeypatch):
    monkeypatch.delenv("FUSED_RESNET_TUNING")
    tuning._read.cache_clear()
    assert tuning.tuning("cuda") == BUILT_IN["cuda"]
    tuning._read.cache_clear()
