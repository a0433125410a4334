"""``fused-resnet experiment`` as a user meets it, and what it makes of its runs' metrics."""

import csv

import pytest
import torch

from fused_resnet import cli
from fused_resnet.experiments import Network, Panel, Result, degradation, shortcuts
from fused_resnet.experiments.table import comparisons, table
from fused_resnet.training import EpochMetrics, Trainer, data

BRIEF = ("--data", "digits", "--epochs", "2", "--seeds", "1", "--threads", "1")


def experiment(*arguments):
    return cli.main(["experiment", *map(str, arguments)])


def test_an_experiment_leaves_rows_and_a_figure_and_prints_a_table(tiny_digits, tmp_path, capsys):
    assert experiment("degradation", "--depths", 32, 20, *BRIEF, "--out", tmp_path) == 0

    networks = ["plain-20", "plain-32", "ResNet-20", "ResNet-32"]
    rows = list(csv.DictReader((tmp_path / "degradation.csv").read_text().splitlines()))
    assert [(row["network"], row["seed"], row["epoch"]) for row in rows] == [
        (network, "0", epoch) for network in networks for epoch in ("1", "2")
    ]
    assert all(0 <= float(row["train_error"]) <= 1 and 0 <= float(row["test_error"]) <= 1 for row in rows)
    assert (tmp_path / "degradation.png").read_bytes().startswith(b"\x89PNG")

    lines = capsys.readouterr().out.splitlines()
    errors = {row["network"]: 100 * float(row["train_error"]) for row in rows}  # the last epoch's
    for network, line in zip(networks, lines[6:10], strict=True):
        assert line.startswith(f"| {network} ")
        assert f" {errors[network]:.2f} ({errors[network]:.2f} to {errors[network]:.2f}) " in line
    assert lines[10].startswith("plain-32 ends with a higher training error than plain-20 in ")
    assert lines[-1] == f"{tmp_path / 'degradation.png'} and {tmp_path / 'degradation.csv'}"


def test_each_network_of_an_experiment_is_what_its_label_says(tiny_digits, tmp_path):
    recipes = {
        f"{network.label}-{trainer.recipe.seed}": trainer.recipe
        for network, trainer in shortcuts(20, "digits", seeds=2, epochs=1, fuse=False).trainers(tmp_path)
    }
    assert [name[:-2] for name in recipes] == ["none", "A", "B", "C"] * 2
    assert all(recipe.model == "resnet20" and recipe.shortcut == name[:-2] for name, recipe in recipes.items())
    assert all(
        recipe.seed == int(name[-1]) and recipe.epochs == 1 and not recipe.fuse for name, recipe in recipes.items()
    )

    plain, residual = degradation([56, 20], "digits", seeds=1).panels
    assert plain.networks == [Network("plain-20", "plain20"), Network("plain-56", "plain56")]
    assert residual.networks == [Network("ResNet-20", "resnet20", "A"), Network("ResNet-56", "resnet56", "A")]


def test_the_recipe_is_the_papers_and_shorter_on_digits():
    digits, cifar = (degradation([20, 56], name, seeds=1).recipe for name in ("digits8x8", "cifar10"))
    for recipe in (digits, cifar):
        assert (recipe.schedule, recipe.momentum, recipe.nesterov, recipe.weight_decay) == ("steps", 0.9, False, 1e-4)
        assert recipe.milestones == (0.5, 0.75)
    assert (cifar.iterations, cifar.batch_size, cifar.lr) == (64_000, 128, 0.1)
    assert not digits.flip  # a mirrored 3 is none
    assert cifar.warmup is None
    assert degradation([20, 110], "cifar10", seeds=1).recipe.warmup == 400 / 64_000  # all begin as the deepest has to


def test_the_small_digits_are_the_images_as_they_are_bundled():
    from sklearn.datasets import load_digits

    device = torch.device("cpu")
    small, enlarged = data.load("digits8x8", device=device), data.load("digits", device=device)
    assert small.train_images.shape[2:] == (8, 8)
    assert torch.equal(small.test_labels, enlarged.test_labels)
    bundled = {image.tobytes() for image in load_digits().images.astype("float32")}
    assert {image.numpy().tobytes() for image in small.test_images} <= bundled


