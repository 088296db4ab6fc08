"""How fast is one optimizer step, beside torch's and beside a loop that only moves the same bytes?

    python benchmarks/kernels.py [--backend numba|numpy] [--only NAME] [--elements 16M] [--threads 1,2] [--repeat 9] [--json F]

Every contender steps one float32 parameter: a flat one, or for optimizers that look at whole tensors a square matrix of MATRIX
elements. Contenders take turns, so that all see the same machine; the figures are medians in 10^9 parameters a second, the
ratios medians of ratios within a turn.

torch's ways are "loop" (foreach=False, its default on a CPU), "foreach" and "fused", as far as the optimizer has them; "torch"
in a ratio is the fastest of them. "moves" is a kernel of the same backend that loads and stores what the optimizer's does and
computes one sum, without which it could leave a load out.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gpu_kernels
import numpy as np
import torch

from optserve.server.backends import select
from optserve.server.formulas import OPTIMIZERS, Elementwise, Optimizer, find
from optserve.server.store import Store

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "adam": [{}, {"amsgrad": True}],
    "rmsprop": [{}, {"centered": True, "momentum": 0.9}],
    "sgd": [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}],
}
"""Options to measure of optimizers that have more than one kernel of interest; of the others, the defaults."""

MATRIX = 1 << 20
"""Elements: Muon's matrix products take seconds on a CPU where the matrix is as large as the flat parameter."""

