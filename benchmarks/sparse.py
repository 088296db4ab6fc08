"""What does a step of an embedding cost? Push of the touched rows' gradients, SparseAdam, pull of the next batch's rows.

    python benchmarks/sparse.py [--rows 100000 1000000 10000000] [--touched 1000 10000 100000] [--dim 16]
                                [--repetitions 15] [--dense-rows 10000000] [--json FILE]

    optserve  one worker over loopback TCP, the server in its own process: SparseGradient up, rows down, in one exchange
    torch 1   torch.optim.SparseAdam on the same batches in one process, no network: coalesce, step, weight[rows]; one thread
    torch     the same with as many threads as torch takes
    dense     optserve without either: Adam, the whole gradient up, the whole table down; for tables up to --dense-rows

A batch is so many distinct rows in any order, another one at each step. Gradients are there already. Ways take turns, step by
step, each in a process of its own, with a pause before each. Bytes are what crosses a TCP relay in a step of optserve's, both
directions, with all that gRPC adds. Without torch its ways are left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from serving import served

from optserve.client import Server, SparseGradient, connect
from optserve.server.app import allocator

PAUSE_SECONDS = 0.05
"""Before each turn: the threads of the one before, OpenMP's in torch above all, go on spinning for a while on the cores."""

BATCHES = 4
"""Of each size, which take turns."""

Step = Callable[[int, int], object]
"""(touched rows, which step)."""


@dataclass(frozen=True)
class Table:
    """An embedding, and the sizes of the batches that touch it."""

    rows: int
    dim: int
    touched: tuple[int, ...]

    def batches(self) -> dict[int, list[np.ndarray[Any, Any]]]:
        """Rows, by size of the batch."""
        bits = np.random.default_rng(0)
        return {count: [bits.choice(self.rows, count, replace=False) for _ in range(BATCHES)] for count in self.touched}

    def gradients(self) -> dict[int, np.ndarray[Any, Any]]:
        """Of a batch's rows."""
        bits = np.random.default_rng(1)
        return {count: bits.standard_normal((count, self.dim), np.float32) for count in self.touched}

    def values(self) -> np.ndarray[Any, Any]:
        return np.zeros((self.rows, self.dim), np.float32)


# Ways, each in a process of its own: an order is (touched rows, which step), or "bytes" --------------------------------------


def obey(orders: Connection, step: Step, count_bytes: Callable[[], object] = lambda: None) -> None:
    orders.send("ready")
    while order := orders.recv():
        if order == "bytes":
            orders.send(count_bytes())
            continue
        began = time.perf_counter()
        step(*order)
        orders.send(time.perf_counter() - began)


def sparse_steps(server: Server, table: Table) -> tuple[ExitStack, Step]:
    """Joins the job; the stack leaves it."""
    batches, gradients, stack = table.batches(), table.gradients(), ExitStack()
    worker = stack.enter_context(server.job("table").join())

    def step(touched: int, number: int) -> None:
        ids, following = (batches[touched][at % BATCHES] for at in (number, number + 1))
        worker.push_pull({"emb": SparseGradient(ids, gradients[touched])}, rows={"emb": following})

    return stack, step


def optserve_way(orders: Connection, table: Table, address: str) -> None:
    allocator.tune()
    with connect(address) as server:
        server.create_job("table", {"emb": table.values()}, optimizer="sparseadam")
        stack, step = sparse_steps(server, table)

        def count_bytes() -> dict[int, int]:
            stack.close()
            return relayed(address, table)

        with stack:
            obey(orders, step, count_bytes)


def dense_way(orders: Connection, table: Table, address: str) -> None:
    allocator.tune()
    with connect(address) as server:
        gradient = table.values()
        job = server.create_job("dense", {"emb": gradient}, optimizer="adam")
        gradient[table.batches()[table.touched[0]][0]] = 1
        with job.join() as worker:
            out = worker.pull()
            obey(orders, lambda *_: worker.push_pull({"emb": gradient}, out=out))


