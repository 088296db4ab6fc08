from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ErrorReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ERROR_REASON_UNSPECIFIED: _ClassVar[ErrorReason]
    ERROR_REASON_INVALID_ARGUMENT: _ClassVar[ErrorReason]
    ERROR_REASON_INVALID_NAME: _ClassVar[ErrorReason]
    ERROR_REASON_UNKNOWN_OPTIMIZER: _ClassVar[ErrorReason]
    ERROR_REASON_UNKNOWN_HYPERPARAMETER: _ClassVar[ErrorReason]
    ERROR_REASON_INVALID_HYPERPARAMETER: _ClassVar[ErrorReason]
    ERROR_REASON_UNKNOWN_SCHEDULE: _ClassVar[ErrorReason]
    ERROR_REASON_UNKNOWN_PARAMETER: _ClassVar[ErrorReason]
    ERROR_REASON_DUPLICATE_PARAMETER: _ClassVar[ErrorReason]
    ERROR_REASON_SHAPE_MISMATCH: _ClassVar[ErrorReason]
    ERROR_REASON_DTYPE_MISMATCH: _ClassVar[ErrorReason]
    ERROR_REASON_NONFINITE_GRADIENT: _ClassVar[ErrorReason]
    ERROR_REASON_INVALID_CHUNK: _ClassVar[ErrorReason]
    ERROR_REASON_INCOMPLETE_STREAM: _ClassVar[ErrorReason]
    ERROR_REASON_PROTOCOL_VIOLATION: _ClassVar[ErrorReason]
    ERROR_REASON_INVALID_STATE_DICT: _ClassVar[ErrorReason]
    ERROR_REASON_JOB_NOT_FOUND: _ClassVar[ErrorReason]
    ERROR_REASON_JOB_EXISTS: _ClassVar[ErrorReason]
    ERROR_REASON_JOB_SPEC_MISMATCH: _ClassVar[ErrorReason]
    ERROR_REASON_JOB_NOT_INITIALIZED: _ClassVar[ErrorReason]
    ERROR_REASON_JOB_LOST: _ClassVar[ErrorReason]
    ERROR_REASON_ROLLED_BACK: _ClassVar[ErrorReason]
    ERROR_REASON_FENCED: _ClassVar[ErrorReason]
    ERROR_REASON_TOO_MANY_WORKERS: _ClassVar[ErrorReason]
    ERROR_REASON_RANK_HELD: _ClassVar[ErrorReason]
    ERROR_REASON_NOT_JOINED: _ClassVar[ErrorReason]
    ERROR_REASON_SEQUENCE_GAP: _ClassVar[ErrorReason]
    ERROR_REASON_SEQUENCE_CONFLICT: _ClassVar[ErrorReason]
    ERROR_REASON_RANKS_DISAGREE: _ClassVar[ErrorReason]
    ERROR_REASON_ROUND_FAILED: _ClassVar[ErrorReason]
    ERROR_REASON_ROUND_TIMEOUT: _ClassVar[ErrorReason]
    ERROR_REASON_CHECKPOINT_NOT_FOUND: _ClassVar[ErrorReason]
    ERROR_REASON_CHECKPOINT_EXISTS: _ClassVar[ErrorReason]
    ERROR_REASON_CHECKPOINT_CORRUPT: _ClassVar[ErrorReason]
    ERROR_REASON_CHECKPOINT_MISMATCH: _ClassVar[ErrorReason]
    ERROR_REASON_STORAGE_FAILED: _ClassVar[ErrorReason]
    ERROR_REASON_TOO_MANY_STREAMS: _ClassVar[ErrorReason]
    ERROR_REASON_OUT_OF_MEMORY: _ClassVar[ErrorReason]
    ERROR_REASON_SERVER_STOPPING: _ClassVar[ErrorReason]
    ERROR_REASON_SERVER_UNAVAILABLE: _ClassVar[ErrorReason]
    ERROR_REASON_DEADLINE_EXCEEDED: _ClassVar[ErrorReason]
    ERROR_REASON_INTERNAL: _ClassVar[ErrorReason]
    ERROR_REASON_CLOSED: _ClassVar[ErrorReason]
    ERROR_REASON_READ_ONLY: _ClassVar[ErrorReason]
    ERROR_REASON_MISSING_EXTRA: _ClassVar[ErrorReason]
    ERROR_REASON_ADDRESS_IN_USE: _ClassVar[ErrorReason]
    ERROR_REASON_INSECURE_ADDRESS: _ClassVar[ErrorReason]
    ERROR_REASON_MISSING_FUNCTION: _ClassVar[ErrorReason]
    ERROR_REASON_UNSUPPORTED_PARAMETER: _ClassVar[ErrorReason]
    ERROR_REASON_UNSUPPORTED_GRADIENT: _ClassVar[ErrorReason]
    ERROR_REASON_STALE_LAYOUT: _ClassVar[ErrorReason]

