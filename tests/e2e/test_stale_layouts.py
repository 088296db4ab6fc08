"""Workers of a job whose parameters another client renames, replaces and removes."""

from __future__ import annotations

import numpy as np
import pytest
from valley import Array

from optserve.client import Server, errors


def test_pushes_go_on_where_parameters_are_renamed_replaced_and_removed(server: Server) -> None:
    zeros = {name: np.zeros(2, np.float32) for name in "abc"}
    job = server.create_job("j", zeros, optimizer="sgd", lr=1.0)
    editor = server.job("j")

    def ones(*names: str, size: int = 2) -> dict[str, Array]:
        return {name: np.ones(size, np.float32) for name in names}

    with job.join() as worker:
        worker.push(ones("a", "b", "c"))
        editor.rename_parameter("a", "x")
        assert worker.push_pull(ones("b"))["x"].tolist() == [-1, -1]
        with pytest.raises(errors.UnknownParameterError, match="gradient 'a' is not in the job"):
            worker.push(ones("a"))
        editor.replace_parameter("b", np.zeros(3, np.float32))
        with pytest.raises(errors.ShapeMismatchError, match=r"'b' has shape \(2,\)"):
            worker.push(ones("b"))
        assert worker.push_pull(ones("b", size=3), out={})["b"].tolist() == [-1, -1, -1]
        editor.remove_parameter("c")
        with pytest.raises(errors.UnknownParameterError, match="'c'"):
            worker.push(ones("x", "c"))
        assert worker.push(ones("x")).step == 4
        assert {name: array.tolist() for name, array in worker.pull().items()} == {"x": [-2, -2], "b": [-1, -1, -1]}
        assert worker.param_groups[0]["params"] == job.param_groups[0]["params"]


def test_rows_of_a_parameter_that_was_replaced(server: Server) -> None:
    job = server.create_job("j", {"e": np.zeros((4, 2), np.float32), "b": np.zeros(1, np.float32)}, optimizer="sgd", lr=1.0)
    editor = server.job("j")
    with job.join() as worker:
        assert worker.pull(rows={"e": [3]})["e"].tolist() == [[0, 0]]
        editor.replace_parameter("e", np.arange(12, dtype=np.float32).reshape(6, 2))
        assert worker.pull(rows={"e": [5, 0]})["e"].tolist() == [[10, 11], [0, 1]]
        editor.replace_parameter("e", np.ones((2, 2), np.float32))
        with pytest.raises(errors.InvalidArgumentError, match="row 5"):
            worker.push_pull({"b": np.ones(1, np.float32)}, rows={"e": [5]})
        found = worker.push_pull({"b": np.ones(1, np.float32)}, rows={"e": [1, 1]})
        assert {name: array.tolist() for name, array in found.items()} == {"e": [[1, 1], [1, 1]], "b": [-1]}
