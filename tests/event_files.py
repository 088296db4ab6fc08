"""TensorBoard event files, read by two readers that share nothing with the writer: TensorBoard's own, and one of TFRecords."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event

_POLYNOMIAL = 0x82F63B78
"""CRC-32C, reflected."""


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a run: (step, value) by tag. Values are float32."""
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {tag: [(entry.step, entry.value) for entry in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def runs(root: Path) -> list[str]:
    """The runs that TensorBoard finds."""
    return sorted({str(path.parent.relative_to(root)) for path in root.rglob("*tfevents*")})


def records(file: Path) -> Iterator[Event]:
    """Every record of a file: length, its masked CRC-32C, the event, its masked CRC-32C; nothing torn, nothing behind."""
    data = file.read_bytes()
    while data:
        (size, head_sum), body = struct.unpack("<QI", data[:12]), data[12:]
        (body_sum,) = struct.unpack("<I", body[size : size + 4])
        assert head_sum == _masked(data[:8])
        assert body_sum == _masked(body[:size])
        yield Event.FromString(body[:size])
        data = body[size + 4 :]


def _masked(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (_POLYNOMIAL & -(crc & 1))
    crc ^= 0xFFFFFFFF
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def float32(value: float) -> float:
    """As it is in a file."""
    return float(np.float32(value))
