"""The functions of LambdaLR and MultiplicativeLR on the client's side."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from optserve.client._functions import Functions, Given, number, split
from optserve.v1 import optimizer_pb2
from optserve.wire.arguments import Factors
from optserve.wire.errors import InvalidArgumentError, InvalidHyperparameterError, MissingFunctionError


def half(epoch: int) -> float:
    return 0.5**epoch


def third(epoch: int) -> float:
    return 3.0**-epoch


def test_functions_are_taken_out_of_the_arguments_depth_first() -> None:
    inner = (
        "ChainedScheduler",
        {"schedulers": [("MultiplicativeLR", {"lr_lambda": [third, half]}), ("StepLR", {"step_size": 3})]},
    )
    arguments = {"schedulers": [("LambdaLR", {"lr_lambda": half, "last_epoch": -1}), inner], "milestones": [3]}
    rest, functions = split("SequentialLR", arguments)
    assert rest == {
        "schedulers": [
            ("LambdaLR", {"last_epoch": -1}),
            ("ChainedScheduler", {"schedulers": [("MultiplicativeLR", {}), ("StepLR", {"step_size": 3})]}),
        ],
        "milestones": [3],
    }
    assert functions == [half, [third, half]]
    assert arguments["schedulers"][0][1]["lr_lambda"] is half


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("LambdaLR", {}, "LambdaLR needs lr_lambda, a function of the epoch"),
        ("lambdalr", {"lr_lambda": 0.9}, "lr_lambda should be a function, but got float"),
        ("MultiplicativeLR", {"lr_lambda": [half, 0.9]}, "lr_lambda should be a function, but got float"),
        ("CyclicLR", {"scale_fn": half}, "CyclicLR's scale_fn is a function; those never travel"),
        ("ChainedScheduler", {"schedulers": [("LambdaLR", {})]}, "LambdaLR needs lr_lambda"),
        ("ChainedScheduler", {"schedulers": half}, "schedulers is"),
    ],
)
def test_what_is_no_function_is_named(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidHyperparameterError, match=message):
        split(name, arguments)


def test_schedules_that_are_nested_without_end_are_refused() -> None:
    schedulers: list[Any] = []
    schedulers.append(("ChainedScheduler", {"schedulers": schedulers}))
    with pytest.raises(InvalidHyperparameterError, match="8 deep in one another"):
        split("ChainedScheduler", {"schedulers": schedulers})
    deep: Any = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(InvalidHyperparameterError, match=r"schedulers is .*must be a list of \(class name, arguments\)"):
        split("ChainedScheduler", {"schedulers": deep})


class Server:
    """Answers as the server does: what is awaited now decides."""

    def __init__(self, *awaited: int, setting: str = "s/1", sets: bool = False) -> None:
        self.schedule = optimizer_pb2.Schedule(name="LambdaLR", awaited=awaited, setting=setting)
        self.calls: list[list[Factors]] = []
        self.asked = 0
        self.sets = sets
        """Whether the calls set the schedule, so that there is no setting yet."""

    def call(self, given: Given) -> optimizer_pb2.Schedule:
        self.calls.append([Factors.from_proto(entry) for entry in given.factors])
        is_other = not self.sets and bool(self.schedule.awaited) and given.setting != self.schedule.setting
        if is_other or [entry.epoch for entry in given.factors] != list(self.schedule.awaited):
            awaited = ",".join(map(str, self.schedule.awaited))
            raise MissingFunctionError("pass lr_lambda=f", awaited=awaited, setting=self.schedule.setting)
        return self.schedule

    def ask(self) -> optimizer_pb2.Schedule:
        self.asked += 1
        return self.schedule


def test_one_function_gives_one_number_and_a_list_one_a_group() -> None:
    server = Server(2, -1, 3, sets=True)
    Functions().create([half, third, [half, third]], server.call)
    assert server.calls == [[], [Factors(2, (0.25,), True), Factors(-1), Factors(3, (0.125, 3.0**-3))]]


def test_what_the_last_reply_awaited_is_sent_at_once() -> None:
    functions, server = Functions(), Server(1)
    functions.hold("s/1", [half])
    functions.told(server.schedule)
    assert functions.step(None, server.call, server.ask) is server.schedule
    assert (server.calls, server.asked) == ([[Factors(1, (0.5,), True)]], 0)


def test_a_step_that_somebody_else_made_meanwhile_is_followed() -> None:
    functions, server = Functions(), Server(4)
    functions.hold("s/1", [half])
    functions.told(optimizer_pb2.Schedule(awaited=[1], setting="s/1"))
    functions.step(None, server.call, server.ask)
    assert [[entry.epoch for entry in call] for call in server.calls] == [[1], [4]]


def test_without_functions_the_server_says_what_to_pass() -> None:
    with pytest.raises(MissingFunctionError, match="pass lr_lambda=f"):
        Functions().step(None, Server(1).call, Server(1).ask)


def test_functions_of_a_schedule_that_was_set_anew_are_not_used() -> None:
    functions, server = Functions(), Server(1, setting="other/9")
    functions.hold("s/1", [half])
    functions.told(optimizer_pb2.Schedule(awaited=[1], setting="s/1"))
    with pytest.raises(MissingFunctionError):
        functions.step(None, server.call, server.ask)
    functions.step(third, server.call, server.ask)
    functions.told(server.schedule)
    functions.step(None, server.call, server.ask)
    assert server.calls[-1] == server.calls[-2] == [Factors(1, (1 / 3,), True)]


def test_functions_for_several_schedules_come_as_a_list() -> None:
    functions, server = Functions(), Server(1, -1)
    for wrong in (half, [half], [half] * 3):
        with pytest.raises(
            InvalidArgumentError, match="LambdaLR has 2 schedules that call functions; lr_lambda must be a list of 2"
        ):
            functions.step(wrong, server.call, server.ask)
    with pytest.raises(InvalidHyperparameterError, match="should be a function, but got int"):
        functions.step([half, 3], server.call, server.ask)
    functions.step([half, [third]], server.call, server.ask)
    assert server.calls == [[Factors(1, (0.5,), True), Factors(-1)]]


def test_a_function_where_none_is_called_is_refused() -> None:
    server = Server()
    with pytest.raises(InvalidArgumentError, match="LambdaLR calls no functions; found lr_lambda"):
        Functions().step(half, server.call, server.ask)
    server.schedule = optimizer_pb2.Schedule()
    with pytest.raises(InvalidArgumentError, match="the job, which has no schedule, calls no functions"):
        Functions().step(half, server.call, server.ask)
    assert server.calls == []


def test_a_schedule_that_never_stands_still_ends_in_an_error() -> None:
    functions, server = Functions(), Server(1)
    functions.hold("s/1", [half])

    def call(given: Given) -> optimizer_pb2.Schedule:
        server.schedule.awaited[0] += 1
        return server.call(given)

    with pytest.raises(MissingFunctionError):
        functions.step(None, call, server.ask)
    assert 2 < len(server.calls) < 40


@pytest.mark.parametrize("value", [np.float32(0.5), np.array(0.5), torch.tensor(0.5), 0.5])
def test_numbers_of_numpy_and_torch_are_numbers(value: Any) -> None:
    server = Server(1, sets=True)
    Functions().create([lambda _: value], server.call)
    assert server.calls[-1] == [Factors(1, (0.5,), True)]
    assert number(value) == 0.5


@pytest.mark.parametrize("value", ["0.5", None, (0.5,), np.zeros(2), 10**400])
def test_what_is_no_number_is_named(value: Any) -> None:
    with pytest.raises(InvalidHyperparameterError, match=r"lr_lambda gave .* at epoch 1; it must be a number"):
        Functions().create([lambda _: value], Server(1, sets=True).call)
    if value is not None:
        with pytest.raises(InvalidArgumentError, match=r"metric is .*; it must be a number"):
            number(value)


def test_an_error_of_the_function_itself_is_the_callers() -> None:
    def broken(epoch: int) -> float:
        raise KeyError(epoch)

    with pytest.raises(KeyError, match="7"):
        Functions().create([broken], Server(7, sets=True).call)
