"""L-BFGS over two workers: logistic regression whose samples lie on two ranks, to the optimum that Newton's method finds.

Needs `pip install "optserve[server]"`. Runs alone, with a server inside this process, or with the one that
OPTSERVE_SERVER names.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

from optserve.client import connect

WORKERS, SAMPLES, FEATURES, PENALTY = 2, 2000, 20, 1e-3

rng = np.random.default_rng(0)
x = rng.standard_normal((SAMPLES, FEATURES)) * np.logspace(0, 1.5, FEATURES)  # badly scaled: plain gradient descent crawls
y = np.where(x @ rng.standard_normal(FEATURES) + 20 * rng.standard_normal(SAMPLES) > 0, 1.0, -1.0)


def loss_and_gradient(w, x, y):
    """The mean log loss with a penalty on the weights' squares."""
    margins = y * (x @ w)
    slope = -y / (1 + np.exp(np.minimum(margins, 700)))
    return np.logaddexp(0, -margins).mean() + PENALTY / 2 * w @ w, x.T @ slope / len(x) + PENALTY * w


def optimum():
    """Newton's method on all samples at once."""
    w = np.zeros(FEATURES)
    for _ in range(50):
        _, gradient = loss_and_gradient(w, x, y)
        p = 1 / (1 + np.exp(-np.clip(x @ w, -700, 700)))
        w -= np.linalg.solve((x.T * (p * (1 - p))) @ x / SAMPLES + PENALTY * np.eye(FEATURES), gradient)
    return w


def work(job, rank):
    """One rank: its own samples, and closures that the server asks at every point of its line search."""
    mine = slice(0, 1500) if rank == 0 else slice(1500, None)  # shares may differ: each loss counts by its weight
    x_mine, y_mine = x[mine], y[mine]

    def closure(weights):
        loss, gradient = loss_and_gradient(weights["w"], x_mine, y_mine)
        return loss, {"w": gradient}

    with job.join(rank=rank) as worker:
        for step in range(5):
            loss = worker.step(closure, weight=len(y_mine))
            if rank == 0:
                print(f"step {step:2}: loss here {loss:.6f}, {worker.last_step.evaluations} evaluations")


with connect() as server:
    job = server.create_job(
        None,
        {"w": np.zeros(FEATURES)},
        optimizer="lbfgs",
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-12,
        tolerance_change=1e-16,
        workers=WORKERS,
    )
    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(partial(work, job), range(WORKERS)))
    found, best = job.pull()["w"], optimum()

print(f"loss {loss_and_gradient(found, x, y)[0]:.12f}, at the optimum {loss_and_gradient(best, x, y)[0]:.12f}")
print(f"distance to the optimum {np.abs(found - best).max():.1e}")