class DataType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DATA_TYPE_UNSPECIFIED: _ClassVar[DataType]
    DATA_TYPE_FLOAT32: _ClassVar[DataType]
    DATA_TYPE_FLOAT64: _ClassVar[DataType]
    DATA_TYPE_FLOAT16: _ClassVar[DataType]
    DATA_TYPE_BFLOAT16: _ClassVar[DataType]
    DATA_TYPE_COMPLEX64: _ClassVar[DataType]
    DATA_TYPE_COMPLEX128: _ClassVar[DataType]
ERROR_REASON_UNSPECIFIED: ErrorReason
ERROR_REASON_INVALID_ARGUMENT: ErrorReason
ERROR_REASON_INVALID_NAME: ErrorReason
ERROR_REASON_UNKNOWN_OPTIMIZER: ErrorReason
ERROR_REASON_UNKNOWN_HYPERPARAMETER: ErrorReason
ERROR_REASON_INVALID_HYPERPARAMETER: ErrorReason
ERROR_REASON_UNKNOWN_SCHEDULE: ErrorReason
ERROR_REASON_UNKNOWN_PARAMETER: ErrorReason
ERROR_REASON_DUPLICATE_PARAMETER: ErrorReason
ERROR_REASON_SHAPE_MISMATCH: ErrorReason
ERROR_REASON_DTYPE_MISMATCH: ErrorReason
ERROR_REASON_NONFINITE_GRADIENT: ErrorReason
ERROR_REASON_INVALID_CHUNK: ErrorReason
ERROR_REASON_INCOMPLETE_STREAM: ErrorReason
ERROR_REASON_PROTOCOL_VIOLATION: ErrorReason
ERROR_REASON_INVALID_STATE_DICT: ErrorReason
ERROR_REASON_JOB_NOT_FOUND: ErrorReason
ERROR_REASON_JOB_EXISTS: ErrorReason
ERROR_REASON_JOB_SPEC_MISMATCH: ErrorReason
ERROR_REASON_JOB_NOT_INITIALIZED: ErrorReason
ERROR_REASON_JOB_LOST: ErrorReason
ERROR_REASON_ROLLED_BACK: ErrorReason
ERROR_REASON_FENCED: ErrorReason
ERROR_REASON_TOO_MANY_WORKERS: ErrorReason
ERROR_REASON_RANK_HELD: ErrorReason
ERROR_REASON_NOT_JOINED: ErrorReason
ERROR_REASON_SEQUENCE_GAP: ErrorReason
ERROR_REASON_SEQUENCE_CONFLICT: ErrorReason
ERROR_REASON_RANKS_DISAGREE: ErrorReason
ERROR_REASON_ROUND_FAILED: ErrorReason
ERROR_REASON_ROUND_TIMEOUT: ErrorReason
ERROR_REASON_CHECKPOINT_NOT_FOUND: ErrorReason
ERROR_REASON_CHECKPOINT_EXISTS: ErrorReason
ERROR_REASON_CHECKPOINT_CORRUPT: ErrorReason
ERROR_REASON_CHECKPOINT_MISMATCH: ErrorReason
ERROR_REASON_STORAGE_FAILED: ErrorReason
ERROR_REASON_TOO_MANY_STREAMS: ErrorReason
ERROR_REASON_OUT_OF_MEMORY: ErrorReason
ERROR_REASON_SERVER_STOPPING: ErrorReason
ERROR_REASON_SERVER_UNAVAILABLE: ErrorReason
ERROR_REASON_DEADLINE_EXCEEDED: ErrorReason
ERROR_REASON_INTERNAL: ErrorReason
ERROR_REASON_CLOSED: ErrorReason
ERROR_REASON_READ_ONLY: ErrorReason
ERROR_REASON_MISSING_EXTRA: ErrorReason
ERROR_REASON_ADDRESS_IN_USE: ErrorReason
ERROR_REASON_INSECURE_ADDRESS: ErrorReason
ERROR_REASON_MISSING_FUNCTION: ErrorReason
ERROR_REASON_UNSUPPORTED_PARAMETER: ErrorReason
ERROR_REASON_UNSUPPORTED_GRADIENT: ErrorReason
ERROR_REASON_STALE_LAYOUT: ErrorReason
DATA_TYPE_UNSPECIFIED: DataType
DATA_TYPE_FLOAT32: DataType
DATA_TYPE_FLOAT64: DataType
DATA_TYPE_FLOAT16: DataType
DATA_TYPE_BFLOAT16: DataType
DATA_TYPE_COMPLEX64: DataType
DATA_TYPE_COMPLEX128: DataType

