"""Training by processes that torchrun starts, with gloo on the CPU."""

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

from fused_resnet.cli import build_parser
from fused_resnet.training import Recipe, RunFolder, Trainer, data, evaluate, named
from fused_resnet.training.command import make_trainer
from fused_resnet.training.distributed import RankFailed, World

# three steps an epoch; each rank's part of a batch is computed in two, of which DDP adds up the gradients once
RECIPE = {
    "data": "folder",
    "model": "resnet20",
    "image_size": 32,
    "batch_size": 8,
    "accumulate": 2,
    "epochs": 2,
    "lr": 0.01,
    "workers": 0,
}

SABOTAGED = """
import os, signal, sys
from fused_resnet import cli
from fused_resnet.training import Trainer

rank, restarts = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
sabotage, arguments = sys.argv[1], sys.argv[2:]
run = Trainer.run

def run_until_the_fifth_step(trainer):
    step = trainer.step
    def killing(*batch):
        if trainer.iteration == 4:
            print("kill", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return step(*batch)
    trainer.step = killing
    run(trainer)

if rank == 1 and restarts == 0:
    if sabotage == "kill":
        Trainer.run = run_until_the_fifth_step
    elif sabotage == "move-data":
        arguments[arguments.index("--data-dir") + 1] = "nowhere"
sys.exit(cli.main(arguments))
"""


