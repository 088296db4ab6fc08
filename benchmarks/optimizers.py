"""The table of docs/optimizers.md: every optimizer on every backend, how close and how fast.

    python benchmarks/optimizers.py [--check]

Errors are measured here, after a hundred steps in which each gradient depends on the parameters: the largest difference of
our parameters, of order 1, from those of torch's default loop in the same dtype (where torch has no such optimizer, from the
float64 textbook loop of tests/reference); SparseAdam's gradient has all rows. LBFGS, which takes no gradient but a closure, has
no row. Speeds come from results/kernels.json, one thread, and results/gpu_kernels.json
where that was measured. --check writes nothing and fails if the table in the docs lacks an optimizer.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from optserve.server.backends import select
from optserve.server.formulas import OPTIMIZERS, Elementwise, Optimizer, Searching, find
from optserve.server.store import Store
from optserve.wire.rows import Rows

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "optimizers.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
STEPS, SHAPE = 100, (150, 140)

sys.path.insert(0, str(HERE.parent / "tests"))


def gradient(values: np.ndarray, step: int) -> np.ndarray:
    """Of a slope towards 0 and a wave, so that it changes its sign and its size."""
    place = np.arange(values.size, dtype=np.float64).reshape(values.shape)
    return (0.5 * values.astype(np.float64) + np.sin(place + 0.3 * step)).astype(values.dtype)


def ours(name: str, backend: str, start: np.ndarray) -> np.ndarray:
    optimizer = find(name)
    groups = [dict(optimizer.defaults)]
    store = Store(optimizer, select(backend))
    store.add_group([("p", start.shape, start.dtype)])
    store.set_values({"p": start})
    store.seal()
    store.prepare(groups)
    accumulators = store.accumulators()
    for step in range(STEPS):
        slope = gradient(store.export().values["p"], step)
        if optimizer.no_dense:
            store.update(groups, {}, sparse={0: Rows(np.arange(len(slope)), slope)})
        else:
            accumulators[0][: start.size] = slope.reshape(-1)
            store.update(groups, accumulators)
    return store.export().values["p"]


def theirs(name: str, start: np.ndarray) -> np.ndarray:
    """torch's run, or the textbook's."""
    kind = getattr(torch.optim, find(name).name, None)
    if kind is None:
        return _textbook(name, start)
    tensor = torch.from_numpy(start.copy()).requires_grad_()
    optimizer = kind([tensor])
    for step in range(STEPS):
        slope = torch.from_numpy(gradient(tensor.detach().numpy(), step))
        tensor.grad = slope.to_sparse(1) if find(name).no_dense else slope
        optimizer.step()
    return tensor.detach().numpy()  # type: ignore[no-any-return]


def _textbook(name: str, start: np.ndarray) -> np.ndarray:
    from reference import LOOPS

    values, state = start.astype(np.float64), {}
    for step in range(STEPS):
        slope = gradient(values, step)
        found = LOOPS[name](find(name).defaults, values.reshape(-1).tolist(), slope.reshape(-1).tolist(), state)
        values = np.asarray(found).reshape(start.shape)
    return values


def cpu_speeds(path: Path) -> dict[str, Mapping[str, Any]]:
    """The measured row of each optimizer's defaults on one thread."""
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    return {row["optimizer"]: row for row in rows if not row["options"] and row["threads"] == 1}


def gpu_speeds(path: Path) -> dict[str, tuple[float, float]]:
    """10^9 parameters a second, and the fraction of the card's copy bandwidth, of each optimizer's defaults in float32."""
    rows = json.loads(path.read_text()) if path.exists() else []
    elements = next((row["elements"] for row in rows if "elements" in row), 0)
    return {
        row["optimizer"]: (elements / row["microseconds"] / 1e3, row["fraction_of_roof"])
        for row in rows
        if "fraction_of_roof" in row and not row["options"] and row["dtypes"] == "f32"
    }


def rows() -> list[str]:
    start = np.random.default_rng(3).normal(size=SHAPE)
    cpu, gpu = cpu_speeds(HERE / "results" / "kernels.json"), gpu_speeds(HERE / "results" / "gpu_kernels.json")
    found = []
    for name, optimizer in stepped().items():
        starts = [start.astype(kind) for kind in ("f8", "f4")]
        wanted = [theirs(name, entry) for entry in starts]
        for backend in ("numba", "numpy"):
            errors = [float(np.abs(ours(name, backend, a) - b).max()) for a, b in zip(starts, wanted, strict=True)]
            row = cpu.get(name, {"speeds": {}, "ratios": {}})
            speed, ratio = row["speeds"].get(backend), row["ratios"].get(f"{backend}/torch")
            kind = "" if isinstance(optimizer, Elementwise) else " ¹"
            cells = [f"{optimizer.name}{kind}", backend, *(f"{error:.0e}" for error in errors)]
            found.append("| " + " | ".join([*cells, _number(speed), _number(ratio), *_gpu(gpu.get(name))]) + " |")
    return found


def stepped() -> dict[str, Optimizer]:
    """The optimizers that a gradient alone makes a step of."""
    return {name: optimizer for name, optimizer in OPTIMIZERS.items() if not isinstance(optimizer, Searching)}


def _number(found: float | None) -> str:
    return "-" if found is None else f"{found:.2f}"


def _gpu(found: tuple[float, float] | None) -> list[str]:
    return ["not measured"] * 2 if found is None else [f"{found[0]:.1f}", f"{found[1]:.2f}"]


def table() -> str:
    titles = ["optimizer", "backend", "float64 error", "float32 error", "10⁹ param/s", "× torch's fastest on a CPU"]
    titles += ["10⁹ param/s, GPU", "of the card's copy bandwidth"]
    head = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    return "\n".join([BEGIN, *head, *rows(), END])


def replaced(page: str, part: Callable[[], str]) -> str:
    before, _, rest = page.partition(BEGIN)
    return before + part() + rest.partition(END)[2]


def lacking(page: str) -> list[str]:
    """Optimizers that the page's table has no row of."""
    shown = page.partition(BEGIN)[2].partition(END)[0]
    return [entry.name for entry in stepped().values() if f"\n| {entry.name} " not in shown]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only look whether the table has every optimizer")
    page = PAGE.read_text()
    if parser.parse_args().check:
        sys.exit(f"the table of {PAGE} lacks {', '.join(lacking(page))}" if lacking(page) else 0)
    PAGE.write_text(replaced(page, table))


if __name__ == "__main__":
    main()
