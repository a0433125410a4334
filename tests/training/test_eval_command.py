"""``fused-resnet eval`` as a user meets it."""

import json
import re

import pytest
import torch

from fused_resnet import cli, models
from fused_resnet.training import Trainer, named


def evaluate(*arguments):
    return cli.main(["eval", *map(str, arguments)])


@pytest.fixture
def run(tiny_recipe, tmp_path):
    trainer = Trainer.start(tiny_recipe, tmp_path / "run")
    trainer.run()
    return trainer


def result(capsys, *arguments):
    assert evaluate(*arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_a_runs_error_is_that_of_its_last_epoch(run, capsys):
    path = run.folder.path
    capsys.readouterr()
    of_folder = result(capsys, path)
    assert of_folder["top1"] == run.history[-1].test_error
    assert of_folder["loss"] == pytest.approx(run.history[-1].test_loss, rel=1e-5)
    assert (of_folder["model"], of_folder["data"], of_folder["images"]) == ("resnet20", "digits", 20)
    assert result(capsys, run.folder.checkpoint) == of_folder
    stock = result(capsys, path, "--stock", "--batch-size", 7)
    assert stock["top1"] == of_folder["top1"]
    assert stock["loss"] == pytest.approx(of_folder["loss"], rel=1e-5)


def test_ten_crops_are_the_mean_of_ten_views(run, tiny_digits, capsys):
    capsys.readouterr()
    found = result(capsys, run.folder.path, "--crops", 10)
    ((views, labels),) = tiny_digits.test_batches(20, crops=10)
    with torch.no_grad():
        run.model.eval()
        probabilities = torch.stack([run.model(views[:, view]).softmax(1) for view in range(10)]).mean(0)
    assert found["top1"] == pytest.approx((probabilities.argmax(1) != labels).double().mean().item())
    assert found["loss"] == pytest.approx(-probabilities[range(20), labels].log().mean().item(), rel=1e-4)


@pytest.mark.parametrize("form", ["bare", "model", "state_dict", "module.", "_orig_mod."])
def test_weights_may_be_kept_as_training_scripts_do(picture_folder, tmp_path, capsys, form):
    model = models.create("resnet20", num_classes=2)
    state = model.state_dict()
    wrapped = {
        "bare": state,
        "model": {"model": state, "epoch": 3},
        "state_dict": {"state_dict": state},
        "module.": {f"module.{name}": tensor for name, tensor in state.items()},
        "_orig_mod.": {"model": {f"_orig_mod.{name}": tensor for name, tensor in state.items()}},
    }
    torch.save(wrapped[form], tmp_path / "weights.pth")
    line = ["--model", "resnet20", "--data", "folder", "--data-dir", picture_folder, "--image-size", 32, "--workers", 0]
    found = result(capsys, tmp_path / "weights.pth", *line)
    assert (found["images"], found["top5"]) == (10, 0)
    assert found["top1"] in (0.4, 0.5, 0.6)


def test_a_run_on_pictures_is_evaluated_with_its_own_folder_and_size(picture_folder, tmp_path, capsys):
    recipe = named(
        data="folder",
        data_dir=str(picture_folder),
        model="resnet20",
        image_size=32,
        batch_size=8,
        epochs=4,
        workers=0,
    )
    trainer = Trainer.start(recipe, tmp_path / "run")
    trainer.run()
    capsys.readouterr()
    assert result(capsys, tmp_path / "run", "--workers", 0)["top1"] == trainer.history[-1].test_error
    assert result(capsys, tmp_path / "run", "--workers", 0, "--crops", 10)["top1"] <= 0.2


def test_published_errors_are_shown_beside(picture_folder, tmp_path, capsys):
    torch.save(models.create("resnet50", num_classes=2).state_dict(), tmp_path / "weights.pth")
    line = [tmp_path / "weights.pth", "--model", "resnet50", "--data", "imagenet", "--data-dir", picture_folder]
    assert evaluate(*line, "--image-size", 32, "--workers", 0) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("resnet50 on imagenet: 10 images, 1 crop, fp32, ")
    assert re.match(r"  top-1 error +\d+\.\d\d%   top-5 error +0\.00%   loss ", out[1])
    assert out[2].split() == ["published", "24.70%", "7.80%", "the", "authors'", "release"]


def test_weights_by_name_are_the_models_own(picture_folder, monkeypatch, capsys):
    create, asked = models.create, []

    def recording(name, **options):
        asked.append((name, options))
        return create("resnet20", num_classes=options["num_classes"])

    monkeypatch.setattr(models, "create", recording)
    line = ["--model", "torchvision:resnet18", "--weights", "IMAGENET1K_V1", "--data", "folder", "--workers", 0]
    assert evaluate(*line, "--data-dir", picture_folder, "--image-size", 32) == 0
    assert asked == [("torchvision:resnet18", {"num_classes": 2, "weights": "IMAGENET1K_V1"})]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing to evaluate: name a run folder or a checkpoint, or --model with --weights"),
        (("nowhere",), "no checkpoint to evaluate: nowhere does not exist"),
        (("text.pth",), "text.pth is damaged or no checkpoint"),
        (("weights.pth",), "--model must be the name of the network that these weights are for; got none"),
        (("weights.pth", "--model", "resnet20"), "--data must be one of digits, digits8x8, cifar10"),
        (("weights.pth", "--model", "resnet19", "--data", "digits"), "model must be one of"),
        (("weights.pth", "--model", "resnet20", "--data", "digits"), "weights weights.pth do not fit this resnet20"),
        (("list.pth", "--model", "resnet20", "--data", "digits"), "weights list.pth must be a state_dict"),
        (("weights.pth", "--weights", "DEFAULT"), "--weights DEFAULT and weights.pth are both weights"),
        (("weights.pth", "--batch-size", "0"), "--batch-size must be at least 1; got 0"),
        (
            ("--model", "torchvision:resnet18", "--weights", "V9", "--data", "synthetic"),
            "model torchvision:resnet18 cannot be made with weights='V9'",
        ),
        (("weights.pth", "--model", "resnet20", "--data", "imagenet"), "data imagenet was looked for in data/imagenet"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input_is_answered_in_one_line(tiny_digits, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.pth").write_text("no weights")
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "weights.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    assert evaluate(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("fused-resnet eval: error: ")
    assert message in error
    assert error.count("\n") == 1
