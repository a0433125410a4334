import dataclasses
import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from fused_resnet.training import CheckpointError, Recipe, Trainer, TrainingDiverged, extras, named

TIMES = ("images_per_second", "seconds")


def curve(trainer):
    return [{k: v for k, v in dataclasses.asdict(row).items() if k not in TIMES} for row in trainer.history]


class Break(Exception):
    """Stands in for the end of a process."""


def break_after(trainer, steps):
    """Let the trainer take so many steps more, and no further one."""
    step, taken = trainer.step, []

    def breaking(images, labels):
        if len(taken) == steps:
            raise Break
        taken.append(step(images, labels))
        return taken[-1]

    trainer.step = breaking


VARIANTS = {
    "fused-fp32": {},
    "fused-bf16": {"precision": "bf16"},
    "fused-fp16": {"precision": "fp16"},
    "stock": {"fuse": False},
    "steps": {"schedule": "steps", "warmup": 0.1},
    "cosine": {"schedule": "cosine", "warmup": 0.1},
    "accumulated": {"accumulate": 2, "epochs": None, "iterations": 7},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_run_has_the_curve_of_an_unbroken_one(tiny_recipe, tmp_path, variant):
    recipe = dataclasses.replace(tiny_recipe, **{"epochs": 2, **VARIANTS[variant]}, checkpoint_minutes=1e-9)
    unbroken = Trainer.start(recipe, tmp_path / "unbroken")
    unbroken.run()

    broken = Trainer.start(recipe, tmp_path / "broken")
    break_after(broken, 4 + 2)  # in the second epoch
    with pytest.raises(Break):
        broken.run()
    torch.manual_seed(1234)
    resumed = Trainer.resume(tmp_path / "broken")
    assert (len(resumed.history), resumed.progress.steps) == (1, 2)
    resumed.run()

    assert curve(resumed) == curve(unbroken)
    for name, tensor in unbroken.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


def test_a_run_broken_before_its_first_checkpoint_is_resumed_from_the_start(tiny_recipe, tmp_path):
    recipe = dataclasses.replace(tiny_recipe, epochs=1)
    unbroken = Trainer.start(recipe, tmp_path / "unbroken")
    unbroken.run()
    broken = Trainer.start(recipe, tmp_path / "broken")
    break_after(broken, 3)
    with pytest.raises(Break):
        broken.run()
    resumed = Trainer.resume(tmp_path / "broken")
    assert resumed.iteration == 0
    resumed.run()
    assert curve(resumed) == curve(unbroken)


KILLED_IN_ITS_FIFTH_STEP = """
import json, os, pathlib, signal, sys
from fused_resnet.training import Trainer, named
trainer = Trainer.start(named(**json.loads(sys.argv[1])), pathlib.Path(sys.argv[2]))
step = trainer.step
trainer.step = lambda *batch: os.kill(os.getpid(), signal.SIGKILL) if trainer.iteration == 4 else step(*batch)
trainer.run()
"""


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_killed_within_an_epoch_ends_with_the_weights_of_an_unbroken_one(picture_folder, tmp_path, precision):
    recipe = {
        "data": "folder",
        "data_dir": str(picture_folder),
        "model": "resnet20",
        "image_size": 32,
        "batch_size": 8,
        "epochs": 2,  # of three steps
        "workers": 0,
        "precision": precision,
        "checkpoint_minutes": 1e-9,
    }
    unbroken = Trainer.start(named(**recipe), tmp_path / "unbroken")
    unbroken.run()
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_IN_ITS_FIFTH_STEP, json.dumps(recipe), tmp_path / "killed"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        timeout=120,
    )
    assert killed.returncode == -signal.SIGKILL
    resumed = Trainer.resume(tmp_path / "killed", workers=2)  # who decodes the images makes no difference
    assert (len(resumed.history), resumed.progress.steps) == (1, 1)
    resumed.run()
    assert curve(resumed) == curve(unbroken)
    for name, tensor in unbroken.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


def test_pictures_in_folders_are_learned(picture_folder, tmp_path):
    recipe = named(data="folder", data_dir=str(picture_folder), model="resnet20", image_size=32, batch_size=8, epochs=4)
    trainer = Trainer.start(dataclasses.replace(recipe, workers=0), tmp_path)
    trainer.run()
    assert trainer.history[-1].train_error < 0.1


