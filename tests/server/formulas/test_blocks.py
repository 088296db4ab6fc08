"""Blocks cover a tensor once, and what is computed in them does not show where they end."""

from __future__ import annotations

from math import fsum, sqrt
from typing import Any

import numpy as np
import pytest

from optserve.server.formulas import blocks


@pytest.mark.parametrize("size", [0, 1, blocks.HOST_BLOCK - 1, blocks.HOST_BLOCK, blocks.HOST_BLOCK + 1, 100_000])
def test_blocks_cover_a_flat_array_once_and_in_order(size: int) -> None:
    covered = [index for block in blocks.blocks(np, size) for index in range(block.start, block.stop)]
    assert covered == list(range(size))


@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1), (1, 300, 200), (7, 40, 24), (9_000, 3, 3), (1, 2, 70_000), (3, 5, 33_000), (2, 40_000, 1), (4, 1, 20_000)],
)
def test_pieces_cover_matrices_once_and_none_is_larger_than_a_block(shape: tuple[int, int, int]) -> None:
    times = np.zeros(shape, np.int8)
    count = 0
    for piece in blocks.pieces(np, shape):
        assert 0 < times[piece].size <= blocks.HOST_BLOCK
        times[piece] += 1
        count += 1
    assert np.all(times == 1)
    assert count <= 3 * np.ceil(times.size / blocks.HOST_BLOCK)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [0, 1, 70_001])
def test_a_norm_is_correct_to_the_last_digits_of_float64(size: int, dtype: Any) -> None:
    values = np.random.default_rng(0).normal(size=size).astype(dtype)
    found = blocks.norm(np, values)
    assert found.dtype == np.float64
    assert float(found) == pytest.approx(sqrt(fsum(float(value) ** 2 for value in values)), rel=1e-14)


def test_the_norm_of_float32_neither_overflows_nor_vanishes() -> None:
    for value in (1e30, 1e-30):
        assert float(blocks.norm(np, np.full(4, value, np.float32))) == pytest.approx(2 * value, rel=1e-6)


def test_the_largest_number_stands_for_an_infinite_factor() -> None:
    with np.errstate(over="ignore"):
        factor = blocks.finite(np, np.float64(1e300), np.dtype(np.float32))
    assert factor.dtype == np.float32
    assert factor == np.finfo(np.float32).max
    assert factor * np.float32(0) == 0
