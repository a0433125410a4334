import dataclasses

import pytest

from fused_resnet.training import Recipe


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("model", "resnet19", "one of resnet18, resnet34"),
        ("data", "imagenet", "one of digits"),
        ("precision", "fp16", "one of fp32, bf16"),
        ("epochs", 0, "at least 1"),
        ("batch_size", 1, "at least 2"),
        ("lr", 0.0, "above 0"),
        ("lr", float("nan"), "above 0"),
        ("momentum", 1.0, "between 0 and 1"),
        ("weight_decay", -1e-4, "at least 0"),
        ("warmup", 0.0, "between 0 and 1"),
        ("max_shift", -1, "at least 0"),
        ("threads", 0, "at least 1"),
    ],
)
def test_a_value_no_run_can_have_is_named_with_what_was_wanted(field, value, wanted):
    with pytest.raises(ValueError, match=f"^{field} must be {wanted}.*; got {value!r}"):
        Recipe(**{field: value})


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_named(device):
    with pytest.raises(ValueError, match=device):
        Recipe(device=device).resolve_device()


def test_a_recipe_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().lr = 1.0
