from optserve.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Contribution(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CONTRIBUTION_UNSPECIFIED: _ClassVar[Contribution]
    CONTRIBUTION_GRADIENT: _ClassVar[Contribution]
    CONTRIBUTION_SKIP: _ClassVar[Contribution]
    CONTRIBUTION_NONFINITE: _ClassVar[Contribution]
    CONTRIBUTION_ABANDON: _ClassVar[Contribution]
CONTRIBUTION_UNSPECIFIED: Contribution
CONTRIBUTION_GRADIENT: Contribution
CONTRIBUTION_SKIP: Contribution
CONTRIBUTION_NONFINITE: Contribution
CONTRIBUTION_ABANDON: Contribution

class StreamOpen(_message.Message):
    __slots__ = ("job_id", "session_id", "epoch", "seen")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEEN_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    session_id: str
    epoch: int
    seen: _types_pb2.Position
    def __init__(self, job_id: _Optional[str] = ..., session_id: _Optional[str] = ..., epoch: _Optional[int] = ..., seen: _Optional[_Union[_types_pb2.Position, _Mapping]] = ...) -> None: ...

class StreamOpened(_message.Message):
    __slots__ = ("position", "last_seq")
    POSITION_FIELD_NUMBER: _ClassVar[int]
    LAST_SEQ_FIELD_NUMBER: _ClassVar[int]
    position: _types_pb2.Position
    last_seq: int
    def __init__(self, position: _Optional[_Union[_types_pb2.Position, _Mapping]] = ..., last_seq: _Optional[int] = ...) -> None: ...

class PushBegin(_message.Message):
    __slots__ = ("call", "contribution", "weight", "parameter_count", "absent", "content_fingerprint", "want_weights", "metrics", "inline", "inline_weights_bytes", "nonfinite", "changes", "groups_version", "layout_version", "dtypes", "sparse", "loss_scale", "clip_grad_norm", "clip_grad_value", "loss", "evaluation", "closure", "want_rows")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class DtypesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: _types_pb2.DataType
        def __init__(self, key: _Optional[int] = ..., value: _Optional[_Union[_types_pb2.DataType, str]] = ...) -> None: ...
    CALL_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTION_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    PARAMETER_COUNT_FIELD_NUMBER: _ClassVar[int]
    ABSENT_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    WANT_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    INLINE_FIELD_NUMBER: _ClassVar[int]
    INLINE_WEIGHTS_BYTES_FIELD_NUMBER: _ClassVar[int]
    NONFINITE_FIELD_NUMBER: _ClassVar[int]
    CHANGES_FIELD_NUMBER: _ClassVar[int]
    GROUPS_VERSION_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_VERSION_FIELD_NUMBER: _ClassVar[int]
    DTYPES_FIELD_NUMBER: _ClassVar[int]
    SPARSE_FIELD_NUMBER: _ClassVar[int]
    LOSS_SCALE_FIELD_NUMBER: _ClassVar[int]
    CLIP_GRAD_NORM_FIELD_NUMBER: _ClassVar[int]
    CLIP_GRAD_VALUE_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    EVALUATION_FIELD_NUMBER: _ClassVar[int]
    CLOSURE_FIELD_NUMBER: _ClassVar[int]
    WANT_ROWS_FIELD_NUMBER: _ClassVar[int]
    call: _types_pb2.CallIdentity
    contribution: Contribution
    weight: float
    parameter_count: int
    absent: _containers.RepeatedScalarFieldContainer[int]
    content_fingerprint: int
    want_weights: bool
    metrics: _containers.ScalarMap[str, float]
    inline: _types_pb2.InlineChunks
    inline_weights_bytes: int
    nonfinite: _containers.RepeatedScalarFieldContainer[int]
    changes: _containers.RepeatedCompositeFieldContainer[_types_pb2.GroupChange]
    groups_version: int
    layout_version: int
    dtypes: _containers.ScalarMap[int, _types_pb2.DataType]
    sparse: _containers.RepeatedCompositeFieldContainer[_types_pb2.RowsEntry]
    loss_scale: float
    clip_grad_norm: float
    clip_grad_value: float
    loss: float
    evaluation: int
    closure: int
    want_rows: _containers.RepeatedCompositeFieldContainer[_types_pb2.Rows]
    def __init__(self, call: _Optional[_Union[_types_pb2.CallIdentity, _Mapping]] = ..., contribution: _Optional[_Union[Contribution, str]] = ..., weight: _Optional[float] = ..., parameter_count: _Optional[int] = ..., absent: _Optional[_Iterable[int]] = ..., content_fingerprint: _Optional[int] = ..., want_weights: bool = ..., metrics: _Optional[_Mapping[str, float]] = ..., inline: _Optional[_Union[_types_pb2.InlineChunks, _Mapping]] = ..., inline_weights_bytes: _Optional[int] = ..., nonfinite: _Optional[_Iterable[int]] = ..., changes: _Optional[_Iterable[_Union[_types_pb2.GroupChange, _Mapping]]] = ..., groups_version: _Optional[int] = ..., layout_version: _Optional[int] = ..., dtypes: _Optional[_Mapping[int, _types_pb2.DataType]] = ..., sparse: _Optional[_Iterable[_Union[_types_pb2.RowsEntry, _Mapping]]] = ..., loss_scale: _Optional[float] = ..., clip_grad_norm: _Optional[float] = ..., clip_grad_value: _Optional[float] = ..., loss: _Optional[float] = ..., evaluation: _Optional[int] = ..., closure: _Optional[int] = ..., want_rows: _Optional[_Iterable[_Union[_types_pb2.Rows, _Mapping]]] = ...) -> None: ...

class PullWeights(_message.Message):
    __slots__ = ("inline_weights_bytes", "seen", "groups_version", "rows", "layout_version")
    INLINE_WEIGHTS_BYTES_FIELD_NUMBER: _ClassVar[int]
    SEEN_FIELD_NUMBER: _ClassVar[int]
    GROUPS_VERSION_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_VERSION_FIELD_NUMBER: _ClassVar[int]
    inline_weights_bytes: int
    seen: _types_pb2.Position
    groups_version: int
    rows: _containers.RepeatedCompositeFieldContainer[_types_pb2.Rows]
    layout_version: int
    def __init__(self, inline_weights_bytes: _Optional[int] = ..., seen: _Optional[_Union[_types_pb2.Position, _Mapping]] = ..., groups_version: _Optional[int] = ..., rows: _Optional[_Iterable[_Union[_types_pb2.Rows, _Mapping]]] = ..., layout_version: _Optional[int] = ...) -> None: ...

class StreamRequest(_message.Message):
    __slots__ = ("open", "push", "end", "pull", "chunk")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    PUSH_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    PULL_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    open: StreamOpen
    push: PushBegin
    end: _types_pb2.StreamEnd
    pull: PullWeights
    chunk: _types_pb2.TensorChunk
    def __init__(self, open: _Optional[_Union[StreamOpen, _Mapping]] = ..., push: _Optional[_Union[PushBegin, _Mapping]] = ..., end: _Optional[_Union[_types_pb2.StreamEnd, _Mapping]] = ..., pull: _Optional[_Union[PullWeights, _Mapping]] = ..., chunk: _Optional[_Union[_types_pb2.TensorChunk, _Mapping]] = ...) -> None: ...

class PushResult(_message.Message):
    __slots__ = ("seq", "position", "learning_rates", "grad_norm", "skipped", "skip_reason", "ranks", "waited_for_rank", "waited_seconds", "weights", "changed_groups", "accumulated", "clip_factor", "evaluations", "metrics")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    SEQ_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATES_FIELD_NUMBER: _ClassVar[int]
    GRAD_NORM_FIELD_NUMBER: _ClassVar[int]
    SKIPPED_FIELD_NUMBER: _ClassVar[int]
    SKIP_REASON_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    WAITED_FOR_RANK_FIELD_NUMBER: _ClassVar[int]
    WAITED_SECONDS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    CHANGED_GROUPS_FIELD_NUMBER: _ClassVar[int]
    ACCUMULATED_FIELD_NUMBER: _ClassVar[int]
    CLIP_FACTOR_FIELD_NUMBER: _ClassVar[int]
    EVALUATIONS_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    seq: int
    position: _types_pb2.Position
    learning_rates: _containers.RepeatedScalarFieldContainer[float]
    grad_norm: float
    skipped: bool
    skip_reason: str
    ranks: _containers.RepeatedScalarFieldContainer[int]
    waited_for_rank: int
    waited_seconds: float
    weights: WeightsBegin
    changed_groups: _types_pb2.ChangedGroups
    accumulated: int
    clip_factor: float
    evaluations: int
    metrics: _containers.ScalarMap[str, float]
    def __init__(self, seq: _Optional[int] = ..., position: _Optional[_Union[_types_pb2.Position, _Mapping]] = ..., learning_rates: _Optional[_Iterable[float]] = ..., grad_norm: _Optional[float] = ..., skipped: bool = ..., skip_reason: _Optional[str] = ..., ranks: _Optional[_Iterable[int]] = ..., waited_for_rank: _Optional[int] = ..., waited_seconds: _Optional[float] = ..., weights: _Optional[_Union[WeightsBegin, _Mapping]] = ..., changed_groups: _Optional[_Union[_types_pb2.ChangedGroups, _Mapping]] = ..., accumulated: _Optional[int] = ..., clip_factor: _Optional[float] = ..., evaluations: _Optional[int] = ..., metrics: _Optional[_Mapping[str, float]] = ...) -> None: ...

class Evaluate(_message.Message):
    __slots__ = ("evaluation", "weights")
    EVALUATION_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    evaluation: int
    weights: WeightsBegin
    def __init__(self, evaluation: _Optional[int] = ..., weights: _Optional[_Union[WeightsBegin, _Mapping]] = ...) -> None: ...

class RoundWaiting(_message.Message):
    __slots__ = ("round", "missing", "waited_seconds")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    WAITED_SECONDS_FIELD_NUMBER: _ClassVar[int]
    round: int
    missing: _containers.RepeatedCompositeFieldContainer[_types_pb2.Member]
    waited_seconds: float
    def __init__(self, round: _Optional[int] = ..., missing: _Optional[_Iterable[_Union[_types_pb2.Member, _Mapping]]] = ..., waited_seconds: _Optional[float] = ...) -> None: ...

class RoundResend(_message.Message):
    __slots__ = ("round", "restart")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    RESTART_FIELD_NUMBER: _ClassVar[int]
    round: int
    restart: bool
    def __init__(self, round: _Optional[int] = ..., restart: bool = ...) -> None: ...

class WeightsBegin(_message.Message):
    __slots__ = ("position", "layout_version", "layout", "inline", "changed_groups", "rows")
    POSITION_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_VERSION_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    INLINE_FIELD_NUMBER: _ClassVar[int]
    CHANGED_GROUPS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    position: _types_pb2.Position
    layout_version: int
    layout: _types_pb2.Layout
    inline: _types_pb2.InlineChunks
    changed_groups: _types_pb2.ChangedGroups
    rows: _containers.RepeatedCompositeFieldContainer[_types_pb2.RowsEntry]
    def __init__(self, position: _Optional[_Union[_types_pb2.Position, _Mapping]] = ..., layout_version: _Optional[int] = ..., layout: _Optional[_Union[_types_pb2.Layout, _Mapping]] = ..., inline: _Optional[_Union[_types_pb2.InlineChunks, _Mapping]] = ..., changed_groups: _Optional[_Union[_types_pb2.ChangedGroups, _Mapping]] = ..., rows: _Optional[_Iterable[_Union[_types_pb2.RowsEntry, _Mapping]]] = ...) -> None: ...

class Goodbye(_message.Message):
    __slots__ = ("error",)
    ERROR_FIELD_NUMBER: _ClassVar[int]
    error: _types_pb2.ErrorDetail
    def __init__(self, error: _Optional[_Union[_types_pb2.ErrorDetail, _Mapping]] = ...) -> None: ...

class StreamResponse(_message.Message):
    __slots__ = ("opened", "pushed", "waiting", "resend", "error", "weights", "end", "goodbye", "evaluate", "chunk")
    OPENED_FIELD_NUMBER: _ClassVar[int]
    PUSHED_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    RESEND_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    GOODBYE_FIELD_NUMBER: _ClassVar[int]
    EVALUATE_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    opened: StreamOpened
    pushed: PushResult
    waiting: RoundWaiting
    resend: RoundResend
    error: _types_pb2.ErrorDetail
    weights: WeightsBegin
    end: _types_pb2.StreamEnd
    goodbye: Goodbye
    evaluate: Evaluate
    chunk: _types_pb2.TensorChunk
    def __init__(self, opened: _Optional[_Union[StreamOpened, _Mapping]] = ..., pushed: _Optional[_Union[PushResult, _Mapping]] = ..., waiting: _Optional[_Union[RoundWaiting, _Mapping]] = ..., resend: _Optional[_Union[RoundResend, _Mapping]] = ..., error: _Optional[_Union[_types_pb2.ErrorDetail, _Mapping]] = ..., weights: _Optional[_Union[WeightsBegin, _Mapping]] = ..., end: _Optional[_Union[_types_pb2.StreamEnd, _Mapping]] = ..., goodbye: _Optional[_Union[Goodbye, _Mapping]] = ..., evaluate: _Optional[_Union[Evaluate, _Mapping]] = ..., chunk: _Optional[_Union[_types_pb2.TensorChunk, _Mapping]] = ...) -> None: ...

class PushRequest(_message.Message):
    __slots__ = ("begin", "end", "chunk")
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    begin: PushBegin
    end: _types_pb2.StreamEnd
    chunk: _types_pb2.TensorChunk
    def __init__(self, begin: _Optional[_Union[PushBegin, _Mapping]] = ..., end: _Optional[_Union[_types_pb2.StreamEnd, _Mapping]] = ..., chunk: _Optional[_Union[_types_pb2.TensorChunk, _Mapping]] = ...) -> None: ...

class PushResponse(_message.Message):
    __slots__ = ("result",)
    RESULT_FIELD_NUMBER: _ClassVar[int]
    result: PushResult
    def __init__(self, result: _Optional[_Union[PushResult, _Mapping]] = ...) -> None: ...

class PullRequest(_message.Message):
    __slots__ = ("job_id", "parameters", "include_layout", "seen", "rows", "layout_version")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_LAYOUT_FIELD_NUMBER: _ClassVar[int]
    SEEN_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_VERSION_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    parameters: _containers.RepeatedScalarFieldContainer[str]
    include_layout: bool
    seen: _types_pb2.Position
    rows: _containers.RepeatedCompositeFieldContainer[_types_pb2.Rows]
    layout_version: int
    def __init__(self, job_id: _Optional[str] = ..., parameters: _Optional[_Iterable[str]] = ..., include_layout: bool = ..., seen: _Optional[_Union[_types_pb2.Position, _Mapping]] = ..., rows: _Optional[_Iterable[_Union[_types_pb2.Rows, _Mapping]]] = ..., layout_version: _Optional[int] = ...) -> None: ...

class PullResponse(_message.Message):
    __slots__ = ("begin", "end", "chunk")
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    begin: WeightsBegin
    end: _types_pb2.StreamEnd
    chunk: _types_pb2.TensorChunk
    def __init__(self, begin: _Optional[_Union[WeightsBegin, _Mapping]] = ..., end: _Optional[_Union[_types_pb2.StreamEnd, _Mapping]] = ..., chunk: _Optional[_Union[_types_pb2.TensorChunk, _Mapping]] = ...) -> None: ...
