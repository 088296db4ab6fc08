"""How fast is one optimizer step on a GPU, beside a copy of the same bytes and beside torch's fused Adam on the same card?

    python benchmarks/kernels.py --backend cupy --elements 100M [--only NAME] [--repeat 9] [--json FILE]

The roof is the better of a copy kernel with 16-byte accesses and CUDA's own device-to-device copy. A kernel's figure is the
bytes that its formula must read and write, by the median time of a launch, as a fraction of the roof; the target is 0.90. Times
are those between two events on the stream, around launches in a row, on data as training has it (zeros and denormals are slower
to divide). Below some 5 million parameters everything lies in the cache, and a launch costs as much as the work.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from optserve.server.backends import select
from optserve.server.backends.cupy import source
from optserve.server.backends.cupy.backend import CupyBackend
from optserve.server.formulas import Elementwise, find
from optserve.server.formulas.language import Program
from optserve.server.store import Store
from optserve.wire.chunks import CHUNK_BYTES
from optserve.wire.errors import MissingExtraError

TARGET, TORCH_TARGET, STEP_TARGET = 0.90, 1.0, 1.25
"""Least fraction of the roof, least speed in torch's fused Adam's, most time of a step in that of its slower transfer."""

F32, BF16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)
DTYPES = {"f32": (F32, F32), "bf16": (BF16, F32), "bf16, its gradient too": (BF16, BF16)}
"""Parameters' and gradients' dtypes."""

COPY = """\
extern "C" __global__ void __launch_bounds__(512) copy16(const float* __restrict__ a, float* __restrict__ b, const Index n) {
  for (Index i = first_of(); i < n; i += stride_of()) store<4>(b, i, load<4>(a, i));
}
"""

IN_A_ROW = 10
"""Between two events: the host launches the next while the device works, so that its own time does not count."""

Timer = Callable[[Callable[[], object], int], float]
"""timer(work, how often) -> the median seconds that the work takes on the device."""


def event_timer(backend: CupyBackend) -> Timer:
    """By CUDA's events. Work is done in the device's thread."""
    cuda, stream = backend.xp.cuda, backend._device.compute

    def seconds(work: Callable[[], object], repeat: int) -> float:
        def measure() -> list[float]:
            times = []
            for turn in range(repeat + 2):
                begin, end = cuda.Event(), cuda.Event()
                begin.record(stream)
                for _ in range(IN_A_ROW):
                    work()
                end.record(stream)
                end.synchronize()
                times += [cuda.get_elapsed_time(begin, end) / 1e3 / IN_A_ROW] if turn >= 2 else []
            return times

        return statistics.median(backend.run(measure))

    return seconds


def bytes_a_parameter(program: Program, dtype: np.dtype[Any], gradient: np.dtype[Any]) -> int:
    """What a step must read and write."""
    state = 8 if dtype == np.float64 else 4
    used = {operand for operation in program.operations for operand in operation.operands} | set(program.results)
    reads = sum(state for name in ("p", *program.slots) if name in used) + gradient.itemsize
    return reads + state * len(program.results) + (dtype.itemsize if dtype.itemsize == 2 else 0)


def roof(backend: CupyBackend, elements: int, timer: Timer, repeat: int) -> dict[str, float]:
    """Bytes a second of either way to copy."""
    (kernel,) = backend.load(source.PRELUDE + COPY, ["copy16"])
    a, b = (backend.zeros(elements, np.float32) for _ in range(2))
    backend.write(a, 1.0)
    packs = np.int64(elements // 4)
    times = {"copy kernel": timer(lambda: backend.launcher.launch(kernel, int(packs), a, b, packs), repeat)}
    if hasattr(b, "data"):
        times["cudaMemcpy"] = timer(lambda: b.data.copy_from_device_async(a.data, a.nbytes), repeat)
    return {way: 8 * elements / seconds for way, seconds in times.items()}


def kernel_seconds(
    backend: CupyBackend, name: str, options: Mapping[str, Any], elements: int, pair: Any, timer: Timer, repeat: int
) -> tuple[float, int]:
    """Of one launch, and its bytes a parameter."""
    (dtype, gradient), optimizer = pair, find(name)
    assert isinstance(optimizer, Elementwise)
    group = {**optimizer.defaults, **options}
    choices = optimizer.choices(group)
    kernel, program = backend.kernel(optimizer, choices, dtype), optimizer.program(choices)
    piece = np.random.default_rng(0).normal(size=min(elements, 1 << 20)).astype(np.float32)
    p, g, *slots = (_filled(backend, elements, kind, piece) for kind in (F32, gradient, *[F32] * len(program.slots)))
    weights = backend.zeros(elements, dtype) if dtype.itemsize == 2 else None
    values = optimizer.values(group, 10, optimizer.initial(group))
    seconds = timer(lambda: kernel(p, g, slots, values, 1.0, weights), repeat)
    return seconds, bytes_a_parameter(program, dtype, gradient)


def _filled(backend: CupyBackend, elements: int, dtype: np.dtype[Any], piece: np.ndarray) -> Any:
    array = backend.zeros(elements, dtype)
    for begin in range(0, elements, len(piece)):
        part = array[begin : begin + len(piece)]
        backend.write(part, np.abs(piece[: len(part)]) * 0.01)
    return array


def torch_seconds(tensors: int, elements: int, repeat: int) -> float | None:
    """torch's fused Adam on so many tensors of together so many elements; None where torch sees no GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    parameters = [torch.randn(elements // tensors, device="cuda").requires_grad_() for _ in range(tensors)]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer, times = torch.optim.Adam(parameters, fused=True), []
    for turn in range(repeat + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(IN_A_ROW):
            optimizer.step()
        end.record()
        end.synchronize()
        times += [begin.elapsed_time(end) / 1e3 / IN_A_ROW] if turn >= 2 else []
    return statistics.median(times)


def whole_step(backend: CupyBackend, elements: int, repeat: int) -> dict[str, float]:
    """Milliseconds of Adam's step with its transfers, its gradients in chunks as gRPC gives them, and of transfers alone."""
    adam = find("adam")
    store, groups = Store(adam, backend), [adam.defaults]
    store.add_group([("p", (elements,), F32)])
    store.seal()
    store.prepare(groups)
    gradients, per_block = store.accumulators(), CHUNK_BYTES // 4
    length = len(gradients[0])
    given, pinned = np.random.default_rng(0).normal(size=length).astype(np.float32), backend.host_zeros(length, F32)

    def step() -> None:
        for begin in range(0, length, per_block):
            part = slice(begin, min(begin + per_block, length))
            backend.fold(gradients[0][part], given[part], 1.0, True)
        store.update(groups, gradients)

    def upload() -> None:
        device = backend._device
        event = backend.run(lambda: (device.upload(gradients[0], pinned, device.copy), device.record(device.copy))[1])
        backend._thread.wait("the transfer", event)

    works = {"step": step, "upload": upload, "download": lambda: backend.publish(gradients[0], pinned)}
    return {name: 1e3 * min(_timed(work) for _ in range(repeat)) for name, work in works.items()}


def _timed(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def measure(
    backend: CupyBackend, variants: Sequence[tuple[str, Mapping[str, Any]]], elements: int, repeat: int, timer: Timer
) -> Iterator[dict[str, Any]]:
    """The roof, a row for each variant and dtype, Adam beside torch's, and a step with its transfers."""
    roofs = roof(backend, elements, timer, repeat)
    yield {"device": backend.description, "elements": elements, "roof_bytes_a_second": roofs}
    best = max(roofs.values())
    adam = 0.0
    for name, options in variants:
        for title, pair in DTYPES.items():
            seconds, size = kernel_seconds(backend, name, options, elements, pair, timer, repeat)
            adam = seconds if (name, dict(options), title) == ("adam", {}, "f32") else adam
            rate = size * elements / seconds
            row = {"optimizer": name, "options": dict(options), "dtypes": title, "bytes_a_parameter": size}
            yield {**row, "microseconds": 1e6 * seconds, "fraction_of_roof": rate / best}
    for tensors in (1, 200):
        theirs = torch_seconds(tensors, elements, repeat)
        if theirs and adam:
            yield {"torch_fused_adam_tensors": tensors, "microseconds": 1e6 * theirs, "ratio": theirs / adam}
    few = min(elements, 25_000_000)
    found = whole_step(backend, few, repeat)
    ratio = found["step"] / max(found["upload"], found["download"])
    yield {"step_of_elements": few, "milliseconds": found, "ratio_to_slower_transfer": ratio}


def line(row: Mapping[str, Any]) -> str:
    if "roof_bytes_a_second" in row:
        ways = ", ".join(f"{way} {rate / 1e12:.3f} TB/s" for way, rate in row["roof_bytes_a_second"].items())
        return f"{row['device']}, {row['elements']:,} parameters; roof: {ways}"
    if "fraction_of_roof" in row:
        options = ", ".join(f"{name}={value}" for name, value in row["options"].items())
        title, fraction = f"{row['optimizer']}({options}) {row['dtypes']}", row["fraction_of_roof"]
        mark = "" if fraction >= TARGET else " !"
        return f"{title:<70}{row['bytes_a_parameter']:>3} B{row['microseconds']:>10.1f} us{100 * fraction:>7.1f} %{mark}"
    if "ratio" in row:
        mark = "" if row["ratio"] >= TORCH_TARGET else " !"
        return f"torch's fused Adam, {row['torch_fused_adam_tensors']} tensors: ours is {row['ratio']:.2f} times as fast{mark}"
    times = ", ".join(f"{name} {milliseconds:.2f} ms" for name, milliseconds in row["milliseconds"].items())
    mark = "" if row["ratio_to_slower_transfer"] <= STEP_TARGET else " !"
    return f"Adam with transfers, {row['step_of_elements']:,}: {times}; {row['ratio_to_slower_transfer']:.2f} x{mark}"


def main(variants: Sequence[tuple[str, Mapping[str, Any]]], elements: int, repeat: int, file: Path | None) -> None:
    """SystemExit says why there is no GPU."""
    try:
        backend = select("cupy")
    except MissingExtraError as error:
        raise SystemExit(f"error: {error}") from error
    assert isinstance(backend, CupyBackend)
    print("'!' marks what misses its target")
    rows = []
    for row in measure(backend, variants, elements, repeat, event_timer(backend)):
        rows.append(row)
        print(line(row), flush=True)
    if not any("ratio" in row for row in rows):
        print("torch sees no GPU (the test extra's is for CPUs): no ratio to its fused Adam")
    if file:
        file.write_text(json.dumps(rows, indent=2) + "\n")