class ErrorDetail(_message.Message):
    __slots__ = ("reason", "message", "metadata")
    class MetadataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    reason: ErrorReason
    message: str
    metadata: _containers.ScalarMap[str, str]
    def __init__(self, reason: _Optional[_Union[ErrorReason, str]] = ..., message: _Optional[str] = ..., metadata: _Optional[_Mapping[str, str]] = ...) -> None: ...

class Position(_message.Message):
    __slots__ = ("lineage_id", "version", "step", "durable_version")
    LINEAGE_ID_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    DURABLE_VERSION_FIELD_NUMBER: _ClassVar[int]
    lineage_id: str
    version: int
    step: int
    durable_version: int
    def __init__(self, lineage_id: _Optional[str] = ..., version: _Optional[int] = ..., step: _Optional[int] = ..., durable_version: _Optional[int] = ...) -> None: ...

class CallIdentity(_message.Message):
    __slots__ = ("job_id", "session_id", "epoch", "seq", "seen")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    SEEN_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    session_id: str
    epoch: int
    seq: int
    seen: Position
    def __init__(self, job_id: _Optional[str] = ..., session_id: _Optional[str] = ..., epoch: _Optional[int] = ..., seq: _Optional[int] = ..., seen: _Optional[_Union[Position, _Mapping]] = ...) -> None: ...

class NumberList(_message.Message):
    __slots__ = ("values", "none")
    VALUES_FIELD_NUMBER: _ClassVar[int]
    NONE_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedScalarFieldContainer[float]
    none: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, values: _Optional[_Iterable[float]] = ..., none: _Optional[_Iterable[int]] = ...) -> None: ...

class Value(_message.Message):
    __slots__ = ("number", "integer", "flag", "text", "numbers", "schedules")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    INTEGER_FIELD_NUMBER: _ClassVar[int]
    FLAG_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    NUMBERS_FIELD_NUMBER: _ClassVar[int]
    SCHEDULES_FIELD_NUMBER: _ClassVar[int]
    number: float
    integer: int
    flag: bool
    text: str
    numbers: NumberList
    schedules: ScheduleList
    def __init__(self, number: _Optional[float] = ..., integer: _Optional[int] = ..., flag: bool = ..., text: _Optional[str] = ..., numbers: _Optional[_Union[NumberList, _Mapping]] = ..., schedules: _Optional[_Union[ScheduleList, _Mapping]] = ...) -> None: ...

class ScheduleList(_message.Message):
    __slots__ = ("entries",)
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedCompositeFieldContainer[ScheduleEntry]
    def __init__(self, entries: _Optional[_Iterable[_Union[ScheduleEntry, _Mapping]]] = ...) -> None: ...

class ScheduleEntry(_message.Message):
    __slots__ = ("name", "arguments")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ARGUMENTS_FIELD_NUMBER: _ClassVar[int]
    name: str
    arguments: _containers.RepeatedCompositeFieldContainer[Hyperparameter]
    def __init__(self, name: _Optional[str] = ..., arguments: _Optional[_Iterable[_Union[Hyperparameter, _Mapping]]] = ...) -> None: ...

class Parameter(_message.Message):
    __slots__ = ("name", "shape", "dtype", "array_id", "offset")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    ARRAY_ID_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    name: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    dtype: DataType
    array_id: int
    offset: int
    def __init__(self, name: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., dtype: _Optional[_Union[DataType, str]] = ..., array_id: _Optional[int] = ..., offset: _Optional[int] = ...) -> None: ...

class FlatArray(_message.Message):
    __slots__ = ("array_id", "group", "dtype", "length")
    ARRAY_ID_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    array_id: int
    group: int
    dtype: DataType
    length: int
    def __init__(self, array_id: _Optional[int] = ..., group: _Optional[int] = ..., dtype: _Optional[_Union[DataType, str]] = ..., length: _Optional[int] = ...) -> None: ...

class Placement(_message.Message):
    __slots__ = ("array_id", "begin", "end", "endpoint")
    ARRAY_ID_FIELD_NUMBER: _ClassVar[int]
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    array_id: int
    begin: int
    end: int
    endpoint: str
    def __init__(self, array_id: _Optional[int] = ..., begin: _Optional[int] = ..., end: _Optional[int] = ..., endpoint: _Optional[str] = ...) -> None: ...

