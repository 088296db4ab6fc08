"""Stock torch as the oracle: its optimizers over NumPy arrays by name, its own lists of configurations and of bad input, and
comparing with it."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import hypothesis
import ml_dtypes
import numpy as np
import torch

from optserve.server.formulas import Optimizer, find
from optserve.server.store import Store, StoreState

Arrays = Mapping[str, np.ndarray]
Build = Callable[..., Store]
Step = Callable[..., None]
Shapes = Mapping[str, tuple[int, ...]]


@contextmanager
def _unchanged() -> Iterator[None]:
    """Undoes what importing torch's test library does beside: it chooses a Hypothesis profile and makes a compiler's folder."""
    profile, key = hypothesis.settings.get_current_profile_name(), "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(key)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[key] = folder
        try:
            yield
        finally:
            hypothesis.settings.load_profile(profile)
            del os.environ[key]
            if before is not None:
                os.environ[key] = before


with _unchanged():
    from torch.testing._internal.common_optimizers import optim_db

APART = frozenset({"LBFGS", "SparseAdam"})
"""Optimizers of optim_db that no plain dense gradient steps: compared with torch in tests of their own."""
NAMES = [info.name for info in optim_db if info.name not in APART]


@dataclass(frozen=True, eq=False)
class Configuration:
    """An optimizer of torch with options as torch takes them: a hyperparameter may be a 0-d tensor."""

    optimizer: str
    options: Mapping[str, Any] = field(default_factory=dict)
    description: str = ""

    def __str__(self) -> str:
        return f"{self.optimizer}-{self.description or self.numbers}"

    @property
    def ours(self) -> Optimizer:
        """KeyError if there is none."""
        return find(self.optimizer)

    @property
    def numbers(self) -> dict[str, Any]:
        """The options as optserve takes them."""
        return {name: number(value) for name, value in self.options.items()}

    @property
    def group(self) -> dict[str, Any]:
        """The whole param group."""
        return {**self.ours.defaults, **self.numbers}

    @property
    def maximizes(self) -> bool:
        return bool(self.options.get("maximize"))


def number(value: Any) -> Any:
    """A tensor of one element as a number, also within a tuple."""
    if isinstance(value, tuple):
        return tuple(number(entry) for entry in value)
    return value.item() if isinstance(value, torch.Tensor) else value


def configurations() -> list[Configuration]:
    """Every CPU configuration of optim_db, whether optserve has the optimizer or not."""
    return [
        Configuration(info.name, given.kwargs, given.desc)
        for info in optim_db
        for given in info.optim_inputs_func(device="cpu")
    ]


def implementations(optimizer: str) -> tuple[str, ...]:
    """The switches by which torch chooses another implementation: of foreach, differentiable and fused."""
    return next((info.supported_impls for info in optim_db if info.name == optimizer), ())


def to_torch(array: np.ndarray) -> torch.Tensor:
    """A copy."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A view."""
    if tensor.dtype == torch.bfloat16:
        return tensor.detach().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.detach().numpy()


def slope(optimizer: str, gradient: np.ndarray) -> torch.Tensor:
    """A gradient as torch's optimizer of that name takes it: for SparseAdam in rows, of which it has all."""
    tensor = to_torch(gradient)
    if optimizer != "SparseAdam":
        return tensor
    return in_rows(np.arange(len(gradient)), tensor, gradient.shape)


