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
from fused_resnet.training import Recipe, RunFolder, Trainer, named

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
        if not (field.name in switches or field.default is None or field.default is False):
            shown = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
            assert f"(default: {shown})" in help_
    assert "fused-resnet train --resume" in help_


def test_options_are_the_fields_of_the_recipe(monkeypatch, tmp_path, capsys):
    asked = []

    def start(recipe, path, world):
        asked.append(recipe)
        raise ValueError("asked")

    monkeypatch.setattr(Trainer, "start", start)
    line = "--data cifar100 --data-dir there --epochs 9 --milestones 0.3 0.6 0.9 --nesterov --no-flip --memory lean"
    train(*line.split(), "--chain", "block", "--compile", "--workers", "3", "--accumulate", "4", "--out", tmp_path)
    expected = named(
        data="cifar100",
        data_dir="there",
        epochs=9,
        milestones=(0.3, 0.6, 0.9),
        nesterov=True,
        flip=False,
        memory="lean",
        chain="block",
        compile=True,
        workers=3,
        accumulate=4,
    )
    assert asked == [expected]


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
    recipe = dataclasses.asdict(Recipe(epochs=2, batch_size=16))
    assert config["recipe"] == {**recipe, "milestones": list(recipe["milestones"])}
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
    assert train("--resume", tmp_path / "run", "--workers", 0) == 0
    assert capsys.readouterr().out.splitlines()[-1] == last


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "resnet19"), "model must be one of resnet18, "),
        (
            ("--data", "mnist"),
            "data must be one of digits, digits8x8, cifar10, cifar100, imagenet, folder, synthetic; got 'mnist'",
        ),
        (("--data", "cifar10"), "data cifar10 was looked for in data/cifar10/cifar-10-batches-py and is not there"),
        (("--data", "imagenet"), "data imagenet was looked for in data/imagenet/"),
        (("--data", "digits", "--download"), "--download fetches cifar10 and cifar100; got data 'digits'"),
        (("--recipe", "mnist"), "recipe must be one of digits, cifar, imagenet; got 'mnist'"),
        (("--precision", "fp8"), "precision must be one of fp32, bf16, fp16; got 'fp8'"),
        (("--device", "cpu", "--cuda-graph"), "cuda_graph must be off: the device is cpu"),
        (("--memory", "small"), "memory must be 'fast' or 'lean'"),
        (("--epochs", "0"), "epochs must be at least 1; got 0"),
        (("--device", "cuda:99"), "device 'cuda:99' is not there"),
        (("--engine", "warp"), "engine must be one of"),
        (("--out", "file/run"), "cannot write the run folder file/run: Not a directory"),
        (("--out", "run"), "run already holds a run: continue it with --resume run"),
        (("--resume", "nowhere"), "no run to resume in nowhere"),
        (("--resume", "broken"), "damaged or no checkpoint"),
        (
            ("--resume", "run", "--lr", "1", "--batch-size", "8"),
            "keeps the run's own recipe: leave out --batch-size, --lr",
        ),
        (("--resume", "run", "--recipe", "cifar"), "keeps the run's own recipe: leave out --recipe"),
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
def running(picture_folder, tmp_path):
    """Yield a training process whose first epoch has just ended, and its folder."""
    folder = RunFolder(tmp_path / "run")
    data = ["--data", "folder", "--data-dir", picture_folder, "--image-size", "32", "--workers", "0"]
    run = ["--model", "resnet20", "--batch-size", "8", "--epochs", "5000", "--out", folder.path]
    process = subprocess.Popen(
        [sys.executable, "-m", "fused_resnet", "train", *data, *run],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    for line in process.stdout:
        if line.startswith("epoch   1/5000"):
            break
    yield process, folder
    process.kill()
    process.communicate()


def test_ctrl_c_ends_a_run_cleanly_and_says_how_to_go_on(running):
    process, folder = running
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == ""
    epochs = len(Trainer.resume(folder.path).history)
    resume = f"fused-resnet train --resume {folder.path}"
    assert out.splitlines()[-1] == f"interrupted; {folder.checkpoint} holds {epochs} epochs; continue with: {resume}"


def test_a_killed_run_leaves_a_whole_checkpoint(running):
    process, folder = running
    process.kill()
    assert process.wait(timeout=60) == -signal.SIGKILL
    assert Trainer.resume(folder.path).history
