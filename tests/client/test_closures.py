"""Steps with closures, against a server whose answers are written down: searches, and streams that break in them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from written_answers import (
    AWAY,
    GRADIENTS,
    GROWN,
    RENAMED,
    STALE,
    TOUCHED,
    Quadratic,
    Written,
    begin_of,
    chunked,
    error,
    evaluate,
    evaluations,
    goodbye,
    joined,
    losses,
    one_call,
    opened,
    pushed,
    resend,
    sent,
    weights,
)

from optserve.client import _closures
from optserve.wire import errors
from optserve.wire.metrics import MOST_METRICS


def test_a_step_with_a_closure_is_a_pull_and_a_push() -> None:
    transport = Written([opened(0), weights(3), pushed(1, evaluations=1), weights(4), pushed(2), weights(4), pushed(3)])
    worker = joined(transport)
    closure = Quadratic()
    assert worker.step(closure, 2.0, metrics={"accuracy": 0.5}) == 3.0
    assert transport.said == ["open", "pull", "push"]
    (begin,) = transport.begins
    assert (begin.loss, begin.evaluation, begin.weight, begin.want_weights) == (3.0, 0, 2.0, False)
    assert dict(begin.metrics) == {"loss": 3.0, "accuracy": 0.5}
    assert sent(begin) == {"w": [3, 3, 3]}
    assert worker.last_step is not None
    assert worker.last_step.evaluations == 1
    worker.step(closure, metrics={"loss": 7})
    assert dict(transport.begins[1].metrics) == {"loss": 7.0}
    assert transport.begins[0].closure != transport.begins[1].closure
    worker.step(closure, metrics={str(number): number for number in range(MOST_METRICS)})
    assert len(transport.begins[2].metrics) == MOST_METRICS, "the loss is left out where there is no room"
    assert closure.arrays[0] is closure.arrays[1], "the arrays are kept from step to step"


def test_a_search_is_one_call() -> None:
    transport = Written([opened(6), weights(3), evaluate(1, 2), evaluate(2, 0.5), pushed(7, evaluations=3), pushed(8)])
    worker = joined(transport)
    closure = Quadratic()
    worker.update_group(0, lr=0.5)
    assert worker.step(closure) == 3.0
    assert (closure.seen, losses(transport)) == ([3, 2, 0.5], [3, 2, 0.5])
    assert evaluations(transport) == [0, 1, 2]
    assert one_call(transport)
    assert [len(changes) for changes in transport.changes] == [1, 0, 0]
    assert len({id(array) for array in closure.arrays}) == 1
    worker.push(GRADIENTS)
    assert (transport.begins[-1].call.seq, list(transport.begins[-1].changes)) == (8, [])


def test_out_is_what_the_closure_gets_and_holds_the_weights_after_the_step() -> None:
    after = pushed(1, weights=begin_of(1, value=9.0))
    transport = Written([opened(0), weights(3), evaluate(1, 2), after])
    closure, out = Quadratic(), {"w": np.zeros(3, np.float32)}
    given = out["w"]
    joined(transport).step(closure, out=out)
    assert all(array is given for array in closure.arrays)
    assert out["w"] is given
    assert given.tolist() == [9, 9, 9]
    assert [begin.want_weights for begin in transport.begins] == [True, True]


def test_weights_after_the_step_that_are_of_another_layout_are_pulled() -> None:
    transport = Written([opened(0), weights(3), pushed(1, weights=begin_of(1, GROWN)), weights(1, GROWN)], layouts=[GROWN])
    out: Any = {}
    joined(transport).step(Quadratic(), out=out)
    assert out["v"].tolist() == [1, 1]


def test_what_a_closure_does_to_its_dict_and_arrays_does_not_matter() -> None:
    transport = Written([opened(0), weights(3), evaluate(1, 2), pushed(1)])
    seen = []

    def closure(found: Any) -> Any:
        seen.append(found["w"].tolist())
        array = found["w"]
        array *= 5
        found["v"] = found["w"] = "mine"
        return 1, {"w": np.ones(3, np.float32)}

    joined(transport).step(closure)
    assert seen == [[3, 3, 3], [2, 2, 2]]


def test_a_closure_gets_new_arrays_where_the_layout_has_changed() -> None:
    transport = Written(
        [opened(0), weights(3), pushed(1), weights(4, RENAMED), weights(4, RENAMED), pushed(2)], layouts=[RENAMED]
    )
    worker = joined(transport)
    names = []

    def closure(found: Any) -> Any:
        names.append(list(found))
        return 1, {name: np.ones(3, np.float32) for name in found}

    worker.step(closure)
    worker.step(closure)
    assert names == [["w"], ["x"]]


def test_a_void_evaluation_is_sent_again_without_another_call_of_the_closure() -> None:
    transport = Written([opened(0), weights(3), resend(), evaluate(1, 2), resend(), resend(), pushed(1)])
    closure = Quadratic()
    joined(transport).step(closure)
    assert evaluations(transport) == [0, 0, 1, 1, 1]
    assert [sent(begin)["w"][0] for begin in transport.begins] == [3, 3, 2, 2, 2]
    assert closure.seen == [3, 2]
    assert one_call(transport)


def test_a_search_that_was_given_up_begins_again_with_a_pull() -> None:
    again = resend(restart=True)
    transport = Written(
        [opened(0), weights(3), evaluate(1, 2), again, weights(5), again, weights(6), evaluate(1, 4), pushed(1)]
    )
    closure = Quadratic()
    assert joined(transport).step(closure) == 6.0, "the loss where the step that counts began"
    assert closure.seen == [3, 2, 5, 6, 4]
    assert evaluations(transport) == [0, 1, 0, 0, 1]
    assert one_call(transport)


def test_a_search_is_not_begun_again_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_closures, "MOST_BEGINNINGS", 3)
    transport = Written([opened(0), *[weights(1), resend(restart=True)] * 3, pushed(1)])
    worker = joined(transport)
    with pytest.raises(errors.RoundFailedError, match="the step was begun 3 times"):
        worker.step(Quadratic())
    worker.push(GRADIENTS)


def test_a_group_that_is_added_in_the_middle_of_a_search_begins_it_again() -> None:
    transport = Written(
        [opened(0), weights(3), evaluate(1, 2, GROWN), weights(4, GROWN), evaluate(1, 5, GROWN), pushed(1)], layouts=[GROWN]
    )
    closure = Quadratic()
    assert joined(transport).step(closure) == 4.0
    assert closure.seen == [3, 4, 5]
    assert evaluations(transport) == [0, 0, 1]


def test_a_stale_layout_begins_the_step_again_at_the_new_weights() -> None:
    transport = Written([opened(0), weights(3), STALE, weights(4, TOUCHED), pushed(1)], layouts=[TOUCHED])
    closure = Quadratic()
    assert joined(transport).step(closure) == 4.0
    assert [begin.layout_version for begin in transport.begins] == [1, 2]


def test_a_closure_that_still_gives_the_old_names_is_told_so() -> None:
    transport = Written([opened(0), weights(3), STALE, weights(4, RENAMED), pushed(1)], layouts=[RENAMED])
    worker = joined(transport)
    names = iter("ww")
    with pytest.raises(errors.UnknownParameterError, match="gradient 'w'"):
        worker.step(lambda _: (1, {next(names): np.ones(3, np.float32)}))
    worker.push({"x": np.ones(3, np.float32)})


def test_weights_of_an_evaluation_may_come_as_chunks() -> None:
    transport = Written([opened(0), weights(3), *chunked(1, 2), *chunked(2, 1), pushed(1)])
    closure = Quadratic()
    joined(transport).step(closure)
    assert closure.seen == [3, 2, 1]


@pytest.mark.parametrize("read", [0, 1, 2], ids=["nothing read", "begin read", "chunk read"])
def test_a_later_evaluation_whose_answer_broke_off_is_pushed_again_and_answered_again(read: int) -> None:
    transport = Written(
        [opened(0), weights(3), evaluate(1, 2), *chunked(2, 1)[:read], AWAY], [opened(0), evaluate(2, 1), pushed(1)]
    )
    closure = Quadratic()
    assert joined(transport).step(closure) == 3.0
    assert closure.seen == [3, 2, 1]
    assert evaluations(transport) == [0, 1, 1, 2]
    assert one_call(transport)


def test_the_first_evaluation_is_not_sent_again_once_the_next_point_may_lie_in_its_gradients() -> None:
    """A closure may return views of its weights, and the server takes a first evaluation as a new beginning."""
    transport = Written([opened(0), weights(3), *chunked(1, 2)[:2], AWAY], [opened(0), weights(3), evaluate(1, 2), pushed(1)])
    closure = Quadratic()
    assert joined(transport).step(closure) == 3.0
    assert [sent(begin)["w"][0] for begin in transport.begins] == [3, 3, 2]
    assert one_call(transport)


@pytest.mark.parametrize("last_seq", [0, 1], ids=["not applied", "applied, answer lost"])
@pytest.mark.parametrize("number", [0, 1])
def test_an_evaluation_whose_stream_broke_is_repeated_with_its_identity(last_seq: int, number: int) -> None:
    search = [evaluate(1, 2)][:number]
    transport = Written([opened(0), weights(3), *search, AWAY], [opened(last_seq), pushed(1), pushed(2)])
    worker = joined(transport)
    worker.step(Quadratic())
    assert evaluations(transport) == [*range(number), number, number]
    assert one_call(transport)
    worker.push(GRADIENTS)
    assert transport.begins[-1].call.seq == 2


def test_a_stream_that_broke_while_the_closure_ran() -> None:
    """What is told then is told at the next push."""
    transport = Written([opened(0), weights(3), evaluate(1, 2), AWAY], [opened(0), resend(restart=True), weights(4), pushed(1)])
    closure = Quadratic()
    assert joined(transport).step(closure) == 4.0
    assert evaluations(transport) == [0, 1, 1, 0]


def test_a_worker_that_the_server_forgot_in_the_middle_of_a_search_joins_again() -> None:
    forgot = goodbye(errors.NotJoinedError("who?"))
    transport = Written(
        [opened(0), weights(3), evaluate(1, 2), forgot], [opened(0), resend(restart=True), weights(4), pushed(1)], joins=2
    )
    assert joined(transport).step(Quadratic()) == 4.0
    assert [call.epoch for call in transport.pushes] == [1, 1, 2, 2]


def test_a_roll_back_in_the_middle_of_a_search_is_raised_and_drops_the_edits() -> None:
    facts = {"from": 9, "to": 5, "lineage_id": "two", "version": 5, "schedule_steps": 2}
    back = goodbye(errors.RolledBackError("back", **facts))
    transport = Written([opened(8, 9), weights(9), evaluate(1, 2), back], [opened(3, 5), pushed(4)])
    worker = joined(transport)
    worker.update_group(0, lr=0.5)
    with pytest.raises(errors.RolledBackError):
        worker.step(Quadratic())
    worker.push(GRADIENTS)
    assert (transport.begins[-1].call.seq, list(transport.begins[-1].changes)) == (4, [])


@pytest.mark.parametrize("failure", [errors.RoundFailedError("the closure of rank 1 failed"), errors.RoundTimeoutError("late")])
def test_a_search_that_failed_for_all_leaves_the_worker_usable(failure: errors.OptserveError) -> None:
    transport = Written([opened(0), weights(3), evaluate(1, 2), error(failure), weights(3), pushed(1)])
    worker = joined(transport)
    with pytest.raises(type(failure)):
        worker.step(Quadratic())
    assert worker.step(Quadratic()) == 3.0
    assert [call.seq for call in transport.pushes] == [1, 1, 1]
    assert transport.begins[0].closure != transport.begins[2].closure
