"""How long is a step? Push, fold, Adam, pull of float32 weights, beside torch's Gloo all-reduce with fused Adam, in one run.

    python benchmarks/step.py [--parameters 250000 2500000 25000000] [--repetitions 9] [--json FILE]

    embedded   one worker, the server in its process
    tcp 1, 2   one or two worker processes over loopback, the server in its own; the allocator tuned in all
    gloo 2     two processes: all_reduce of the flat gradient, divided by two, then torch's fused Adam, one thread each

The gradients are there already and the weights end in the worker's own arrays. Ways take turns, step by step; of two workers
the slower one counts. Without torch the last way is left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import socket
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from serving import served

from optserve.client import connect
from optserve.server.app import allocator

# Workers, each in its own process: an order is one step, answered with its seconds ------------------------------------------


def obey(orders: Connection, step: Callable[[], object]) -> None:
    step()
    orders.send("ready")
    while orders.recv():
        began = time.perf_counter()
        step()
        orders.send(time.perf_counter() - began)


def gradient_of(rank: int, parameters: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(rank).standard_normal(parameters, np.float32)


def optserve_worker(orders: Connection, rank: int, workers: int, parameters: int, address: str | None) -> None:
    allocator.tune()
    gradients = {"w": gradient_of(rank, parameters)}
    with connect(address) as server:
        start = {"w": np.zeros(parameters, np.float32)}
        job = server.create_job(f"step{workers}", start, optimizer="adam", workers=workers, exist_ok=True)
        with job.join(rank=rank) as worker:
            out = worker.pull()
            obey(orders, lambda: worker.push_pull(gradients, out=out))


def gloo_worker(orders: Connection, rank: int, workers: int, parameters: int, port: str) -> None:
    import torch
    import torch.distributed as dist

    allocator.tune()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=workers)
    weights = torch.zeros(parameters)
    gradient = weights.grad = torch.from_numpy(gradient_of(rank, parameters))
    optimizer = torch.optim.Adam([weights], fused=True)

    def step() -> None:
        dist.all_reduce(gradient)
        gradient.div_(workers)
        optimizer.step()

    obey(orders, step)
    dist.destroy_process_group()


# Measuring --------------------------------------------------------------------------------------------------------------------


@contextmanager
def team(target: Callable[..., None], workers: int, parameters: int, where: str | None) -> Iterator[list[Connection]]:
    """The workers' connections; they take orders once they are `ready`."""
    context = get_context("spawn")
    pipes = [context.Pipe() for _ in range(workers)]
    processes = [
        context.Process(target=target, args=(there, rank, workers, parameters, where), daemon=True)
        for rank, (_, there) in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    try:
        yield [here for here, _ in pipes]
        for here, _ in pipes:
            here.send(None)
        for process in processes:
            process.join(30)
    finally:
        for process in processes:
            process.kill()
            process.join()


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return str(listener.getsockname()[1])


def ready(teams: Mapping[str, list[Connection]]) -> None:
    """Waits until all workers of these have started, side by side."""
    for name, members in teams.items():
        for here in members:
            if not here.poll(120) or here.recv() != "ready":
                raise TimeoutError(f"a worker of {name} was not ready within 120 s")


def step_seconds(team: list[Connection]) -> float:
    for worker in team:
        worker.send("step")
    return float(max(worker.recv() for worker in team))


def measure(parameters: int, repetitions: int) -> dict[str, float]:
    """Median milliseconds of a step, by way."""
    with ExitStack() as stack:
        address = stack.enter_context(served())
        teams = {
            "embedded": stack.enter_context(team(optserve_worker, 1, parameters, None)),
            "tcp 1": stack.enter_context(team(optserve_worker, 1, parameters, address)),
            "tcp 2": stack.enter_context(team(optserve_worker, 2, parameters, address)),
        }
        if importlib.util.find_spec("torch"):
            teams["gloo 2"] = stack.enter_context(team(gloo_worker, 2, parameters, free_port()))
        ready(teams)
        taken: dict[str, list[float]] = {name: [] for name in teams}
        for repetition in range(-2, repetitions):
            for name, members in teams.items():
                seconds = step_seconds(members)
                if repetition >= 0:
                    taken[name].append(seconds * 1e3)
        return {name: statistics.median(found) for name, found in taken.items()}


def table(steps: Mapping[int, Mapping[str, float]], machine: str) -> str:
    names = list(next(iter(steps.values())))
    lines = [machine, f"{'parameters':>12}" + "".join(f"{name:>12}" for name in names)]
    for parameters, of in steps.items():
        if "gloo 2" in of:
            ratios = "".join(f"{of[name] / of['gloo 2']:12.2f}" for name in names)
            lines.append(f"{parameters:12,}{ratios}   x gloo 2")
        lines.append(f"{parameters:12,}" + "".join(f"{of[name]:12.2f}" for name in names) + "   ms")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--parameters", type=int, nargs="+", default=[250_000, 2_500_000, 25_000_000])
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    chosen = parser.parse_args()
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, NumPy {np.__version__}"
    steps = {parameters: measure(parameters, chosen.repetitions) for parameters in chosen.parameters}
    print(table(steps, machine))
    if chosen.json:
        ratios = {n: {name: ms / of["gloo 2"] for name, ms in of.items()} for n, of in steps.items() if "gloo 2" in of}
        found = {"ratio_to_gloo": ratios, "milliseconds": steps, "repetitions": chosen.repetitions, "machine": machine}
        chosen.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
