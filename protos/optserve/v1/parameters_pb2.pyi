from optserve.v1 import types_pb2 as _types_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RenameParameterRequest(_message.Message):
    __slots__ = ("call", "parameter", "new_name")
    CALL_FIELD_NUMBER: _ClassVar[int]
    PARAMETER_FIELD_NUMBER: _ClassVar[int]
    NEW_NAME_FIELD_NUMBER: _ClassVar[int]
    call: _types_pb2.CallIdentity
    parameter: str
    new_name: str
    def __init__(self, call: _Optional[_Union[_types_pb2.CallIdentity, _Mapping]] = ..., parameter: _Optional[str] = ..., new_name: _Optional[str] = ...) -> None: ...

class RenameParameterResponse(_message.Message):
    __slots__ = ("position", "layout")
    POSITION_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    position: _types_pb2.Position
    layout: _types_pb2.Layout
    def __init__(self, position: _Optional[_Union[_types_pb2.Position, _Mapping]] = ..., layout: _Optional[_Union[_types_pb2.Layout, _Mapping]] = ...) -> None: ...

class ReplaceParameterRequest(_message.Message):
    __slots__ = ("begin", "end", "chunk")
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    begin: ReplaceParameterBegin
    end: _types_pb2.StreamEnd
    chunk: _types_pb2.TensorChunk
    def __init__(self, begin: _Optional[_Union[ReplaceParameterBegin, _Mapping]] = ..., end: _Optional[_Union[_types_pb2.StreamEnd, _Mapping]] = ..., chunk: _Optional[_Union[_types_pb2.TensorChunk, _Mapping]] = ...) -> None: ...

class ReplaceParameterBegin(_message.Message):
    __slots__ = ("call", "entry", "bundle_bytes", "keep_state")
    CALL_FIELD_NUMBER: _ClassVar[int]
    ENTRY_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_BYTES_FIELD_NUMBER: _ClassVar[int]
    KEEP_STATE_FIELD_NUMBER: _ClassVar[int]
    call: _types_pb2.CallIdentity
    entry: _types_pb2.BundleEntry
    bundle_bytes: int
    keep_state: bool
    def __init__(self, call: _Optional[_Union[_types_pb2.CallIdentity, _Mapping]] = ..., entry: _Optional[_Union[_types_pb2.BundleEntry, _Mapping]] = ..., bundle_bytes: _Optional[int] = ..., keep_state: bool = ...) -> None: ...

class ReplaceParameterResponse(_message.Message):
    __slots__ = ("position", "layout")
    POSITION_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    position: _types_pb2.Position
    layout: _types_pb2.Layout
    def __init__(self, position: _Optional[_Union[_types_pb2.Position, _Mapping]] = ..., layout: _Optional[_Union[_types_pb2.Layout, _Mapping]] = ...) -> None: ...

class RemoveParameterRequest(_message.Message):
    __slots__ = ("call", "parameter")
    CALL_FIELD_NUMBER: _ClassVar[int]
    PARAMETER_FIELD_NUMBER: _ClassVar[int]
    call: _types_pb2.CallIdentity
    parameter: str
    def __init__(self, call: _Optional[_Union[_types_pb2.CallIdentity, _Mapping]] = ..., parameter: _Optional[str] = ...) -> None: ...

class RemoveParameterResponse(_message.Message):
    __slots__ = ("position", "layout")
    POSITION_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    position: _types_pb2.Position
    layout: _types_pb2.Layout
    def __init__(self, position: _Optional[_Union[_types_pb2.Position, _Mapping]] = ..., layout: _Optional[_Union[_types_pb2.Layout, _Mapping]] = ...) -> None: ...
