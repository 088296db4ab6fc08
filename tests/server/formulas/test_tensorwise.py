"""What holds for every optimizer that looks at a parameter as a whole."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from optserve.server.formulas import OPTIMIZERS, Tensorwise, blocks

NAMES = sorted(name for name, optimizer in OPTIMIZERS.items() if isinstance(optimizer, Tensorwise))

IN_CUPY = frozenset({
    "add", "array", "ascontiguousarray", "bitwise_and", "copyto", "divide", "empty", "empty_like", "isnan", "matmul", "maximum",
    "minimum", "multiply", "negative", "right_shift", "sign", "sqrt", "subtract", "where", "zeros",
})  # fmt: skip
"""Functions that CuPy has with the arguments and the meaning of NumPy's, `out`, `dtype` and `where` included."""


class Device:
    """NumPy as if it were a device's library: blocks are a device's, and no other functions are there."""

    def __getattr__(self, name: str) -> Any:
        if name not in IN_CUPY:
            raise AttributeError(f"{name} is not known to be in CuPy")
        return getattr(np, name)


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "l1": 0.01}], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_devices_blocks_and_functions_give_the_same_step(name: str, options: dict[str, Any], run: Any, start: Any) -> None:
    begin = start((200, 300))
    assert blocks.block_size(np, begin.size) < begin.size == blocks.block_size(Device(), begin.size)
    host, device = run(name, options, begin), run(name, options, begin)
    for index in range(3):
        gradient = np.roll(begin, index)
        host.step(gradient)
        device.step(gradient, xp=Device())
    np.testing.assert_allclose(host.value, device.value, rtol=1e-12, atol=1e-14)
    for slot, kept in host.state.items():
        np.testing.assert_allclose(kept, device.state[slot], rtol=1e-12, atol=1e-14, err_msg=slot)


@pytest.mark.parametrize("name", NAMES)
def test_the_penalty_is_a_part_of_the_gradient(name: str, run: Any, start: Any) -> None:
    penalised, given = run(name, {"l1": 0.3}, start((5, 6))), run(name, {}, start((5, 6)))
    for index in range(3):
        gradient = np.roll(start((5, 6)), index)
        given.step(gradient + 0.3 * np.sign(given.value))
        penalised.step(gradient)
    np.testing.assert_allclose(penalised.value, given.value, rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(3, 4), (40, 1_000)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_step_writes_into_the_arrays_that_it_was_given(
    name: str, shape: tuple[int, ...], dtype: Any, run: Any, start: Any
) -> None:
    """Views of flat arrays, of which not one element beside them changes."""
    kept = np.dtype(np.float64 if dtype is np.float64 else np.float32)
    size, ours = int(np.prod(shape)), run(name, {}, start(shape, kept))
    flat = np.full(size + 64, 7, kept)
    flat[32:-32] = ours.value.reshape(-1)
    ours.value, slots = flat[32:-32].reshape(shape), dict(ours.state)
    ours.step(start(shape, kept) + kept.type(0.5), dtype)
    assert np.all(flat[:32] == 7)
    assert np.all(flat[-32:] == 7)
    assert not np.array_equal(flat[32:-32], start(shape, kept).reshape(-1))
    assert all(ours.state[slot] is array and np.any(array) for slot, array in slots.items())
    assert {array.dtype for array in (ours.value, *slots.values())} == {kept}


@pytest.mark.parametrize("name", NAMES)
def test_a_step_repeated_gives_the_same_bits(name: str, run: Any, start: Any) -> None:
    values = [run(name, {}, start((65, 90), np.float32)).steps_down(4).value.tobytes() for _ in range(3)]
    assert len(set(values)) == 1
