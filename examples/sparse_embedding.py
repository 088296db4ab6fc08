"""An embedding model whose tables have more rows than a step touches: only those cross the wire, and only those are updated.

Items of 200 topics; items that occur together are of one topic, which the model is not told. Skip-gram with negative samples
learns vectors in which an item's nearest neighbour is of its own topic.

Needs `pip install "optserve[server]"`. Runs alone, with a server inside this process, or with the one that
OPTSERVE_SERVER names.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

from optserve.client import SparseGradient, connect

WORKERS, STEPS, BATCH, NEGATIVES = 2, 400, 512, 5
ITEMS, TOPICS, SIZE = 10_000, 200, 16


def sample(rng):
    """Items, and for each of them one that occurs with it and some that do not. Item i is of topic i % TOPICS."""
    items = rng.integers(ITEMS, size=BATCH)
    together = (items + TOPICS * rng.integers(ITEMS // TOPICS, size=BATCH)) % ITEMS
    return items, np.column_stack([together, rng.integers(ITEMS, size=(BATCH, NEGATIVES))])


def rows(items, others):
    """What a step needs of the two tables; rows may repeat."""
    return {"item": items, "context": others.ravel()}


def loss_and_gradients(weights, items, others):
    item, context = weights["item"], weights["context"].reshape(BATCH, 1 + NEGATIVES, SIZE)
    sign = np.where(np.arange(1 + NEGATIVES) == 0, 1, -1).astype(np.float32)
    margins = sign * np.einsum("bd,bnd->bn", item, context)
    slope = -sign / (1 + np.exp(margins)) / BATCH
    gradients = {
        "item": SparseGradient(items, np.einsum("bn,bnd->bd", slope, context)),
        "context": SparseGradient(others.ravel(), (slope[:, :, None] * item[:, None, :]).reshape(-1, SIZE)),
    }
    return float(np.logaddexp(0, -margins).sum(axis=1).mean()), gradients


def work(job, rank):
    rng = np.random.default_rng((1, rank))
    with job.join(rank=rank) as worker:
        batch = sample(rng)
        weights = worker.pull(rows=rows(*batch))
        for step in range(STEPS):
            loss, gradients = loss_and_gradients(weights, *batch)
            batch = sample(rng)
            weights = worker.push_pull(gradients, metrics={"loss": loss}, rows=rows(*batch))  # of the batch to come
            if rank == 0 and step % 100 == 99:
                print(f"step {step + 1}: loss {job.info().metrics['loss']:.3f}")


def accuracy(vectors):
    """How many of 1,000 items have a nearest neighbour (by cosine) of their own topic."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    asked = np.random.default_rng(2).choice(ITEMS, 1000, replace=False)
    likeness = unit[asked] @ unit.T
    likeness[np.arange(1000), asked] = -1
    return (likeness.argmax(axis=1) % TOPICS == asked % TOPICS).mean()


with connect() as server:
    rng = np.random.default_rng(0)
    tables = {name: rng.normal(0, 0.1, (ITEMS, SIZE)).astype(np.float32) for name in ("item", "context")}
    job = server.create_job(None, tables, optimizer="SparseAdam", lr=0.03, workers=WORKERS)
    print(f"before: accuracy {accuracy(tables['item']):.3f}")
    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(partial(work, job), range(WORKERS)))
    touched = BATCH * (2 + NEGATIVES)
    print(f"a step of a worker sends {touched:,} of {2 * ITEMS:,} rows")
    print(f"after {STEPS} steps: accuracy {accuracy(job.pull(['item'])['item']):.3f}")
