"""A store whose state memory is a device's: the same bits as on the host, through the backend's methods alone."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from host_device import backend_on, cupy_on_host, new_device

from optserve.server.formulas import Elementwise, find
from optserve.server.store import Store, StoreState
from optserve.wire.errors import OutOfMemoryError

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ for the kernels")

Build = Callable[..., Store]
Step = Callable[..., None]
DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16, np.complex64]
CASES: list[tuple[str, dict[str, Any]]] = [
    ("adam", {"amsgrad": True}),
    ("sgd", {}),
    ("nadam", {"l1": 0.1}),
    ("rprop", {}),
    ("adagrad", {"initial_accumulator_value": 0.5}),
    ("lamb", {"l1": 0.1}),
    ("lars", {"momentum": 0.0}),
]


def tensors(dtype: Any, seed: int) -> dict[str, np.ndarray]:
    """Odd sizes, so that there is padding."""
    random = np.random.default_rng(seed)
    shapes = {"a": (5, 7), "scalar": (), "nothing": (1, 0, 2), "b": (40,)}
    imaginary = 1j if np.dtype(dtype).kind == "c" else 0
    return {
        name: np.asarray(random.normal(size=shape) + imaginary * random.normal(size=shape)).astype(dtype)
        if imaginary
        else np.asarray(random.normal(size=shape)).astype(dtype)
        for name, shape in shapes.items()
    }


def pairs(value: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(value).reshape(-1).view(value.real.dtype) if np.iscomplexobj(value) else value


def bits(content: StoreState) -> dict[str, Any]:
    return {name: array.tobytes() for name, array in {**content.values, **content.state}.items()} | dict(content.steps)


def histories(name: str, options: dict[str, Any], dtype: Any, build: Build, step: Step) -> list[list[dict[str, Any]]]:
    """What a store on the host and one on a device hold after each of the same calls."""
    optimizer = find(name)
    group = {**optimizer.defaults, "lr": 0.05, **options}
    found = []
    for backend in ("numpy", cupy_on_host()):
        store = build(optimizer, backend, [tensors(dtype, 0)], [group])
        seen = [bits(store.export())]
        for index in range(6):
            slopes = {key: pairs(value) for key, value in tensors(dtype, index + 1).items()}
            step(store, [group], slopes if index != 2 else {"b": slopes["b"]}, 0.5)
            with store.reading() as arrays:
                seen.append({array_id: array.tobytes() for array_id, array in arrays.items()})
            if index == 3:
                store.set_values({"a": tensors(dtype, 50)["a"]})
                content = store.export()
                step(store, [group], slopes)
                store.load(content, [group], with_values=True)
            seen.append(bits(store.export()))
        found.append(seen)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "options"), CASES, ids=[name for name, _ in CASES])
def test_a_device_holds_what_the_host_holds(name: str, options: dict[str, Any], dtype: Any, build: Build, step: Step) -> None:
    host, device = histories(name, options, dtype, build, step)
    for index, (ours, theirs) in enumerate(zip(device, host, strict=True)):
        assert ours == theirs, f"after call {index}"


def test_initial_values_that_came_in_blocks_reach_the_device(step: Step) -> None:
    store = Store(find("sgd"), cupy_on_host())
    store.add_group([("a", (3,), np.dtype(np.float16)), ("b", (40,), np.dtype(np.float16))])
    raw = np.full(96, 1.5, np.float16)
    store.write_block(0, 0, memoryview(raw.tobytes()))
    store.seal()
    step(store, [{**find("sgd").defaults, "lr": 1.0}], {"a": np.ones(3, np.float16), "b": np.full(40, 2, np.float16)})
    with store.reading() as arrays:
        assert arrays[0].tolist() == [0.5] * 3 + [0.0] * 29 + [-0.5] * 40 + [0.0] * 24


def test_gradients_of_the_host_do_as_well(build: Build) -> None:
    """A log has them so."""
    for name in ("adam", "lamb"):
        group, found = find(name).defaults, []
        for backend in ("numpy", cupy_on_host()):
            store = build(find(name), backend, [{"a": np.ones((5, 7), np.float32)}], [group])
            store.update([group], {0: np.random.default_rng(0).normal(size=64).astype(np.float32)})
            found.append(store.export().values["a"].tobytes())
        assert found[0] == found[1]


@pytest.mark.parametrize("name", ["adam", "lamb"])
def test_a_device_without_room_says_so_when_the_job_is_made(name: str) -> None:
    device = new_device(capacity=60 << 20)
    store, groups = Store(find(name), backend_on(device)), [find(name).defaults]
    free = device.capacity - device.used
    length = free // 4 // 2 // 32 * 32  # the masters fit, the slots do not
    store.add_group([("a", (length,), np.dtype(np.float32))])
    used = device.used
    for _ in range(2):
        with pytest.raises(OutOfMemoryError, match="host has no memory for"):
            store.prepare(groups)
        store.backend.to_host(store._columns[0].masters[:1])  # what the streams held is let go
        gc.collect()
        assert device.used == used
    with pytest.raises(OutOfMemoryError, match="host has no memory for"):
        store.add_group([("b", (2 * length,), np.dtype(np.float32))])
    assert device.used == used
    assert [place.name for place in store.layout.places] == ["a"]


def test_the_room_for_gradients_is_taken_when_the_job_is_made() -> None:
    device = new_device(capacity=60 << 20)
    backend = backend_on(device)
    store, groups = Store(find("sgd"), backend), [find("sgd").defaults]
    length = (device.capacity - device.used) // 4 * 3 // 320 * 32  # three tenths; this optimizer has no other state
    store.add_group([("a", (length,), np.dtype(np.float32))])
    store.prepare(groups)
    backend.to_host(store._columns[0].masters[:1])  # what the streams held is let go
    gc.collect()
    used = device.used
    (gradient,) = store.accumulators().values()
    assert gradient.shape == (length,)
    assert not backend.to_host(gradient).any()
    assert device.used == used
    assert store.accumulators(wanted=[]) == {}
    store.prepare(groups)
    assert device.used == used, "once"
    store.add_group([("b", (length,), np.dtype(np.float32))])
    with pytest.raises(OutOfMemoryError, match="host has no memory for"):
        store.prepare([*groups, *groups])


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_step_is_tried_once_for_each_number_of_dimensions(momentum: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has kernels of its own to compile; with and without state."""
    tried: list[tuple[int, ...]] = []
    lars = find("lars")
    monkeypatch.setattr(type(lars), "step", lambda *arguments: tried.append(arguments[5].shape))
    store, group = Store(lars, cupy_on_host()), {**lars.defaults, "momentum": momentum}
    shapes = {"a": (40,), "b": (5, 7), "c": (), "d": (9, 9), "e": (3,)}
    store.add_group([(name, shape, np.dtype(np.float32)) for name, shape in shapes.items()])
    for _ in range(2):
        store.prepare([group])
        assert sorted(tried) == [(), (9, 9), (40,)]
    store.add_group([("f", (2, 2), np.dtype(np.float32))])
    store.prepare([group, group])
    assert tried[3:] == [(2, 2)]


