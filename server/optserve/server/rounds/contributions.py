"""What a rank pushes, and its part in a round that gathers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from optserve.server.formulas import Optimizer
from optserve.server.jobs.sessions import Member
from optserve.server.records import Caller, Changes, Result
from optserve.server.rounds.decide import Vote
from optserve.server.rounds.rows import StagedRows
from optserve.v1 import data_pb2, types_pb2
from optserve.wire import dtypes, errors
from optserve.wire.chunks import Coverage
from optserve.wire.layout import Array, Layout
from optserve.wire.values import Value

Key = tuple[int, int]
"""(array id, unit in it)."""


@dataclass(frozen=True)
class Push:
    """The head of a push, checked for form. For what the fields mean see PushBegin."""

    caller: Caller
    seen: tuple[str, int]
    kind: data_pb2.Contribution
    weight: float
    parameter_count: int
    absent: frozenset[int]
    metrics: Mapping[str, float]
    nonfinite: frozenset[int] = frozenset()
    changes: Changes = field(default_factory=dict)
    layout_version: int = 0
    dtypes: Mapping[int, np.dtype[np.generic]] = field(default_factory=dict)
    sparse: tuple[types_pb2.RowsEntry, ...] = ()
    loss_scale: float | None = None
    clip_grad_norm: float | None = None
    clip_grad_value: float | None = None
    loss: float | None = None
    evaluation: int = 0

    def is_repeated_by(self, push: Push) -> bool:
        """All evaluations of a step are the same call."""
        return (self.caller, self.evaluation) == (push.caller, push.evaluation)


@dataclass(frozen=True)
class Trial:
    """The optimizer asks for another evaluation, at these weights: flat arrays by id, which stay until all ranks pushed it."""

    evaluation: int
    arrays: Mapping[int, npt.NDArray[np.generic]]


@dataclass
class Contribution:
    """One rank's push to one round. Guarded by the job's lock."""

    member: Member
    push: Push
    present: frozenset[int]
    """Indices of the parameters that have a gradient."""
    arrays: frozenset[int]
    """The arrays in which those of them lie whose gradient is dense."""
    dtypes: Mapping[int, np.dtype[np.generic]]
    """That of the chunks of each array that any come of."""
    coverage: dict[int, Coverage]
    """What has not come yet, by array, in the grid of its chunks' dtype."""
    wanted: frozenset[Key]
    rows: StagedRows | None
    """What is sparse."""
    chunk_count: int
    """How many chunks the push must bring."""
    progress_at: float
    unfolded: set[Key] = field(default_factory=set)
    ended: bool = False
    found_inf: bool = False
    folded_any: bool = False
    error: errors.OptserveError | None = None
    result: Result | None = None
    trial: Trial | None = None
    """The optimizer took it in and asks for another evaluation."""

    @property
    def weight(self) -> float:
        return self.push.weight

    @property
    def folds(self) -> bool:
        """Whether its blocks are added at all."""
        return self.push.kind == data_pb2.CONTRIBUTION_GRADIENT and self.weight > 0 and not self.found_inf

    @property
    def complete(self) -> bool:
        return self.ended and (not self.folds or not self.unfolded)

    @property
    def missing(self) -> int:
        """How many chunks are still to come."""
        rows = 0 if self.rows is None else self.rows.missing
        return rows + sum(len(coverage.missing) for coverage in self.coverage.values())

    def vote(self) -> Vote:
        push = self.push
        return Vote(
            self.member.rank,
            self.weight,
            self.folds,
            self.found_inf or push.kind == data_pb2.CONTRIBUTION_NONFINITE,
            self.present,
            push.metrics,
            push.changes,
            frozenset(entry.parameter for entry in push.sparse),
            push.loss_scale,
            push.clip_grad_norm,
            push.clip_grad_value,
            push.loss,
            push.kind == data_pb2.CONTRIBUTION_GRADIENT,
        )