def in_rows(ids: np.ndarray, values: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """A sparse gradient; rows may come in any order, and repeatedly."""
    return torch.sparse_coo_tensor(torch.from_numpy(ids)[None], values, shape, check_invariants=True)


class Stock:
    """A stock torch optimizer over copies of the parameters; single-tensor unless `how` says otherwise."""

    def __init__(self, optimizer: str, options: Mapping[str, Any], start: Arrays, **how: Any) -> None:
        if "foreach" in implementations(optimizer):
            how = {"foreach": False, **how}
        self.name = optimizer
        self.tensors = {name: to_torch(value).requires_grad_() for name, value in start.items()}
        self.optimizer = getattr(torch.optim, optimizer)(list(self.tensors.values()), **options, **how)

    def step(self, gradients: Mapping[str, np.ndarray | torch.Tensor]) -> None:
        """Parameters that are not among the gradients have none; one may be a tensor, `in_rows`. In one thread: others that
        spin cost more than they save."""
        for name, parameter in self.tensors.items():
            given = gradients.get(name)
            parameter.grad = slope(self.name, given) if isinstance(given, np.ndarray) else given
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        with torch.sparse.check_sparse_tensor_invariants(enable=True):  # else it warns
            self.optimizer.step()
        torch.set_num_threads(threads)

    @property
    def values(self) -> dict[str, np.ndarray]:
        return {name: to_numpy(parameter) for name, parameter in self.tensors.items()}

    @property
    def state(self) -> dict[str, np.ndarray]:
        """By "slot/parameter": slots, carried scalars and step."""
        return {
            f"{slot}/{name}": to_numpy(value.to_dense()) if isinstance(value, torch.Tensor) else np.float32(value)
            for name, parameter in self.tensors.items()
            for slot, value in self.optimizer.state.get(parameter, {}).items()
        }


BLOCK = 16_384
"""Elements of a block of the numpy backend."""
SHAPES = {"w": (3, 4), "scalar": (), "nothing": (1, 0, 2), "large": (BLOCK + 3_617,)}
_SHAPES: dict[str, Shapes] = {
    "Adafactor": {**SHAPES, "deep": (5, 6, 7), "line": (1, 9)},
    "Muon": {"w": (3, 4), "tall": (17, 6), "wide": (7, 30), "nothing": (0, 3)},
    "SparseAdam": {name: shape for name, shape in SHAPES.items() if shape},
}


def shapes_for(optimizer: str) -> Shapes:
    """Shapes that the optimizer takes: more than a block, a scalar, nothing."""
    return _SHAPES.get(optimizer, SHAPES)


def initial(shapes: Shapes, dtype: Any) -> dict[str, np.ndarray]:
    """Parameters of size 1, always the same."""
    random = np.random.default_rng(7)
    return {name: np.asarray(random.normal(size=shape)).astype(dtype) for name, shape in shapes.items()}


@cache
def wave(shape: tuple[int, ...], step: int) -> np.ndarray:
    """Signs change from step to step, and sizes span three decades."""
    place = np.arange(math.prod(shape), dtype=np.float64).reshape(shape)
    return np.sin(place + 1.3 * step) * np.exp2(-np.mod(place, 10.0))


def gradients(values: Arrays, step: int, loop: str, uphill: bool) -> dict[str, np.ndarray]:
    """In the values' dtype. Loop "open": they do not depend on the values. "closed": of a paraboloid that moves, turned over
    for an optimizer that goes uphill; so flat that steps of a constant size (Adafactor's) do not jump over its lowest point,
    since then rounding would grow from step to step."""
    curvature, sign = (0.2 if loop == "closed" else 0.0), (-1.0 if uphill else 1.0)
    return {
        name: np.asarray(sign * (curvature * value.astype(np.float64) + wave(value.shape, step))).astype(value.dtype)
        for name, value in values.items()
    }


def weights(store: Store) -> dict[str, np.ndarray]:
    """Views."""
    with store.reading() as arrays:
        return {p.name: arrays[p.array_id][p.offset : p.offset + p.size].reshape(p.shape) for p in store.layout.places}


TOLERANCES = {np.float32: 2e-6, np.float64: 1e-13}
"""Measured: 9e-7 and 2e-15."""


def slack(case: Configuration) -> float:
    """What else may differ: Muon orthogonalises in bfloat16, where the order of a sum decides over 1 % of a step."""
    return 0.25 * float(case.group["lr"]) if case.optimizer == "Muon" else 0.0


def compare(content: StoreState, stock: Stock, case: Configuration, tolerance: float) -> None:
    """Parameters, slots, carried scalars and steps. An element may differ by the tolerance times its size, and by the tolerance
    times the largest size that the parameters, or that slot of all of them, have; carried scalars and steps not at all."""
    theirs, optimizer = stock.state, case.ours
    ours = {key: value for key, value in content.state.items() if key.partition("/")[2] in stock.tensors}
    if optimizer.counts_steps:
        ours |= {f"step/{name}": np.float32(content.steps[name]) for name in stock.tensors if name in content.steps}
    assert ours.keys() == theirs.keys()
    ours |= {f"/{name}": value for name, value in content.values.items()}
    theirs |= {f"/{name}": value for name, value in stock.values.items()}
    sizes: dict[str, float] = {}
    for key, value in theirs.items():
        slot = key.partition("/")[0]
        sizes[slot] = max(sizes.get(slot, 0.0), float(np.max(np.abs(value), initial=0.0)))
    for key, value in theirs.items():
        slot = key.partition("/")[0]
        assert (ours[key].shape, ours[key].dtype) == (value.shape, value.dtype), key
        exact = slot in ("step", *optimizer.scalar_keys)
        relative, absolute = (0.0, 0.0) if exact else (tolerance, tolerance * sizes[slot] + slack(case))
        np.testing.assert_allclose(ours[key], value, rtol=relative, atol=absolute, err_msg=key)


@dataclass(frozen=True, eq=False)
class Refusal:
    """One of torch's error cases: what it refuses, and how."""

    optimizer: str
    params: Any
    """As given to torch; None: any parameters."""
    options: Mapping[str, Any]
    description: str
    error: type[Exception]
    pattern: str

    def __str__(self) -> str:
        return f"{self.optimizer}-{self.description}"


def refusals() -> list[Refusal]:
    """Every error case of optim_db, whether optserve has the optimizer or not."""
    return [
        Refusal(info.name, given.params, given.kwargs, given.desc, case.error_type, case.error_regex)
        for info in optim_db
        for case in info.optim_error_inputs_func(device="cpu", dtype=torch.float32)
        for given in [case.optimizer_error_input]
    ]