class Launch:
    """What torchrun printed, and how it ended."""

    LIMIT = 180  # seconds: nothing may hang

    def __init__(self, ranks, script, arguments, *, torchrun=(), interrupt_at=None, **environment):
        command = ["torch.distributed.run", "--standalone", "--nproc-per-node", ranks, *torchrun, *script, *arguments]
        self.lines = []  # of the ranks' stdout, with the time of each
        with subprocess.Popen(
            [sys.executable, "-m", *map(str, command)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        ) as process:
            alarm = threading.Timer(self.LIMIT, process.terminate)
            alarm.start()
            for line in process.stdout:
                self.lines.append((line.rstrip("\n"), time.monotonic()))
                if interrupt_at is not None and line.startswith(interrupt_at):
                    process.send_signal(signal.SIGINT)
            self.err = process.stderr.read()
        alarm.cancel()
        self.status, self.end = process.returncode, time.monotonic()

    @property
    def out(self):
        return [line for line, _ in self.lines]

    @property
    def errors(self):
        return [line for line in self.err.splitlines() if line.startswith("fused-resnet train: error: ")]


@pytest.fixture(scope="module")
def train(picture_folder, tmp_path_factory):
    """Return a function that trains by torchrun, perhaps sabotaged, and waits for the end."""
    script = tmp_path_factory.mktemp("script") / "sabotaged.py"
    script.write_text(SABOTAGED)
    data = {"data_dir": picture_folder, **RECIPE}

    def launch(ranks, *arguments, sabotage=None, recipe=data, **how):
        options = [word for name, value in recipe.items() for word in ("--" + name.replace("_", "-"), value)]
        program = ["-m", "fused_resnet"] if sabotage is None else [script, sabotage]
        return Launch(ranks, program, ["train", *options, *arguments], **how)

    return launch


@pytest.fixture(scope="module")
def by_two(train, tmp_path_factory):
    """Return a finished run of two ranks."""
    folder = RunFolder(tmp_path_factory.mktemp("runs") / "by-two")
    launch = train(2, "--out", folder.path)
    assert launch.status == 0, launch.err
    return launch, folder


def alone(picture_folder, path, **changes):
    """Return a finished run of this process."""
    trainer = Trainer.start(named(**{**RECIPE, "data_dir": str(picture_folder), **changes}), path)
    trainer.run()
    return trainer


def curve(folder):
    rows = csv.DictReader(folder.metrics.read_text().splitlines())
    return [
        {name: value for name, value in row.items() if name not in ("images_per_second", "seconds")} for row in rows
    ]


def test_two_ranks_take_the_steps_of_one_process(by_two, picture_folder, tmp_path):
    _, folder = by_two
    single = alone(picture_folder, tmp_path, accumulate=4)  # the same parts, one after the other
    shared = Trainer.resume(folder.path)
    for name, weight in single.model.named_parameters():
        torch.testing.assert_close(shared.model.get_parameter(name), weight, rtol=1e-4, atol=1e-5, msg=name)
    for theirs, ours in zip(single.history, shared.history, strict=True):
        assert (ours.iteration, ours.train_error) == (theirs.iteration, theirs.train_error)
        assert ours.train_loss == pytest.approx(theirs.train_loss, rel=1e-5)


def test_the_ranks_test_the_checkpoint_on_all_images(by_two):
    _, folder = by_two
    shared = Trainer.resume(folder.path)
    shared.model.eval()
    whole = evaluate(shared.forward, shared.data.test_batches(4, crops=1))
    assert shared.history[-1].test_loss == pytest.approx(whole.loss, rel=1e-5)
    assert shared.history[-1].test_error == whole.top1


def test_rank_0_alone_prints_and_writes(by_two):
    launch, folder = by_two
    first, *epochs, last = launch.out
    assert first.endswith(f"on cpu, 2 ranks; run folder {folder.path}")
    assert [line[:11] for line in epochs] == ["epoch   1/2", "epoch   2/2"]
    assert all(" images/s, " in line and line.endswith(" a rank") for line in epochs)
    assert last.startswith("test error")
    assert launch.err == ""
    assert {path.name for path in folder.path.iterdir()} == {
        "checkpoint.pt",
        "config.json",
        "curves.png",
        "metrics.csv",
    }
    assert json.loads(folder.config.read_text())["environment"]["ranks"] == 2
    assert not any(name.startswith("module.") for name in folder.read_checkpoint()["model"])


def test_restarted_ranks_go_on_to_the_weights_of_an_unbroken_run(train, by_two, tmp_path):
    _, unbroken = by_two
    folder = RunFolder(tmp_path / "run")
    launch = train(
        2,
        *("--checkpoint-minutes", 1e-9, "--out", folder.path),
        sabotage="kill",
        torchrun=("--max-restarts", 1),
        TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
    )
    assert launch.status == 0, launch.err
    assert "kill" in launch.out
    assert curve(folder) == curve(unbroken)
    ended, expected = folder.read_checkpoint()["model"], unbroken.read_checkpoint()["model"]
    for name, tensor in expected.items():
        assert torch.equal(ended[name], tensor), name


def test_without_one_of_four_the_others_end_and_two_go_on(train, tmp_path):
    folder = RunFolder(tmp_path / "run")
    launch = train(4, "--accumulate", 1, "--checkpoint-minutes", 1e-9, "--out", folder.path, sabotage="kill")
    killed = next(when for line, when in launch.lines if line == "kill")
    assert launch.status == 1
    assert launch.end - killed < 60
    assert "Signal 9 (SIGKILL)" in launch.err  # torchrun says whose end it was
    assert all("lost another of the 4 ranks" in line for line in launch.errors)  # of those that saw it first

    before = Trainer.resume(folder.path)
    assert before.iteration in (3, 4)
    resumed = train(2, "--resume", folder.path, recipe={})
    assert resumed.status == 0, resumed.err
    assert Trainer.resume(folder.path).iteration == 6
    assert "on cpu, 2 ranks" in resumed.out[0]


def test_ctrl_c_ends_all_ranks_and_one_says_how_to_go_on(train, tmp_path):
    folder = RunFolder(tmp_path / "run")
    launch = train(2, "--epochs", 5000, "--out", folder.path, interrupt_at="epoch   1/")
    (last,) = [line for line in launch.out if "interrupted" in line]
    assert last.endswith(f"; continue with: torchrun ... -m fused_resnet train --resume {folder.path}")
    assert launch.errors == []
    assert launch.end - next(when for line, when in launch.lines if line.startswith("epoch   1/")) < 60
    assert Trainer.resume(folder.path).history


def test_what_one_rank_lacks_ends_all(train, tmp_path):
    launch = train(2, "--out", tmp_path / "run", sabotage="move-data")
    assert launch.status == 1
    assert launch.out == []
    (error,) = launch.errors
    assert "error: rank 1: data folder was looked for in nowhere/" in error
    assert "exitcode  : 2" in launch.err
    assert not (tmp_path / "run").exists()


def test_a_loss_that_diverges_ends_all(train, tmp_path):
    launch = train(2, "--lr", 1e30, "--out", tmp_path / "run")
    assert launch.status == 1
    (error,) = launch.errors
    assert "the training loss of epoch 1 is nan" in error


def test_with_synchronised_batch_norm_two_ranks_are_one_process_with_the_whole_batch(train, picture_folder, tmp_path):
    folder = RunFolder(tmp_path / "run")
    launch = train(2, "--accumulate", 1, "--sync-batch-norm", "--out", folder.path)
    assert launch.status == 0, launch.err
    single, shared = alone(picture_folder, tmp_path / "single", accumulate=1), folder.read_checkpoint()
    for name, tensor in single.model.state_dict().items():
        torch.testing.assert_close(shared["model"][name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_columns_and_shares_are_everything_once():
    batches = torch.arange(24).view(2, 12)
    worlds = [World(rank, 4) for rank in range(4)]
    assert torch.equal(torch.cat([world.columns(batches) for world in worlds], dim=1), batches)
    images = range(10)
    assert sorted(image for world in worlds for image in images[world.share]) == list(images)


@pytest.mark.parametrize("ranks", [3, 30])
def test_shares_of_the_test_images_add_up_to_the_evaluation_of_all(tiny_digits, ranks):
    def forward(images):
        return F.conv2d(images, torch.linspace(-1, 1, 10 * 16 * 16).view(10, 1, 16, 16)).flatten(1)

    parts = []
    for rank in range(ranks):  # some have none
        share = tiny_digits.test_batches(4, 1, World(rank, ranks).share)
        with pytest.raises(ZeroDivisionError) if rank >= 20 else nullcontext():
            evaluate(forward, share, total=lambda sums: parts.append(sums) or sums)
    whole = evaluate(forward, tiny_digits.test_batches(20, 1))
    loss, wrong, wrong_of_five, images = sum(parts).tolist()
    assert images == whole.images == 20
    assert (wrong / 20, wrong_of_five / 20) == (whole.top1, whole.top5)
    assert loss / 20 == pytest.approx(whole.loss)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 62}, r"batch_size must be 4 equal parts .*4 ranks, each of which takes 1 .*; got 62"),
        ({"accumulate": 32}, "batch_size must be 128 equal parts of at least 2 images"),
        ({"cuda_graph": True}, "cuda_graph must be off: there are 4 ranks"),
        ({"fuse": False, "sync_batch_norm": True}, "sync_batch_norm must be off: on the CPU only fused blocks have it"),
    ],
    ids=str,
)
def test_what_so_many_ranks_cannot_do_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        World(0, 4).check(dataclasses.replace(Recipe(), **changes), torch.device("cpu"))