def test_three_epochs_learn_the_digits(tmp_path):
    trainer = Trainer.start(Recipe(epochs=3), tmp_path)
    trainer.run()
    assert trainer.history[0].train_error > 0.5
    assert trainer.history[-1].train_error < 0.1
    assert trainer.history[-1].test_error < 0.1


def test_stock_and_fused_checkpoints_hold_the_same_keys(tiny_recipe, tmp_path):
    fused = Trainer.start(tiny_recipe, tmp_path / "fused")
    stock = Trainer.start(dataclasses.replace(tiny_recipe, fuse=False), tmp_path / "stock")
    assert list(fused.model.state_dict()) == list(stock.model.state_dict())
    for name, tensor in stock.model.state_dict().items():
        assert torch.equal(fused.model.state_dict()[name], tensor), name


def test_a_run_may_end_within_an_epoch(tiny_recipe, tmp_path):
    trainer = Trainer.start(dataclasses.replace(tiny_recipe, epochs=None, iterations=6), tmp_path)
    trainer.run()
    assert [row.iteration for row in trainer.history] == [4, 6]
    assert trainer.iteration == trainer.scheduler.last_epoch == 6


def test_a_run_on_noise_takes_its_steps(tmp_path):
    recipe = named(data="synthetic", model="resnet20", image_size=32, batch_size=4, iterations=2)
    trainer = Trainer.start(recipe, tmp_path)
    trainer.run()
    assert trainer.history[-1].test_error > 0.9


def test_a_diverged_run_stops_and_keeps_the_last_good_epoch(tiny_recipe, tmp_path):
    trainer = Trainer.start(dataclasses.replace(tiny_recipe, lr=1e30), tmp_path)
    with pytest.raises(TrainingDiverged, match=r"training loss of epoch \d is (nan|inf): take a lower lr"):
        trainer.run()
    assert all(torch.isfinite(tensor).all() for tensor in Trainer.resume(tmp_path).model.state_dict().values())


def test_a_run_that_diverges_within_an_epoch_keeps_its_last_good_checkpoint(tiny_recipe, tmp_path):
    trainer = Trainer.start(dataclasses.replace(tiny_recipe, lr=1e30, checkpoint_minutes=1e-9), tmp_path)
    with pytest.raises(TrainingDiverged):
        trainer.run()
    assert torch.isfinite(Trainer.resume(tmp_path).progress.totals).all()


def test_a_cuda_graph_needs_a_gpu(tiny_recipe, tmp_path):
    with pytest.raises(ValueError, match="cuda_graph must be off: the device is cpu; got True"):
        Trainer.start(dataclasses.replace(tiny_recipe, device="cpu", cuda_graph=True), tmp_path)


def test_a_model_that_cannot_take_the_images_is_refused(tiny_recipe, tmp_path):
    with pytest.raises(ValueError, match="model torchvision:resnet18 cannot be made with in_channels=1"):
        Trainer.start(dataclasses.replace(tiny_recipe, model="torchvision:resnet18"), tmp_path)


def test_a_batch_larger_than_the_data_is_refused(tiny_recipe, tmp_path):
    with pytest.raises(ValueError, match="batch_size must be at most 70, the training images; got 71"):
        Trainer.start(dataclasses.replace(tiny_recipe, batch_size=71), tmp_path)


def test_a_checkpoint_whose_weights_do_not_fit_is_refused(tiny_recipe, tmp_path):
    trainer = Trainer.start(tiny_recipe, tmp_path)
    state = trainer.state_dict()
    state["model"] = dict(list(state["model"].items())[1:])
    trainer.folder.write_checkpoint(state)
    with pytest.raises(CheckpointError, match=r"does not fit its own recipe.*conv1\.weight"):
        Trainer.resume(tmp_path)


def test_a_resumed_run_goes_on_with_the_same_random_numbers(tiny_recipe, tmp_path):
    Trainer.start(tiny_recipe, tmp_path)
    expected = torch.rand(3)
    torch.manual_seed(1234)
    Trainer.resume(tmp_path)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("data", "module", "message"),
    [
        ("digits", "sklearn", r"data digits needs scikit-learn, .* pip install 'fused_resnet\[train\]'"),
        ("folder", "torchvision", r"data folder needs torchvision, .* pip install 'fused_resnet\[vision\]'"),
    ],
)
def test_a_missing_extra_is_named_with_the_mend(tmp_path, monkeypatch, data, module, message):
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == module else object())
    with pytest.raises(ModuleNotFoundError, match=message):
        Trainer.start(named(data=data), tmp_path)
