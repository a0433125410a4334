"""What a GPU can show of training: a step captured into a CUDA graph is the step."""

import dataclasses

import pytest
import torch

from fused_resnet.training import Trainer, named

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

RECIPE = named(data="synthetic", model="resnet18", image_size=64, batch_size=32, iterations=12, device="cuda")


@pytest.fixture(autouse=True)
def any_algorithm(poisoned_memory):
    """Let cuDNN take the algorithms that it takes in training."""
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("changes", [{}, {"precision": "bf16"}, {"precision": "fp16"}, {"accumulate": 2}], ids=str)
@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "stock"])
def test_a_graphed_run_has_the_curve_of_an_eager_one(tmp_path, changes, fuse):
    recipe = dataclasses.replace(RECIPE, fuse=fuse, schedule="cosine", warmup=0.25, lr=0.01, **changes)
    eager = Trainer.start(recipe, tmp_path / "eager")
    graphed = Trainer.start(dataclasses.replace(recipe, cuda_graph=True), tmp_path / "graphed")
    for trainer in (eager, graphed):
        trainer.run()
    assert graphed.history[-1].train_loss == pytest.approx(eager.history[-1].train_loss, rel=0.02)
    assert float(graphed.optimizer.param_groups[0]["lr"]) == pytest.approx(
        eager.optimizer.param_groups[0]["lr"], abs=1e-6
    )
    for name, tensor in eager.model.named_parameters():
        moved = graphed.model.get_parameter(name)
        torch.testing.assert_close(moved, tensor, rtol=0.05, atol=0.02, msg=name)


def test_a_graphed_run_is_resumed(tmp_path):
    recipe = dataclasses.replace(RECIPE, cuda_graph=True, checkpoint_minutes=1e-9)
    trainer = Trainer.start(recipe, tmp_path)
    trainer.run()
    resumed = Trainer.resume(tmp_path)
    assert resumed.iteration == RECIPE.iterations
    lr = resumed.optimizer.param_groups[0]["lr"]
    assert lr.device.type == "cuda"
