"""Digests of arrays that also say whether every element is finite, in one pass."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from optserve.wire import dtypes

Array = npt.NDArray[np.generic]

_FLOAT16_EXPONENT, _BFLOAT16_EXPONENT = np.uint16(0x7C00), np.uint16(0x7F80)
"""Set in full: Inf or NaN."""

_BLOCK = 1 << 17

_ROW = 1 << 12
_FACTORS = {width: (1 + np.arange(_ROW) * 0.6180339887498949 % 1).astype(f"f{width}") for width in (4, 8)}
"""By itemsize: one for each place in a row, between 1 and 2 and all different, so that signs and places count in a sum."""

_WORD_FACTORS = np.arange(_BLOCK // 4, dtype=np.uint64) * np.uint64(0x9E37_79B9_7F4A_7C15) | np.uint64(1)
"""The same for the 64-bit words of a block."""


def digest(array: Array, sent: np.dtype[np.generic]) -> bytes | None:
    """Sums that follow every element's value and place; None if an element is NaN or Inf, or becomes so in the dtype `sent`.

    NumPy may warn of an overflow, at which is looked again.
    """
    if array.itemsize == 2:
        exponent = _FLOAT16_EXPONENT if array.dtype == np.float16 else _BFLOAT16_EXPONENT
        return _of_bits(np.ascontiguousarray(array).reshape(-1).view(np.uint16), exponent)
    flat = np.ascontiguousarray(array.reshape(-1, order="A")).view(dtypes.storage_dtype(array.dtype))
    if sent.itemsize >= flat.itemsize:
        return _of_reals(flat)
    parts: list[bytes] = []
    for begin in range(0, flat.size, _BLOCK):
        part = _of_reals(flat[begin : begin + _BLOCK].astype(sent))
        if part is None:
            return None
        parts.append(part)
    return b"".join(parts)


def _of_reals(flat: Array) -> bytes | None:
    factors = _FACTORS[flat.itemsize]
    whole = flat.size // _ROW * _ROW
    rest = np.dot(flat[whole:], factors[: flat.size - whole])
    sums = np.append(flat[:whole].reshape(-1, _ROW) @ factors, rest) if whole else np.asarray(rest)
    if np.isfinite(sums).all() or np.isfinite(flat).all():  # sums of finite elements may overflow
        return sums.tobytes()
    return None


def _of_bits(bits: npt.NDArray[np.uint16], mask: np.uint16) -> bytes | None:
    total = 0
    for begin in range(0, bits.size, _BLOCK):
        block = bits[begin : begin + _BLOCK]
        if ((block & mask) == mask).any():
            return None
        words = block[: block.size // 4 * 4].view(np.uint64)
        rest = int.from_bytes(block[4 * words.size :].tobytes(), "little")
        total = (total * 31 + int(np.dot(words, _WORD_FACTORS[: words.size])) + rest) & 0xFFFF_FFFF_FFFF_FFFF
    return total.to_bytes(8, "little")
