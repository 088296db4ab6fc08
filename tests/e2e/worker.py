"""A worker as a process: python worker.py ADDRESS JOB STEPS. Its rank is RANK; prints a digest of its last weights."""

from __future__ import annotations

import hashlib
import os
import sys

import numpy as np

from optserve.client import connect


def gradients(rank: int, step: int, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """The same in every process."""
    bits = np.random.default_rng((rank, step))
    return {name: bits.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def digest(weights: dict[str, np.ndarray]) -> str:
    found = hashlib.sha256()
    for name, array in weights.items():
        found.update(name.encode() + array.tobytes())
    return found.hexdigest()


def main(address: str, job: str, steps: str) -> None:
    rank = int(os.environ["RANK"])
    with connect(address) as server, server.job(job).join() as worker:
        weights = worker.pull()
        shapes = {name: array.shape for name, array in weights.items()}
        for step in range(int(steps)):
            weights = worker.push_pull(gradients(rank, step, shapes), out=weights)
        print(digest(weights), worker.last_step.step, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
