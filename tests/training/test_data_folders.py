"""Image folders, and synthetic images."""

import re

import pytest
import torch

from fused_resnet.training import data

CPU = torch.device("cpu")
AUGMENTATION = data.Augmentation(flip=True)
ORDER = data.epoch_order(24, 8, seed=0, epoch=1)


def load(folder, workers=0):
    return data.load("folder", folder, image_size=32, workers=workers, device=CPU)


def train_images(source, order=ORDER, augmentation=AUGMENTATION, epoch=1):
    return [images for images, _ in source.train_batches(order, augmentation, seed=0, epoch=epoch)]


def test_classes_are_the_folders_and_images_are_standardized(picture_folder):
    source = load(picture_folder)
    assert (source.train_size, source.test_size, source.num_classes, source.channels) == (24, 10, 2, 3)
    (images, labels), (rest, _) = source.test_batches(8, crops=1)
    assert images.shape == (8, 1, 3, 32, 32)
    assert len(rest) == 2
    assert labels.tolist() == [0] * 5 + [1] * 3
    redness = (images[:, 0, 0] - images[:, 0, 2]).mean((1, 2))
    assert (redness > 0).tolist() == [False] * 5 + [True] * 3


@pytest.mark.parametrize("crop", data.TRAIN_CROPS)
def test_an_images_fate_does_not_depend_on_workers_or_where_an_epoch_begins(picture_folder, crop):
    augmentation = data.Augmentation(flip=True, crop=crop)
    here = train_images(load(picture_folder), augmentation=augmentation)
    assert here[0].shape == (8, 3, 32, 32)
    elsewhere = train_images(load(picture_folder, workers=2), augmentation=augmentation)
    assert torch.equal(torch.cat(here), torch.cat(elsewhere))
    assert torch.equal(here[2], train_images(load(picture_folder), ORDER[2:], augmentation)[0])
    assert not torch.equal(here[0], train_images(load(picture_folder), augmentation=augmentation, epoch=2)[0])


def test_loading_leaves_torchs_random_numbers_alone(picture_folder):
    before = torch.get_rng_state()
    train_images(load(picture_folder))
    train_images(load(picture_folder, workers=1))
    list(load(picture_folder).test_batches(8, crops=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_training_crops_come_from_the_papers_range_of_scales(picture_folder):
    from PIL import Image

    # brightness rises from left to right, 0 to 255: what is missing of it in a crop is beyond its edges
    ramp = Image.linear_gradient("L").rotate(90).convert("RGB")
    transform = data.folders.train_transform(112, data.Augmentation())
    crops = [transform(ramp).float() for _ in range(100)]
    sides = [112 / ((crop.amax() - crop.amin()).item() / 255) for crop in crops]  # of the image, whose crop is 112
    assert 125 < min(sides) < 140
    assert 215 < max(sides) < 245


def test_ten_crops_of_a_picture_are_torchvisions(picture_folder):
    ((single, _), _) = load(picture_folder).test_batches(8, crops=1)
    ((views, _), _) = load(picture_folder).test_batches(8, crops=10)
    assert views.shape == (8, 10, 3, 32, 32)
    assert torch.equal(views[:, 4], single[:, 0])  # torchvision's order: four corners, center, the same mirrored
    top_left, top_right = views[:, 0], views[:, 1]
    assert torch.equal(views[:, 5], top_right.flip(-1))
    assert torch.equal(views[:, 6], top_left.flip(-1))
    assert len({view.numpy().tobytes() for view in views[0]}) == 10


@pytest.mark.parametrize("name", ["folder", "imagenet"])
def test_a_missing_folder_says_where_it_was_looked_for(tmp_path, name):
    source = data.load(name, tmp_path, device=CPU)
    place = re.escape(str(tmp_path / "val"))
    with pytest.raises(FileNotFoundError, match=rf"data {name} was looked for in {place} .* with --data-dir") as raised:
        source.num_classes  # noqa: B018
    assert ("image-net.org" in str(raised.value)) == (name == "imagenet")


def test_an_evaluation_needs_no_training_images(picture_folder, tmp_path):
    (tmp_path / "test").symlink_to(picture_folder / "val")
    source = load(tmp_path)
    assert source.test_size == 10
    with pytest.raises(FileNotFoundError, match=r"train and is not there"):
        source.train_size  # noqa: B018


def test_splits_of_different_classes_are_named(picture_folder, tmp_path):
    (tmp_path / "val").symlink_to(picture_folder / "val")
    (tmp_path / "train" / "green").mkdir(parents=True)
    (tmp_path / "train" / "red").symlink_to(picture_folder / "train" / "red")
    (tmp_path / "train" / "green" / "0.png").symlink_to(picture_folder / "train" / "red" / "0.png")
    with pytest.raises(
        ValueError, match="must hold the same classes, got 2 and 2, of which blue, green are in one alone"
    ):
        load(tmp_path).train_size  # noqa: B018


def test_an_empty_folder_is_named(tmp_path):
    (tmp_path / "val").mkdir()
    with pytest.raises(FileNotFoundError, match="val must hold CLASS/IMAGE"):
        load(tmp_path).test_size  # noqa: B018


def test_synthetic_images_are_a_function_of_seed_epoch_and_index():
    source = data.load("synthetic", image_size=32, device=CPU)
    order = data.epoch_order(source.train_size, 4, seed=0, epoch=1)[:3]
    first = [images for images, _ in source.train_batches(order, AUGMENTATION, seed=0, epoch=1)]
    assert first[0].shape == (4, 3, 32, 32)
    assert not torch.equal(first[0], first[1])
    later = [images for images, _ in source.train_batches(order[1:], AUGMENTATION, seed=0, epoch=1)]
    assert torch.equal(torch.stack(first[1:]), torch.stack(later))
    assert sum(len(labels) for _, labels in source.test_batches(100, crops=1)) == source.test_size
