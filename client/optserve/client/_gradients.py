"""Gradients: checked before the first byte is sent, then packed."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from optserve.client import _packing
from optserve.client._transport import Pieces
from optserve.v1 import data_pb2
from optserve.wire import dtypes
from optserve.wire.errors import DtypeMismatchError, InvalidArgumentError, ShapeMismatchError
from optserve.wire.layout import Layout

Array = npt.NDArray[np.generic]
Gradients = Mapping[str, npt.ArrayLike | None]

_FLOAT16_EXPONENT, _BFLOAT16_EXPONENT = np.uint16(0x7C00), np.uint16(0x7F80)
"""Set in full: Inf or NaN."""

_BLOCK = 1 << 17

_ROW = 1 << 12
_FACTORS = {width: (1 + np.arange(_ROW) * 0.6180339887498949 % 1).astype(f"f{width}") for width in (4, 8)}
"""By itemsize: one for each place in a row, between 1 and 2 and all different, so that signs and places count in a sum."""

_WORD_FACTORS = np.arange(_BLOCK // 4, dtype=np.uint64) * np.uint64(0x9E37_79B9_7F4A_7C15) | np.uint64(1)
"""The same for the 64-bit words of a block."""


@dataclass(frozen=True)
class Push:
    """What one push contributes. Its arrays are the caller's own and must stay as they are until the answer."""

    layout: Layout
    values: Mapping[str, Array]
    contribution: data_pb2.Contribution
    weight: float
    metrics: Mapping[str, float]
    fingerprint: int
    nonfinite: tuple[int, ...] = ()
    """Indices of the parameters whose gradients hold NaN or Inf."""

    @property
    def absent(self) -> list[int]:
        return [place.index for place in self.layout.places if place.name not in self.values]

    def chunks(self) -> Iterator[Pieces]:
        """The blocks that hold anything of a present parameter; none unless it is a gradient."""
        if self.contribution == data_pb2.CONTRIBUTION_GRADIENT:
            wanted = None
            if len(self.values) < len(self.layout.places):
                wanted = self.layout.blocks_of([p.index for p in self.layout.places if p.name in self.values])
            yield from _packing.blocks(self.layout, self.values, wanted)


def checked(layout: Layout, gradients: Gradients, weight: float, metrics: Mapping[str, float] | None) -> Push:
    """A push of gradients; names that are missing or None are absent.

    UnknownParameterError, ShapeMismatchError, DtypeMismatchError, or InvalidArgumentError for a weight that is not finite and
    at least 0. A gradient with NaN or Inf becomes the verdict instead of the bytes: the server answers by the job's policy.
    """
    if not isinstance(gradients, Mapping):
        raise InvalidArgumentError(f"gradients must be a dict of names to arrays; got {type(gradients).__name__}")
    weight = _weight(weight)
    values = _checked_arrays(layout, gradients)
    with np.errstate(all="ignore"):  # an overflow is looked at again
        digests = [(name, _digest(array)) for name, array in values.items()]
    finite = all(digest is not None for _, digest in digests)
    contribution = data_pb2.CONTRIBUTION_GRADIENT if finite else data_pb2.CONTRIBUTION_NONFINITE
    return _push(layout, values, contribution, weight, metrics, digests)


def _checked_arrays(layout: Layout, gradients: Gradients) -> dict[str, Array]:
    values: dict[str, Array] = {}
    for name, gradient in gradients.items():
        place = layout.place(name, "gradient")
        if gradient is None:
            continue
        array = np.asarray(gradient)
        if array.shape != place.shape:
            raise ShapeMismatchError(
                f"gradient {name!r} has shape {array.shape}; the parameter has shape {place.shape}", parameter=name
            )
        if array.dtype != place.dtype:
            raise DtypeMismatchError(
                f"gradient {name!r} has dtype {array.dtype}; the parameter has dtype {place.dtype}", parameter=name
            )
        values[name] = array
    return values


def skipped(layout: Layout, metrics: Mapping[str, float] | None = None) -> Push:
    """A push that contributes nothing."""
    return _push(layout, {}, data_pb2.CONTRIBUTION_SKIP, 0.0, metrics, [])


def _push(
    layout: Layout,
    values: Mapping[str, Array],
    contribution: data_pb2.Contribution,
    weight: float,
    metrics: Mapping[str, float] | None,
    digests: list[tuple[str, bytes | None]],
) -> Push:
    content = hashlib.blake2b(struct.pack("<id", contribution, weight), digest_size=8)
    for name, digest in digests:
        content.update(name.encode() + b"\0")
        content.update(digest or b"")
    fingerprint = int.from_bytes(content.digest(), "little")
    try:
        numbers = {str(name): float(value) for name, value in (metrics or {}).items()}
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError(f"metrics must be numbers by name: {error}") from None
    nonfinite = tuple(layout.by_name[name].index for name, digest in digests if digest is None)
    return Push(layout, values, contribution, weight, numbers, fingerprint, nonfinite)


def _weight(weight: float) -> float:
    try:
        number = float(weight)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or number < 0:
        raise InvalidArgumentError(f"weight is {weight!r}; it must be a finite number of at least 0")
    return number


def _digest(array: Array) -> bytes | None:
    """Sums that follow every element's value and place, in one pass; None if an element is NaN or Inf."""
    if array.itemsize == 2:
        exponent = _FLOAT16_EXPONENT if array.dtype == np.float16 else _BFLOAT16_EXPONENT
        return _digest_of_bits(np.ascontiguousarray(array).reshape(-1).view(np.uint16), exponent)
    flat = np.ascontiguousarray(array.reshape(-1, order="A")).view(dtypes.storage_dtype(array.dtype))
    factors = _FACTORS[flat.itemsize]
    whole = flat.size // _ROW * _ROW
    rest = np.dot(flat[whole:], factors[: flat.size - whole])
    sums = np.append(flat[:whole].reshape(-1, _ROW) @ factors, rest) if whole else np.asarray(rest)
    if np.isfinite(sums).all() or np.isfinite(flat).all():  # sums of finite elements may overflow
        return sums.tobytes()
    return None


def _digest_of_bits(bits: npt.NDArray[np.uint16], mask: np.uint16) -> bytes | None:
    total = 0
    for begin in range(0, bits.size, _BLOCK):
        block = bits[begin : begin + _BLOCK]
        if ((block & mask) == mask).any():
            return None
        words = block[: block.size // 4 * 4].view(np.uint64)
        rest = int.from_bytes(block[4 * words.size :].tobytes(), "little")
        total = (total * 31 + int(np.dot(words, _WORD_FACTORS[: words.size])) + rest) & 0xFFFF_FFFF_FFFF_FFFF
    return total.to_bytes(8, "little")
