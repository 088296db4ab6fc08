"""A checkpoint's manifest: optserve's document, and the size and hash of each file, as JSON that ends with its own hash.

A manifest may come from a stranger (downloaded checkpoints are uploaded again), so reading it checks every field it uses;
whoever interprets the document checks that. Non-finite numbers are written as Python's json does (`NaN`, `Infinity`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import xxhash

from optserve.wire.errors import CheckpointCorruptError, CheckpointMismatchError, InvalidArgumentError

MANIFEST, PARAMETERS, STATE = "manifest.json", "parameters.safetensors", "state.safetensors"
FILES = (MANIFEST, PARAMETERS, STATE)
FORMAT, FORMAT_VERSION = "optserve checkpoint", 1

MAX_BYTES = 256 << 20
"""Of a manifest: it is read into memory before anything is known about it."""

_TAIL = re.compile(rb',\n "xxh3_128": "([0-9a-f]{32})"\n}\n\Z')


@dataclass(frozen=True)
class Fingerprint:
    """A file's bytes and their xxh3-128 in hexadecimal."""

    size: int
    xxh3_128: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says about itself. `files` holds PARAMETERS and STATE."""

    document: dict[str, Any]
    files: Mapping[str, Fingerprint]
    time_seconds: float

    def encode(self) -> bytes:
        """The file's bytes."""
        fields = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "time_seconds": self.time_seconds,
            "files": {name: {"size": mark.size, "xxh3_128": mark.xxh3_128} for name, mark in self.files.items()},
            "document": self.document,
        }
        head = json.dumps(fields, indent=1).removesuffix("\n}").encode()
        raw = head + f',\n "xxh3_128": "{xxhash.xxh3_128_hexdigest(head)}"\n}}\n'.encode()
        if len(raw) > MAX_BYTES:
            raise InvalidArgumentError(f"a manifest of {len(raw)} bytes cannot be saved; at most {MAX_BYTES} are read")
        return raw

    @classmethod
    def decode(cls, raw: bytes, what: str) -> Manifest:
        """CheckpointCorruptError names `what`; CheckpointMismatchError if a newer optserve wrote it."""
        tail = _TAIL.search(raw, max(0, len(raw) - 64))
        if tail is None:
            raise CheckpointCorruptError(f"{what} does not end with its hash: it is truncated, or no manifest")
        if xxhash.xxh3_128_hexdigest(raw[: tail.start()]) != tail[1].decode():
            raise CheckpointCorruptError(f"{what} was altered: its hash is not the one at its end")
        try:
            fields = json.loads(raw)
            if fields["format"] != FORMAT:
                raise ValueError(f"its format is {fields['format']!r}")
            if fields["format_version"] != FORMAT_VERSION:
                raise CheckpointMismatchError(
                    f"{what} has format version {fields['format_version']!r}; this optserve reads {FORMAT_VERSION}"
                )
            document, time_seconds = fields["document"], fields["time_seconds"]
            if not isinstance(document, dict) or not isinstance(document.get("position"), dict):
                raise ValueError("its document has no position")
            if type(time_seconds) is not float or not math.isfinite(time_seconds):
                raise ValueError(f"its time is {time_seconds!r}")
            return cls(document, {name: _fingerprint(fields["files"][name]) for name in (PARAMETERS, STATE)}, time_seconds)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointCorruptError(f"{what} is no manifest: {error}") from error


def _fingerprint(fields: dict[str, Any]) -> Fingerprint:
    size, digest = fields["size"], fields["xxh3_128"]
    if type(size) is not int or size < 0 or not isinstance(digest, str):
        raise ValueError(f"a file has size {size!r} and hash {digest!r}")
    return Fingerprint(size, digest)
