"""What takes rows, and what takes nothing else: refused in torch's words, before anything changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from host_device import backend_on, new_device
from host_kernels import needs_compiler
from oracle import Stock

from optserve.server.formulas import OPTIMIZERS, find
from optserve.server.store import Store, StoreState
from optserve.wire.errors import UnsupportedGradientError
from optserve.wire.rows import Rows

Build = Callable[..., Store]


def bits(content: StoreState) -> dict[str, Any]:
    return {name: array.tobytes() for name, array in {**content.values, **content.state}.items()} | dict(content.steps)


REFUSING = [*((name, {}) for name, found in OPTIMIZERS.items() if hasattr(torch.optim, found.name) and found.sparse is None)]
REFUSING += [("sgd", {"weight_decay": 0.1}), ("adagrad", {"weight_decay": 0.1})]


@pytest.mark.parametrize(("name", "options"), REFUSING, ids=str)
def test_what_takes_no_rows_says_so_in_torchs_words(name: str, options: dict[str, Any], build: Build) -> None:
    optimizer, first = find(name), oracle.initial({"a": (4, 4)}, np.float32)
    stock = Stock(optimizer.name, options, first)
    ids, ones = np.array([1, 2]), np.ones((2, 4), np.float32)
    with pytest.raises(RuntimeError) as theirs:
        stock.step({"a": oracle.in_rows(ids, torch.from_numpy(ones), (4, 4))})
    group = {**optimizer.defaults, **options}
    store = build(optimizer, "numpy", [first], [group])
    before = bits(store.export())
    for refused in (
        lambda: store.update([group], {}, 1.0, frozenset(), {0: Rows(ids, ones)}),
        lambda: store.check_kinds([group], frozenset(), {0: Rows(ids, ones)}),
    ):
        with pytest.raises(UnsupportedGradientError) as ours:
            refused()
        assert str(ours.value).startswith(str(theirs.value))  # which value it is, and what is allowed, may follow
        assert ours.value.metadata == {"parameter": "a"}
    assert bits(store.export()) == before


def test_optimizers_that_torch_does_not_have_take_no_rows_either() -> None:
    for name, optimizer in OPTIMIZERS.items():
        if not hasattr(torch.optim, optimizer.name):
            with pytest.raises(RuntimeError, match=f"{optimizer.name} does not support sparse gradients"):
                find(name).moves_all(optimizer.defaults)


def test_a_penalty_takes_no_rows(build: Build) -> None:
    """It would move every row."""
    for name in ("sgd", "adagrad", "sparseadam"):
        group = {**find(name).defaults, "l1": 0.1}
        with pytest.raises(RuntimeError, match="l1 option is not compatible with sparse gradients"):
            find(name).moves_all(group)


def test_sparse_adam_takes_no_dense_gradient(build: Build) -> None:
    first = oracle.initial({"a": (9, 5), "b": (9, 5)}, np.float32)
    store = build(find("sparseadam"), "numpy", [first], [find("sparseadam").defaults])
    before = bits(store.export())
    for absent, sparse in ((frozenset(), {}), (frozenset(), {0: Rows(np.array([1]), np.ones((1, 5), np.float32))})):
        with pytest.raises(UnsupportedGradientError, match="SparseAdam does not support dense gradients, please consider Adam"):
            store.update([find("sparseadam").defaults], store.accumulators(), 1.0, absent, sparse)
    assert bits(store.export()) == before


def test_sparse_adam_refuses_complex_parameters_in_torchs_words() -> None:
    with pytest.raises(ValueError, match="Complex params at indices") as theirs:
        torch.optim.SparseAdam([torch.ones(2, 2, dtype=torch.complex64)])
    with pytest.raises(ValueError) as ours:
        find("sparseadam").check_parameter("a", (2, 2), True)
    assert str(theirs.value).endswith(f": {ours.value}")


@needs_compiler
@pytest.mark.parametrize(("name", "arrays"), [("sparseadam", 3), ("adam", 4)])
def test_a_device_has_room_for_dense_gradients_where_there_are_any(name: str, arrays: int) -> None:
    """Masters and two slots; and for others, when the job is made, what gradients are folded into."""
    device, shape = new_device(), (1 << 16, 16)
    backend = backend_on(device)
    used = device.used
    store = Store(find(name), backend)
    store.add_group([("emb", shape, np.dtype(np.float32))])
    store.seal()
    store.prepare([find(name).defaults])
    backend.to_host(store._columns[0].masters[:1])  # what the streams held is let go
    assert (device.used - used) // (4 << 20) == arrays
