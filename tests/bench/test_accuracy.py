import pytest
import torch

from fused_resnet.bench.accuracy import WrongResult, check, distance


def results(error_of_stock, error_of_peer):
    """An exact tensor of magnitude 1, and two that are off by the given relative errors."""
    exact = torch.randn(4096, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sign = torch.randn(4096, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).sign()

    def off_by(error):
        return {"output": {"z": (exact * (1 + error * sign)).float()}}

    return off_by(error_of_peer), off_by(error_of_stock), {"output": {"z": exact}}


def test_distance_is_relative():
    exact = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert distance(1.01 * exact, exact) == pytest.approx(0.01)
    assert distance(1e6 * 1.01 * exact, 1e6 * exact) == pytest.approx(0.01)


@pytest.mark.parametrize("error", [0, 1e-3, 1.9e-3])
def test_a_result_within_twice_the_error_of_stock_passes(error):
    check("fused", *results(1e-3, error))


@pytest.mark.parametrize("error", [2.2e-3, 1.0])
def test_a_result_beyond_twice_the_error_of_stock_is_refused(error):
    with pytest.raises(WrongResult, match=r"fused is wrong: output z is off by .*, stock by 1\.\de-03, the limit is"):
        check("fused", *results(1e-3, error))


def test_a_nan_is_refused():
    result, stock, exact = results(1e-3, 1e-3)
    result["output"]["z"][17] = torch.nan
    with pytest.raises(WrongResult, match="off by nan"):
        check("fused", result, stock, exact)


def test_a_missing_gradient_is_refused():
    _, stock, exact = results(1e-3, 1e-3)
    with pytest.raises(WrongResult, match="it has no output z"):
        check("fused", {"output": {}}, stock, exact)


def test_one_wrong_tensor_among_many_is_refused():
    result, stock, exact = results(1e-5, 1e-5)
    for tensors in (result, stock, exact):
        good = tensors["output"]["z"]
        tensors["output"] |= {f"good {i}": good for i in range(100)}
    result["output"]["z"] = 1.01 * result["output"]["z"]
    with pytest.raises(WrongResult, match="output z"):
        check("fused", result, stock, exact)


def test_a_gradient_may_differ_by_an_activation_at_zero():
    result, stock, exact = ({"gradient of": tensors["output"]} for tensors in results(1e-6, 5e-3))
    check("fused", result, stock, exact)
    result, stock, exact = ({"gradient of": tensors["output"]} for tensors in results(1e-6, 2e-2))
    with pytest.raises(WrongResult, match="gradient of z"):
        check("fused", result, stock, exact)


def test_what_nobody_has_a_digit_of_is_nothing_to_the_others():
    """The gradient of a norm's bias in front of another norm is exactly 0: relatively, its rounding is infinite."""
    result, stock, exact = results(1e-5, 1e-3)
    for tensors, rounding in ((result, 1e-9), (stock, 1e-9), (exact, 0)):
        tensors["output"]["zero"] = torch.full((64,), rounding)
    with pytest.raises(WrongResult, match="output z"):
        check("fused", result, stock, exact)


@pytest.mark.parametrize(("noise", "passes"), [([], False), ([1e-4], False), ([1e-4, 6e-3], True)])
def test_a_tensor_within_twice_the_worst_of_the_networks_own_noise_passes(noise, passes):
    result, stock, exact = results(1e-3, 1e-2)
    draws = [results(1e-3, error)[0] for error in noise]
    if passes:
        check("fused", result, stock, exact, draws)
    else:
        with pytest.raises(WrongResult, match="output z is off by"):
            check("fused", result, stock, exact, draws)


def test_no_draw_is_made_where_nothing_is_broken():
    check("fused", *results(1e-3, 1e-3), (pytest.fail("drawn") for _ in range(1)))


def test_no_noise_excuses_a_nan():
    result, stock, exact = results(1e-3, 1e-3)
    result["output"]["z"][17] = torch.nan
    with pytest.raises(WrongResult, match="off by nan"):
        check("fused", result, stock, exact, [results(1e-3, 1.0)[0]])
