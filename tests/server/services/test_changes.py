"""Hyperparameters in pushes and their replies, on the wire."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from optserve.server.services import pushing
from optserve.v1 import data_pb2, optimizer_pb2, types_pb2
from optserve.wire import errors, reasons

W = {"w": np.zeros(4, np.float32)}
G = {"w": np.ones(4, np.float32)}


def change(build: Any, group: int = 0, **hyperparameters: Any) -> types_pb2.GroupChange:
    return types_pb2.GroupChange(group=group, hyperparameters=build.values(hyperparameters))


def number(group: types_pb2.Group, name: str) -> float:
    (found,) = [entry.value.number for entry in group.hyperparameters if entry.name == name]
    return float(found)


def test_a_join_tells_all_groups_without_names(foreign: Any) -> None:
    foreign.create(W)
    foreign.initialize()
    (group,) = foreign.join().groups
    assert number(group, "lr") == 1.0
    assert list(group.parameters) == []


def test_a_pushs_changes_hold_from_its_step_on(foreign: Any, build: Any) -> None:
    foreign.ready(W)
    result = foreign.push(G, changes=[change(build, lr=0.5)])
    assert list(result.learning_rates) == [0.5]
    np.testing.assert_array_equal(foreign.weights()["w"], -0.5 * G["w"])


@pytest.mark.parametrize("over", ["Push", "Stream"])
def test_a_reply_tells_what_changed_since_the_version_that_the_push_names(
    foreign: Any, build: Any, open_stream: Callable[..., Any], over: str
) -> None:
    foreign.ready(W)

    def push(**fields: Any) -> data_pb2.PushResult:
        if over == "Push":
            return foreign.push(G, **fields)
        stream = open_stream(foreign)
        stream.receive("opened")
        stream.push(foreign, G, **fields)
        found: data_pb2.PushResult = stream.receive("pushed")
        stream.close()
        foreign.seq = found.seq
        return found

    seen = foreign.position()
    changed = push(changes=[change(build, lr=0.5)], call=foreign.identity(seen=seen), groups_version=seen.version)
    assert changed.changed_groups.position == changed.position
    assert number(changed.changed_groups.groups[0], "lr") == 0.5
    assert list(changed.changed_groups.groups[0].parameters) == []
    seen = changed.position
    assert not push(call=foreign.identity(seen=seen), groups_version=seen.version).HasField("changed_groups")
    (told,) = push(call=foreign.identity(seen=seen), groups_version=0).changed_groups.groups.values()
    assert list(told.parameters) == ["w"]
    assert not push(changes=[change(build, lr=0.25)]).HasField("changed_groups"), "it does not ask"


@pytest.mark.parametrize("inline", [1 << 16, 0])
def test_a_pull_tells_what_changed_since_the_version_that_it_names(
    foreign: Any, build: Any, open_stream: Callable[..., Any], inline: int
) -> None:
    foreign.ready(W)
    before = foreign.position()
    after = foreign.push(G, changes=[change(build, lr=0.5)]).position
    stream = open_stream(foreign)
    stream.receive("opened")

    def pull(**fields: Any) -> data_pb2.WeightsBegin:
        stream.send(pull=data_pb2.PullWeights(inline_weights_bytes=inline, **fields))
        found: data_pb2.WeightsBegin
        if inline:
            found = stream.receive("weights")
        else:
            found, _ = stream.receive_weights(foreign)
        return found

    told = pull(seen=before, groups_version=before.version).changed_groups
    assert (told.position, number(told.groups[0], "lr")) == (after, 0.5)
    assert not pull(seen=after, groups_version=after.version).HasField("changed_groups")
    assert not pull().HasField("changed_groups"), "it does not ask"


def test_a_pull_of_a_worker_that_saw_what_is_gone_is_refused_and_leaves_the_stream_usable(
    foreign: Any, open_stream: Callable[..., Any]
) -> None:
    foreign.ready(W)
    stream = open_stream(foreign)
    position = stream.receive("opened").position
    seen = types_pb2.Position(lineage_id=position.lineage_id, version=position.version + 1)
    stream.send(pull=data_pb2.PullWeights(seen=seen))
    detail = stream.receive("error")
    assert isinstance(reasons.from_detail(detail.reason, detail.message, detail.metadata), errors.RolledBackError)
    stream.push(foreign, G, want_weights=True)
    assert stream.receive("pushed").position.step == 1
    np.testing.assert_array_equal(stream.receive_weights(foreign)[1]["w"], -G["w"])


def test_a_group_that_is_new_to_the_worker_comes_with_its_names(foreign: Any, build: Any) -> None:
    foreign.ready(W)
    before = foreign.position()
    other = {"v": np.zeros(2, np.float32)}
    admin = foreign.another()
    begin = optimizer_pb2.AddGroupBegin(
        call=admin.identity(epoch=0),
        group=build.group(other, lr=0.125),
        entries=[types_pb2.BundleEntry(parameter="v", shape=[2], dtype=types_pb2.DATA_TYPE_FLOAT32)],
        bundle_bytes=8,
    )
    requests = [
        optimizer_pb2.AddGroupRequest(begin=begin),
        optimizer_pb2.AddGroupRequest(chunk=types_pb2.TensorChunk(data=other["v"].tobytes())),
        optimizer_pb2.AddGroupRequest(end=types_pb2.StreamEnd()),
    ]
    admin.optimizer.AddGroup(iter(requests), timeout=20)
    told = foreign.push(G, call=foreign.identity(seen=before), groups_version=before.version).changed_groups.groups
    assert list(told) == [1]
    assert (list(told[1].parameters), number(told[1], "lr")) == (["v"], 0.125)


def test_a_counted_step_of_the_schedule_tells_what_it_changed_and_may_be_repeated(foreign: Any, build: Any) -> None:
    foreign.ready(W)
    admin = foreign.another()
    arguments = build.values({"gamma": 0.5})
    admin.optimizer.SetSchedule(
        optimizer_pb2.SetScheduleRequest(call=admin.identity(epoch=0), name="ExponentialLR", arguments=arguments), timeout=20
    )
    seen = foreign.position()
    request = optimizer_pb2.StepScheduleRequest(call=foreign.identity(seen=seen), count=1, groups_version=seen.version)
    answer = foreign.optimizer.StepSchedule(request, timeout=20)
    assert number(answer.changed_groups.groups[0], "lr") == 0.5
    request.groups_version = answer.position.version
    again = foreign.optimizer.StepSchedule(request, timeout=20)
    assert again.position == answer.position
    assert not again.HasField("changed_groups")


def test_a_repeat_with_other_changes_is_a_conflict(foreign: Any, build: Any, failed: Any) -> None:
    foreign.ready(W)
    call = foreign.identity()
    applied = foreign.push(G, call=call, changes=[change(build, lr=0.5)])
    assert foreign.push(G, call=call, changes=[change(build, lr=0.5)]).position == applied.position
    for other in ([change(build, lr=0.25)], []):
        found = failed(lambda other=other: foreign.push(G, call=call, changes=other))
        assert found.reason == "SEQUENCE_CONFLICT"
    assert list(foreign.push(G).learning_rates) == [0.5]


def test_what_is_kept_of_a_push_to_know_its_repeat_is_short(foreign: Any, build: Any) -> None:
    foreign.ready(W)
    values = tuple(float(number) for number in range(1000))
    few, many = (pushing.push(foreign.begin(G, changes=[change(build, betas=found)])) for found in (values[:2], values))
    assert len(few.caller.fingerprint) == len(many.caller.fingerprint) == 32
    assert few.caller.fingerprint != many.caller.fingerprint


@pytest.mark.parametrize(
    ("changes", "reason", "message"),
    [
        ([(0, "lr", 0.5), (0, "momentum", 0.9)], "INVALID_ARGUMENT", "group 0 is changed twice in one call"),
        ([(7, "lr", 0.5)], "UNKNOWN_PARAMETER", "there is no group 7"),
        ([(0, "params", "w")], "UNKNOWN_HYPERPARAMETER", "no hyperparameter 'params'"),
        ([(0, "lr", "fast")], "INVALID_HYPERPARAMETER", ""),
        ([(0, "lr", float("nan"))], "INVALID_HYPERPARAMETER", "Invalid learning rate: nan"),
    ],
)
def test_changes_that_are_refused(
    foreign: Any, build: Any, failed: Any, changes: list[tuple[int, str, Any]], reason: str, message: str
) -> None:
    foreign.ready(W)
    found = failed(lambda: foreign.push(G, changes=[change(build, group, **{name: value}) for group, name, value in changes]))
    assert found.reason == reason
    assert message in found.message
    assert list(foreign.push(G).learning_rates) == [1.0]


def test_a_refused_change_leaves_the_stream_usable(foreign: Any, build: Any, open_stream: Callable[..., Any]) -> None:
    foreign.ready(W)
    stream = open_stream(foreign)
    stream.receive("opened")
    stream.push(foreign, G, changes=[change(build, lr=-1.0)])
    detail = stream.receive("error")
    assert isinstance(reasons.from_detail(detail.reason, detail.message, detail.metadata), errors.InvalidHyperparameterError)
    stream.push(foreign, G, changes=[change(build, lr=2.0)])
    assert list(stream.receive("pushed").learning_rates) == [2.0]