class Layout(_message.Message):
    __slots__ = ("layout_version", "parameters", "arrays", "placements", "base_version")
    LAYOUT_VERSION_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    ARRAYS_FIELD_NUMBER: _ClassVar[int]
    PLACEMENTS_FIELD_NUMBER: _ClassVar[int]
    BASE_VERSION_FIELD_NUMBER: _ClassVar[int]
    layout_version: int
    parameters: _containers.RepeatedCompositeFieldContainer[Parameter]
    arrays: _containers.RepeatedCompositeFieldContainer[FlatArray]
    placements: _containers.RepeatedCompositeFieldContainer[Placement]
    base_version: int
    def __init__(self, layout_version: _Optional[int] = ..., parameters: _Optional[_Iterable[_Union[Parameter, _Mapping]]] = ..., arrays: _Optional[_Iterable[_Union[FlatArray, _Mapping]]] = ..., placements: _Optional[_Iterable[_Union[Placement, _Mapping]]] = ..., base_version: _Optional[int] = ...) -> None: ...

class Group(_message.Message):
    __slots__ = ("hyperparameters", "parameters")
    HYPERPARAMETERS_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    hyperparameters: _containers.RepeatedCompositeFieldContainer[Hyperparameter]
    parameters: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, hyperparameters: _Optional[_Iterable[_Union[Hyperparameter, _Mapping]]] = ..., parameters: _Optional[_Iterable[str]] = ...) -> None: ...

class Hyperparameter(_message.Message):
    __slots__ = ("name", "value")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    name: str
    value: Value
    def __init__(self, name: _Optional[str] = ..., value: _Optional[_Union[Value, _Mapping]] = ...) -> None: ...

class GroupChange(_message.Message):
    __slots__ = ("group", "hyperparameters")
    GROUP_FIELD_NUMBER: _ClassVar[int]
    HYPERPARAMETERS_FIELD_NUMBER: _ClassVar[int]
    group: int
    hyperparameters: _containers.RepeatedCompositeFieldContainer[Hyperparameter]
    def __init__(self, group: _Optional[int] = ..., hyperparameters: _Optional[_Iterable[_Union[Hyperparameter, _Mapping]]] = ...) -> None: ...

class ChangedGroups(_message.Message):
    __slots__ = ("position", "groups")
    class GroupsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: Group
        def __init__(self, key: _Optional[int] = ..., value: _Optional[_Union[Group, _Mapping]] = ...) -> None: ...
    POSITION_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    position: Position
    groups: _containers.MessageMap[int, Group]
    def __init__(self, position: _Optional[_Union[Position, _Mapping]] = ..., groups: _Optional[_Mapping[int, Group]] = ...) -> None: ...

class TensorChunk(_message.Message):
    __slots__ = ("array_id", "offset", "padding", "data")
    ARRAY_ID_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    PADDING_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    array_id: int
    offset: int
    padding: bytes
    data: bytes
    def __init__(self, array_id: _Optional[int] = ..., offset: _Optional[int] = ..., padding: _Optional[bytes] = ..., data: _Optional[bytes] = ...) -> None: ...

class Rows(_message.Message):
    __slots__ = ("parameter", "deltas")
    PARAMETER_FIELD_NUMBER: _ClassVar[int]
    DELTAS_FIELD_NUMBER: _ClassVar[int]
    parameter: int
    deltas: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, parameter: _Optional[int] = ..., deltas: _Optional[_Iterable[int]] = ...) -> None: ...

class RowsEntry(_message.Message):
    __slots__ = ("parameter", "count", "dtype")
    PARAMETER_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    parameter: int
    count: int
    dtype: DataType
    def __init__(self, parameter: _Optional[int] = ..., count: _Optional[int] = ..., dtype: _Optional[_Union[DataType, str]] = ...) -> None: ...

class StreamEnd(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class InlineChunks(_message.Message):
    __slots__ = ("chunks",)
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    chunks: _containers.RepeatedCompositeFieldContainer[TensorChunk]
    def __init__(self, chunks: _Optional[_Iterable[_Union[TensorChunk, _Mapping]]] = ...) -> None: ...

class BundleEntry(_message.Message):
    __slots__ = ("parameter", "slot", "shape", "dtype", "offset")
    PARAMETER_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    parameter: str
    slot: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    dtype: DataType
    offset: int
    def __init__(self, parameter: _Optional[str] = ..., slot: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., dtype: _Optional[_Union[DataType, str]] = ..., offset: _Optional[int] = ...) -> None: ...

class Member(_message.Message):
    __slots__ = ("name", "rank", "epoch", "alive")
    NAME_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ALIVE_FIELD_NUMBER: _ClassVar[int]
    name: str
    rank: int
    epoch: int
    alive: bool
    def __init__(self, name: _Optional[str] = ..., rank: _Optional[int] = ..., epoch: _Optional[int] = ..., alive: bool = ...) -> None: ...
