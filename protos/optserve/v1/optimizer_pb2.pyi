from optserve.v1 import jobs_pb2 as _jobs_pb2
from optserve.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ListGroupsRequest(_message.Message):
    __slots__ = ("job_id",)
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    def __init__(self, job_id: _Optional[str] = ...) -> None: ...

class ListGroupsResponse(_message.Message):
    __slots__ = ("groups", "position")
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    groups: _containers.RepeatedCompositeFieldContainer[_types_pb2.Group]
    position: _types_pb2.Position
    def __init__(self, groups: _Optional[_Iterable[_Union[_types_pb2.Group, _Mapping]]] = ..., position: _Optional[_Union[_types_pb2.Position, _Mapping]] = ...) -> None: ...

class AddGroupRequest(_message.Message):
    __slots__ = ("begin", "end", "chunk")
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    begin: AddGroupBegin
    end: _types_pb2.StreamEnd
    chunk: _types_pb2.TensorChunk
    def __init__(self, begin: _Optional[_Union[AddGroupBegin, _Mapping]] = ..., end: _Optional[_Union[_types_pb2.StreamEnd, _Mapping]] = ..., chunk: _Optional[_Union[_types_pb2.TensorChunk, _Mapping]] = ...) -> None: ...

class AddGroupBegin(_message.Message):
    __slots__ = ("call", "group", "entries", "bundle_bytes")
    CALL_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_BYTES_FIELD_NUMBER: _ClassVar[int]
    call: _types_pb2.CallIdentity
    group: _jobs_pb2.GroupSpec
    entries: _containers.RepeatedCompositeFieldContainer[_types_pb2.BundleEntry]
    bundle_bytes: int
    def __init__(self, call: _Optional[_Union[_types_pb2.CallIdentity, _Mapping]] = ..., group: _Optional[_Union[_jobs_pb2.GroupSpec, _Mapping]] = ..., entries: _Optional[_Iterable[_Union[_types_pb2.BundleEntry, _Mapping]]] = ..., bundle_bytes: _Optional[int] = ...) -> None: ...

class AddGroupResponse(_message.Message):
    __slots__ = ("position", "layout")
    POSITION_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    position: _types_pb2.Position
    layout: _types_pb2.Layout
    def __init__(self, position: _Optional[_Union[_types_pb2.Position, _Mapping]] = ..., layout: _Optional[_Union[_types_pb2.Layout, _Mapping]] = ...) -> None: ...

class UpdateGroupRequest(_message.Message):
    __slots__ = ("call", "group", "hyperparameters")
    CALL_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    HYPERPARAMETERS_FIELD_NUMBER: _ClassVar[int]
    call: _types_pb2.CallIdentity
    group: int
    hyperparameters: _containers.RepeatedCompositeFieldContainer[_types_pb2.Hyperparameter]
    def __init__(self, call: _Optional[_Union[_types_pb2.CallIdentity, _Mapping]] = ..., group: _Optional[int] = ..., hyperparameters: _Optional[_Iterable[_Union[_types_pb2.Hyperparameter, _Mapping]]] = ...) -> None: ...

class UpdateGroupResponse(_message.Message):
    __slots__ = ("position",)
    POSITION_FIELD_NUMBER: _ClassVar[int]
    position: _types_pb2.Position
    def __init__(self, position: _Optional[_Union[_types_pb2.Position, _Mapping]] = ...) -> None: ...

class UpdateRulesRequest(_message.Message):
    __slots__ = ("call", "rules")
    CALL_FIELD_NUMBER: _ClassVar[int]
    RULES_FIELD_NUMBER: _ClassVar[int]
    call: _types_pb2.CallIdentity
    rules: _containers.RepeatedCompositeFieldContainer[_types_pb2.Hyperparameter]
    def __init__(self, call: _Optional[_Union[_types_pb2.CallIdentity, _Mapping]] = ..., rules: _Optional[_Iterable[_Union[_types_pb2.Hyperparameter, _Mapping]]] = ...) -> None: ...

class UpdateRulesResponse(_message.Message):
    __slots__ = ("position", "rules")
    POSITION_FIELD_NUMBER: _ClassVar[int]
    RULES_FIELD_NUMBER: _ClassVar[int]
    position: _types_pb2.Position
    rules: _jobs_pb2.StepRules
    def __init__(self, position: _Optional[_Union[_types_pb2.Position, _Mapping]] = ..., rules: _Optional[_Union[_jobs_pb2.StepRules, _Mapping]] = ...) -> None: ...

class Schedule(_message.Message):
    __slots__ = ("name", "arguments", "last_epoch", "learning_rates", "awaited", "setting", "state")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ARGUMENTS_FIELD_NUMBER: _ClassVar[int]
    LAST_EPOCH_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATES_FIELD_NUMBER: _ClassVar[int]
    AWAITED_FIELD_NUMBER: _ClassVar[int]
    SETTING_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    name: str
    arguments: _containers.RepeatedCompositeFieldContainer[_types_pb2.Hyperparameter]
    last_epoch: int
    learning_rates: _containers.RepeatedScalarFieldContainer[float]
    awaited: _containers.RepeatedScalarFieldContainer[int]
    setting: str
    state: str
    def __init__(self, name: _Optional[str] = ..., arguments: _Optional[_Iterable[_Union[_types_pb2.Hyperparameter, _Mapping]]] = ..., last_epoch: _Optional[int] = ..., learning_rates: _Optional[_Iterable[float]] = ..., awaited: _Optional[_Iterable[int]] = ..., setting: _Optional[str] = ..., state: _Optional[str] = ...) -> None: ...