def torch_way(orders: Connection, table: Table, threads: str) -> None:
    import torch

    allocator.tune()
    if threads:
        torch.set_num_threads(int(threads))
    weight = torch.nn.Parameter(torch.from_numpy(table.values()))
    optimizer = torch.optim.SparseAdam([weight])
    batches = {count: [torch.from_numpy(ids) for ids in found] for count, found in table.batches().items()}
    values = {count: torch.from_numpy(found) for count, found in table.gradients().items()}

    def step(touched: int, number: int) -> object:
        ids, following = (batches[touched][at % BATCHES] for at in (number, number + 1))
        weight.grad = torch.sparse_coo_tensor(ids[None], values[touched], weight.shape, check_invariants=False)
        optimizer.step()
        return weight.detach()[following]

    obey(orders, step)


# Bytes ------------------------------------------------------------------------------------------------------------------------


def relayed(address: str, table: Table) -> dict[int, int]:
    """Bytes of a step by touched rows, counted between the worker and the server."""
    counted = [0]

    def pump(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):  # either end may be gone first
            while data := source.recv(1 << 16):
                counted[0] += len(data)
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def relay(listener: socket.socket) -> None:
        host, _, port = address.rpartition(":")
        with listener.accept()[0] as near, socket.create_connection((host, int(port))) as far:
            back = threading.Thread(target=pump, args=(far, near), daemon=True)
            back.start()
            pump(near, far)
            back.join(10)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=relay, args=(listener,), daemon=True).start()
        with connect(f"127.0.0.1:{listener.getsockname()[1]}") as server:
            stack, step = sparse_steps(server, table)
            with stack:
                return {touched: counted_step(step, touched, counted) for touched in table.touched}


def counted_step(step: Step, touched: int, counted: Sequence[int]) -> int:
    """Median of three: now and then there is a heartbeat among them."""
    found = []
    for number in range(4):
        before = counted[0]
        step(touched, number)
        found.append(counted[0] - before)
    return int(statistics.median(found[1:]))


# Measuring --------------------------------------------------------------------------------------------------------------------


@contextmanager
def way(target: Callable[..., None], table: Table, address: str) -> Iterator[Connection]:
    """A process that takes orders once it is `ready`."""
    here, there = get_context("spawn").Pipe()
    process = get_context("spawn").Process(target=target, args=(there, table, address), daemon=True)
    process.start()
    try:
        yield here
        here.send(None)
        process.join(30)
    finally:
        process.kill()
        process.join()


def received(orders: Connection, what: object) -> Any:
    if not orders.poll(300):
        raise TimeoutError(f"{what} was not there within 300 s")
    return orders.recv()


def ready(ways: Mapping[str, Connection]) -> None:
    """Waits until all of these have started, side by side."""
    for name, orders in ways.items():
        received(orders, name)


def answered(orders: Connection, order: object) -> Any:
    orders.send(order)
    return received(orders, f"what answers {order}")


def measure(table: Table, repetitions: int, dense: bool) -> tuple[dict[int, dict[str, float]], dict[int, int]]:
    """Median milliseconds of a step by touched rows and way, and optserve's bytes by touched rows."""
    milliseconds: dict[int, dict[str, float]] = {}
    with ExitStack() as stack:
        address = stack.enter_context(served())
        ways = {"optserve": stack.enter_context(way(optserve_way, table, address))}
        if importlib.util.find_spec("torch"):
            ways["torch 1"] = stack.enter_context(way(torch_way, table, "1"))
            ways["torch"] = stack.enter_context(way(torch_way, table, ""))
        ready(ways)
        for touched in table.touched:
            taken: dict[str, list[float]] = {name: [] for name in ways}
            for number in range(-BATCHES, repetitions):
                for name, orders in ways.items():
                    time.sleep(PAUSE_SECONDS)
                    seconds = answered(orders, (touched, number))
                    if number >= 0:
                        taken[name].append(seconds * 1e3)
            milliseconds[touched] = {name: statistics.median(found) for name, found in taken.items()}
        nbytes: dict[int, int] = answered(ways["optserve"], "bytes")
    if dense:
        whole = dense_milliseconds(table, repetitions)
        milliseconds = {touched: {**of, "dense": whole} for touched, of in milliseconds.items()}
    return milliseconds, nbytes


