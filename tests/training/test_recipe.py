import dataclasses

import pytest

from fused_resnet.training import RECIPES, Recipe, named
from fused_resnet.training.device import resolve_device


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("model", "resnet19", "one of resnet18, resnet34"),
        ("data", "mnist", "one of digits, "),
        ("precision", "fp8", "one of fp32, bf16, fp16"),
        ("schedule", "plateau", "one of one-cycle, steps, cosine"),
        ("crop", "center", "one of scale, resized"),
        ("image_size", 16, "at least 32"),
        ("epochs", 0, "at least 1"),
        ("batch_size", 1, "at least 2"),
        ("accumulate", 0, "at least 1"),
        ("lr", 0.0, "above 0"),
        ("lr", float("nan"), "above 0"),
        ("milestones", (0.5, 0.25), "parts of the run between 0 and 1, rising"),
        ("milestones", (0.5, 1.0), "parts of the run between 0 and 1, rising"),
        ("momentum", 1.0, "between 0 and 1"),
        ("weight_decay", -1e-4, "at least 0"),
        ("label_smoothing", 1.0, "at least 0 and below 1"),
        ("warmup", 0.0, "between 0 and 1"),
        ("max_shift", -1, "at least 0"),
        ("seed", -1, "at least 0"),
        ("threads", 0, "at least 1"),
        ("workers", -1, "at least 0"),
        ("checkpoint_minutes", 0.0, "above 0"),
    ],
)
def test_a_value_no_run_can_have_is_named_with_what_was_wanted(field, value, wanted):
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        Recipe(**{field: value})
    message = str(raised.value)
    assert message.startswith(f"{field} must be {wanted}")
    assert message.endswith(f"; got {value!r}")


@pytest.mark.parametrize(("batch_size", "accumulate"), [(64, 3), (64, 64)])
def test_a_batch_is_accumulated_of_equal_parts_that_batch_norm_can_take(batch_size, accumulate):
    with pytest.raises(ValueError, match=rf"batch_size must be {accumulate} \(accumulate\) equal parts of at least 2"):
        Recipe(batch_size=batch_size, accumulate=accumulate)


@pytest.mark.parametrize("length", [{"epochs": None}, {"iterations": 10}])
def test_a_run_has_one_length(length):
    with pytest.raises(ValueError, match="epochs, iterations must be one of the two"):
        Recipe(**length)


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_named(device):
    with pytest.raises(ValueError, match=device):
        resolve_device(device)


def test_a_recipe_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().lr = 1.0


@pytest.mark.parametrize(
    ("data", "recipe"),
    [
        ("digits", "digits"),
        ("cifar10", "cifar"),
        ("cifar100", "cifar"),
        ("imagenet", "imagenet"),
        ("folder", "imagenet"),
        ("synthetic", "imagenet"),
    ],
)
def test_a_data_set_brings_its_recipe(data, recipe):
    assert named(data=data) == dataclasses.replace(RECIPES[recipe], data=data)


def test_the_papers_recipes_are_the_papers():
    cifar, imagenet = named("cifar"), named("imagenet")
    for recipe in (cifar, imagenet):
        assert (recipe.lr, recipe.momentum, recipe.nesterov, recipe.weight_decay) == (0.1, 0.9, False, 1e-4)
        assert recipe.flip
    assert (cifar.data, cifar.model, cifar.batch_size, cifar.iterations, cifar.max_shift) == (
        "cifar10",
        "resnet20",
        128,
        64_000,
        4,
    )
    assert (imagenet.data, imagenet.batch_size, imagenet.epochs, imagenet.crop) == ("imagenet", 256, 90, "scale")


def test_every_value_of_a_recipe_can_be_changed_and_one_length_replaces_the_other():
    assert named("cifar", epochs=3, lr=0.2).iterations is None
    assert named("imagenet", iterations=10).epochs is None
    assert named("cifar", data="digits").data == "digits"
    with pytest.raises(ValueError, match="recipe must be one of digits, cifar, imagenet; got 'mnist'"):
        named("mnist")