class Factors(_message.Message):
    __slots__ = ("epoch", "values", "shared")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    SHARED_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    values: _containers.RepeatedScalarFieldContainer[float]
    shared: bool
    def __init__(self, epoch: _Optional[int] = ..., values: _Optional[_Iterable[float]] = ..., shared: bool = ...) -> None: ...

class SetScheduleRequest(_message.Message):
    __slots__ = ("call", "name", "arguments", "factors")
    CALL_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    ARGUMENTS_FIELD_NUMBER: _ClassVar[int]
    FACTORS_FIELD_NUMBER: _ClassVar[int]
    call: _types_pb2.CallIdentity
    name: str
    arguments: _containers.RepeatedCompositeFieldContainer[_types_pb2.Hyperparameter]
    factors: _containers.RepeatedCompositeFieldContainer[Factors]
    def __init__(self, call: _Optional[_Union[_types_pb2.CallIdentity, _Mapping]] = ..., name: _Optional[str] = ..., arguments: _Optional[_Iterable[_Union[_types_pb2.Hyperparameter, _Mapping]]] = ..., factors: _Optional[_Iterable[_Union[Factors, _Mapping]]] = ...) -> None: ...

class SetScheduleResponse(_message.Message):
    __slots__ = ("position", "schedule")
    POSITION_FIELD_NUMBER: _ClassVar[int]
    SCHEDULE_FIELD_NUMBER: _ClassVar[int]
    position: _types_pb2.Position
    schedule: Schedule
    def __init__(self, position: _Optional[_Union[_types_pb2.Position, _Mapping]] = ..., schedule: _Optional[_Union[Schedule, _Mapping]] = ...) -> None: ...

class StepScheduleRequest(_message.Message):
    __slots__ = ("call", "count", "metric", "groups_version", "factors", "setting", "changes")
    CALL_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    METRIC_FIELD_NUMBER: _ClassVar[int]
    GROUPS_VERSION_FIELD_NUMBER: _ClassVar[int]
    FACTORS_FIELD_NUMBER: _ClassVar[int]
    SETTING_FIELD_NUMBER: _ClassVar[int]
    CHANGES_FIELD_NUMBER: _ClassVar[int]
    call: _types_pb2.CallIdentity
    count: int
    metric: float
    groups_version: int
    factors: _containers.RepeatedCompositeFieldContainer[Factors]
    setting: str
    changes: _containers.RepeatedCompositeFieldContainer[_types_pb2.GroupChange]
    def __init__(self, call: _Optional[_Union[_types_pb2.CallIdentity, _Mapping]] = ..., count: _Optional[int] = ..., metric: _Optional[float] = ..., groups_version: _Optional[int] = ..., factors: _Optional[_Iterable[_Union[Factors, _Mapping]]] = ..., setting: _Optional[str] = ..., changes: _Optional[_Iterable[_Union[_types_pb2.GroupChange, _Mapping]]] = ...) -> None: ...

class StepScheduleResponse(_message.Message):
    __slots__ = ("position", "schedule", "changed_groups")
    POSITION_FIELD_NUMBER: _ClassVar[int]
    SCHEDULE_FIELD_NUMBER: _ClassVar[int]
    CHANGED_GROUPS_FIELD_NUMBER: _ClassVar[int]
    position: _types_pb2.Position
    schedule: Schedule
    changed_groups: _types_pb2.ChangedGroups
    def __init__(self, position: _Optional[_Union[_types_pb2.Position, _Mapping]] = ..., schedule: _Optional[_Union[Schedule, _Mapping]] = ..., changed_groups: _Optional[_Union[_types_pb2.ChangedGroups, _Mapping]] = ...) -> None: ...

class LoadScheduleStateRequest(_message.Message):
    __slots__ = ("call", "state")
    CALL_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    call: _types_pb2.CallIdentity
    state: str
    def __init__(self, call: _Optional[_Union[_types_pb2.CallIdentity, _Mapping]] = ..., state: _Optional[str] = ...) -> None: ...

class LoadScheduleStateResponse(_message.Message):
    __slots__ = ("position", "schedule")
    POSITION_FIELD_NUMBER: _ClassVar[int]
    SCHEDULE_FIELD_NUMBER: _ClassVar[int]
    position: _types_pb2.Position
    schedule: Schedule
    def __init__(self, position: _Optional[_Union[_types_pb2.Position, _Mapping]] = ..., schedule: _Optional[_Union[Schedule, _Mapping]] = ...) -> None: ...

class GetScheduleRequest(_message.Message):
    __slots__ = ("job_id",)
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    def __init__(self, job_id: _Optional[str] = ...) -> None: ...

class GetScheduleResponse(_message.Message):
    __slots__ = ("schedule", "position")
    SCHEDULE_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    schedule: Schedule
    position: _types_pb2.Position
    def __init__(self, schedule: _Optional[_Union[Schedule, _Mapping]] = ..., position: _Optional[_Union[_types_pb2.Position, _Mapping]] = ...) -> None: ...
