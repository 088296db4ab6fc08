from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class GetServerRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetServerResponse(_message.Message):
    __slots__ = ("version", "start_id", "backend", "has_data_dir", "jobs", "uptime_seconds", "streams", "max_streams")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    START_ID_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    HAS_DATA_DIR_FIELD_NUMBER: _ClassVar[int]
    JOBS_FIELD_NUMBER: _ClassVar[int]
    UPTIME_SECONDS_FIELD_NUMBER: _ClassVar[int]
    STREAMS_FIELD_NUMBER: _ClassVar[int]
    MAX_STREAMS_FIELD_NUMBER: _ClassVar[int]
    version: str
    start_id: str
    backend: str
    has_data_dir: bool
    jobs: int
    uptime_seconds: float
    streams: int
    max_streams: int
    def __init__(self, version: _Optional[str] = ..., start_id: _Optional[str] = ..., backend: _Optional[str] = ..., has_data_dir: bool = ..., jobs: _Optional[int] = ..., uptime_seconds: _Optional[float] = ..., streams: _Optional[int] = ..., max_streams: _Optional[int] = ...) -> None: ...
