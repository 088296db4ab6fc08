from optserve.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetStateRequest(_message.Message):
    __slots__ = ("job_id",)
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    def __init__(self, job_id: _Optional[str] = ...) -> None: ...

class GetStateResponse(_message.Message):
    __slots__ = ("begin", "end", "chunk")
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    begin: StateBegin
    end: _types_pb2.StreamEnd
    chunk: _types_pb2.TensorChunk
    def __init__(self, begin: _Optional[_Union[StateBegin, _Mapping]] = ..., end: _Optional[_Union[_types_pb2.StreamEnd, _Mapping]] = ..., chunk: _Optional[_Union[_types_pb2.TensorChunk, _Mapping]] = ...) -> None: ...

class StateBegin(_message.Message):
    __slots__ = ("position", "groups", "steps", "entries", "bundle_bytes", "has_step", "integer_steps")
    class StepsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    POSITION_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_BYTES_FIELD_NUMBER: _ClassVar[int]
    HAS_STEP_FIELD_NUMBER: _ClassVar[int]
    INTEGER_STEPS_FIELD_NUMBER: _ClassVar[int]
    position: _types_pb2.Position
    groups: _containers.RepeatedCompositeFieldContainer[_types_pb2.Group]
    steps: _containers.ScalarMap[str, float]
    entries: _containers.RepeatedCompositeFieldContainer[_types_pb2.BundleEntry]
    bundle_bytes: int
    has_step: bool
    integer_steps: bool
    def __init__(self, position: _Optional[_Union[_types_pb2.Position, _Mapping]] = ..., groups: _Optional[_Iterable[_Union[_types_pb2.Group, _Mapping]]] = ..., steps: _Optional[_Mapping[str, float]] = ..., entries: _Optional[_Iterable[_Union[_types_pb2.BundleEntry, _Mapping]]] = ..., bundle_bytes: _Optional[int] = ..., has_step: bool = ..., integer_steps: bool = ...) -> None: ...

class LoadStateRequest(_message.Message):
    __slots__ = ("begin", "end", "chunk")
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    begin: LoadStateBegin
    end: _types_pb2.StreamEnd
    chunk: _types_pb2.TensorChunk
    def __init__(self, begin: _Optional[_Union[LoadStateBegin, _Mapping]] = ..., end: _Optional[_Union[_types_pb2.StreamEnd, _Mapping]] = ..., chunk: _Optional[_Union[_types_pb2.TensorChunk, _Mapping]] = ...) -> None: ...

class LoadStateBegin(_message.Message):
    __slots__ = ("call", "groups", "steps", "entries", "bundle_bytes", "partial", "loaded")
    class StepsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    CALL_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_BYTES_FIELD_NUMBER: _ClassVar[int]
    PARTIAL_FIELD_NUMBER: _ClassVar[int]
    LOADED_FIELD_NUMBER: _ClassVar[int]
    call: _types_pb2.CallIdentity
    groups: _containers.RepeatedCompositeFieldContainer[_types_pb2.Group]
    steps: _containers.ScalarMap[str, float]
    entries: _containers.RepeatedCompositeFieldContainer[_types_pb2.BundleEntry]
    bundle_bytes: int
    partial: bool
    loaded: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, call: _Optional[_Union[_types_pb2.CallIdentity, _Mapping]] = ..., groups: _Optional[_Iterable[_Union[_types_pb2.Group, _Mapping]]] = ..., steps: _Optional[_Mapping[str, float]] = ..., entries: _Optional[_Iterable[_Union[_types_pb2.BundleEntry, _Mapping]]] = ..., bundle_bytes: _Optional[int] = ..., partial: bool = ..., loaded: _Optional[_Iterable[str]] = ...) -> None: ...

class LoadStateResponse(_message.Message):
    __slots__ = ("position",)
    POSITION_FIELD_NUMBER: _ClassVar[int]
    position: _types_pb2.Position
    def __init__(self, position: _Optional[_Union[_types_pb2.Position, _Mapping]] = ...) -> None: ...