def dense_milliseconds(table: Table, repetitions: int) -> float:
    """Median of a fifth as many: whatever the batch, all of the table crosses the wire twice."""
    with served() as address, way(dense_way, table, address) as orders:
        ready({"dense": orders})
        taken = [answered(orders, (table.touched[0], number)) * 1e3 for number in range(-1, max(1, repetitions // 5))]
    return statistics.median(taken[1:])


def found_of(chosen: argparse.Namespace) -> dict[str, Any]:
    """By touched rows, then by the table's rows."""
    milliseconds: dict[int, dict[int, dict[str, float]]] = {}
    nbytes: dict[int, dict[int, int]] = {}
    for rows in chosen.rows:
        touched = tuple(count for count in chosen.touched if count <= rows)
        table = Table(rows, chosen.dim, touched)
        times, counted = measure(table, chosen.repetitions, rows <= chosen.dense_rows)
        for count in touched:
            milliseconds.setdefault(count, {})[rows] = times[count]
            nbytes.setdefault(count, {})[rows] = counted[count]
    ratios = {
        count: {rows: {name: ms / of["optserve"] for name, ms in of.items()} for rows, of in by_rows.items()}
        for count, by_rows in milliseconds.items()
    }
    largest, smallest = max(chosen.rows), min(chosen.rows)
    return {
        "ratio_to_optserve": ratios,
        "largest_to_smallest_table": {
            count: {name: ms / of[smallest][name] for name, ms in of[largest].items() if name in of[smallest]}
            for count, of in milliseconds.items()
            if smallest in of
        },
        "milliseconds": milliseconds,
        "bytes": nbytes,
        "dim": chosen.dim,
        "repetitions": chosen.repetitions,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, NumPy {np.__version__}",
    }


def table_of(result: Mapping[str, Any]) -> str:
    names = [name for name in ("optserve", "torch 1", "torch", "dense") if any(name in of for of in _cells(result))]
    heads = "".join(f"{name + ' ms':>14}" for name in names) + "".join(f"{name + ' x':>10}" for name in names[1:])
    lines = [f"{result['machine']}, rows of {result['dim']} float32, median of {result['repetitions']}"]
    lines.append(f"{'touched':>10}{'table rows':>12}{heads}{'bytes':>14}{'a row':>8}")
    for touched, by_rows in result["milliseconds"].items():
        for rows, of in by_rows.items():
            ratios = result["ratio_to_optserve"][touched][rows]
            cells = "".join(f"{of[name]:14.2f}" if name in of else " " * 14 for name in names)
            cells += "".join(f"{ratios[name]:10.2f}" if name in of else " " * 10 for name in names[1:])
            nbytes = result["bytes"][touched][rows]
            lines.append(f"{touched:10,}{rows:12,}{cells}{nbytes:14,}{nbytes / touched:8.1f}")
    for touched, of in result["largest_to_smallest_table"].items():
        times = ", ".join(f"{name} {ratio:.2f} x" for name, ratio in of.items())
        lines.append(f"{touched:,} rows of the largest table instead of the smallest: {times} the time")
    return "\n".join(lines)


def _cells(result: Mapping[str, Any]) -> Iterator[Mapping[str, float]]:
    for by_rows in result["milliseconds"].values():
        yield from by_rows.values()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000], help="of the table")
    parser.add_argument("--touched", type=int, nargs="+", default=[1_000, 10_000, 100_000], help="rows of a batch")
    parser.add_argument("--dim", type=int, default=16, help="float32 numbers in a row")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--dense-rows", type=int, default=10_000_000, help="the largest table that is pushed and pulled whole")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    chosen = parser.parse_args()
    result = found_of(chosen)
    print(table_of(result))
    if chosen.json:
        chosen.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
