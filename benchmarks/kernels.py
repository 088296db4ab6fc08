"""How fast is one optimizer step, beside torch's and beside a plain copy?

    python benchmarks/kernels.py [--backend numba|numpy] [--elements 16M] [--threads 1,2] [--repeat 9] [--json FILE]

Every contender steps one flat float32 parameter. Contenders take turns, so that all see the same machine; the figures are
medians in 10^9 parameters a second, the ratios medians of ratios within a turn. "loop" is torch's default on a CPU
(foreach=False).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from optserve.server.backends import select
from optserve.server.formulas import find
from optserve.server.store import Store

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("adam", {}),
    ("adam", {"amsgrad": True}),
    ("adamw", {}),
    ("sgd", {}),
    ("sgd", {"momentum": 0.9}),
    ("sgd", {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}),
]
HOW = {"loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
TARGETS = {"numba": ("fused", 0.95), "numpy": ("loop", 1.5)}
"""Backend to the torch path that it is measured against, and the least ratio."""

Step = Callable[[], object]


def store_step(backend: str, name: str, options: Mapping[str, Any], values: np.ndarray, threads: int) -> Step:
    optimizer = find(name)
    groups = [{**optimizer.defaults, **options}]
    store = Store(optimizer, select(backend), threads)
    store.add_group([("p", values.shape, values.dtype)])
    store.set_values({"p": values})
    store.seal()
    store.prepare(groups)
    gradients = store.accumulators()
    gradients[0][: values.size] = values[::-1]
    return lambda: store.update(groups, gradients)


def torch_step(how: str, name: str, options: Mapping[str, Any], values: np.ndarray) -> Step:
    tensor = torch.from_numpy(values.copy()).requires_grad_()
    tensor.grad = torch.from_numpy(values[::-1].copy())
    return getattr(torch.optim, find(name).name)([tensor], **HOW[how], **options).step


def copy_step(values: np.ndarray) -> Step:
    source, target = values.copy(), values.copy()
    return lambda: np.copyto(target, source)


def interleaved(contenders: Mapping[str, Step], repeat: int) -> dict[str, list[float]]:
    """Seconds of each turn of each contender."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        run()
        run()
    for _ in range(repeat):
        for name, run in contenders.items():
            begin = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - begin)
    return times


def paired_ratio(theirs: list[float], ours: list[float]) -> float:
    """How much faster ours was: the median over turns, each of which both took within the same second."""
    return statistics.median(slow / fast for slow, fast in zip(theirs, ours, strict=True))


def measure(backends: list[str], elements: int, threads: list[int], repeat: int) -> list[dict[str, Any]]:
    values = np.random.default_rng(0).normal(size=elements).astype(np.float32)
    rows: list[dict[str, Any]] = []
    for count in threads:
        torch.set_num_threads(count)
        for name, options in VARIANTS:
            contenders: dict[str, Step] = {"copy": copy_step(values)}
            contenders |= {backend: store_step(backend, name, options, values, count) for backend in backends}
            contenders |= {how: torch_step(how, name, options, values) for how in HOW}
            times = interleaved(contenders, repeat)
            speeds = {contender: elements / statistics.median(found) / 1e9 for contender, found in times.items()}
            ratios = {backend: paired_ratio(times[TARGETS[backend][0]], times[backend]) for backend in backends}
            rows.append({"optimizer": name, "options": options, "threads": count, "speeds": speeds, "ratios": ratios})
            print(line(rows[-1], backends), flush=True)
    return rows


def header(backends: list[str]) -> str:
    columns = ["copy", *backends, *HOW, *(f"{backend}/{TARGETS[backend][0]}" for backend in backends)]
    return f"{'variant':<60}{'threads':>8}" + "".join(f"{column:>12}" for column in columns)


def line(row: Mapping[str, Any], backends: list[str]) -> str:
    options = ", ".join(f"{name}={value}" for name, value in row["options"].items())
    title = f"{row['optimizer']}({options})"
    cells = [f"{speed:.2f}" for speed in row["speeds"].values()]
    for backend in backends:
        ratio, least = row["ratios"][backend], TARGETS[backend][1]
        cells.append(f"{ratio:.2f}{' ' if ratio >= least else '!'}")
    return f"{title:<60}{row['threads']:>8}" + "".join(f"{cell:>12}" for cell in cells)


def number(text: str) -> int:
    """16M, 250K or plain digits."""
    factor = {"K": 10**3, "M": 10**6, "G": 10**9}.get(text[-1:].upper(), 1)
    return int(float(text.rstrip("kKmMgG")) * factor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=list(TARGETS), action="append", help="one backend only; may be repeated")
    parser.add_argument("--elements", type=number, default=number("16M"))
    parser.add_argument("--threads", type=lambda text: [int(part) for part in text.split(",")], default=[1, 2])
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    backends = arguments.backend or list(TARGETS)
    print(
        f"{arguments.elements:,} float32, 10^9 parameters a second; '!' marks a ratio below its target",
        header(backends),
        sep="\n",
    )
    rows = measure(backends, arguments.elements, arguments.threads, arguments.repeat)
    if arguments.json:
        machine = {"machine": platform.machine(), "python": platform.python_version(), "torch": torch.__version__}
        arguments.json.write_text(json.dumps({"elements": arguments.elements, **machine, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
