from optserve.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Consistency(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CONSISTENCY_UNSPECIFIED: _ClassVar[Consistency]
    CONSISTENCY_SYNC: _ClassVar[Consistency]
    CONSISTENCY_ASYNC: _ClassVar[Consistency]

class OnNonfinite(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ON_NONFINITE_UNSPECIFIED: _ClassVar[OnNonfinite]
    ON_NONFINITE_REJECT: _ClassVar[OnNonfinite]
    ON_NONFINITE_SKIP: _ClassVar[OnNonfinite]

class OnMissing(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ON_MISSING_UNSPECIFIED: _ClassVar[OnMissing]
    ON_MISSING_DROP: _ClassVar[OnMissing]
    ON_MISSING_WAIT: _ClassVar[OnMissing]
    ON_MISSING_FAIL: _ClassVar[OnMissing]
CONSISTENCY_UNSPECIFIED: Consistency
CONSISTENCY_SYNC: Consistency
CONSISTENCY_ASYNC: Consistency
ON_NONFINITE_UNSPECIFIED: OnNonfinite
ON_NONFINITE_REJECT: OnNonfinite
ON_NONFINITE_SKIP: OnNonfinite
ON_MISSING_UNSPECIFIED: OnMissing
ON_MISSING_DROP: OnMissing
ON_MISSING_WAIT: OnMissing
ON_MISSING_FAIL: OnMissing

class GroupSpec(_message.Message):
    __slots__ = ("hyperparameters", "parameters")
    HYPERPARAMETERS_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    hyperparameters: _containers.RepeatedCompositeFieldContainer[_types_pb2.Hyperparameter]
    parameters: _containers.RepeatedCompositeFieldContainer[_types_pb2.Parameter]
    def __init__(self, hyperparameters: _Optional[_Iterable[_Union[_types_pb2.Hyperparameter, _Mapping]]] = ..., parameters: _Optional[_Iterable[_Union[_types_pb2.Parameter, _Mapping]]] = ...) -> None: ...

class JobSpec(_message.Message):
    __slots__ = ("name", "optimizer", "defaults", "groups", "workers", "consistency", "on_nonfinite", "on_missing", "quorum", "round_timeout_seconds", "lease_seconds", "rules")
    NAME_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    DEFAULTS_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    CONSISTENCY_FIELD_NUMBER: _ClassVar[int]
    ON_NONFINITE_FIELD_NUMBER: _ClassVar[int]
    ON_MISSING_FIELD_NUMBER: _ClassVar[int]
    QUORUM_FIELD_NUMBER: _ClassVar[int]
    ROUND_TIMEOUT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    LEASE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    RULES_FIELD_NUMBER: _ClassVar[int]
    name: str
    optimizer: str
    defaults: _containers.RepeatedCompositeFieldContainer[_types_pb2.Hyperparameter]
    groups: _containers.RepeatedCompositeFieldContainer[GroupSpec]
    workers: int
    consistency: Consistency
    on_nonfinite: OnNonfinite
    on_missing: OnMissing
    quorum: int
    round_timeout_seconds: float
    lease_seconds: float
    rules: StepRules
    def __init__(self, name: _Optional[str] = ..., optimizer: _Optional[str] = ..., defaults: _Optional[_Iterable[_Union[_types_pb2.Hyperparameter, _Mapping]]] = ..., groups: _Optional[_Iterable[_Union[GroupSpec, _Mapping]]] = ..., workers: _Optional[int] = ..., consistency: _Optional[_Union[Consistency, str]] = ..., on_nonfinite: _Optional[_Union[OnNonfinite, str]] = ..., on_missing: _Optional[_Union[OnMissing, str]] = ..., quorum: _Optional[int] = ..., round_timeout_seconds: _Optional[float] = ..., lease_seconds: _Optional[float] = ..., rules: _Optional[_Union[StepRules, _Mapping]] = ...) -> None: ...

class StepRules(_message.Message):
    __slots__ = ("clip_grad_norm", "clip_grad_value", "accumulation")
    CLIP_GRAD_NORM_FIELD_NUMBER: _ClassVar[int]
    CLIP_GRAD_VALUE_FIELD_NUMBER: _ClassVar[int]
    ACCUMULATION_FIELD_NUMBER: _ClassVar[int]
    clip_grad_norm: float
    clip_grad_value: float
    accumulation: int
    def __init__(self, clip_grad_norm: _Optional[float] = ..., clip_grad_value: _Optional[float] = ..., accumulation: _Optional[int] = ...) -> None: ...

class JobInfo(_message.Message):
    __slots__ = ("job_id", "spec", "position", "layout", "groups", "members", "initialized", "backend", "metrics", "state_bytes", "rules", "accumulated")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    INITIALIZED_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    STATE_BYTES_FIELD_NUMBER: _ClassVar[int]
    RULES_FIELD_NUMBER: _ClassVar[int]
    ACCUMULATED_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    spec: JobSpec
    position: _types_pb2.Position
    layout: _types_pb2.Layout
    groups: _containers.RepeatedCompositeFieldContainer[_types_pb2.Group]
    members: _containers.RepeatedCompositeFieldContainer[_types_pb2.Member]
    initialized: bool
    backend: str
    metrics: _containers.ScalarMap[str, float]
    state_bytes: int
    rules: StepRules
    accumulated: int
    def __init__(self, job_id: _Optional[str] = ..., spec: _Optional[_Union[JobSpec, _Mapping]] = ..., position: _Optional[_Union[_types_pb2.Position, _Mapping]] = ..., layout: _Optional[_Union[_types_pb2.Layout, _Mapping]] = ..., groups: _Optional[_Iterable[_Union[_types_pb2.Group, _Mapping]]] = ..., members: _Optional[_Iterable[_Union[_types_pb2.Member, _Mapping]]] = ..., initialized: bool = ..., backend: _Optional[str] = ..., metrics: _Optional[_Mapping[str, float]] = ..., state_bytes: _Optional[int] = ..., rules: _Optional[_Union[StepRules, _Mapping]] = ..., accumulated: _Optional[int] = ...) -> None: ...

class CreateJobRequest(_message.Message):
    __slots__ = ("job_id", "session_id", "spec", "exist_ok")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    EXIST_OK_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    session_id: str
    spec: JobSpec
    exist_ok: bool
    def __init__(self, job_id: _Optional[str] = ..., session_id: _Optional[str] = ..., spec: _Optional[_Union[JobSpec, _Mapping]] = ..., exist_ok: bool = ...) -> None: ...

class CreateJobResponse(_message.Message):
    __slots__ = ("job", "created")
    JOB_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    job: JobInfo
    created: bool
    def __init__(self, job: _Optional[_Union[JobInfo, _Mapping]] = ..., created: bool = ...) -> None: ...

class InitializeJobRequest(_message.Message):
    __slots__ = ("begin", "end", "chunk")
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    begin: InitializeBegin
    end: _types_pb2.StreamEnd
    chunk: _types_pb2.TensorChunk
    def __init__(self, begin: _Optional[_Union[InitializeBegin, _Mapping]] = ..., end: _Optional[_Union[_types_pb2.StreamEnd, _Mapping]] = ..., chunk: _Optional[_Union[_types_pb2.TensorChunk, _Mapping]] = ...) -> None: ...

class InitializeBegin(_message.Message):
    __slots__ = ("job_id", "session_id")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    session_id: str
    def __init__(self, job_id: _Optional[str] = ..., session_id: _Optional[str] = ...) -> None: ...

class InitializeJobResponse(_message.Message):
    __slots__ = ("position",)
    POSITION_FIELD_NUMBER: _ClassVar[int]
    position: _types_pb2.Position
    def __init__(self, position: _Optional[_Union[_types_pb2.Position, _Mapping]] = ...) -> None: ...

class CreateJobFromCheckpointRequest(_message.Message):
    __slots__ = ("begin", "end", "chunk")
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    begin: CreateJobFromCheckpointBegin
    end: _types_pb2.StreamEnd
    chunk: _types_pb2.TensorChunk
    def __init__(self, begin: _Optional[_Union[CreateJobFromCheckpointBegin, _Mapping]] = ..., end: _Optional[_Union[_types_pb2.StreamEnd, _Mapping]] = ..., chunk: _Optional[_Union[_types_pb2.TensorChunk, _Mapping]] = ...) -> None: ...

class CreateJobFromCheckpointBegin(_message.Message):
    __slots__ = ("job_id", "session_id", "name", "files")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    session_id: str
    name: str
    files: _containers.RepeatedCompositeFieldContainer[CheckpointFile]
    def __init__(self, job_id: _Optional[str] = ..., session_id: _Optional[str] = ..., name: _Optional[str] = ..., files: _Optional[_Iterable[_Union[CheckpointFile, _Mapping]]] = ...) -> None: ...

class CheckpointFile(_message.Message):
    __slots__ = ("name", "size")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    name: str
    size: int
    def __init__(self, name: _Optional[str] = ..., size: _Optional[int] = ...) -> None: ...

class CreateJobFromCheckpointResponse(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: JobInfo
    def __init__(self, job: _Optional[_Union[JobInfo, _Mapping]] = ...) -> None: ...

class GetJobRequest(_message.Message):
    __slots__ = ("job", "wait_initialized")
    JOB_FIELD_NUMBER: _ClassVar[int]
    WAIT_INITIALIZED_FIELD_NUMBER: _ClassVar[int]
    job: str
    wait_initialized: bool
    def __init__(self, job: _Optional[str] = ..., wait_initialized: bool = ...) -> None: ...

class GetJobResponse(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: JobInfo
    def __init__(self, job: _Optional[_Union[JobInfo, _Mapping]] = ...) -> None: ...

class ListJobsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListJobsResponse(_message.Message):
    __slots__ = ("jobs",)
    JOBS_FIELD_NUMBER: _ClassVar[int]
    jobs: _containers.RepeatedCompositeFieldContainer[JobInfo]
    def __init__(self, jobs: _Optional[_Iterable[_Union[JobInfo, _Mapping]]] = ...) -> None: ...

class WaitForVersionRequest(_message.Message):
    __slots__ = ("job_id", "version", "timeout_seconds")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    version: int
    timeout_seconds: float
    def __init__(self, job_id: _Optional[str] = ..., version: _Optional[int] = ..., timeout_seconds: _Optional[float] = ...) -> None: ...

class WaitForVersionResponse(_message.Message):
    __slots__ = ("position",)
    POSITION_FIELD_NUMBER: _ClassVar[int]
    position: _types_pb2.Position
    def __init__(self, position: _Optional[_Union[_types_pb2.Position, _Mapping]] = ...) -> None: ...

class Event(_message.Message):
    __slots__ = ("index", "time_seconds", "kind", "position", "message", "fields", "metrics")
    class FieldsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TIME_SECONDS_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    FIELDS_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    index: int
    time_seconds: float
    kind: str
    position: _types_pb2.Position
    message: str
    fields: _containers.ScalarMap[str, str]
    metrics: _containers.ScalarMap[str, float]
    def __init__(self, index: _Optional[int] = ..., time_seconds: _Optional[float] = ..., kind: _Optional[str] = ..., position: _Optional[_Union[_types_pb2.Position, _Mapping]] = ..., message: _Optional[str] = ..., fields: _Optional[_Mapping[str, str]] = ..., metrics: _Optional[_Mapping[str, float]] = ...) -> None: ...

class ListEventsRequest(_message.Message):
    __slots__ = ("job_id", "after", "wait_seconds")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    WAIT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    after: int
    wait_seconds: float
    def __init__(self, job_id: _Optional[str] = ..., after: _Optional[int] = ..., wait_seconds: _Optional[float] = ...) -> None: ...

class ListEventsResponse(_message.Message):
    __slots__ = ("events",)
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    events: _containers.RepeatedCompositeFieldContainer[Event]
    def __init__(self, events: _Optional[_Iterable[_Union[Event, _Mapping]]] = ...) -> None: ...

class DeleteJobRequest(_message.Message):
    __slots__ = ("job_id",)
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    def __init__(self, job_id: _Optional[str] = ...) -> None: ...

class DeleteJobResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
