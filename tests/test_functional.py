"""batch_norm_act against stock PyTorch: ``act(batch_norm(x) + residual)``, and what is no argument of it."""

import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from fused_resnet import engines
from fused_resnet.functional import batch_norm_act
from tests.support.accuracy import assert_as_accurate_as_stock, gradient_for
from tests.support.batch_norm_act import (
    CASES,
    CPU_ENGINES,
    DTYPES,
    LAYOUTS,
    RESIDUALS,
    STOCK_ACTS,
    assert_accurate,
    make_arguments,
    run,
    stock_batch_norm_act,
)

# ---- accuracy --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", STOCK_ACTS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("engine", "dtype"), CASES)
def test_every_variant_is_as_accurate_as_stock(engine, dtype, layout, residual, training, act):
    # of a few halves beside a kink of an activation, rounding decides which of its sides they fall on
    draws = 8 if dtype.itemsize == 2 and act in ("relu6", "hardtanh", "hardswish") else 1
    arguments = [make_arguments((4, 24, 7, 9), dtype, layout=LAYOUTS[layout], residual=residual) for _ in range(draws)]
    fused = assert_accurate(arguments[0], engine, *arguments[1:], training=training, act=act)
    assert fused["z"].is_contiguous(memory_format=LAYOUTS[layout])
    assert fused["x.grad"].is_contiguous(memory_format=LAYOUTS[layout])


AWKWARD = [
    (1, 8, 5, 1), (1, 8, 1, 5), (2, 8, 1, 1), (200, 8, 1, 1), (8, 8, 5, 5), (2, 3, 7, 7), (2, 13, 7, 1), (3, 1, 4, 4),
    (2, 1, 1, 1), (1, 1, 1, 2), (1, 130, 3, 3), (2, 5, 57, 3), (1, 7, 1, 200), (5, 2048, 1, 2), (2, 64, 20, 17),
]  # fmt: skip


@pytest.mark.parametrize("shape", AWKWARD, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize(("engine", "dtype"), CASES)
def test_an_awkward_shape_is_as_accurate_as_stock(engine, dtype, shape):
    for layout in LAYOUTS.values():
        for residual in ("no residual", "residual norm"):
            draws = [make_arguments(shape, dtype, layout=layout, residual=residual) for _ in range(8)]
            assert_accurate(draws[0], engine, *draws[1:])


@pytest.mark.parametrize("shape", [(2, 64, 56, 56), (8, 512, 7, 7)], ids=["56x56x64", "7x7x512"])
@pytest.mark.parametrize(("engine", "dtype"), CASES)
def test_a_shape_of_resnet50_is_as_accurate_as_stock_on_three_threads(engine, dtype, shape):
    torch.set_num_threads(3)
    assert_accurate(make_arguments(shape, dtype, residual="residual"), engine)


@pytest.mark.parametrize("residual", ["no residual", "residual norm"])
@pytest.mark.parametrize(
    ("engine", "dtype", "mean"),
    [
        pytest.param(engine, dtype, mean, id=f"{engine}-{name}-{mean}")
        for engine in CPU_ENGINES
        for name, dtype, means in [("fp32", torch.float32, (10, 1000)), ("bf16", torch.bfloat16, (10, 100))]
        for mean in means
    ],
)
def test_a_mean_of_many_standard_deviations_costs_no_digits(engine, dtype, mean, residual):
    for layout in LAYOUTS.values():
        arguments = make_arguments((8, 16, 14, 14), dtype, layout=layout, mean=mean, residual=residual)
        assert_accurate(arguments, engine)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("engine", "dtype"), CASES)
def test_without_affine_is_as_accurate_as_stock(engine, dtype, training):
    arguments = make_arguments((2, 16, 7, 7), dtype, residual="residual norm", affine=False)
    assert_accurate(arguments, engine, training=training)


@pytest.mark.parametrize("missing", ["weight", "bias"])
@pytest.mark.parametrize("engine", CPU_ENGINES)
def test_a_scale_or_a_shift_alone_is_as_accurate_as_stock(engine, missing):
    assert_accurate(make_arguments((2, 16, 7, 7)) | {missing: None}, engine)


@pytest.mark.parametrize("engine", CPU_ENGINES)
def test_without_running_statistics_is_as_accurate_as_stock(engine):
    assert_accurate(make_arguments((2, 16, 7, 7), residual="residual norm", tracked=False), engine)


