"""LAMB and LARS beside loops written from their papers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from reference.layers import LOOPS, VARIANTS
from reference.variant import Variant

from optserve.server.formulas import OPTIMIZERS, Elementwise, blocks, find

SHAPES = [(3, 4), (), (1, 0, 2), (7,), (65, 33)]
CLOSE: dict[Any, dict[str, float]] = {np.float64: {"rtol": 1e-12, "atol": 1e-13}, np.float32: {"rtol": 1e-5, "atol": 2e-6}}
NAMES = sorted(LOOPS)


def test_every_optimizer_that_torch_does_not_have_and_that_is_not_elementwise_has_a_loop_here() -> None:
    import torch

    missing = {name for name, found in OPTIMIZERS.items() if not hasattr(torch.optim, found.name)}
    assert set(LOOPS) == {variant.optimizer for variant in VARIANTS}
    assert set(LOOPS) == {name for name in missing if not isinstance(OPTIMIZERS[name], Elementwise)}


def compare(ours: Any, variant: Variant, begin: np.ndarray, descend: Any) -> None:
    wide, state = begin.astype(np.float64), {}
    loop, tolerance = LOOPS[variant.optimizer], CLOSE[begin.dtype.type]
    for index in range(ours.steps):
        slope = descend(wide, index).reshape(-1).tolist()
        wide = np.array(loop(ours.group, wide.reshape(-1).tolist(), slope, state)).reshape(begin.shape)
    np.testing.assert_allclose(ours.value, wide, **tolerance)
    steps = state.pop("step", None)
    assert steps == (ours.steps if ours.optimizer.counts_steps else None)
    assert ours.state.keys() == state.keys()
    for slot, kept in state.items():
        np.testing.assert_allclose(ours.state[slot].reshape(-1), kept, **tolerance, err_msg=slot)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_fifty_steps_equal_the_papers_algorithm(
    variant: Variant, shape: tuple[int, ...], dtype: Any, run: Any, start: Any, descend: Any
) -> None:
    begin = start(shape, dtype)
    compare(run(variant.optimizer, variant.options, begin).steps_down(50), variant, begin, descend)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_parameter_of_several_blocks_equals_the_papers_algorithm(
    variant: Variant, run: Any, start: Any, descend: Any
) -> None:
    begin = start((2, blocks.HOST_BLOCK // 2 + 100))
    compare(run(variant.optimizer, variant.options, begin).steps_down(3), variant, begin, descend)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_complex_parameter_is_its_real_and_imaginary_parts(variant: Variant, run: Any, start: Any) -> None:
    """Its norm is that of the reals."""
    parts, whole = run(variant.optimizer, variant.options, start((6, 2))), run(variant.optimizer, variant.options, start((12,)))
    for each in (parts, whole):
        each.step(start(each.value.shape) + 1)
    assert np.array_equal(parts.value.reshape(-1), whole.value)
    assert np.linalg.norm(parts.value.view(np.complex128)) == pytest.approx(np.linalg.norm(whole.value), rel=1e-15)


@pytest.mark.parametrize("name", NAMES)
def test_to_maximize_is_to_descend_the_negated_gradient(name: str, run: Any, start: Any, descend: Any) -> None:
    down, up = (
        run(name, {"weight_decay": 0.1}, start((5, 5))),
        run(name, {"weight_decay": 0.1, "maximize": True}, start((5, 5))),
    )
    for index in range(3):
        gradient = descend(start((5, 5)), index)
        down.step(gradient)
        up.step(-gradient)
    assert np.array_equal(down.value, up.value)
    assert not np.array_equal(down.value, start((5, 5)))


@pytest.mark.parametrize("name", NAMES)
def test_a_parameter_of_zeros_moves_as_if_its_ratio_were_one(name: str, run: Any) -> None:
    ours = run(name, {"lr": 0.1}, np.zeros((2, 3)))
    ours.step(np.full((2, 3), 0.5))
    expected = -0.1 * (0.5 / (0.5 + 1e-6) if name == "lamb" else 0.5)
    np.testing.assert_allclose(ours.value, np.full((2, 3), expected), rtol=1e-12)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_of_zeros_leaves_what_the_decay_leaves(name: str, weight_decay: float, run: Any, start: Any) -> None:
    ours = run(name, {"lr": 0.5, "weight_decay": weight_decay}, start((4, 4)))
    ours.step(np.zeros((4, 4)))
    shrinkage = 0.0 if weight_decay == 0 else 0.5 * (1.0 if name == "lamb" else 1e-3)  # both: lr · the ratio, whatever λ is
    np.testing.assert_allclose(ours.value, (1 - shrinkage) * start((4, 4)), rtol=1e-12)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_larss_step_is_a_part_of_the_norm_whatever_the_gradients_size(scale: float, run: Any, start: Any) -> None:
    begin = start((50,), np.float32)
    ours = run("lars", {"lr": 10.0}, begin)
    ours.step((scale * start((50,))[::-1]).astype(np.float32))
    assert np.linalg.norm(ours.value - begin) == pytest.approx(0.01 * np.linalg.norm(begin), rel=1e-5)


@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e30])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_at_the_ends_of_float32_make_no_nan(name: str, scale: float, run: Any, start: Any) -> None:
    ours = run(name, {}, start((50,), np.float32))
    for _ in range(3):
        ours.step((scale * np.sign(start((50,)))).astype(np.float32))
    assert np.all(np.isfinite(ours.value))


@pytest.mark.parametrize(
    ("name", "defaults"),
    [
        ("lamb", {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.0, "maximize": False}),
        (
            "lars",
            {"lr": 1.0, "momentum": 0.9, "weight_decay": 0.0, "trust_coefficient": 1e-3, "eps": 0.0, "maximize": False},
        ),
    ],
)
def test_defaults(name: str, defaults: dict[str, Any]) -> None:
    assert list(find(name).defaults.items()) == list(defaults.items())


def test_lars_keeps_nothing_without_momentum() -> None:
    lars = find("lars")
    assert lars.state_shapes({**lars.defaults, "momentum": 0.0}, (2, 3)) == {}
    assert lars.state_shapes(lars.defaults, (2, 3)) == {"momentum_buffer": (2, 3)}


NAN = float("nan")
REFUSED: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    *((name, {key: value}, ValueError, rf"Invalid .*: {value}") for name, keys in (
        ("lamb", ("lr", "eps", "weight_decay")), ("lars", ("lr", "momentum", "eps", "weight_decay", "trust_coefficient")),
    ) for key in keys for value in (-0.1, NAN)),
    ("lamb", {"betas": (1.0, 0.9)}, ValueError, "Invalid beta parameter at index 0: 1.0"),
    ("lamb", {"betas": (0.9, NAN)}, ValueError, "Invalid beta parameter at index 1: nan"),
    ("lamb", {"betas": 0.9}, TypeError, "betas is 0.9 of type float"),
    *(("lars", {key: "x"}, TypeError, f"{key} is 'x' of type str") for key in ("momentum", "trust_coefficient", "eps")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "error", "message"), REFUSED)
def test_bad_hyperparameters_are_refused(name: str, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        find(name).check({**find(name).defaults, **options})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {"lr": value, "weight_decay": value, "eps": value}) for name in NAMES for value in (10**300, float("inf"))),
        ("lamb", {"betas": (0, 0)}), ("lars", {"momentum": 10**300, "trust_coefficient": 10**300}),
    ],
    ids=str,
)  # fmt: skip
def test_no_step_of_what_is_allowed_raises(name: str, options: dict[str, Any], run: Any, start: Any) -> None:
    run(name, options, start((3, 4), np.float32)).steps_down(3)
