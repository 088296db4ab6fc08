"""Gather: the ranks' gradients folded block by block, in rank order, into one accumulator.

The fold is Σ (wᵣ/w₀)·gᵣ with w₀ the weight of the lowest rank that contributes. A block of rank r is added when every lower
rank has added its own or has none; until then it is held, within a budget, beyond which the rank's stream is not read. So the
sum does not depend on arrival, threads or transport. What was added cannot be taken back: if a rank that has added anything
falls out, the round's sum is void and everybody sends again.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from optserve.server.backends import Backend
from optserve.server.jobs.sessions import Member
from optserve.server.records import Caller, Changes, Result
from optserve.server.rounds.decide import Vote
from optserve.v1 import data_pb2
from optserve.wire import errors
from optserve.wire.chunks import CHUNK_BYTES, Chunk, Coverage
from optserve.wire.layout import Layout

logger = logging.getLogger("optserve.server")

Key = tuple[int, int]
"""(array id, block of its grid)."""

STAGING_BYTES = 256 << 20
"""Of chunks that a job holds until lower ranks have sent theirs."""


@dataclass
class Contribution:
    """One rank's push to one round. Guarded by the job's lock."""

    member: Member
    caller: Caller
    kind: data_pb2.Contribution
    weight: float
    present: frozenset[int]
    """Indices of the parameters that have a gradient."""
    metrics: Mapping[str, float]
    coverage: dict[int, Coverage]
    """What has not come yet, by array."""
    wanted: frozenset[Key]
    progress_at: float
    unfolded: set[Key] = field(default_factory=set)
    ended: bool = False
    found_inf: bool = False
    folded_any: bool = False
    changes: Changes = field(default_factory=dict)
    error: errors.OptserveError | None = None
    result: Result | None = None

    @property
    def folds(self) -> bool:
        """Whether its blocks are added at all."""
        return self.kind == data_pb2.CONTRIBUTION_GRADIENT and self.weight > 0 and not self.found_inf

    @property
    def complete(self) -> bool:
        return self.ended and (not self.folds or not self.unfolded)

    def vote(self) -> Vote:
        found_inf = self.found_inf or self.kind == data_pb2.CONTRIBUTION_NONFINITE
        return Vote(self.member.rank, self.weight, self.folds, found_inf, self.present, self.metrics, self.changes)


class Gather:
    """One round's gathering. `changed` is the job's condition: its lock guards everything here but the accumulators' contents,
    which belong to whoever marked their key busy."""

    def __init__(self, changed: threading.Condition, backend: Backend, skip_nonfinite: bool, started_at: float) -> None:
        self._changed = changed
        self._backend = backend
        self._skip_nonfinite = skip_nonfinite
        self.started_at = started_at
        self.layout = Layout()
        self.accumulators: dict[int, npt.NDArray[np.generic]] = {}
        self.contributions: dict[int, Contribution] = {}
        self.expected: tuple[int, ...] = ()
        self.base: Contribution | None = None
        self.void = False
        self.staged_bytes = 0
        self._held: dict[Key, dict[int, memoryview]] = {}
        self._folded: dict[Key, set[int]] = {}
        self._busy: set[Key] = set()
        self._squares: dict[Key, float] = {}
        self._waiting = 0
        self.stale = False
        """Blocks may have become ready that nobody folds: call `pump`."""

    # Called with the lock held ------------------------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """No thread writes into the accumulators."""
        return not self._busy

    @property
    def complete(self) -> bool:
        """Every rank that is waited for has contributed."""
        return all(rank in self.contributions and self.contributions[rank].complete for rank in self.expected)

    def missing(self) -> list[int]:
        """Ranks that are waited for."""
        return [r for r in self.expected if r not in self.contributions or not self.contributions[r].complete]

    def add(self, contribution: Contribution, layout: Layout, accumulators: Mapping[int, npt.NDArray[np.generic]]) -> None:
        """Takes a push in; its chunks follow. One that comes back below a rank that has added something voids the sum."""
        self.layout = layout
        self.accumulators = dict(accumulators)
        if contribution.folds:
            contribution.unfolded = set(contribution.wanted)
        rank = contribution.member.rank
        if contribution.folds and any(other.folded_any for at, other in self.contributions.items() if at > rank):
            self.void = True
        self.contributions[rank] = contribution

    def expect(self, ranks: tuple[int, ...]) -> None:
        """Says whom the round waits for."""
        if ranks != self.expected:
            self.expected = ranks
            self.stale = True

    def remove(self, contribution: Contribution) -> None:
        """Takes a push out: the round is void if anything depends on it."""
        if self.contributions.get(contribution.member.rank) is not contribution:
            return
        if contribution.folded_any or contribution is self.base:
            self.void = True
        del self.contributions[contribution.member.rank]
        self.stale = True
        for held in self._held.values():
            data = held.pop(contribution.member.rank, None)
            self.staged_bytes -= 0 if data is None else data.nbytes
        self._changed.notify_all()

    def base_weight(self) -> float:
        return self.base.weight if self.base else 1.0

    def sum_of_squares(self) -> float:
        """Of the aggregate, over the blocks that were sent, in their order."""
        if self._backend.squares_at_end:
            for array_id in {array_id for array_id, _ in self._folded}:
                sums = self._backend.sums_of_squares(self.accumulators[array_id], self._per_block(array_id))
                self._squares |= {(array_id, block): squares for block, squares in enumerate(sums)}
        total = 0.0
        for key in sorted(self._folded):
            total += self._squares[key] if key in self._squares else self._backend.sum_of_squares(self._block(key))
        return total

    def _block(self, key: Key) -> npt.NDArray[np.generic]:
        array_id, block = key
        per_block = self._per_block(array_id)
        return self.accumulators[array_id][block * per_block : (block + 1) * per_block]

    def _per_block(self, array_id: int) -> int:
        return CHUNK_BYTES // self.layout.arrays[array_id].dtype.itemsize

    def _ready(self, rank: int, key: Key) -> bool:
        for lower in self.expected:
            if lower >= rank:
                break
            other = self.contributions.get(lower)
            if other is None or (other.folds and key in other.unfolded):
                return False
        return all(lower in self.expected or lower >= rank or key not in c.unfolded for lower, c in self.contributions.items())

    def _turn(self, key: Key) -> tuple[Contribution, memoryview] | None:
        held = self._held.get(key, {})
        for rank in sorted(held):
            contribution = self.contributions.get(rank)
            if contribution is None or not contribution.folds or self.void:
                self.staged_bytes -= held.pop(rank).nbytes
            elif self._ready(rank, key):
                data = held.pop(rank)
                self.staged_bytes -= data.nbytes
                return contribution, data
            else:
                break
        return None

    # Called without the lock --------------------------------------------------------------------------------------------------

    def offer(self, contribution: Contribution, chunk: Chunk, now: float, wait: Callable[[], None]) -> None:
        """Adds a chunk, or holds it. `wait` is called with the lock held as long as the budget is spent; it raises to give up.

        InvalidChunkError if the chunk does not belong to the push.
        """
        with self._changed:
            contribution.progress_at = now
            coverage = contribution.coverage.get(chunk.array_id)
            if coverage is None:
                raise errors.InvalidChunkError(f"a chunk names array {chunk.array_id}, which the push does not announce")
            key = (chunk.array_id, coverage.add(chunk.offset, chunk.data.nbytes))
            if not contribution.folds:
                return
            rank = contribution.member.rank
            while not self._ready(rank, key) and self.staged_bytes + chunk.data.nbytes > STAGING_BYTES:
                self._waiting += 1
                try:
                    wait()
                finally:
                    self._waiting -= 1
                if self.void or contribution.error or self.contributions.get(rank) is not contribution:
                    return
            self._held.setdefault(key, {})[rank] = chunk.data
            self.staged_bytes += chunk.data.nbytes
        self._fold(key)

    def pump(self) -> None:
        """Folds whatever became ready because a lower rank began or fell out."""
        with self._changed:
            self.stale = False
            keys = [key for key, held in self._held.items() if held]
        for key in keys:
            self._fold(key)

    def _fold(self, key: Key) -> None:
        """Adds what is ready of one block. One thread at a time does so for a block; another one's chunk is taken along."""
        with self._changed:
            if key in self._busy:
                return
            turn = self._turn(key)
            if turn is None:
                return
            self._busy.add(key)
        while turn is not None:
            try:
                squares, error = self._add(key, *turn)
            except Exception as defect:
                logger.exception("a defect while block %s was folded", key)
                squares, error = None, errors.InternalError(f"the gradient could not be folded: {defect!r}")
            with self._changed:
                self._added(key, turn[0], squares, error)
                turn = self._turn(key)
                if turn is None:
                    self._busy.discard(key)
                    # A wake-up for each block would make every push that waits look again each time.
                    if self._waiting or (not self._busy and (self.stale or self.void or self.complete)):
                        self._changed.notify_all()

    def _add(self, key: Key, contribution: Contribution, data: memoryview) -> tuple[float | None, errors.OptserveError | None]:
        """Folds one block: the aggregate's sum of squares if no rank is to come, and why it was not folded."""
        values = np.frombuffer(data, self.layout.arrays[key[0]].dtype)
        error = self._fault(key, contribution, values)
        if error is not None:
            return None, error
        with self._changed:
            if self.void or self.contributions.get(contribution.member.rank) is not contribution:
                return None, None  # it fell out meanwhile: from here on that would void the round
            if self.base is None:
                self.base = min((c for c in self.contributions.values() if c.folds), key=lambda c: c.member.rank)
            contribution.folded_any = True
            first = not self._folded.get(key)
            self._folded.setdefault(key, set()).add(contribution.member.rank)
            ratio = contribution.weight / self.base.weight
            measures = contribution.member.rank == max(self.expected, default=0) and not self._backend.squares_at_end
        into = self._block(key)
        self._backend.fold(into, values, ratio, first)
        return (self._backend.sum_of_squares(into) if measures else None), None  # while the block is in the cache

    def _fault(self, key: Key, contribution: Contribution, values: npt.NDArray[np.generic]) -> errors.OptserveError | None:
        """Why a block must not be folded."""
        if not self._backend.finite(values):
            return nonfinite(contribution.member, self._names(key))
        padding = self.layout.padding(*key)
        if padding.size and values[padding].astype(np.float32).any():
            return errors.InvalidChunkError(
                f"the gradient of rank {contribution.member.rank} is not zero between the parameters in block {key[1]} "
                f"of array {key[0]}"
            )
        return None

    def _added(self, key: Key, contribution: Contribution, squares: float | None, error: errors.OptserveError | None) -> None:
        if error is None:
            contribution.unfolded.discard(key)
            self._squares.pop(key, None)
            if squares is not None:
                self._squares[key] = squares
        elif self._skip_nonfinite and isinstance(error, errors.NonfiniteGradientError):
            contribution.found_inf = True
            self.stale = True
        else:
            contribution.error = error
            self.remove(contribution)

    def _names(self, key: Key) -> list[str]:
        array_id, block = key
        return [
            repr(place.name)
            for place in self.layout.places
            if place.array_id == array_id and block in self.layout.blocks_of([place.index]).get(array_id, [])
        ]


def nonfinite(member: Member, names: list[str]) -> errors.NonfiniteGradientError:
    """For the sender of NaN or Inf; `names` are those of the parameters, quoted."""
    where = f" in {', '.join(names[:4])}" + (f" and {len(names) - 4} more" if len(names) > 4 else "") if names else ""
    return errors.NonfiniteGradientError(
        f"the gradient of rank {member.rank} {member.name!r} holds NaN or Inf{where}; nothing was applied, push again",
        rank=member.rank,
    )
