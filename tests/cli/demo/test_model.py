"""The demo's hand-written backward pass, and its data."""

import numpy as np
import pytest

from optserve.cli.demo import digits, model


@pytest.mark.parametrize("name", ["w1", "b1", "w2", "b2"])
def test_the_gradient_agrees_with_finite_differences(name: str) -> None:
    rng = np.random.default_rng(3)
    weights = {key: value.astype(np.float64) for key, value in model.initial_weights(1).items()}
    weights["b1"] += rng.standard_normal(model.HIDDEN) * 0.1
    images, labels = rng.random((7, model.PIXELS)), rng.integers(0, model.CLASSES, 7)
    _, gradients = model.loss_and_gradients(weights, images, labels)
    for index in rng.choice(weights[name].size, 20):
        place = np.unravel_index(index, weights[name].shape)
        losses = []
        for shift in (1e-6, -1e-6):
            moved = {**weights, name: weights[name].copy()}
            moved[name][place] += shift
            losses.append(model.loss_and_gradients(moved, images, labels)[0])
        assert gradients[name][place] == pytest.approx((losses[0] - losses[1]) / 2e-6, abs=1e-7)


def test_loss_and_accuracy_of_a_model_that_knows_nothing() -> None:
    weights = {name: np.zeros_like(value) for name, value in model.initial_weights().items()}
    labels = np.arange(20) % 10
    loss, accuracy = model.evaluate(weights, np.ones((20, model.PIXELS), np.float32), labels)
    assert loss == pytest.approx(np.log(10))
    assert accuracy == pytest.approx(0.1)


def test_initial_weights_and_gradients_are_float32() -> None:
    weights = model.initial_weights()
    data = digits.load()
    _, gradients = model.loss_and_gradients(weights, *data.shard(0, 0, 1))
    assert {value.dtype for value in (*weights.values(), *gradients.values())} == {np.dtype(np.float32)}


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_shards_of_an_epoch_are_all_images_once(workers: int) -> None:
    data = digits.load()
    pixels = [
        data.shard(step, rank, workers)[0]
        for step in range(data.steps_per_epoch, 2 * data.steps_per_epoch)
        for rank in range(workers)
    ]
    seen = np.concatenate(pixels)
    assert len(seen) == len(data.train_images)
    assert np.array_equal(np.sort(seen.sum(axis=1)), np.sort(data.train_images.sum(axis=1)))


def test_the_mean_of_the_shards_gradients_is_the_batchs_gradient() -> None:
    data, weights = digits.load(), model.initial_weights()
    _, whole = model.loss_and_gradients(weights, *data.shard(22, 0, 1))
    shards = [data.shard(22, rank, 2) for rank in range(2)]
    sizes = [len(labels) for _, labels in shards]
    parts = [model.loss_and_gradients(weights, *shard)[1] for shard in shards]
    for name, gradient in whole.items():
        mean = sum(part[name] * size for part, size in zip(parts, sizes, strict=True)) / sum(sizes)
        np.testing.assert_allclose(mean, gradient, rtol=1e-4, atol=1e-6)
