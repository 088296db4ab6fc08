"""What the contract promises about itself, checked against the protos' text and descriptors."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from google.protobuf.descriptor import MethodDescriptor

from optserve.v1 import (
    checkpoints_pb2,
    data_pb2,
    jobs_pb2,
    optimizer_pb2,
    parameters_pb2,
    server_pb2,
    state_pb2,
    types_pb2,
    workers_pb2,
)
from optserve.wire.methods import METHODS

FOLDER = Path(__file__).parents[1] / "protos/optserve/v1"
FILES = [
    module.DESCRIPTOR
    for module in (checkpoints_pb2, data_pb2, jobs_pb2, optimizer_pb2, parameters_pb2, server_pb2, state_pb2, workers_pb2)
]
RPCS: dict[str, MethodDescriptor] = {
    f"/{service.full_name}/{method.name}": method
    for file in FILES
    for service in file.services_by_name.values()
    for method in service.methods
}


def comments() -> dict[str, str]:
    """The comment above each rpc by its path."""
    found = {}
    for path in FOLDER.glob("*.proto"):
        text = path.read_text()
        for service in re.finditer(r"^service (\w+) \{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL):
            for rpc in re.finditer(r"((?:^ *//.*\n)+) *rpc (\w+)\(", service[2], re.MULTILINE):
                words = " ".join(line.strip(" /") for line in rpc[1].splitlines())
                found[f"/optserve.v1.{service[1]}/{rpc[2]}"] = words
    return found


def test_every_proto_file_is_looked_at() -> None:
    assert {Path(file.name).stem for file in [*FILES, types_pb2.DESCRIPTOR]} == {path.stem for path in FOLDER.glob("*.proto")}


@pytest.mark.parametrize("path", RPCS)
def test_rpc_says_whether_a_retry_is_safe(path: str) -> None:
    assert re.search(r"safe to retry|not to be retried", comments()[path], re.IGNORECASE), comments()[path]


@pytest.mark.parametrize("path", RPCS)
def test_rpc_has_its_own_request_and_response(path: str) -> None:
    method = RPCS[path]
    assert method.input_type.name == f"{method.name}Request"
    assert method.output_type.name == f"{method.name}Response"


@pytest.mark.parametrize("path", [path for path, method in RPCS.items() if method.client_streaming or method.server_streaming])
def test_streamed_message_is_one_content_with_the_chunk_in_field_15(path: str) -> None:
    method = RPCS[path]
    streamed = [method.input_type] * method.client_streaming + [method.output_type] * method.server_streaming
    for message in streamed:
        assert {field.containing_oneof.name for field in message.fields if field.containing_oneof} == {"content"}
        assert message.fields_by_number[15].name == "chunk"
        assert message.fields_by_number[15].message_type is types_pb2.TensorChunk.DESCRIPTOR


def test_method_table_knows_every_rpc() -> None:
    assert set(METHODS) == set(RPCS)
