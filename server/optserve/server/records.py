"""What happens to a job, as data: every mutation is one of these records, and replaying them in order gives the job again.

A record is made after its call was checked, logged before it is applied, and holds all that `Job.apply` needs.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from optserve.v1 import jobs_pb2
from optserve.v1 import types_pb2 as pb
from optserve.wire.arguments import Factors, ScheduleValue
from optserve.wire.rows import Sums
from optserve.wire.values import Value

Arrays = Mapping[int, npt.NDArray[np.generic]]
"""Flat arrays by id."""

Changes = Mapping[int, Mapping[str, Value]]
"""Hyperparameters by group and name."""


@dataclass(frozen=True)
class Position:
    """Where a job stands: index of the last applied record, optimizer steps, and the history that they belong to."""

    lineage_id: str
    version: int = 0
    step: int = 0
    durable_version: int = 0

    def to_proto(self) -> pb.Position:
        return pb.Position(
            lineage_id=self.lineage_id, version=self.version, step=self.step, durable_version=self.durable_version
        )


@dataclass(frozen=True)
class Caller:
    """Identity of the call that a record comes from. `fingerprint` stands for the call's content."""

    session_id: str
    epoch: int
    seq: int
    fingerprint: str


@dataclass(frozen=True)
class Result:
    """What a call is answered with, the first time and every time it is repeated.

    `value` is JSON-able and never holds tensors.
    """

    position: Position
    value: Mapping[str, Any] = field(default_factory=dict)

    def to_document(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Result:
        return cls(Position(**document["position"]), document["value"])


@dataclass(frozen=True)
class Rules:
    """What happens to the averaged gradient before the optimizer steps with it. At most one of the clip rules is set.

    `accumulation`: the optimizer steps with the mean of so many rounds.
    """

    clip_grad_norm: float | None = None
    clip_grad_value: float | None = None
    accumulation: int = 1

    def to_proto(self) -> jobs_pb2.StepRules:
        return jobs_pb2.StepRules(**asdict(self))


@dataclass(frozen=True)
class Initialized:
    """The creator's values are in the store."""


@dataclass(frozen=True)
class Joined:
    """A session holds a name and a rank from now on; whoever held either is fenced."""

    name: str
    rank: int
    session_id: str
    epoch: int


@dataclass(frozen=True)
class Left:
    """A member is not waited for until it joins again."""

    name: str


@dataclass(frozen=True)
class GroupAdded:
    """One more parameter group, with its hyperparameters filled in and its parameters' values."""

    caller: Caller
    hyperparameters: Mapping[str, Value]
    parameters: Sequence[tuple[str, npt.NDArray[np.generic]]]


@dataclass(frozen=True)
class GroupUpdated:
    """Hyperparameters of one group, all of them, as they are after the edit."""

    caller: Caller
    group: int
    hyperparameters: Mapping[str, Value]


@dataclass(frozen=True)
class RulesUpdated:
    """The rules, all of them, as they are after the edit."""

    caller: Caller
    rules: Rules


@dataclass(frozen=True)
class ParameterRenamed:
    """A parameter has another name; its value and state stay."""

    caller: Caller
    name: str
    new_name: str


@dataclass(frozen=True)
class ParameterReplaced:
    """A parameter has another value, perhaps of another shape and dtype; its state begins again unless it is kept."""

    caller: Caller
    name: str
    value: npt.NDArray[np.generic]
    keep_state: bool


@dataclass(frozen=True)
class ParameterRemoved:
    """A parameter is gone, with its state."""

    caller: Caller
    name: str


@dataclass(frozen=True)
class ScheduleSet:
    """Another schedule, or none (name empty)."""

    caller: Caller
    name: str
    arguments: Mapping[str, ScheduleValue]
    factors: tuple[Factors, ...] = ()


@dataclass(frozen=True)
class ScheduleStepped:
    """A step of the schedule. `count` is the k of a worker's counted call, 0 for an administrative one."""

    caller: Caller
    count: int
    metric: float | None
    factors: tuple[Factors, ...] = ()
    setting: str = ""
    """Of the schedule, that the functions were given for which gave the factors."""
    changes: Changes = field(default_factory=dict)
    """The groups have these before the schedule steps."""


@dataclass(frozen=True)
class ScheduleLoaded:
    """The schedule put where a state_dict of torch's stands, which is JSON-able; the groups stay."""

    caller: Caller
    state: Mapping[str, Any]


@dataclass(frozen=True)
class StateLoaded:
    """Optimizer state and groups replaced by a state_dict's; parameters stay.

    `loaded`: the names of the parameters whose state is replaced, None: of all.
    """

    caller: Caller
    groups: Sequence[Mapping[str, Value]]
    steps: Mapping[str, int]
    state: Mapping[str, npt.NDArray[np.generic]]
    loaded: frozenset[str] | None = None


@dataclass(frozen=True)
class Restored:
    """The job put where a checkpoint stands, in a new lineage."""

    caller: Caller
    lineage_id: str
    document: Mapping[str, Any]
    parameters: Mapping[str, npt.NDArray[np.generic]]
    state: Mapping[str, npt.NDArray[np.generic]]


@dataclass(frozen=True)
class CheckpointDeleted:
    """A checkpoint is gone; of the job itself only the stored result changes."""

    caller: Caller
    name: str


@dataclass(frozen=True)
class Decision:
    """What a round does, decided once. With the aggregate it is all that its application needs.

    The aggregate times `scale` is what the optimizer steps with: the weighted mean, unscaled and clipped in norm; its elements
    are then clipped to `clip_value`. `absent` are the parameters that have no gradient. `grad_norm` is the mean's before it was
    clipped. `changes` hold from this round's step on, and if there is no step all the same.
    """

    ranks: tuple[int, ...]
    scale: float
    absent: frozenset[int]
    grad_norm: float
    skip_reason: str
    metrics: Mapping[str, float]
    changes: Changes = field(default_factory=dict)
    clip_factor: float = 1.0
    """What `scale` holds of clipping in norm."""
    clip_value: float | None = None
    accumulated: int = 0
    """Not 0: the aggregate is the sum of so many rounds, and is kept for a later round's step."""
    evaluations: int = 0
    """Of the ranks' closures."""

    @property
    def skipped(self) -> bool:
        return bool(self.skip_reason)

    @property
    def steps(self) -> bool:
        return not (self.skip_reason or self.accumulated)


@dataclass(frozen=True)
class RoundApplied:
    """A decided round: in `async` one push. `callers` are the pushes that it answers.

    `gradients` are the aggregate, with what earlier rounds of the window have summed up. `outcome` is what a search has come
    to, in the store's own terms: then it counts, and the gradients do not.
    """

    callers: tuple[Caller, ...]
    decision: Decision
    gradients: Sums
    outcome: Mapping[str, npt.NDArray[np.generic]] | None = None


Record = (
    Initialized
    | Joined
    | Left
    | GroupAdded
    | GroupUpdated
    | RulesUpdated
    | ParameterRenamed
    | ParameterReplaced
    | ParameterRemoved
    | ScheduleSet
    | ScheduleStepped
    | ScheduleLoaded
    | StateLoaded
    | Restored
    | CheckpointDeleted
    | RoundApplied
)


def new_id() -> str:
    """A UUID: for a lineage, a start, a job."""
    return str(uuid.uuid4())


def advanced(position: Position, *, step: int = 0) -> Position:
    """The position one record later."""
    return replace(position, version=position.version + 1, step=position.step + step)