HOW = {"loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
TARGETS = {"numba": {"torch": 0.9, "moves": 0.9}, "numpy": {"loop": 1.5}}
"""Backend to the peers that it is measured against, and the least ratio for elementwise optimizers."""

PAUSE_SECONDS = 0.05
"""Before each turn: the threads of the one before, OpenMP's in torch above all, go on spinning for a while on the cores."""

Step = Callable[[], object]


def moves(optimizer: Elementwise, options: Mapping[str, Any]) -> Elementwise:
    """An optimizer with as many slots, whose formula is a rotation of its values."""
    formulas: dict[int, Callable[..., Any]] = {0: _rotate0, 1: _rotate1, 2: _rotate2, 3: _rotate3}
    slots = optimizer.slots({**optimizer.defaults, **options})
    return Elementwise(
        name="Moves",
        defaults={},
        check=lambda _: None,
        slot_keys=slots,
        options=lambda _: {},
        scalars=lambda *_: {},
        formula=formulas[len(slots)],
    )


def _rotate0(p, g):  # type: ignore[no-untyped-def]
    return p + g


def _rotate1(p, g, a):  # type: ignore[no-untyped-def]
    return g + a, p


def _rotate2(p, g, a, b):  # type: ignore[no-untyped-def]
    return g + b, p, a


def _rotate3(p, g, a, b, c):  # type: ignore[no-untyped-def]
    return g + c, p, a, b


def store_step(backend: str, optimizer: Optimizer, options: Mapping[str, Any], values: np.ndarray, threads: int) -> Step:
    groups = [{**optimizer.defaults, **options}]
    store = Store(optimizer, select(backend), threads)
    store.add_group([("p", values.shape, values.dtype)])
    store.set_values({"p": values})
    store.seal()
    store.prepare(groups)
    gradients = store.accumulators()
    gradients[0][: values.size] = values.reshape(-1)[::-1]
    return lambda: store.update(groups, gradients)


def torch_steps(name: str, options: Mapping[str, Any], values: np.ndarray) -> dict[str, Step]:
    """torch's ways to take the step; empty if it has no such optimizer."""
    kind = getattr(torch.optim, find(name).name, None)
    if kind is None:
        return {}
    known = inspect.signature(kind).parameters
    ways = {how: flags for how, flags in HOW.items() if flags.keys() <= known.keys()}
    return {how: _torch_step(kind, options, flags, values) for how, flags in (ways or {"loop": {}}).items()}


def _torch_step(kind: Any, options: Mapping[str, Any], flags: Mapping[str, Any], values: np.ndarray) -> Step:
    tensor = torch.from_numpy(values.copy()).requires_grad_()
    tensor.grad = torch.from_numpy(values.reshape(-1)[::-1].reshape(values.shape).copy())
    return kind([tensor], **flags, **options).step  # type: ignore[no-any-return]


def interleaved(contenders: Mapping[str, Step], repeat: int) -> dict[str, list[float]]:
    """Seconds of each turn of each contender."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        run()
        run()
    for _ in range(repeat):
        for name, run in contenders.items():
            time.sleep(PAUSE_SECONDS)
            begin = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - begin)
    return times


def paired_ratio(theirs: list[float], ours: list[float]) -> float:
    """How much faster ours was: the median over turns, each of which both took within the same second."""
    return statistics.median(slow / fast for slow, fast in zip(theirs, ours, strict=True))


def measure_one(
    name: str, options: Mapping[str, Any], values: np.ndarray, backends: list[str], threads: int, repeat: int
) -> dict[str, Any]:
    optimizer = find(name)
    whole = not isinstance(optimizer, Elementwise)
    if whole:
        side = math.isqrt(min(MATRIX, values.size))
        values = values[: side * side].reshape(side, side)
    ways = torch_steps(name, options, values)
    contenders: dict[str, Step] = dict(ways)
    for backend in backends:
        contenders[backend] = store_step(backend, optimizer, options, values, threads)
    if isinstance(optimizer, Elementwise) and "numba" in backends:
        contenders["moves"] = store_step("numba", moves(optimizer, options), {}, values, threads)
    times = interleaved(contenders, repeat)
    if ways:
        times["torch"] = times[min(ways, key=lambda way: statistics.median(times[way]))]
    speeds = {contender: values.size / statistics.median(found) / 1e9 for contender, found in times.items()}
    ratios = {
        f"{backend}/{peer}": paired_ratio(times[peer], times[backend])
        for backend in backends
        for peer in {**TARGETS[backend], "torch": 0}
        if peer in times
    }
    return {"optimizer": name, "options": options, "whole": whole, "threads": threads, "speeds": speeds, "ratios": ratios}


COLUMNS = ("numba", "numpy", "moves", *HOW)


def header() -> str:
    ratios = [f"{backend}/{peer}" for backend, peers in TARGETS.items() for peer in peers]
    return f"{'variant':<50}{'threads':>8}" + "".join(f"{column:>13}" for column in (*COLUMNS, *ratios))


def line(row: Mapping[str, Any]) -> str:
    options = ", ".join(f"{name}={value}" for name, value in row["options"].items())
    cells = [f"{row['speeds'][column]:.3f}" if column in row["speeds"] else "-" for column in COLUMNS]
    for backend, peers in TARGETS.items():
        for peer, least in peers.items():
            ratio = row["ratios"].get(f"{backend}/{peer}")
            missed = ratio is not None and ratio < least and not row["whole"]
            cells.append("-" if ratio is None else f"{ratio:.2f}{'!' if missed else ' '}")
    return f"{row['optimizer']}({options})".ljust(50) + f"{row['threads']:>8}" + "".join(f"{cell:>13}" for cell in cells)


def number(text: str) -> int:
    """16M, 250K or plain digits."""
    factor = {"K": 10**3, "M": 10**6, "G": 10**9}.get(text[-1:].upper(), 1)
    return int(float(text.rstrip("kKmMgG")) * factor)


def elementwise(names: list[str] | None) -> list[tuple[str, dict[str, Any]]]:
    """What is measured on a GPU."""
    found = [name for name in names or OPTIMIZERS if isinstance(find(name), Elementwise)]
    return [(name, options) for name in found for options in VARIANTS.get(name, [{}])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=[*TARGETS, "cupy"], action="append", help="one backend only; may be repeated")
    parser.add_argument("--only", choices=list(OPTIMIZERS), action="append", help="one optimizer only; may be repeated")
    parser.add_argument("--elements", type=number, default=number("16M"))
    parser.add_argument("--threads", type=lambda text: [int(part) for part in text.split(",")], default=[1, 2])
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    backends = arguments.backend or list(TARGETS)
    if "cupy" in backends:
        gpu_kernels.main(elementwise(arguments.only), arguments.elements, arguments.repeat, arguments.json)
        return
    print(f"{arguments.elements:,} float32, 10^9 parameters a second; '!' marks a ratio below its target", header(), sep="\n")
    values = np.random.default_rng(0).normal(size=arguments.elements).astype(np.float32)
    rows: list[dict[str, Any]] = []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for name in arguments.only or OPTIMIZERS:
            for options in VARIANTS.get(name, [{}]):
                rows.append(measure_one(name, options, values, backends, threads, arguments.repeat))
                print(line(rows[-1]), flush=True)
    if arguments.json:
        machine = {"machine": platform.machine(), "python": platform.python_version(), "torch": torch.__version__}
        arguments.json.write_text(json.dumps({"elements": arguments.elements, **machine, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