def contribution_of(
    push: Push, member: Member, layout: Layout, optimizer: Optimizer, groups: Sequence[Mapping[str, Value]], now: float
) -> Contribution:
    """A push's part in a round, none of which has come yet. `groups` are those after the push's changes.

    StaleLayoutError, UnknownParameterError, InvalidArgumentError, ShapeMismatchError, DtypeMismatchError, OutOfMemoryError;
    UnsupportedGradientError with torch's message for a kind of gradient that the optimizer does not take.
    """
    layout.check_version(push.layout_version, "the push")
    count = len(layout.places)
    if push.parameter_count > count:
        raise errors.UnknownParameterError(f"the push announces {push.parameter_count} parameters; the job has {count}")
    present = [index for index in range(push.parameter_count) if index not in push.absent]
    if push.kind != data_pb2.CONTRIBUTION_GRADIENT:
        return Contribution(member, push, frozenset(present), frozenset(), {}, {}, frozenset(), None, 0, now)
    rows = None
    dense = present
    if push.sparse:
        rows = _staged(push, layout, optimizer, groups)
        sparse = {entry.parameter for entry in push.sparse}
        dense = [index for index in present if index not in sparse]
    _check_dense(dense, layout, optimizer)
    grids = _grids(push, layout)
    blocks = layout.blocks_of(dense, grids)
    kinds = {array_id: grids.get(array_id, layout.arrays[array_id].dtype) for array_id in blocks}
    return Contribution(
        member,
        push,
        frozenset(present),
        layout.arrays_of(dense),
        kinds,
        {
            key: Coverage(f"array {key}", layout.arrays[key].length * kinds[key].itemsize, found)
            for key, found in blocks.items()
        },
        frozenset((array_id, unit) for array_id, found in layout.units_of(dense).items() for unit in found),
        rows,
        sum(map(len, blocks.values())) + (0 if rows is None else rows.chunk_count),
        now,
    )


def _staged(push: Push, layout: Layout, optimizer: Optimizer, groups: Sequence[Mapping[str, Value]]) -> StagedRows:
    for entry in push.sparse:
        if entry.parameter >= push.parameter_count:
            raise errors.UnknownParameterError(
                f"parameter {entry.parameter} has a sparse gradient, but only {push.parameter_count} are announced"
            )
        place = layout.places[entry.parameter]
        if entry.parameter in push.absent:
            raise errors.InvalidArgumentError(
                f"parameter {place.name!r} is announced as absent and with a sparse gradient", parameter=place.name
            )
        try:
            optimizer.moves_all(groups[layout.arrays[place.array_id].group])
        except RuntimeError as error:
            raise errors.UnsupportedGradientError(f"gradient {place.name!r}: {error}", parameter=place.name) from error
    return StagedRows(layout, push.sparse)


def _check_dense(dense: Collection[int], layout: Layout, optimizer: Optimizer) -> None:
    try:
        optimizer.check_dense()
    except RuntimeError as error:
        for index in dense:
            name = layout.places[index].name
            raise errors.UnsupportedGradientError(f"gradient {name!r}: {error}", parameter=name) from error


def _grids(push: Push, layout: Layout) -> dict[int, np.dtype[np.generic]]:
    """The dtypes of the arrays whose chunks do not have the array's own. UnknownParameterError, DtypeMismatchError."""
    for array_id, dtype in push.dtypes.items():
        if array_id >= len(layout.arrays):
            raise errors.UnknownParameterError(
                f"the push says the dtype of array {array_id}; the job has {len(layout.arrays)} arrays"
            )
        _check_width(layout.arrays[array_id], dtype)
    return {array_id: dtype for array_id, dtype in push.dtypes.items() if dtype != layout.arrays[array_id].dtype}


def _check_width(array: Array, dtype: np.dtype[np.generic]) -> None:
    if dtypes.is_complex(dtype) or dtype.itemsize > array.state_dtype.itemsize:
        raise errors.DtypeMismatchError(
            f"the gradient of array {array.array_id} has dtype {dtype}; it must be real, and no wider than {array.state_dtype}",
            found=dtype,
        )
