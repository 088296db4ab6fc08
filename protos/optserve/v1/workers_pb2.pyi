from optserve.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class JoinRequest(_message.Message):
    __slots__ = ("job_id", "session_id", "name", "rank", "seen")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    SEEN_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    session_id: str
    name: str
    rank: int
    seen: _types_pb2.Position
    def __init__(self, job_id: _Optional[str] = ..., session_id: _Optional[str] = ..., name: _Optional[str] = ..., rank: _Optional[int] = ..., seen: _Optional[_Union[_types_pb2.Position, _Mapping]] = ...) -> None: ...

class JoinResponse(_message.Message):
    __slots__ = ("name", "rank", "epoch", "workers", "position", "layout", "lease_seconds", "schedule_steps", "last_seq", "learning_rates", "groups")
    NAME_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    LEASE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    SCHEDULE_STEPS_FIELD_NUMBER: _ClassVar[int]
    LAST_SEQ_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATES_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    name: str
    rank: int
    epoch: int
    workers: int
    position: _types_pb2.Position
    layout: _types_pb2.Layout
    lease_seconds: float
    schedule_steps: int
    last_seq: int
    learning_rates: _containers.RepeatedScalarFieldContainer[float]
    groups: _containers.RepeatedCompositeFieldContainer[_types_pb2.Group]
    def __init__(self, name: _Optional[str] = ..., rank: _Optional[int] = ..., epoch: _Optional[int] = ..., workers: _Optional[int] = ..., position: _Optional[_Union[_types_pb2.Position, _Mapping]] = ..., layout: _Optional[_Union[_types_pb2.Layout, _Mapping]] = ..., lease_seconds: _Optional[float] = ..., schedule_steps: _Optional[int] = ..., last_seq: _Optional[int] = ..., learning_rates: _Optional[_Iterable[float]] = ..., groups: _Optional[_Iterable[_Union[_types_pb2.Group, _Mapping]]] = ...) -> None: ...

class HeartbeatRequest(_message.Message):
    __slots__ = ("job_id", "session_id", "epoch")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    session_id: str
    epoch: int
    def __init__(self, job_id: _Optional[str] = ..., session_id: _Optional[str] = ..., epoch: _Optional[int] = ...) -> None: ...

class HeartbeatResponse(_message.Message):
    __slots__ = ("position",)
    POSITION_FIELD_NUMBER: _ClassVar[int]
    position: _types_pb2.Position
    def __init__(self, position: _Optional[_Union[_types_pb2.Position, _Mapping]] = ...) -> None: ...

class LeaveRequest(_message.Message):
    __slots__ = ("job_id", "session_id", "epoch")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    session_id: str
    epoch: int
    def __init__(self, job_id: _Optional[str] = ..., session_id: _Optional[str] = ..., epoch: _Optional[int] = ...) -> None: ...

class LeaveResponse(_message.Message):
    __slots__ = ("position",)
    POSITION_FIELD_NUMBER: _ClassVar[int]
    position: _types_pb2.Position
    def __init__(self, position: _Optional[_Union[_types_pb2.Position, _Mapping]] = ...) -> None: ...