@pytest.mark.parametrize("momentum", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("engine", CPU_ENGINES)
def test_running_statistics_move_by_the_momentum(engine, momentum):
    assert_accurate(make_arguments((2, 16, 7, 7), residual="residual norm"), engine, momentum=momentum)


@pytest.mark.parametrize("eps", [1e-12, 1e-3, 10.0])
@pytest.mark.parametrize("engine", CPU_ENGINES)
def test_eps_is_honoured(engine, eps):
    assert_accurate(make_arguments((2, 16, 7, 7)), engine, eps=eps)


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize(("engine", "dtype"), CASES)
def test_zero_and_negative_scales_are_as_accurate_as_stock(engine, dtype, residual):
    arguments = make_arguments((2, 16, 7, 7), dtype, residual=residual)
    arguments["weight"] = torch.linspace(-2, 1.75, 16, dtype=arguments["weight"].dtype)  # the ninth is 0
    assert (arguments["weight"] == 0).sum() == 1
    assert_accurate(arguments, engine)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("engine", CPU_ENGINES)
def test_float64_agrees_with_stock(engine, residual, training):
    for layout in LAYOUTS.values():
        arguments = make_arguments((4, 24, 7, 9), torch.float64, layout=layout, residual=residual)
        fused = run(functools.partial(batch_norm_act, engine=engine), arguments, training=training)
        assert_close(fused, run(stock_batch_norm_act, arguments, training=training))


@pytest.mark.parametrize("value", [0.0, 1.0, 3.7, -1000.0])
@pytest.mark.parametrize(("engine", "dtype"), CASES)
def test_a_dead_channel_is_as_accurate_as_stock(engine, dtype, value):
    arguments = make_arguments((4, 8, 7, 7), dtype)
    arguments["x"][:, 3] = value  # its variance is 0
    arguments["x"][:, 5] = 0
    assert_accurate(arguments, engine)


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize(("engine", "dtype"), CASES)
def test_zero_gradients_stay_zero(engine, dtype, residual):
    fused = run(
        functools.partial(batch_norm_act, engine=engine),
        arguments := make_arguments((2, 16, 7, 7), dtype, residual=residual),
        grad=torch.zeros_like(arguments["x"]),
        training=True,
    )
    for name, t in fused.items():
        assert not name.endswith(".grad") or not t.any(), name


@pytest.mark.parametrize("scale", [1e-15, 1e15])
@pytest.mark.parametrize("engine", CPU_ENGINES)
def test_tiny_and_huge_activations_are_as_accurate_as_stock(engine, scale):
    arguments = make_arguments((4, 16, 7, 7))
    assert_accurate(arguments | {"x": arguments["x"] * scale}, engine)


# ---- NaN and infinity ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["x", "residual", "weight", "bias", "r_weight", "grad"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("engine", CPU_ENGINES)
def test_nan_and_infinity_come_out_exactly_where_stock_gives_them(engine, training, place):
    residuals = {"residual": RESIDUALS[1:], "r_weight": RESIDUALS[2:]}.get(place, RESIDUALS)
    for residual in residuals:
        for bad in (float("nan"), float("inf"), -float("inf")):
            arguments = make_arguments((2, 8, 5, 5), residual=residual)
            grad = gradient_for(arguments["x"]).clone()
            target = grad if place == "grad" else arguments[place]
            target[(1, 3, 2, 2) if target.dim() == 4 else 3] = bad
            stock = run(stock_batch_norm_act, arguments, grad=grad, training=training)
            fused = run(functools.partial(batch_norm_act, engine=engine), arguments, grad=grad, training=training)
            for name, t in stock.items():
                assert torch.equal(fused[name].isfinite(), t.isfinite()), (residual, bad, name)
                # from infinity on, NaN or infinity is a matter of the order of operations
                assert bad == bad or torch.equal(fused[name].isnan(), t.isnan()), (residual, name)


@pytest.mark.parametrize("engine", CPU_ENGINES)
def test_a_nan_preactivation_passes_relu_and_its_gradient(engine):
    arguments = make_arguments((1, 4, 3, 3), residual="residual")
    arguments["residual"][0, 1, 1, 1] = float("nan")
    fused = run(functools.partial(batch_norm_act, engine=engine), arguments, training=False)
    assert fused["z"].isnan().sum() == 1
    assert fused["residual.grad"][0, 1, 1, 1] == gradient_for(fused["z"])[0, 1, 1, 1]


# ---- any shape -------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 40), st.integers(1, 12), st.integers(1, 12)).filter(
        lambda s: s[0] * s[2] * s[3] > 4
    ),
    dtype=st.sampled_from(list(DTYPES.values())),
    layout=st.sampled_from(list(LAYOUTS.values())),
    residual=st.sampled_from(RESIDUALS),
    training=st.booleans(),
    act=st.sampled_from(["relu", "none"]),
)
def test_any_shape_is_as_accurate_as_stock(shape, dtype, layout, residual, training, act):
    torch.manual_seed(0)
    draws = [make_arguments(shape, dtype, layout=layout, residual=residual) for _ in range(8)]
    assert_accurate(*draws[:1], "auto", *draws[1:], training=training, act=act)