def test_each_rank_has_a_gpu_of_its_own(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for name in ("auto", "cuda"):
        assert World(5, 8, 1, 2).device(name) == torch.device("cuda:1")
    assert taken == [torch.device("cuda:1")] * 2
    with pytest.raises(ValueError, match=r"nproc-per-node of torchrun must be at most 2, the GPUs .*; got 4"):
        World(5, 8, 1, 4).device("cuda")
    with pytest.raises(ValueError, match=r"device must be auto, cuda or cpu under torchrun.*; got 'cuda:0'"):
        World(5, 8, 1, 2).device("cuda:0")


def test_the_ranks_of_a_node_share_its_cores(picture_folder):
    def workers(**sharing):
        folders = data.Folders(
            "folder", picture_folder, image_size=32, workers=None, device=torch.device("cpu"), **sharing
        )
        return folders.workers

    cores = len(os.sched_getaffinity(0))
    assert workers() == min(cores, 16)
    assert workers(sharing=cores) == workers(sharing=8 * cores) == 1


def test_an_environment_that_is_not_torchruns_is_named(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="WORLD_SIZE is 2 but LOCAL_RANK, LOCAL_WORLD_SIZE are not set: start"):
        World.join(timeout=1)


def test_what_restarts_need_is_said_before_the_first(monkeypatch, tmp_path):
    place = dict.fromkeys(("RANK", "LOCAL_RANK"), "0") | dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), "2")
    for name, value in (place | {"TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_USE_AGENT_STORE": "True"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="--max-restarts needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        World.join(timeout=1)
    monkeypatch.setenv("WORLD_SIZE", "1")  # a process alone meets nobody
    assert World.join(timeout=1) == World(max_restarts=3)
    with pytest.raises(ValueError, match=r"out must be named where torchrun has --max-restarts.*; got None"):
        make_trainer(build_parser().parse_args(["train"]), World(max_restarts=3))


def test_what_may_restart_continues_its_own_run_alone(tiny_digits, tmp_path):
    def start(*arguments):
        return make_trainer(
            build_parser().parse_args(["train", "--out", str(tmp_path), *arguments]), World(max_restarts=3)
        )

    trainer = start("--epochs", "1", "--batch-size", "16")
    trainer.run()
    assert start("--epochs", "1", "--batch-size", "16", "--workers", "3").history == trainer.history
    with pytest.raises(FileExistsError, match="already holds a run of another recipe: choose another folder"):
        start("--epochs", "2", "--batch-size", "16")


def test_an_agreement_names_the_rank_that_fails(monkeypatch):
    monkeypatch.setattr(World, "gather", lambda self, message: [message, "no such data"])
    with pytest.raises(RankFailed, match="rank 1: no such data"), World(0, 2).agreement():
        pass
