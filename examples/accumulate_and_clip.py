"""Digits with small batches: the server sums the gradients of 4 rounds up, clips their mean to norm 0.25 and steps once.

Needs `pip install "optserve[demo]"`. Runs alone, with a server inside this process, or with the one that
OPTSERVE_SERVER names.
"""

import numpy as np
from sklearn.datasets import load_digits

from optserve.client import connect

EPOCHS, BATCH, ROUNDS = 24, 32, 4

images, labels = load_digits(return_X_y=True)
images = (images / 16).astype(np.float32)
order = np.random.default_rng(0).permutation(len(labels))
train, test = order[400:], order[:400]


def forward(weights, x):
    hidden = np.maximum(x @ weights["w1"] + weights["b1"], 0)
    scores = hidden @ weights["w2"] + weights["b2"]
    scores -= scores.max(axis=1, keepdims=True)
    return hidden, scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))


def loss_and_gradients(weights, x, y):
    """Softmax cross-entropy of one hidden layer of 64."""
    hidden, logs = forward(weights, x)
    d_scores = (np.exp(logs) - np.eye(10, dtype=np.float32)[y]) / len(y)
    d_hidden = (d_scores @ weights["w2"].T) * (hidden > 0)
    gradients = {"w1": x.T @ d_hidden, "b1": d_hidden.sum(0), "w2": hidden.T @ d_scores, "b2": d_scores.sum(0)}
    return -logs[np.arange(len(y)), y].mean(), gradients


def accuracy(weights):
    return (forward(weights, images[test])[1].argmax(axis=1) == labels[test]).mean()


rng = np.random.default_rng(1)
initial = {
    "w1": rng.normal(0, 0.18, (64, 64)).astype(np.float32),
    "b1": np.zeros(64, np.float32),
    "w2": rng.normal(0, 0.18, (64, 10)).astype(np.float32),
    "b2": np.zeros(10, np.float32),
}
with connect() as server:
    job = server.create_job(None, initial, optimizer="sgd", lr=0.3, momentum=0.9, accumulation=ROUNDS, clip_grad_norm=0.25)
    clipped = 0
    with job.join() as worker:
        weights = worker.pull()
        for _ in range(EPOCHS):
            for batch in np.array_split(rng.permutation(train), len(train) // BATCH):
                loss, gradients = loss_and_gradients(weights, images[batch], labels[batch])
                # Between two steps the weights stay as they are, as in torch's loop of backward() without step().
                weights = worker.push_pull(gradients, weight=len(batch), metrics={"loss": loss})
                clipped += worker.last_step.clip_factor < 1
        info = job.info()
    print(f"{info.position.step} steps of {ROUNDS} rounds each, {clipped} of them clipped; loss {info.metrics['loss']:.3f}")
    print(f"{info.accumulated} rounds are summed up for the next step")
    print(f"accuracy {accuracy(weights):.3f}")