# ---- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compiled_it_is_as_accurate_as_stock(residual, training):
    arguments = make_arguments((2, 16, 7, 7), residual=residual)
    exact = run(stock_batch_norm_act, arguments, torch.float64, training=training)
    stock = run(stock_batch_norm_act, arguments, training=training)
    compiled = torch.compile(batch_norm_act, fullgraph=True, backend="aot_eager")
    assert_as_accurate_as_stock(run(compiled, arguments, training=training), stock, exact)


# ---- bad input -------------------------------------------------------------------------------------------------------

X = torch.randn(2, 4, 3, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": torch.randn(2, 4, 3)}, ValueError, r"x must be .* \[N, C, H, W\], got \(2, 4, 3\)"),
        ({"x": torch.ones(2, 4, 3, 3, dtype=torch.int32)}, ValueError, r"x must be floating-point .*torch.int32"),
        ({"weight": torch.ones(5)}, ValueError, r"weight must have shape \[C\] = \[4\].*got \[5\]"),
        ({"weight": torch.ones(1)}, ValueError, r"weight must have shape \[C\] = \[4\].*got \[1\]"),
        ({"bias": torch.ones(4, 1)}, ValueError, r"bias must have shape \[C\] = \[4\].*got \[4, 1\]"),
        ({"weight": torch.ones(4, device="meta")}, ValueError, r"weight must be on the device of x, cpu, got meta"),
        ({"running_mean": torch.ones(4)}, ValueError, "running_mean and running_var must be given both or neither"),
        ({"training": False}, ValueError, "running_mean and running_var are needed with training=False"),
        ({"act": "tanh"}, ValueError, "act must be an Act or one of 'none', 'relu', .* got 'tanh'"),
        ({"engine": "cuda graphs"}, ValueError, r"engine must be one of .*got 'cuda graphs'"),
        ({"residual": torch.randn(2, 4, 3, 1)}, ValueError, r"residual must have the shape.*4, 3, 3\).*4, 3, 1\)"),
        ({"residual": X.double()}, ValueError, r"residual must have the .*dtype.*torch.float32.*torch.float64"),
        ({"residual": X.to("meta")}, ValueError, r"residual must have the .*device.*cpu.*meta"),
        ({"residual_norm": (None,) * 4}, ValueError, "residual_norm normalises the residual: give residual, too"),
        (
            {"residual": X, "residual_norm": (None, None, torch.ones(5), None)},
            ValueError,
            r"residual_norm: weight must have shape \[C\] = \[4\].*got \[5\]",
        ),
        ({"x": torch.randn(1, 4, 1, 1)}, ValueError, "Expected more than 1 value per channel when training"),
        ({"x": X.half(), "engine": "cpu"}, engines.EngineError, "engine='cpu' cannot serve: .*not torch.float16"),
        ({"x": X.to("meta"), "engine": "cpu"}, engines.EngineError, "engine='cpu' cannot serve: .*'meta'"),
    ],
)  # fmt: skip
def test_a_bad_argument_is_named_with_what_was_wanted_and_what_came(arguments, error, message):
    with pytest.raises(error, match=message):
        batch_norm_act(**({"x": X} | arguments))


@pytest.mark.parametrize("residual_norm", [(None, None, None), (None,) * 5], ids=len)
def test_a_residual_norm_of_another_length_is_refused(residual_norm):
    with pytest.raises(ValueError, match=r"residual_norm"):
        batch_norm_act(X, residual=X, residual_norm=residual_norm)


@pytest.mark.parametrize("engine", CPU_ENGINES)
@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0, 3), (2, 0, 3, 3)], ids=str)
def test_an_empty_batch_gives_what_stock_gives(shape, engine):
    x = torch.empty(shape)
    mean, var = torch.zeros(shape[1]), torch.ones(shape[1])
    z = batch_norm_act(x, mean, var, training=False, engine=engine)
    assert_close(z, F.relu(F.batch_norm(x, mean, var)))
