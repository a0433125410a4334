"""``fused-resnet train`` as a user meets it."""

import csv
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys

import pytest

from fused_resnet import cli
from fused_resnet.training import Recipe, RunFolder, Trainer

BRIEF = ("--epochs", "2", "--batch-size", "16")


def train(*arguments):
    return cli.main(["train", *map(str, arguments)])


def test_every_field_of_the_recipe_is_an_option_and_its_default_is_shown(capsys):
    with pytest.raises(SystemExit) as exit_:
        train("--help")
    assert exit_.value.code == 0
    help_ = " ".join(capsys.readouterr().out.split())
    switches = {"fuse": "--stock", "channels_last": "--contiguous"}
    for field in dataclasses.fields(Recipe):
        assert switches.get(field.name, "--" + field.name.replace("_", "-")) in help_
        if field.name not in (*switches, "threads"):
            assert f"(default: {field.default})" in help_
    assert "fused-resnet train --resume" in help_


def test_a_run_leaves_its_files_and_says_where(tiny_digits, tmp_path, capsys):
    folder = RunFolder(tmp_path / "new" / "run")
    assert train("--out", folder.path, *BRIEF) == 0

    assert {path.name for path in folder.path.iterdir()} == {
        "checkpoint.pt",
        "config.json",
        "curves.png",
        "metrics.csv",
    }
    rows = list(csv.DictReader(folder.metrics.read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert all(0 <= float(row["test_error"]) <= 1 and float(row["images_per_second"]) > 0 for row in rows)
    config = json.loads(folder.config.read_text())
    assert config["recipe"] == dataclasses.asdict(Recipe(epochs=2, batch_size=16))
    assert folder.curves.read_bytes().startswith(b"\x89PNG")
    assert [row.epoch for row in Trainer.resume(folder.path).history] == [1, 2]

    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4  # no progress bar where the output is not a terminal
    assert lines[-1].startswith(f"test error {float(rows[-1]['test_error']):.2%} after 2 epochs;")
    assert str(folder.path) in lines[-1]


def test_a_terminal_gets_a_progress_bar(tiny_digits, tmp_path, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", terminal)
    assert train("--out", tmp_path / "run", *BRIEF) == 0
    for shown in ("epoch   1/2", "loss ", "error ", " images/s"):
        assert shown in terminal.getvalue()


def test_a_finished_run_resumes_to_its_last_line(tiny_digits, tmp_path, capsys):
    train("--out", tmp_path / "run", *BRIEF)
    last = capsys.readouterr().out.splitlines()[-1]
    assert train("--resume", tmp_path / "run") == 0
    assert capsys.readouterr().out.splitlines()[-1] == last


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "resnet19"), "model must be one of resnet18, "),
        (("--data", "imagenet"), "data must be one of digits; got 'imagenet'"),
        (("--precision", "fp8"), "precision must be one of fp32, bf16; got 'fp8'"),
        (("--epochs", "0"), "epochs must be at least 1; got 0"),
        (("--device", "cuda:99"), "device 'cuda:99' is not there"),
        (("--engine", "warp"), "engine must be one of"),
        (("--out", "file/run"), "cannot write the run folder file/run: Not a directory"),
        (("--out", "run"), "run already holds a run: continue it with --resume run"),
        (("--resume", "nowhere"), "no run to resume in nowhere"),
        (("--resume", "broken"), "damaged or no checkpoint"),
        (("--resume", "run", "--lr", "1"), "--resume keeps the run's own recipe: leave out lr"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input_is_answered_in_one_line(tiny_digits, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    for name in ("run", "broken"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "checkpoint.pt").write_text("anything")
    assert train(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("fused-resnet train: error: ")
    assert message in error


def test_a_diverged_run_fails_in_one_line(tiny_digits, tmp_path, capsys):
    assert train("--out", tmp_path / "run", *BRIEF, "--lr", "1e30") == 1
    assert capsys.readouterr().err.startswith("fused-resnet train: error: the training loss of epoch")


@pytest.fixture
def running(tmp_path):
    """Yield a training process whose first epoch has just ended, and its folder."""
    command = [sys.executable, "-m", "fused_resnet", "train", "--epochs", "50", "--out", tmp_path / "run"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    for line in process.stdout:
        if line.startswith("epoch   1/50"):
            break
    yield process, RunFolder(tmp_path / "run")
    process.kill()
    process.communicate()


def test_ctrl_c_ends_a_run_cleanly_and_says_how_to_go_on(running):
    process, folder = running
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    resume = f"fused-resnet train --resume {folder.path}"
    assert process.returncode == 130
    assert err == ""
    assert out.splitlines()[-1] == (f"interrupted; {folder.checkpoint} holds 1 of 50 epochs; continue with: {resume}")
    assert len(Trainer.resume(folder.path).history) == 1


def test_a_killed_run_leaves_a_whole_checkpoint(running):
    process, folder = running
    process.kill()
    process.wait(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert len(Trainer.resume(folder.path).history) == 1
