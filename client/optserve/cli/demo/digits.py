"""scikit-learn's digits (1,797 images of 8 x 8 pixels), split and cut into batches the same way on every worker."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from optserve.cli.demo.model import Floats, Labels

BATCH = 64
_TEST_SHARE = 5
"""Every fifth image is for the test."""


@dataclass(frozen=True)
class Digits:
    """Pixels are in 0..1."""

    train_images: Floats
    train_labels: Labels
    test_images: Floats
    test_labels: Labels

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.train_labels) // BATCH)

    def shard(self, step: int, rank: int, workers: int) -> tuple[Floats, Labels]:
        """A rank's part of the batch of a step: a function of the step alone, so that a restored run sees the same data."""
        epoch, index = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng((1, epoch)).permutation(len(self.train_labels))
        chosen = order[index * BATCH : (index + 1) * BATCH][rank::workers]
        return self.train_images[chosen], self.train_labels[chosen]


def load() -> Digits:
    """Reads what scikit-learn brings with it; no download."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images, labels = (images[order] / 16).astype(np.float32), labels[order].astype(np.int64)
    test = np.arange(len(labels)) % _TEST_SHARE == 0
    return Digits(images[~test], labels[~test], images[test], labels[test])
