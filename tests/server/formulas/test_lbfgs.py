"""LBFGS beside torch.optim.LBFGS: the same closures are evaluated at the same points, parameters and state come out alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from oracle import Configuration

from optserve.server.formulas import Searching, find
from optserve.server.formulas.vectors import dot, largest, total_size

pytestmark = pytest.mark.usefixtures("one_torch_thread")

Loss = Callable[[Sequence[torch.Tensor]], torch.Tensor]

VECTORS = ("d", "prev_flat_grad", "old_dirs", "old_stps")
WOLFE = {"line_search_fn": "strong_wolfe"}


def lbfgs() -> Searching:
    found = find("lbfgs")
    assert isinstance(found, Searching)
    return found


@dataclass
class Problem:
    loss: Loss
    start: list[np.ndarray]

    @property
    def x(self) -> np.ndarray:
        """A vector of reals."""
        return np.concatenate([reals(value) for value in self.start])

    def parts(self, x: np.ndarray) -> list[torch.Tensor]:
        ends = np.cumsum([reals(value).size for value in self.start])
        pieces = zip(np.split(x, ends[:-1]), self.start, strict=True)
        return [torch.tensor(piece.view(value.dtype).reshape(value.shape)) for piece, value in pieces]

    def evaluate(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        parts = [part.requires_grad_() for part in self.parts(x)]
        loss = self.loss(parts)
        loss.backward()
        slopes = [reals(part.grad.resolve_conj().numpy()) for part in parts if part.grad is not None]
        return float(loss.detach()), np.concatenate(slopes)


def reals(value: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(value).reshape(-1).view(value.real.dtype)


@dataclass
class Ours:
    problem: Problem
    options: Mapping[str, Any]
    state: dict[str, Any] = field(default_factory=dict)
    points: int = 0

    def __post_init__(self) -> None:
        self.group = lbfgs().complete({**lbfgs().defaults, **self.options})
        self.x = self.problem.x

    def step(self) -> None:
        with np.errstate(all="ignore"):
            search = lbfgs().search(np, self.group, self.state, self.x)
            point = next(search)
            assert point is self.x
            while True:
                self.points += 1
                try:
                    point = search.send(self.problem.evaluate(point.copy()))
                except StopIteration as end:
                    self.state = end.value
                    return


class Theirs:
    def __init__(self, problem: Problem, options: Mapping[str, Any]) -> None:
        self.problem = problem
        self.parameters = [part.requires_grad_() for part in problem.parts(problem.x)]
        self.optimizer = torch.optim.LBFGS(self.parameters, **options)

    def closure(self) -> torch.Tensor:
        self.optimizer.zero_grad()
        loss = self.problem.loss(self.parameters)
        loss.backward()
        return loss

    def step(self) -> None:
        self.optimizer.step(self.closure)

    @property
    def x(self) -> np.ndarray:
        return np.concatenate([reals(part.detach().numpy()) for part in self.parameters])

    @property
    def state(self) -> dict[str, Any]:
        return {name: plain(value) for name, value in self.optimizer.state[self.parameters[0]].items()}


def plain(value: Any) -> Any:
    if isinstance(value, list):
        return [plain(entry) for entry in value]
    return value.numpy().copy() if isinstance(value, torch.Tensor) else value


def quadratic(dtype: Any) -> Problem:
    random = np.random.default_rng(0)
    a, b = random.normal(size=(30, 30)), torch.tensor(random.normal(size=30).astype(dtype))
    matrix = torch.tensor((a @ a.T / 30 + 0.1 * np.eye(30)).astype(dtype))
    return Problem(lambda p: 0.5 * p[0] @ (matrix @ p[0]) - b @ p[0], [random.normal(size=30).astype(dtype)])


def rosenbrock(dtype: Any) -> Problem:
    return Problem(lambda p: 100 * (p[0][1] - p[0][0] ** 2) ** 2 + (1 - p[0][0]) ** 2, [np.array([-1.2, 1.0], dtype)])


def logistic(dtype: Any) -> Problem:
    """Two parameters, one of them a scalar."""
    random = np.random.default_rng(1)
    inputs = torch.tensor(random.normal(size=(60, 6)).astype(dtype))
    labels = torch.tensor((random.random(60) < 0.5).astype(dtype))

    def loss(p: Sequence[torch.Tensor]) -> torch.Tensor:
        fit = torch.nn.functional.binary_cross_entropy_with_logits(inputs @ p[0] + p[1], labels)
        return fit + 0.01 * (p[0] ** 2).sum()

    return Problem(loss, [random.normal(size=6).astype(dtype), np.array(0.5, dtype)])


def network(dtype: Any) -> Problem:
    random = np.random.default_rng(2)
    inputs, wanted = (torch.tensor(random.normal(size=shape).astype(dtype)) for shape in ((60, 6), (60, 2)))

    def loss(p: Sequence[torch.Tensor]) -> torch.Tensor:
        return ((torch.tanh(inputs @ p[0] + p[1]) @ p[2] + p[3] - wanted) ** 2).mean()

    return Problem(loss, [0.5 * random.normal(size=shape).astype(dtype) for shape in ((6, 5), (5,), (5, 2), (2,))])


def complex_fit(dtype: Any) -> Problem:
    """A complex and a real parameter."""
    random = np.random.default_rng(3)
    kind = np.result_type(dtype, np.complex64)
    matrix, wanted = (
        torch.tensor((random.normal(size=shape) + 1j * random.normal(size=shape)).astype(kind)) for shape in ((9, 4), (9,))
    )
    start = [(random.normal(size=4) + 1j * random.normal(size=4)).astype(kind), np.array([0.3], dtype)]
    return Problem(lambda p: (torch.view_as_real(matrix @ p[0] + p[1] - wanted) ** 2).sum(), start)


TOLERANCES = {np.float32: 1e-3, np.float64: 1e-9}
OPTIONS: list[dict[str, Any]] = [
    {},
    WOLFE,
    {"max_iter": 4},
    {"max_iter": 4, **WOLFE},
    {"max_iter": 1, "lr": 0.6},
    {"max_iter": 3, "history_size": 2, **WOLFE},
    {"max_iter": 8, "max_eval": 5, **WOLFE},
]
dtypes = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def near(ours: Any, theirs: Any, tolerance: float) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance * np.max(np.abs(theirs), initial=0.0))


@dtypes
@pytest.mark.parametrize("options", OPTIONS[2:], ids=str)
@pytest.mark.parametrize("problem", [quadratic, logistic, complex_fit])
def test_fifty_steps_of_convex_problems_equal_torch(
    problem: Callable[[Any], Problem], options: dict[str, Any], dtype: Any
) -> None:
    ours, theirs = Ours(problem(dtype), options), Theirs(problem(dtype), options)
    for _ in range(50):
        ours.step()
        theirs.step()
        near(ours.x, theirs.x, TOLERANCES[dtype])
    if dtype is np.float64:
        assert ours.points == ours.state["func_evals"] == theirs.state["func_evals"]


@dtypes
@pytest.mark.parametrize("case", [case for case in oracle.configurations() if case.optimizer == "LBFGS"], ids=str)
def test_fifty_steps_of_torchs_own_configurations_equal_torch(case: Configuration, dtype: Any) -> None:
    """Of optim_db, as tests of the other optimizers have them."""
    ours, theirs = Ours(logistic(dtype), case.numbers), Theirs(logistic(dtype), case.options)
    for _ in range(50):
        ours.step()
        theirs.step()
    near(ours.x, theirs.x, TOLERANCES[dtype])


@dtypes
@pytest.mark.parametrize("options", [{"lr": 0.01, "max_iter": 4}, {"max_iter": 4, **WOLFE}, WOLFE, OPTIONS[5]], ids=str)
def test_fifty_steps_along_rosenbrocks_valley_equal_torch(options: dict[str, Any], dtype: Any) -> None:
    ours, theirs = Ours(rosenbrock(dtype), options), Theirs(rosenbrock(dtype), options)
    for _ in range(50):
        ours.step()
        theirs.step()
        near(ours.x, theirs.x, TOLERANCES[dtype])


@pytest.mark.parametrize("options", [*OPTIONS[:2], *OPTIONS[4:], {"lr": 0.02, "max_iter": 2, "history_size": 3}], ids=str)
@pytest.mark.parametrize("problem", [quadratic, rosenbrock, logistic, network, complex_fit])
def test_each_of_fifty_steps_from_torchs_own_state_equals_torch(
    problem: Callable[[Any], Problem], options: dict[str, Any]
) -> None:
    """A network's path is chaotic: a last bit grows. From where torch stands each step is torch's, parameters and state."""
    given = problem(np.float64)
    ours, theirs, first = Ours(given, options), Theirs(given, options), slope(given, given.x)
    for _ in range(50):
        ours.x, ours.state = theirs.x.copy(), continued(theirs.state)
        ours.step()
        theirs.step()
        near(ours.x, theirs.x, 1e-9)
        if slope(given, theirs.x) < 1e-4 * first:  # what is left is rounding
            break
        compare_states(ours.state, theirs.state, 1e-9)


@pytest.mark.parametrize("options", [{"max_iter": 3}, {"max_iter": 3, **WOLFE}], ids=str)
@pytest.mark.parametrize("problem", [quadratic, rosenbrock, logistic, network, complex_fit])
def test_state_in_float32_equals_torch(problem: Callable[[Any], Problem], options: dict[str, Any]) -> None:
    ours, theirs = Ours(problem(np.float32), options), Theirs(problem(np.float32), options)
    for _ in range(3):
        ours.step()
        theirs.step()
        compare_states(ours.state, theirs.state, 1e-3)


def slope(problem: Problem, x: np.ndarray) -> float:
    return float(np.max(np.abs(problem.evaluate(x)[1])))


def continued(state: Mapping[str, Any]) -> dict[str, Any]:
    """torch's state as ours."""
    return {name: [entry for entry in value if entry is not None] if name == "al" else value for name, value in state.items()}


