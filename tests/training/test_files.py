import pytest
import torch

from fused_resnet.training.files import CheckpointError, EpochMetrics, RunFolder


def test_metrics_are_one_row_an_epoch(tmp_path):
    row = EpochMetrics(1, 22, 0.1, 2.0, 0.5, 1.5, 1 / 3, 600.0, 2.25)
    folder = RunFolder(tmp_path)
    folder.write_metrics([row])
    assert folder.metrics.read_text() == (
        "epoch,iteration,lr,train_loss,train_error,test_loss,test_error,images_per_second,seconds\n"
        "1,22,0.1,2,0.5,1.5,0.333333,600,2.25\n"
    )


def test_a_checkpoint_is_read_as_it_was_written(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_checkpoint({"weights": torch.arange(3)})
    assert torch.equal(folder.read_checkpoint()["weights"], torch.arange(3))


def test_no_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no run to resume in .*checkpoint\.pt does not exist"):
        RunFolder(tmp_path / "nowhere").read_checkpoint()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "damaged or no checkpoint"),
        ({"conv1.weight": torch.zeros(1)}, "was not written by fused-resnet train"),
        (torch.zeros(1), "was not written by fused-resnet train"),
        ({"fused_resnet_checkpoint": 1}, "has format 1, this version of fused_resnet continues 2: start the run anew"),
        ({"fused_resnet_checkpoint": 99}, "has format 99, this version of fused_resnet continues 2"),
    ],
    ids=["text", "weights", "tensor", "older", "newer"],
)
def test_what_is_no_checkpoint_of_ours_is_named(tmp_path, content, message):
    folder = RunFolder(tmp_path)
    if content is None:
        folder.checkpoint.write_text("not a checkpoint")
    else:
        torch.save(content, folder.checkpoint)
    with pytest.raises(CheckpointError, match=message):
        folder.read_checkpoint()


def test_a_cut_off_checkpoint_is_named(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_checkpoint({"weights": torch.zeros(10000)})
    whole = folder.checkpoint.read_bytes()
    folder.checkpoint.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        folder.read_checkpoint()
