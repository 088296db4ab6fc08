"""The demo's model in NumPy: 64 pixels, one hidden layer of 64 (ReLU), 10 digits, softmax cross-entropy."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]
Weights = dict[str, npt.NDArray[Any]]
"""float32; Any, because that is all that the server's own arrays say to a type checker."""

PIXELS, HIDDEN, CLASSES = 64, 64, 10
HIDDEN_LAYER = ("w1", "b1")
OUTPUT_LAYER = ("w2", "b2")


def initial_weights(seed: int = 0) -> Weights:
    """He's initialisation; the same on every worker."""
    rng = np.random.default_rng(seed)

    def layer(inputs: int, outputs: int) -> Floats:
        return (rng.standard_normal((inputs, outputs)) * np.float64(2 / inputs) ** 0.5).astype(np.float32)

    return {
        "w1": layer(PIXELS, HIDDEN),
        "b1": np.zeros(HIDDEN, np.float32),
        "w2": layer(HIDDEN, CLASSES),
        "b2": np.zeros(CLASSES, np.float32),
    }


def _forward(weights: Weights, images: Floats) -> tuple[Floats, Floats]:
    """The hidden activations and the logarithms of the class probabilities."""
    hidden = np.maximum(images @ weights["w1"] + weights["b1"], 0)
    scores = hidden @ weights["w2"] + weights["b2"]
    scores -= scores.max(axis=1, keepdims=True)
    return hidden, scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))


def loss_and_gradients(weights: Weights, images: Floats, labels: Labels) -> tuple[float, Weights]:
    """The mean cross-entropy of a batch and its gradient by every weight."""
    rows = np.arange(len(labels))
    hidden, log_probabilities = _forward(weights, images)
    d_scores = np.exp(log_probabilities)
    d_scores[rows, labels] -= 1
    d_scores /= len(labels)
    d_hidden = (d_scores @ weights["w2"].T) * (hidden > 0)
    gradients = {
        "w1": images.T @ d_hidden,
        "b1": d_hidden.sum(axis=0),
        "w2": hidden.T @ d_scores,
        "b2": d_scores.sum(axis=0),
    }
    return float(-log_probabilities[rows, labels].mean()), gradients


def evaluate(weights: Weights, images: Floats, labels: Labels) -> tuple[float, float]:
    """(mean cross-entropy, accuracy in 0..1)."""
    _, log_probabilities = _forward(weights, images)
    rows = np.arange(len(labels))
    accuracy = (log_probabilities.argmax(axis=1) == labels).mean()
    return float(-log_probabilities[rows, labels].mean()), float(accuracy)