def test_what_a_step_computes_besides_is_tried_when_the_job_is_made(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[tuple[Any, ...]] = []
    lamb = find("lamb")
    assert not isinstance(lamb, Elementwise)

    def note(xp: Any, group: Any, step: int, dtype: Any, p: Any, g: Any, state: Any) -> None:
        tried.append((xp is cupy_on_host().xp, step, dtype, p.shape, {slot: array.shape for slot, array in state.items()}))

    monkeypatch.setattr(type(lamb), "step", lambda _, *arguments: note(*arguments))
    store = build(lamb, cupy_on_host(), [tensors(np.float16, 0)], [lamb.defaults])
    slots = {"exp_avg": (40,), "exp_avg_sq": (40,)}
    assert (True, 1, np.float16, (40,), slots) in tried
    before, once = bits(store.export()), len(tried)
    store.prepare([lamb.defaults])
    assert len(tried) == once
    assert bits(store.export()) == before

    def fail(*_: Any) -> None:
        raise MemoryError("too little")

    monkeypatch.setattr(type(lamb), "step", fail)
    store = Store(lamb, cupy_on_host())
    store.add_group([("b", (40,), np.dtype(np.float32))])
    before = store.state_bytes
    for _ in range(2):
        with pytest.raises(OutOfMemoryError, match="'b' of 40 elements computes; nothing was changed"):
            store.prepare([lamb.defaults])
        assert store.state_bytes == before