def test_a_broken_experiment_continues_to_the_rows_of_an_unbroken_one(tiny_digits, tmp_path, monkeypatch, capsys):
    options = ("shortcuts", "--depth", 20, *BRIEF, "--out")
    assert experiment(*options, tmp_path / "unbroken") == 0

    run_epoch, epochs = Trainer.run_epoch, []

    def interrupted(trainer, epoch):
        epochs.append(epoch)
        if len(epochs) == 4:  # the second network's second
            raise KeyboardInterrupt
        return run_epoch(trainer, epoch)

    monkeypatch.setattr(Trainer, "run_epoch", interrupted)
    assert experiment(*options, tmp_path / "broken") == 130
    assert "the same command continues it" in capsys.readouterr().out
    assert not (tmp_path / "broken" / "shortcuts.csv").exists()

    assert experiment(*options, tmp_path / "broken") == 0
    assert epochs == [1, 2, 1, 2, 2, 1, 2, 1, 2]
    rows, figure = (tmp_path / "broken" / f"shortcuts.{suffix}" for suffix in ("csv", "png"))
    assert rows.read_text() == (tmp_path / "unbroken" / "shortcuts.csv").read_text()
    assert figure.read_bytes() == (tmp_path / "unbroken" / "shortcuts.png").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("degradation", "--depths", "20"), "depths must be two or more of 18, 20, 32, 34, 44, 56, 110; got [20]"),
        (
            ("degradation", "--depths", "20", "21"),
            "depths must be two or more of 18, 20, 32, 34, 44, 56, 110; got [20, 21]",
        ),
        (("shortcuts", "--depth", "57"), "depth must be one of 18, 20, 32, 34, "),
        (("shortcuts", "--seeds", "0"), "seeds must be at least 1; got 0"),
        (("shortcuts", "--epochs", "0"), "epochs must be at least 1; got 0"),
        (("shortcuts", "--data", "cats"), "data must be one of digits, "),
        (("shortcuts", "--data", "digits", "--out", "file/runs"), "cannot write the run folder file/runs/none-seed-0"),
        (
            ("shortcuts", "--depth", "20", "--data", "digits", "--out", "other", "--lr", "0.5"),
            "none-seed-0 holds a run with lr 0.25, not 0.5: take the same",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input_is_answered_in_one_line(tiny_digits, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    next(shortcuts(20, "digits", seeds=1, lr=0.25).trainers(tmp_path / "other"))
    assert experiment(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("fused-resnet experiment: error: ")
    assert message in error
    assert error.count("\n") == 1


def test_a_diverged_run_ends_the_experiment_and_says_where_the_others_are(tiny_digits, tmp_path, capsys):
    assert experiment("shortcuts", "--depth", 20, *BRIEF, "--lr", "1e30", "--out", tmp_path) == 1
    error = capsys.readouterr().err
    assert error.startswith("fused-resnet experiment: error: the training loss of epoch ")
    assert error.endswith(f"what was trained is in {tmp_path}\n")


def result(network, seed, *errors):
    """Stand in for a run: training and test error after each epoch."""
    return Result(
        network,
        seed,
        [
            EpochMetrics(
                epoch=epoch,
                iteration=22 * epoch,
                lr=0.1,
                train_loss=0,
                train_error=train_error,
                test_loss=0,
                test_error=test_error,
                images_per_second=1,
                seconds=1,
            )
            for epoch, (train_error, test_error) in enumerate(errors, start=1)
        ],
    )


def test_the_table_has_the_mean_and_the_spread_over_seeds():
    shallow, deep = Network("plain-20", "plain20"), Network("plain-56", "plain56")
    panels = [Panel("plain", [shallow, deep])]
    results = [
        result(shallow, 0, (0.5, 0.04), (0.1, 0.05)),
        result(deep, 0, (0.9, 0.9), (0.3, 0.4)),
        result(shallow, 1, (0.5, 0.9), (0.2, 0.07)),
        result(deep, 1, (0.9, 0.9), (0.2, 0.1)),
    ]
    head, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table(panels, results).splitlines()]
    assert head == ["network", "runs", "training error, %", "test error, %", "best test error, %"]
    assert rows == [
        ["plain-20", "2", "15.00 (10.00 to 20.00)", "6.00 (5.00 to 7.00)", "5.50 (4.00 to 7.00)"],
        ["plain-56", "2", "25.00 (20.00 to 30.00)", "25.00 (10.00 to 40.00)", "25.00 (10.00 to 40.00)"],
    ]
    assert comparisons(panels, results) == ["plain-56 ends with a higher training error than plain-20 in 1 of 2 seeds"]
