"""L-BFGS, as torch.optim.LBFGS: the loss is evaluated several times a step, and all parameters are one vector.

    d = -H g, with H from the last pairs (s, y): s = t d the move before, y = g - g₋ what it did to the gradient
    x := x + t d, with t = lr (first of all lr·min(1, 1/Σ|gᵢ|)), or as the line search finds it

H g is the two-loop recursion begun with H₀ = (y·s)/(y·y); a pair counts if y·s > 1e-10. Up to max_iter moves make a step, fewer
if max_eval evaluations are used up, the gradient or the move is small, or the loss stays. Nocedal & Wright, "Numerical
Optimization", 2006, algorithm 7.4; as in minFunc and torch. Its `al` is kept for torch's sake: it is scratch memory.

Deviations: what torch refuses at the first step (line_search_fn) is refused at once, as is what makes its steps fail: a
history_size below 1. A history that was made shorter drops its oldest pairs. Sums are in float64, then rounded to the vector's
dtype.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any

from optserve.server.formulas import checks
from optserve.server.formulas.definition import Evaluation, Group, Searching
from optserve.server.formulas.language import L1
from optserve.server.formulas.strong_wolfe import Line, Point, strong_wolfe
from optserve.server.formulas.vectors import add, dot, largest, total_size

_DEFAULTS = {
    "lr": 1,
    "max_iter": 20,
    "max_eval": None,
    "tolerance_grad": 1e-7,
    "tolerance_change": 1e-9,
    "history_size": 100,
    "line_search_fn": None,
}

_LEAST_CURVATURE = 1e-10


def check(group: Group) -> None:
    """torch's checks, that of its first step too."""
    checks.learning_rate(group)
    checks.integer(group, "max_iter")
    if group["max_eval"] is not None:
        checks.integer(group, "max_eval")
    checks.not_nan(group, "tolerance_grad")
    checks.not_nan(group, "tolerance_change")
    if checks.integer(group, "history_size") < 1:
        raise ValueError(f"Invalid history_size value: {group['history_size']}")
    if group["line_search_fn"] not in (None, "strong_wolfe"):
        raise RuntimeError("only 'strong_wolfe' is supported")
    if group.get(L1):
        raise ValueError("LBFGS takes no l1 penalty: add it to the loss and the gradient that the closure returns")


def complete(group: Group) -> dict[str, Any]:
    """The group with the max_eval that goes with its max_iter, unless it has one."""
    most = group["max_iter"] * 5 // 4 if group["max_eval"] is None else group["max_eval"]
    return {**group, "max_eval": most}


@dataclass
class _State:
    """torch's state: vectors are replaced, never changed."""

    func_evals: int = 0
    n_iter: int = 0
    d: Any = None
    t: Any = None
    old_dirs: list[Any] = field(default_factory=list)
    old_stps: list[Any] = field(default_factory=list)
    ro: list[Any] = field(default_factory=list)
    H_diag: Any = None
    prev_flat_grad: Any = None
    prev_loss: float | None = None
    al: list[Any] | None = None

    @classmethod
    def begun(cls, state: Mapping[str, Any], history_size: int) -> _State:
        """A copy of what was returned before, with no more pairs than may be kept."""
        kept = {name: state[name][-history_size:] for name in ("old_dirs", "old_stps", "ro") if name in state}
        return cls(**{**state, **kept})

    def returned(self) -> dict[str, Any]:
        """By torch's names, as far as there is something."""
        named = dict(vars(self))
        if self.d is None:
            return {"func_evals": self.func_evals, "n_iter": self.n_iter}
        return {name: value for name, value in named.items() if value is not None}

    def direct(self, xp: Any, g: Any, history_size: int) -> None:
        """The direction at the gradient g."""
        self.n_iter += 1
        if self.n_iter == 1:
            self.d, self.H_diag = xp.negative(g), 1.0
            self.old_dirs, self.old_stps, self.ro = [], [], []
            return
        y = g - self.prev_flat_grad
        s = self.d * g.dtype.type(self.t)
        curvature = dot(xp, y, s)
        if curvature > _LEAST_CURVATURE:
            if len(self.old_dirs) == history_size:
                self.old_dirs, self.old_stps, self.ro = self.old_dirs[1:], self.old_stps[1:], self.ro[1:]
            self.old_dirs, self.old_stps = [*self.old_dirs, y], [*self.old_stps, s]
            self.ro = [*self.ro, 1.0 / curvature]
            self.H_diag = curvature / dot(xp, y, y)
        self.d = self._recursion(xp, g)

    def _recursion(self, xp: Any, g: Any) -> Any:
        """-H g."""
        kind, count = g.dtype.type, len(self.old_dirs)
        al = [kind(0)] * count
        q = xp.negative(g)
        for i in reversed(range(count)):
            al[i] = dot(xp, self.old_stps[i], q) * kind(self.ro[i])
            add(xp, q, -al[i], self.old_dirs[i])
        xp.multiply(q, kind(self.H_diag), out=q)
        for i in range(count):
            be = dot(xp, self.old_dirs[i], q) * kind(self.ro[i])
            add(xp, q, al[i] - be, self.old_stps[i])
        self.al = al
        return q


def search(xp: Any, group: Group, state: Mapping[str, Any], x: Any) -> Generator[Any, Evaluation, dict[str, Any]]:
    """One step. Its vectors have the dtype of x."""
    max_iter, max_eval, tolerance_change = group["max_iter"], group["max_eval"], group["tolerance_change"]
    now = _State.begun(state, group["history_size"])
    loss, g = yield x
    evaluated = 1
    now.func_evals += 1
    if largest(xp, g) <= group["tolerance_grad"]:
        return now.returned()
    for moved in range(1, max_iter + 1):
        now.direct(xp, g, group["history_size"])
        now.prev_flat_grad, now.prev_loss, now.t = g, loss, _first_try(xp, group["lr"], g, now.n_iter)
        slope = dot(xp, g, now.d)
        if slope > -tolerance_change:
            break
        used = 0
        if group["line_search_fn"] is not None:
            line = Line(xp, x, now.d, Point(0.0, loss, g, slope))
            point, used = yield from strong_wolfe(line, now.t, tolerance_change, max_eval - evaluated)
            loss, g, now.t = point.loss, point.g, point.t
            add(xp, x, now.t, now.d)
        else:
            add(xp, x, now.t, now.d)
            if moved < max_iter:
                loss, g = yield x
                used = 1
        evaluated += used
        now.func_evals += used
        if moved == max_iter or evaluated >= max_eval or largest(xp, g) <= group["tolerance_grad"]:
            break
        if largest(xp, now.d) * abs(g.dtype.type(now.t)) <= tolerance_change or abs(loss - now.prev_loss) < tolerance_change:
            break
    return now.returned()


def _first_try(xp: Any, lr: float, g: Any, n_iter: int) -> Any:
    return min(1.0, 1.0 / total_size(xp, g)) * lr if n_iter == 1 else lr


LBFGS = Searching(
    name="LBFGS",
    defaults=_DEFAULTS,
    slot_keys=(),
    counts_steps=False,
    check=check,
    complete=complete,
    sparse=lambda _: True,
    several_groups="LBFGS doesn't support per-parameter options (parameter groups)",
    search=search,
    counts=("func_evals", "n_iter"),
    moves="n_iter",
    numbers=("t", "H_diag", "prev_loss"),
    vectors=("d", "prev_flat_grad"),
    histories=("old_dirs", "old_stps"),
    lists=("ro",),
    most_vectors=lambda group: 2 * group["history_size"] + 2,
    scratch=("al",),
)
