"""Gather: the ranks' gradients folded unit by unit, in rank order, into one accumulator.

The fold is Σ (wᵣ/w₀)·gᵣ with w₀ the weight of the lowest rank that contributes. A unit (Array.unit) of rank r is added when
every lower rank has added its own or has none; until then it is held, within a budget, beyond which the rank's stream is not
read. So the sum does not depend on arrival, threads or transport, nor on the dtypes in which gradients come: a chunk of
narrow ones is cut into its units. What was added cannot be taken back: if a rank that has added anything falls out, the
round's sum is void and everybody sends again. Rows of sparse gradients are kept apart, and added up at the decision.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import numpy.typing as npt

from optserve.server.backends import Backend
from optserve.server.jobs.sessions import Member
from optserve.server.rounds.contributions import Contribution, Key
from optserve.server.rounds.rows import StagedRows, added
from optserve.wire import errors
from optserve.wire.chunks import CHUNK_BYTES, Chunk
from optserve.wire.layout import Layout
from optserve.wire.rows import ROWS_ARRAY_ID, Rows, Sums

logger = logging.getLogger("optserve.server")

STAGING_BYTES = 256 << 20
"""Of units that a job holds until lower ranks have sent theirs."""


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
        self._rows: dict[int, Rows] | None = None
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
        self.stale = True  # what higher ranks have sent waits for lower ones to begin

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

    def sums(self) -> Sums:
        """The aggregate of a complete round: the arrays that some rank has a dense gradient in, and rows.

        Elements of parameters that no rank has sent hold anything.
        """
        if self._rows is None:
            base = self.base_weight()
            parts = [(c.weight / base, c.rows.found or {}) for c in self._folding() if c.rows is not None]
            self._rows = added(parts)
        dense = frozenset[int]().union(*(contribution.arrays for contribution in self._folding()))
        return Sums({array_id: self.accumulators[array_id] for array_id in sorted(dense)}, self._rows)

    def base_weight(self) -> float:
        """w₀."""
        base = self.base or next(iter(self._folding()), None)
        return base.weight if base else 1.0

    def _folding(self) -> list[Contribution]:
        """In rank order."""
        return [self.contributions[rank] for rank in sorted(self.contributions) if self.contributions[rank].folds]

    def sum_of_squares(self) -> float:
        """Of the aggregate, over the units that were sent, in their order, and then the rows."""
        if self._backend.squares_at_end:
            for array_id, first, last in self._runs():
                per_unit = self.layout.arrays[array_id].unit
                values = self.accumulators[array_id][first * per_unit : last * per_unit]
                sums = self._backend.sums_of_squares(values, per_unit)
                self._squares |= {(array_id, first + at): squares for at, squares in enumerate(sums)}
        total = 0.0
        for key in sorted(self._folded):
            total += self._squares[key] if key in self._squares else self._backend.sum_of_squares(self._unit(key))
        for _, rows in sorted(self.sums().sparse.items()):
            total += self._backend.sum_of_squares(rows.values.reshape(-1))
        return total

    def _runs(self) -> Iterator[tuple[int, int, int]]:
        """Array, first and last + 1 of neighbouring units that were folded."""
        keys = sorted(self._folded)
        begin = 0
        for at, (array_id, unit) in enumerate(keys):
            if at + 1 == len(keys) or keys[at + 1] != (array_id, unit + 1):
                yield array_id, keys[begin][1], unit + 1
                begin = at + 1

    def _unit(self, key: Key) -> npt.NDArray[np.generic]:
        array_id, unit = key
        per_unit = self.layout.arrays[array_id].unit
        return self.accumulators[array_id][unit * per_unit : (unit + 1) * per_unit]

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

        InvalidChunkError if the chunk does not belong to the push, InvalidArgumentError for a row that there is not.
        """
        if chunk.array_id == ROWS_ARRAY_ID and contribution.rows is not None:
            self._offer_rows(contribution, contribution.rows, chunk, now)
            return
        with self._changed:
            rank = contribution.member.rank
            if self.contributions.get(rank) is not contribution:
                return  # the push came anew on another stream, while this one brought its rest
            contribution.progress_at = now
            coverage = contribution.coverage.get(chunk.array_id)
            if coverage is None:
                raise errors.InvalidChunkError(f"a chunk names array {chunk.array_id}, which the push does not announce")
            coverage.add(chunk.offset, chunk.data.nbytes)
            if not contribution.folds:
                return
            pieces = self._pieces(contribution, chunk)
            while not all(self._ready(rank, key) for key in pieces) and self.staged_bytes + chunk.data.nbytes > STAGING_BYTES:
                self._waiting += 1
                try:
                    wait()
                finally:
                    self._waiting -= 1
                if self.void or contribution.error or self.contributions.get(rank) is not contribution:
                    return
            for key, data in pieces.items():
                self._held.setdefault(key, {})[rank] = data
                self.staged_bytes += data.nbytes
        for key in pieces:
            self._fold(key)

    def _pieces(self, contribution: Contribution, chunk: Chunk) -> dict[Key, memoryview]:
        """A chunk's units; without those that hold nothing of what the push brings, as they do not come in another dtype."""
        nbytes = self.layout.arrays[chunk.array_id].unit * contribution.dtypes[chunk.array_id].itemsize
        if nbytes == CHUNK_BYTES:
            return {(chunk.array_id, chunk.offset // CHUNK_BYTES): chunk.data}
        first = chunk.offset // nbytes
        pieces = {
            (chunk.array_id, first + at): chunk.data[at * nbytes : (at + 1) * nbytes]
            for at in range(-(-chunk.data.nbytes // nbytes))
        }
        return {key: data for key, data in pieces.items() if key in contribution.wanted}

    def _offer_rows(self, contribution: Contribution, rows: StagedRows, chunk: Chunk, now: float) -> None:
        """In the one thread that reads the rank's stream, which alone touches its rows until they are whole."""
        contribution.progress_at = now
        rows.add(chunk)
        if rows.missing:
            return
        odd = rows.check(self._backend.finite)
        if odd and contribution.folds:
            error = nonfinite(contribution.member, odd)
            if not self._skips(contribution):
                raise error
            with self._changed:
                contribution.found_inf = True
                self.stale = True

    def pump(self) -> None:
        """Folds whatever became ready because a lower rank began or fell out."""
        with self._changed:
            self.stale = False
            keys = [key for key, held in self._held.items() if held]
        for key in keys:
            self._fold(key)

    def _fold(self, key: Key) -> None:
        """Adds what is ready of one unit. One thread at a time does so for a unit; another one's chunk is taken along."""
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
                logger.exception("a defect while unit %s was folded", key)
                squares, error = None, errors.InternalError(f"the gradient could not be folded: {defect!r}")
            with self._changed:
                self._added(key, turn[0], squares, error)
                turn = self._turn(key)
                if turn is None:
                    self._busy.discard(key)
                    # A wake-up for each unit would make every push that waits look again each time.
                    if self._waiting or (not self._busy and (self.stale or self.void or self.complete)):
                        self._changed.notify_all()

    def _add(self, key: Key, contribution: Contribution, data: memoryview) -> tuple[float | None, errors.OptserveError | None]:
        """Folds one unit: the aggregate's sum of squares if no rank is to come, and why it was not folded."""
        values = np.frombuffer(data, contribution.dtypes[key[0]])
        error = self._fault(key, contribution, values)
        if error is not None:
            return None, error
        with self._changed:
            if self.void or not contribution.folds or self.contributions.get(contribution.member.rank) is not contribution:
                return None, None  # it fell out meanwhile: from here on that would void the round
            if self.base is None:
                self.base = self._folding()[0]
            contribution.folded_any = True
            first = not self._folded.get(key)
            self._folded.setdefault(key, set()).add(contribution.member.rank)
            ratio = contribution.weight / self.base.weight
            measures = contribution.member.rank == max(self.expected, default=0) and not self._backend.squares_at_end
        into = self._unit(key)
        self._backend.fold(into, values, ratio, first)
        return (self._backend.sum_of_squares(into) if measures else None), None  # while the unit is in the cache

    def _fault(self, key: Key, contribution: Contribution, values: npt.NDArray[np.generic]) -> errors.OptserveError | None:
        """Why a unit must not be folded."""
        if not self._backend.finite(values):
            return nonfinite(contribution.member, self._names(key))
        padding = self.layout.padding(*key)
        if padding.size and values[padding].astype(np.float32).any():
            return errors.InvalidChunkError(
                f"the gradient of rank {contribution.member.rank} is not zero between the parameters in unit {key[1]} "
                f"of array {key[0]}"
            )
        return None

    def _added(self, key: Key, contribution: Contribution, squares: float | None, error: errors.OptserveError | None) -> None:
        if error is None:
            contribution.unfolded.discard(key)
            self._squares.pop(key, None)
            if squares is not None:
                self._squares[key] = squares
        elif self._skips(contribution) and isinstance(error, errors.NonfiniteGradientError):
            contribution.found_inf = True
            self.stale = True
        else:
            contribution.error = error
            self.remove(contribution)

    def _skips(self, contribution: Contribution) -> bool:
        """Whether what is not finite skips the step: also where a rank has scaled its loss, whatever the job's policy."""
        return self._skip_nonfinite or contribution.push.loss_scale is not None

    def _names(self, key: Key) -> list[str]:
        array_id, unit = key
        begin, end = (at * self.layout.arrays[array_id].unit for at in (unit, unit + 1))
        return [
            repr(place.name)
            for place in self.layout.places
            if place.array_id == array_id and place.offset < end and place.offset + place.size > begin and place.size
        ]


def nonfinite(member: Member, names: list[str]) -> errors.NonfiniteGradientError:
    """For the sender of NaN or Inf; `names` are those of the parameters, quoted."""
    where = f" in {', '.join(names[:4])}" + (f" and {len(names) - 4} more" if len(names) > 4 else "") if names else ""
    return errors.NonfiniteGradientError(
        f"the gradient of rank {member.rank} {member.name!r} holds NaN or Inf{where}; nothing was applied, push again",
        rank=member.rank,
    )