def compare_states(ours: Mapping[str, Any], theirs: Mapping[str, Any], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name in ("func_evals", "n_iter"):
        assert (ours[name], type(ours[name])) == (theirs[name], int)
    for name in ("t", "prev_loss", "H_diag", "d", "prev_flat_grad"):
        near(ours[name], theirs[name], 100 * tolerance if name in ("H_diag", "d") else tolerance)
    for name in ("old_dirs", "old_stps", "ro"):
        assert len(ours[name]) == len(theirs[name])
        for mine, other in zip(ours[name], theirs[name], strict=True):
            near(mine, other, 100 * tolerance)  # differences of neighbouring gradients
    if "al" in theirs:
        assert len(ours["al"]) == len([entry for entry in theirs["al"] if entry is not None])


def test_state_has_the_vectors_dtype() -> None:
    ours = Ours(logistic(np.float32), WOLFE)
    ours.step()
    assert {ours.state[name].dtype for name in ("d", "prev_flat_grad")} == {np.dtype(np.float32)}
    assert {vector.dtype for name in ("old_dirs", "old_stps") for vector in ours.state[name]} == {np.dtype(np.float32)}


def test_an_optimum_ends_the_step_at_once() -> None:
    ours = Ours(Problem(lambda p: (p[0] ** 2).sum(), [np.zeros(3)]), WOLFE)
    ours.step()
    ours.step()
    assert ours.state == {"func_evals": 2, "n_iter": 0}
    np.testing.assert_array_equal(ours.x, np.zeros(3))


def test_no_iterations_evaluate_and_move_nothing() -> None:
    ours = Ours(quadratic(np.float64), {"max_iter": 0})
    ours.step()
    assert ours.state == {"func_evals": 1, "n_iter": 0}
    np.testing.assert_array_equal(ours.x, quadratic(np.float64).x)


def test_no_elements_are_at_their_optimum() -> None:
    ours = Ours(Problem(lambda p: p[0].sum(), [np.zeros((0, 3))]), {})
    ours.step()
    assert ours.state == {"func_evals": 1, "n_iter": 0}


@pytest.mark.parametrize("options", [{"lr": 0.0, **WOLFE}, {"lr": 0.0}, {"max_eval": 0, **WOLFE}, {"max_eval": -3}], ids=str)
def test_what_makes_torch_divide_by_zero_or_lose_its_way_does_not_raise(options: dict[str, Any]) -> None:
    ours = Ours(quadratic(np.float64), options)
    for _ in range(3):
        ours.step()
    assert np.isfinite(ours.x).all()
    if options.get("lr") == 0.0:
        np.testing.assert_array_equal(ours.x, quadratic(np.float64).x)


def test_losses_that_are_infinite_are_stepped_over() -> None:
    def loss(p: Sequence[torch.Tensor]) -> torch.Tensor:
        inside = (p[0] ** 4).sum() + p[0].sum()
        return inside if inside < 2000 else inside * torch.inf

    given = Problem(loss, [np.array([3.0, 1.0, -2.0])])
    ours, theirs = Ours(given, {"lr": 50, "max_iter": 6, **WOLFE}), Theirs(given, {"lr": 50, "max_iter": 6, **WOLFE})
    ours.step()
    theirs.step()
    near(ours.x, theirs.x, 1e-9)
    assert ours.state["func_evals"] == theirs.state["func_evals"]
    assert given.evaluate(ours.x)[0] < given.evaluate(given.x)[0]


@pytest.mark.parametrize(
    ("drop", "end", "found"),
    [(2e-4, 0.1, True), (5e-5, 0.1, False), (0.3, 0.89, True), (0.3, 0.91, False), (0.3, -0.89, True), (0.3, -0.91, False)],
)
def test_the_first_trial_is_taken_if_the_loss_drops_and_the_slope_flattens_enough(drop: float, end: float, found: bool) -> None:
    """A cubic along the line, with slope -1 at 0; at 1 it is lower by `drop` and has the slope `end`. c₁ = 1e-4, c₂ = 0.9."""
    square, cube = 3 * (1 - drop) - (end + 1), (end + 1) - 2 * (1 - drop)
    options = {"lr": 1, "max_iter": 1, "max_eval": 30, **WOLFE}
    given = Problem(lambda p: (-p[0] + square * p[0] ** 2 + cube * p[0] ** 3).sum(), [np.zeros(1)])
    ours, theirs = Ours(given, options), Theirs(given, options)
    ours.step()
    theirs.step()
    near(ours.x, theirs.x, 1e-9)
    assert ours.state["func_evals"] == theirs.state["func_evals"]
    assert (ours.state["func_evals"] == 2) is found


def test_a_shorter_history_drops_the_oldest_and_a_longer_one_grows() -> None:
    ours = Ours(network(np.float64), {"max_iter": 6})
    ours.step()
    kept = ours.state["old_dirs"]
    assert len(kept) == 5
    ours.group |= {"history_size": 2, "max_iter": 1}
    ours.step()
    assert [len(ours.state[name]) for name in ("old_dirs", "old_stps", "ro")] == [2, 2, 2]
    assert ours.state["old_dirs"][0] is kept[-1]
    ours.group |= {"history_size": 7, "max_iter": 4}
    ours.step()
    assert len(ours.state["old_dirs"]) == 6


def test_what_was_returned_is_not_changed_by_the_next_step() -> None:
    ours = Ours(network(np.float64), {"max_iter": 4, "history_size": 2, **WOLFE})
    ours.step()
    before, state = {name: np.array(ours.state[name]) for name in VECTORS}, ours.state
    ours.step()
    for name, values in before.items():
        np.testing.assert_array_equal(np.array(state[name]), values)


@pytest.mark.parametrize("max_iter", [1, 4, 7, 20])
def test_max_eval_is_filled_in_as_torch_does(max_iter: int) -> None:
    theirs = torch.optim.LBFGS([torch.zeros(1)], max_iter=max_iter).param_groups[0]
    ours = lbfgs().complete({**lbfgs().defaults, "max_iter": max_iter})
    assert ours == {name: value for name, value in theirs.items() if name != "params"}
    assert lbfgs().complete({**ours, "max_iter": 40}) == {**ours, "max_iter": 40}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -1}, ValueError, "Invalid learning rate: -1"),
        ({"line_search_fn": "wolfe"}, RuntimeError, "only 'strong_wolfe' is supported"),
        ({"line_search_fn": True}, RuntimeError, "only 'strong_wolfe' is supported"),
        ({"history_size": 0}, ValueError, "Invalid history_size value: 0"),
        ({"history_size": 2.5}, TypeError, "history_size is 2.5 of type float; it must be an int"),
        ({"max_iter": "3"}, TypeError, "max_iter is '3' of type str"),
        ({"max_eval": 2.0}, TypeError, "max_eval is 2.0 of type float"),
        ({"tolerance_grad": None}, TypeError, "tolerance_grad is None"),
        ({"tolerance_change": float("nan")}, ValueError, "Invalid tolerance_change value: nan"),
        ({"l1": 0.1}, ValueError, "LBFGS takes no l1 penalty"),
    ],
    ids=str,
)
def test_bad_hyperparameters_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        lbfgs().check({**lbfgs().defaults, **options})


@dtypes
def test_sums_are_of_float64_products_over_any_number_of_blocks(dtype: Any) -> None:
    random = np.random.default_rng(0)
    a, b = (random.normal(size=100_003).astype(dtype) for _ in range(2))
    exact = {np.float32: 1e-7, np.float64: 1e-13}[dtype]
    near(dot(np, a, b), np.dot(a.astype(np.float64), b.astype(np.float64)), exact)
    near(total_size(np, a), np.abs(a.astype(np.float64)).sum(), exact)
    assert largest(np, a) == np.abs(a).max()
    a[70_000] = np.nan
    assert np.isnan(largest(np, a))
    assert {dot(np, a, b).dtype, total_size(np, a).dtype, largest(np, a).dtype} == {np.dtype(dtype)}
