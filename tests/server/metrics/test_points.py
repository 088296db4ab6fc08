"""Rounds become one point a step."""

from __future__ import annotations

from collections.abc import Mapping

from optserve.server.metrics.points import Point, Points
from optserve.server.records import Position
from optserve.server.rounds.events import Event, Round


def event(
    step: int,
    metrics: Mapping[str, float] | None = None,
    *,
    lineage: str = "a",
    skip_reason: str = "",
    accumulated: int = 0,
    grad_norm: float = 3.0,
) -> Event:
    numbers = Round((0.5, 0.25), grad_norm, 0.75, skip_reason, accumulated)
    return Event(1, 1000.0 + step, "round", Position(lineage, step, step), "", {}, metrics or {}, numbers)


def own(skipped: float = 0.0) -> dict[str, float]:
    return {
        "optserve/grad_norm": 3.0,
        "optserve/clip_factor": 0.75,
        "optserve/skipped": skipped,
        "optserve/lr/group0": 0.5,
        "optserve/lr/group1": 0.25,
    }


def test_a_step_is_a_point_with_its_metrics_and_the_servers_own_numbers() -> None:
    points = Points()
    assert points.of(event(7, {"loss": 2.5})) == Point(7, 1007.0, {"loss": 2.5, **own()}, begins=7)
    assert points.of(event(8, {"loss": 1.5})) == Point(8, 1008.0, {"loss": 1.5, **own()}, begins=None)


def test_what_is_no_round_is_no_point() -> None:
    assert Points().of(Event(1, 0.0, "joined", Position("a", 1, 0), "", {})) is None


def test_the_rounds_of_a_window_are_one_point_with_the_means_of_their_metrics() -> None:
    points = Points()
    assert points.of(event(0, {"loss": 1.0, "first": 5.0}, accumulated=1)) is None
    assert points.of(event(0, {"loss": 2.0}, accumulated=2)) is None
    assert points.of(event(1, {"loss": 6.0})) == Point(1, 1001.0, {"first": 5.0, "loss": 3.0, **own()}, begins=1)
    assert points.of(event(2, {"loss": 4.0})) == Point(2, 1002.0, {"loss": 4.0, **own()})


def test_skipped_rounds_are_counted_at_the_step_that_they_were_for_and_their_metrics_are_left_out() -> None:
    points = Points()
    points.of(event(4, {"loss": 1.0}))
    assert points.of(event(4, {"loss": float("nan")}, skip_reason="nonfinite")) == Point(5, 1004.0, {"optserve/skipped": 1.0})
    assert points.of(event(4, {"loss": float("inf")}, skip_reason="nonfinite")) == Point(5, 1004.0, {"optserve/skipped": 2.0})
    assert points.of(event(5, {"loss": 2.0})) == Point(5, 1005.0, {"loss": 2.0, **own(skipped=2.0)})
    assert points.of(event(6)) == Point(6, 1006.0, own())


def test_metrics_of_a_round_without_gradients_stand_at_the_last_step() -> None:
    points = Points()
    points.of(event(4, {"loss": 1.0}))
    assert points.of(event(4, {"accuracy": 0.5}, skip_reason="no weight")) == Point(4, 1004.0, {"accuracy": 0.5})
    assert points.of(event(4, skip_reason="no weight")) is None


def test_another_lineage_makes_void_what_was_from_its_first_step_on() -> None:
    points = Points()
    points.of(event(9, {"loss": 1.0}))
    points.of(event(9, {"loss": 100.0}, accumulated=1))
    assert points.of(event(5, {"loss": 2.0}, lineage="b", accumulated=1)) is None
    assert points.of(event(6, {"loss": 4.0}, lineage="b")) == Point(6, 1006.0, {"loss": 3.0, **own()}, begins=6)
    assert points.of(event(7, {"loss": 4.0}, lineage="b")) == Point(7, 1007.0, {"loss": 4.0, **own()})


def test_a_restored_jobs_last_step_stays_where_its_weights_are_only_looked_at() -> None:
    points = Points()
    points.of(event(9))
    point = points.of(event(5, {"accuracy": 0.5}, lineage="b", skip_reason="no weight"))
    assert point == Point(5, 1005.0, {"accuracy": 0.5}, begins=6)


def test_a_new_file_begins_with_what_it_makes_void() -> None:
    points = Points()
    points.of(event(9))
    points.restart()
    assert points.of(event(10)) == Point(10, 1010.0, own(), begins=10)
