"""The cupy backend has the bits of the numpy backend: on a device of host memory whose streams are as late as they may be, and
on a GPU where there is one."""

from __future__ import annotations

import gc
import threading
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from every_backend import EARLY, GPU, backend_named
from host_device import backend_on, new_device
from host_kernels import needs_compiler

from optserve.server.backends import Backend, select
from optserve.server.backends.cupy import source
from optserve.server.backends.cupy.thread import SLOT_BYTES, DeviceThread
from optserve.server.backends.norms import SEGMENT
from optserve.server.formulas import OPTIMIZERS, Elementwise, find
from optserve.wire.dtypes import state_dtype
from optserve.wire.errors import MissingExtraError, OutOfMemoryError

DTYPES = [np.dtype(kind) for kind in (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)]
SIZES = [0, 1, 7, 4096, SLOT_BYTES // 4 + 3, SLOT_BYTES]

pytestmark = needs_compiler


@pytest.fixture(params=["cupy-on-host", EARLY, GPU])
def backend(request: pytest.FixtureRequest) -> Backend:
    return backend_named(request.param)


def values(size: int, dtype: Any, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=size).astype(dtype)


def unaligned(array: np.ndarray) -> np.ndarray:
    """A read-only copy at an odd address, as a message's bytes may lie."""
    return np.frombuffer(b"?" + array.tobytes(), np.uint8)[1:].view(array.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("size", SIZES)
def test_gradients_are_folded_with_the_same_bits(backend: Backend, size: int, dtype: np.dtype[Any]) -> None:
    state = state_dtype(dtype)
    into, expected = backend.zeros(size + 32, state), np.zeros(size + 32, state)
    for part in (slice(32, None), slice(31, -1), slice(0, size)):  # neither all aligned nor apart
        for seed, (ratio, first) in enumerate(((0.3, True), (1.0, False), (1 / 3, False))):
            given = values(size, dtype, seed)
            backend.fold(into[part], unaligned(given), ratio, first)
            select("numpy").fold(expected[part], given, ratio, first)
    assert backend.to_host(into).tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", [DTYPES[0], *DTYPES[2:]], ids=lambda dtype: dtype.name)
def test_narrower_gradients_are_folded_into_float64_with_the_same_bits(backend: Backend, dtype: np.dtype[Any]) -> None:
    size = SLOT_BYTES // 4 + 3
    into, expected = backend.zeros(size, np.float64), np.zeros(size)
    for seed, (ratio, first) in enumerate(((0.3, True), (1 / 3, False))):
        given = values(size, dtype, seed)
        backend.fold(into, unaligned(given), ratio, first)
        select("numpy").fold(expected, given, ratio, first)
    assert backend.to_host(into).tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("shape", [(9, 5), (3000, 16), (400, 1), (5, 70_000), (9, 0)])
def test_rows_are_taken_put_and_published(backend: Backend, shape: tuple[int, int], dtype: np.dtype[Any]) -> None:
    """Within a flat array, next to what is not theirs."""
    flat = values(shape[0] * shape[1] + 64, dtype)
    home = backend.place(flat)
    matrix = home[32 : len(flat) - 32].reshape(shape)
    ids = np.flatnonzero(np.random.default_rng(1).random(shape[0]) < 0.4)
    taken = backend.zeros(len(ids) * shape[1], dtype).reshape(len(ids), shape[1])
    backend.take_rows(matrix, backend.place(ids), taken)
    own = flat[32 : len(flat) - 32].reshape(shape)
    assert backend.to_host(taken).tobytes() == own[ids].tobytes()
    new, expected, weights = values(taken.size, dtype, 7).reshape(taken.shape), flat.copy(), own.copy()
    backend.put_rows(backend.place(new), backend.place(ids), matrix)
    expected[32 : len(flat) - 32].reshape(shape)[ids] = new
    assert backend.to_host(home).tobytes() == expected.tobytes()
    backend.publish_rows(backend.place(new), ids, weights)
    assert weights.tobytes() == expected[32 : len(flat) - 32].tobytes()


def test_no_rows_are_launched_for_nothing() -> None:
    device = new_device()
    backend = backend_on(device)
    launched = len(device.blocks)
    empty = backend.zeros(0, np.float32).reshape(0, 5)
    backend.take_rows(backend.zeros(10, np.float32).reshape(2, 5), backend.zeros(0, np.int64), empty)
    backend.put_rows(empty, backend.zeros(0, np.int64), backend.zeros(10, np.float32).reshape(2, 5))
    assert len(device.blocks) == launched


def test_fold_refuses_other_lengths(backend: Backend) -> None:
    with pytest.raises(ValueError, match="3 values cannot be folded into 4"):
        backend.fold(backend.zeros(4, np.float32), np.zeros(3, np.float32), 1.0, True)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
def test_state_is_written_cast_and_read_back(backend: Backend, dtype: np.dtype[Any]) -> None:
    state, given = state_dtype(dtype), values(SLOT_BYTES // 3 * 2, dtype).reshape(2, -1)
    into = backend.zeros(given.size + 5, state)
    backend.write(into[5:].reshape(given.shape), given)
    backend.write(into[:5], 0.25)
    expected = np.concatenate([np.full(5, 0.25, state), given.reshape(-1).astype(state)])
    assert backend.to_host(into).tobytes() == expected.tobytes()
    assert backend.to_host(into[5:].reshape(given.shape)).shape == given.shape


@pytest.mark.parametrize("copies_at_once", [False, True])
def test_one_slot_is_enough_for_any_size(copies_at_once: bool) -> None:
    device, given = new_device(copies_at_once=copies_at_once), values(SLOT_BYTES, np.float32)
    backend = backend_on(device, slots=1)
    written, folded = (backend.zeros(given.size, np.float32) for _ in range(2))
    backend.write(written, given)
    backend.fold(folded, given, 1.0, True)
    assert backend.to_host(written).tobytes() == backend.to_host(folded).tobytes() == given.tobytes()


def test_host_memory_is_placed_and_state_memory_stays(backend: Backend) -> None:
    given = values(12, np.float32).reshape(3, 4)
    placed = backend.place(given)
    assert not isinstance(placed, np.ndarray)
    assert backend.place(placed) is placed
    np.testing.assert_array_equal(backend.to_host(placed), given)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("size", SIZES)
def test_weights_are_published_whole_and_narrowed(backend: Backend, size: int, dtype: np.dtype[Any]) -> None:
    masters, weights = values(size, state_dtype(dtype)), backend.host_zeros(size, dtype)
    placed = backend.place(masters)
    backend.publish(placed, weights)
    assert weights.tobytes() == masters.astype(dtype).tobytes()
    twin = backend.zeros(size, dtype)
    backend.write(twin, masters[::-1])
    backend.publish(twin, weights)
    assert weights.tobytes() == masters[::-1].astype(dtype).tobytes()


@pytest.mark.parametrize("dtype", DTYPES[2:], ids=lambda dtype: dtype.name)
def test_every_16_bit_pattern_is_widened_and_every_float32_narrowed_alike(backend: Backend, dtype: np.dtype[Any]) -> None:
    patterns = np.arange(65_536, dtype=np.uint16).view(dtype)
    into = backend.zeros(65_536, np.float32)
    backend.fold(into, patterns, 1.0, True)
    bits = np.random.default_rng(0).integers(0, 1 << 32, 300_000, np.uint32).view(np.float32)
    near = [patterns.astype(np.float32).view(np.uint32) + np.uint32(k) for k in (0, 1, 4096, 32768, 32769)]
    masters = np.concatenate([bits, *(neighbour.view(np.float32) for neighbour in near)])
    weights = backend.host_zeros(len(masters), dtype)
    backend.publish(backend.place(masters), weights)
    with np.errstate(all="ignore"):
        expected = [patterns.astype(np.float32), masters.astype(dtype)]
    for found, wanted in zip((backend.to_host(into), weights), expected, strict=True):
        nan = wanted != wanted
        assert np.array_equal(found != found, nan)
        unsigned = f"u{found.itemsize}"
        assert np.array_equal(found.view(unsigned)[~nan], wanted.view(unsigned)[~nan])


def test_host_memory_begins_at_a_cache_line(backend: Backend) -> None:
    for length in (0, 1, 1000):
        array = backend.host_zeros(length, np.float16)
        assert array.shape == (length,)
        assert not array.any()
        assert array.ctypes.data % 64 == 0 or not length


def test_padding_is_cleared_and_its_indices_are_kept_no_longer_than_the_caller_keeps_them(backend: Any) -> None:
    kept = len(backend._indices)
    indices = np.array([1, 500, 999], np.intp)
    for dtype in DTYPES:
        array = backend.place(np.ones(1000, dtype))
        backend.clear(array, indices)
        assert np.flatnonzero(backend.to_host(array) == 0).tolist() == [1, 500, 999]
    backend.clear(array, np.array([], np.intp))
    assert len(backend._indices) == kept + 1
    del indices
    gc.collect()
    assert len(backend._indices) == kept


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [0, 1, 1024, 20_001, SEGMENT + 5])
def test_the_sum_of_squares_has_the_same_bits(backend: Backend, size: int, dtype: Any) -> None:
    array = values(size, dtype)
    assert backend.sum_of_squares(backend.place(array)) == select("numpy").sum_of_squares(array)
    for length in (1000, 8192, SEGMENT + 1):
        expected = [select("numpy").sum_of_squares(array[at : at + length]) for at in range(0, size, length)]
        assert list(backend.sums_of_squares(backend.place(array), length)) == expected


def test_more_rows_of_squares_than_go_at_once(backend: Backend) -> None:
    array = values(2500 * 16, np.float32)
    expected = [select("numpy").sum_of_squares(row) for row in array.reshape(-1, 16)]
    assert list(backend.sums_of_squares(backend.place(array), 16)) == expected


def test_norms_of_two_jobs_at_once_do_not_mix(backend: Backend) -> None:
    arrays = [values(50_000, np.float32, seed) for seed in range(4)]
    found: dict[int, set[float]] = {seed: set() for seed in range(4)}

    def measure(seed: int) -> None:
        placed = backend.place(arrays[seed])
        found[seed] |= {backend.sum_of_squares(placed) for _ in range(20)}

    threads = [threading.Thread(target=measure, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {seed: {select("numpy").sum_of_squares(array)} for seed, array in enumerate(arrays)}


def test_gradients_of_many_handlers_share_the_slots(backend: Backend) -> None:
    size = SLOT_BYTES // 4 * 3
    into = [backend.zeros(size, np.float32) for _ in range(6)]

    def handle(index: int) -> None:
        for seed in range(3):
            backend.fold(into[index], values(size, np.float32, 10 * index + seed), 0.5, seed == 0)

    threads = [threading.Thread(target=handle, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for index, array in enumerate(into):
        expected = np.zeros(size, np.float32)
        for seed in range(3):
            select("numpy").fold(expected, values(size, np.float32, 10 * index + seed), 0.5, seed == 0)
        assert backend.to_host(array).tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
def test_a_kernel_steps_slices_wherever_they_begin(backend: Backend, dtype: np.dtype[Any]) -> None:
    adam, state, size = find("adam"), state_dtype(dtype), 4000
    choices, scalars = adam.choices(adam.defaults), adam.values(adam.defaults, 2, {})
    kernel, reference = (found.kernel(adam, choices, dtype) for found in (backend, select("numpy")))
    for gradient in dict.fromkeys((state, dtype)):
        start = [values(size, state, seed) ** 2 for seed in range(3)]
        narrow = backend.zeros(size, dtype) if dtype.itemsize == 2 else None
        p, *slots = (backend.place(array) for array in start)
        expected, expected_narrow = [array.copy() for array in start], None if narrow is None else np.zeros(size, dtype)
        for where in (slice(0, 1024), slice(1024, 1024), slice(1025, 1061), slice(1061, 4000)):
            g = values(size, gradient, 9)[where]
            given = backend.place(g) if where.start else g  # tests hand host memory over, rounds state memory
            kernel(p[where], given, [s[where] for s in slots], scalars, 0.7, None if narrow is None else narrow[where])
            own = [array[where] for array in expected]
            reference(own[0], g, own[1:], scalars, 0.7, None if expected_narrow is None else expected_narrow[where])
        for found, wanted in zip((p, *slots), expected, strict=True):
            assert backend.to_host(found).tobytes() == wanted.tobytes()
        if narrow is not None and expected_narrow is not None:
            assert backend.to_host(narrow).tobytes() == expected_narrow.tobytes()


def test_a_kernel_refuses_other_lengths_and_dtypes(backend: Backend) -> None:
    adam = find("adam")
    kernel = backend.kernel(adam, adam.choices(adam.defaults), np.dtype(np.float32))
    scalars, long, short = adam.values(adam.defaults, 1, {}), backend.zeros(8, np.float32), backend.zeros(7, np.float32)
    for arguments in ((short, long, [long, long]), (long, short, [long, long]), (long, long, [long, short])):
        with pytest.raises(ValueError, match="slices of other lengths"):
            kernel(*arguments, scalars, 1.0, None)
    with pytest.raises(ValueError, match="gradients have dtype float64"):
        kernel(long, backend.zeros(8, np.float64), [long, long], scalars, 1.0, None)
    assert backend.kernel(adam, adam.choices(adam.defaults), np.dtype(np.float32)) is kernel


def test_a_launch_is_as_large_as_its_work_and_no_larger_than_is_worth_it() -> None:
    device = new_device()
    backend = backend_on(device, slots=2)
    for size, blocks in ((1, 1), (1024, 1), (1028, 2), (100_000, 64)):
        into, given = backend.zeros(size, np.float32), np.zeros(size, np.float32)
        device.blocks.clear()
        backend.fold(into, given, 1.0, True)
        assert list(device.blocks) == [blocks]


def test_no_memory_is_a_typed_error_and_takes_nothing() -> None:
    device = new_device(capacity=24 << 20)
    backend = backend_on(device, slots=2)
    used = device.used
    array = backend.zeros(1 << 20, np.float32)
    with pytest.raises(OutOfMemoryError, match="host has no memory for 40,000,000 bytes"):
        backend.zeros(10_000_000, np.float32)
    assert device.used == used + (4 << 20)
    del array
    backend.to_host(backend.zeros(1, np.float32))  # what the streams held is let go
    gc.collect()
    assert device.used == used


def test_a_device_too_small_for_its_buffers_is_refused() -> None:
    with pytest.raises(OutOfMemoryError, match="no memory"):
        DeviceThread(new_device(capacity=3 << 20), slots=4)


def test_memory_that_array_functions_lack_is_a_typed_error(backend: Backend) -> None:
    def work() -> None:
        raise MemoryError("17 GiB")

    with pytest.raises(OutOfMemoryError, match="no memory for the update: 17 GiB"):
        backend.run(work)


def test_a_library_that_array_functions_lack_is_a_typed_error(backend: Backend) -> None:
    def work() -> None:
        raise ImportError("libcublas.so.13")

    with pytest.raises(MissingExtraError, match=r"the update needs a library: libcublas\.so\.13; the extras"):
        backend.run(work)


def test_array_functions_come_after_what_was_launched_before(backend: Backend) -> None:
    array = backend.place(values(1000, np.float32))
    doubled = backend.run(lambda: backend.xp.multiply(array, 2))
    assert backend.to_host(doubled).tobytes() == (values(1000, np.float32) * 2).tobytes()
    assert backend.run(lambda: len(backend.zeros(5, np.float32))) == 5, "a call from the device's thread is not queued"
    with pytest.raises(RuntimeError, match="must not wait for staging memory"):
        backend.run(lambda: backend.write(array, 0.0))


def test_finite_looks_at_host_memory(backend: Backend) -> None:
    assert backend.finite(np.ones(5, np.float16))
    assert not backend.finite(np.array([1, np.inf], ml_dtypes.bfloat16))


def test_two_kernels_share_a_module(backend: Any) -> None:
    """One compilation for gradients of either dtype."""
    sgd = find("sgd")
    kernel = backend.kernel(sgd, sgd.choices(sgd.defaults), np.dtype(np.float16))
    assert set(kernel._kernels) == {np.dtype(np.float32), np.dtype(np.float16)}
    assert source.kernel_name("SGD", np.dtype(np.float16), np.dtype(np.float16)) == "optserve_sgd_f32_g_f16_w_f16"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("name", [name for name, found in OPTIMIZERS.items() if isinstance(found, Elementwise)])
def test_no_kernel_spills_registers_to_memory(name: str, dtype: np.dtype[Any]) -> None:
    optimizer, backend = find(name), backend_named("cupy")
    kernel: Any = backend.kernel(optimizer, optimizer.choices(optimizer.defaults), dtype)

    def look() -> list[tuple[int, int]]:
        """In the device's thread: CUDA loads a kernel when it is first asked about."""
        return [(found.local_size_bytes, found.num_regs) for found in kernel._kernels.values()]

    for spilt, registers in backend.run(look):
        assert spilt == 0
        assert registers <= 128
