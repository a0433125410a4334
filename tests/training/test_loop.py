import dataclasses

import pytest
import torch

from fused_resnet.training import CheckpointError, Recipe, Trainer, TrainingDiverged, extras

TIMES = ("images_per_second", "seconds")


def curve(trainer):
    return [{k: v for k, v in dataclasses.asdict(row).items() if k not in TIMES} for row in trainer.history]


def interrupt_in_epoch(trainer, epoch, monkeypatch):
    run_epoch = trainer.run_epoch

    def interrupted(number):
        row = run_epoch(number)  # its steps are taken, then lost
        if number == epoch:
            raise KeyboardInterrupt
        return row

    monkeypatch.setattr(trainer, "run_epoch", interrupted)


@pytest.mark.parametrize(
    ("fuse", "precision"), [(True, "fp32"), (True, "bf16"), (False, "fp32")], ids=["fused-fp32", "fused-bf16", "stock"]
)
def test_a_resumed_run_has_the_curve_of_an_unbroken_one(tiny_recipe, tmp_path, monkeypatch, fuse, precision):
    recipe = dataclasses.replace(tiny_recipe, fuse=fuse, precision=precision)
    unbroken = Trainer.start(recipe, tmp_path / "unbroken")
    unbroken.run()

    broken = Trainer.start(recipe, tmp_path / "broken")
    interrupt_in_epoch(broken, 3, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        broken.run()
    torch.manual_seed(1234)
    resumed = Trainer.resume(tmp_path / "broken")
    assert len(resumed.history) == 2
    resumed.run()

    assert curve(resumed) == curve(unbroken)
    for name, tensor in unbroken.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


def test_a_run_interrupted_in_its_first_epoch_is_resumed_from_the_start(tiny_recipe, tmp_path, monkeypatch):
    recipe = dataclasses.replace(tiny_recipe, epochs=1)
    unbroken = Trainer.start(recipe, tmp_path / "unbroken")
    unbroken.run()
    broken = Trainer.start(recipe, tmp_path / "broken")
    interrupt_in_epoch(broken, 1, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        broken.run()
    resumed = Trainer.resume(tmp_path / "broken")
    resumed.run()
    assert curve(resumed) == curve(unbroken)


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


def test_each_epoch_has_a_new_order_and_the_seed_decides_it(tiny_recipe, tmp_path):
    recipe = dataclasses.replace(tiny_recipe, max_shift=0)

    def labels(folder, recipe):
        trainer = Trainer.start(recipe, tmp_path / folder)
        return [torch.cat([labels for _, labels in trainer.batches()]).tolist() for _ in range(2)]

    first, second = labels("a", recipe)
    assert first != second
    assert labels("b", recipe) == [first, second]
    assert labels("c", dataclasses.replace(recipe, seed=1)) != [first, second]


def test_a_diverged_run_stops_and_keeps_the_last_good_epoch(tiny_recipe, tmp_path):
    trainer = Trainer.start(dataclasses.replace(tiny_recipe, lr=1e30), tmp_path)
    with pytest.raises(TrainingDiverged, match=r"training loss of epoch \d is (nan|inf): take a lower lr"):
        trainer.run()
    assert all(torch.isfinite(tensor).all() for tensor in Trainer.resume(tmp_path).model.state_dict().values())


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


def test_a_missing_extra_is_named_with_the_mend(tiny_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(extras, "find_spec", lambda module: None if module == "sklearn" else object())
    with pytest.raises(ModuleNotFoundError, match=r"needs scikit-learn, .* pip install 'fused_resnet\[train\]'"):
        Trainer.start(tiny_recipe, tmp_path)
