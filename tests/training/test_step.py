"""One step of training."""

import dataclasses
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch.amp.grad_scaler import GradScaler

from fused_resnet.training import Recipe, Trainer
from fused_resnet.training.optimizer import make_optimizer
from fused_resnet.training.precision import Forward
from fused_resnet.training.step import EagerStep

IMAGES, LABELS = torch.arange(24.0).view(8, 3) / 10, torch.tensor([0, 1] * 4)


class Linear(torch.nn.Module):
    """A network without batch norm, whose gradient is the mean of the images'."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)

    def forward(self, images):
        return self.linear(images.flatten(1))


def make_step(model, *, accumulate=1, label_smoothing=0.0, scaler=None):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    forward = Forward(model, "fp32", channels_last=False)
    scaler = GradScaler("cpu", enabled=False) if scaler is None else scaler
    return EagerStep(forward, optimizer, scaler, accumulate=accumulate, label_smoothing=label_smoothing)


def batch():
    return IMAGES.view(8, 3, 1, 1), LABELS


def test_gradients_of_parts_add_up_to_that_of_the_batch():
    whole, parts = Linear(), Linear()
    parts.load_state_dict(whole.state_dict())
    totals = make_step(whole).gradients(*batch())
    for accumulate in (2, 4):
        torch.testing.assert_close(make_step(parts, accumulate=accumulate).gradients(*batch()), totals)
        torch.testing.assert_close(parts.linear.weight.grad, whole.linear.weight.grad)


def test_gradients_travel_to_other_processes_with_the_last_part_alone():
    unsent = []

    @contextmanager
    def no_sync():
        unsent.append("part")
        yield
        unsent.append("end")

    model = Linear()
    model.register_forward_hook(lambda *_: unsent.append("forward"))
    step = make_step(model, accumulate=4)
    step.no_sync = no_sync
    step.gradients(*batch())
    assert unsent == [*("part", "forward", "end") * 3, "forward"]


def test_a_step_returns_the_sum_of_the_loss_and_the_count_of_wrong_images():
    model = Linear()
    logits = model(IMAGES)
    totals = make_step(model)(*batch())
    assert totals[0].item() == pytest.approx(F.cross_entropy(logits, LABELS, reduction="sum").item())
    assert totals[1] == (logits.argmax(1) != LABELS).sum()


def test_smoothed_labels_are_a_mixture_with_the_uniform_distribution():
    model = Linear()
    make_step(model, label_smoothing=0.1).gradients(*batch())
    smoothed = model.linear.weight.grad.clone()
    targets = 0.9 * F.one_hot(LABELS, 2) + 0.1 / 2
    loss = -(targets * model(IMAGES).log_softmax(1)).sum(1).mean()
    (expected,) = torch.autograd.grad(loss, model.linear.weight)
    torch.testing.assert_close(smoothed, expected)


def test_a_step_whose_gradients_overflow_is_skipped_and_the_scale_halved():
    model = Linear()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scaler = GradScaler("cpu", init_scale=2.0**127)
    step = make_step(model, scaler=scaler)
    images, labels = batch()
    step(100 * images, labels)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert scaler.get_scale() == 2.0**126
    assert not step.optimizer.state

    scaler.update(2.0**10)
    step(images, labels)
    assert not torch.equal(model.linear.weight, before["linear.weight"])


def test_a_skipped_first_step_counts_in_the_schedule_without_a_warning(tiny_recipe, tmp_path):
    trainer = Trainer.start(dataclasses.replace(tiny_recipe, precision="fp16", epochs=1), tmp_path)
    trainer.scaler = trainer.step.scaler = GradScaler("cpu", init_scale=2.0**127)
    trainer.run()
    assert trainer.scaler.get_scale() < 2.0**127
    assert trainer.scheduler.last_epoch == trainer.steps


def test_a_run_in_parts_learns_as_one_in_whole_batches_does(tiny_recipe, tmp_path):
    whole = Trainer.start(tiny_recipe, tmp_path / "whole")
    parts = Trainer.start(dataclasses.replace(tiny_recipe, accumulate=2), tmp_path / "parts")
    for trainer in (whole, parts):
        trainer.run()
    assert parts.history[-1].train_loss == pytest.approx(whole.history[-1].train_loss, rel=0.2)


@pytest.mark.parametrize(
    ("device", "precision", "fused"), [("cuda", "bf16", True), ("cuda", "fp16", None), ("cpu", "fp32", None)]
)
def test_the_optimizer_is_fused_where_no_step_is_skipped(device, precision, fused):
    optimizer = make_optimizer(Linear(), Recipe(precision=precision), torch.device(device))
    assert optimizer.defaults["fused"] is fused


def test_every_parameter_decays():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    (group,) = make_optimizer(model, Recipe(weight_decay=0.5), torch.device("cpu")).param_groups
    assert len(group["params"]) == 4
    assert group["weight_decay"] == 0.5
