"""What ``fused-resnet doctor`` reports."""

import json

import pytest

from fused_resnet import cli, doctor, engines
from fused_resnet.engines import libraries


def test_it_shows_how_the_kernels_were_built(capsys):
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for fact in ("commit", "flags", "files", *filter(None, [libraries.build_record().get("compiler")])):
        assert fact in shown


def test_it_names_what_is_missing_what_for_and_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert cli.main(["doctor", "--json"]) == 0
    missing = json.loads(capsys.readouterr().out)["missing"]
    assert missing["triton"] == "kernels for NVIDIA GPUs: pip install triton"
    assert "apt install g++" in missing["c++"]
    assert set(missing) == {"triton", "torchvision", "matplotlib", "sklearn", "tqdm", "c++", "nvcc"}


def test_every_engine_serves_or_says_why_not(capsys):
    cli.main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert set(report["engines"]) == set(engines.NAMES)
    assert report["engines"]["reference"] == "serves"


@pytest.mark.parametrize(("wrong", "status"), [(None, 0), ("batch_norm_act in torch.float32 is off", 1)])
def test_a_failed_self_check_is_the_exit_status(wrong, status, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "self_check", lambda device: {"cpu": wrong})
    assert cli.main(["doctor"]) == status
    assert (wrong or "passed") in capsys.readouterr().out
