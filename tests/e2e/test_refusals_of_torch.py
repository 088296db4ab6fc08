"""torch's own error cases of optim_db: what torch refuses, optserve refuses, with torch's type of error and torch's message."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from oracle import Refusal

from optserve.client import Server, errors

ALL = oracle.refusals()
W = np.ones((1, 1), np.float32)

IN_OUR_TERMS: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "invalid param type": (W, {}, errors.InvalidArgumentError, "params must be a mapping of names to arrays.*got ndarray"),
    "a param group cannot have duplicate parameters": (
        [("w", W), ("w", W)],
        {},
        errors.DuplicateParameterError,
        "parameter 'w' appears more than once",
    ),
    "duplicate parameters should not occur across param groups either": (
        [{"params": {"w": W}}, {"params": {"w": W}}],
        {},
        errors.DuplicateParameterError,
        "parameter 'w' appears more than once",
    ),
    "dense params required": (
        {"w": torch.zeros(2, 2).to_sparse()},
        {},
        errors.DtypeMismatchError,
        "parameter 'w' .*Sparse layout",
    ),
    "dense params required in param_groups": (
        [{"params": {"w": torch.zeros(2, 2).to_sparse()}}],
        {},
        errors.DtypeMismatchError,
        "parameter 'w' .*Sparse layout",
    ),
    "Tensor lr must be 1-element": (
        {"w": W},
        {"lr": torch.tensor([0.001, 0.001])},
        errors.InvalidHyperparameterError,
        "lr is tensor.* of type Tensor; allowed are None, bool, int, float",
    ),
    "all optimizer params should be with/without names": (
        [("w", W), W],
        {},
        errors.InvalidArgumentError,
        "params must name every array|a param group is a dict",
    ),
    "all optimizer param groups should be with/without names.": (
        [{"params": [W], "lr": 1e-2}, {"params": [("w", W)]}],
        {},
        errors.InvalidArgumentError,
        "params must name every array by a string",
    ),
}
"""What torch says of parameters that are objects; ours have names, always, and hyperparameters are numbers. By description: the
same mistake in our terms, and how it is refused."""

NUMBERS_HERE = {
    "lr as Tensor doesn't work with foreach & not capturable",
    "betas must be either both floats or both Tensors",
    r"betas\[0\] as a Tensor is not supported for capturable=False and foreach=True",
}
"""Where torch's implementations cannot take a tensor as a hyperparameter. Here one is sent as the number that it holds."""


def kind(case: Refusal) -> str:
    if case.description in IN_OUR_TERMS:
        return "in our terms"
    return "numbers here" if case.description in NUMBERS_HERE else "as torch"


def of(what: str) -> Any:
    cases = [case for case in ALL if kind(case) == what]
    return pytest.mark.parametrize("case", cases, ids=str)


def parameters(case: Refusal) -> dict[str, Any]:
    given = [torch.ones(1, 1)] if case.params is None else list(case.params)
    return {f"p{index}": value.detach().numpy() for index, value in enumerate(given)}


def test_every_case_is_accounted_for() -> None:
    assert Counter(map(kind, ALL)) == {"in our terms": 15 * 6 + 2, "numbers here": 2 * 4, "as torch": 24}
    assert len(ALL) == 124


@of("as torch")
def test_refused_as_torch_does(embedded: Server, case: Refusal) -> None:
    with pytest.raises(case.error, match=case.pattern) as caught:
        embedded.create_job("j", parameters(case), optimizer=case.optimizer, **case.options)
    assert isinstance(caught.value, errors.OptserveError)
    assert embedded.jobs() == []
    if case.params is None:
        job = embedded.create_job("j", {"w": W}, optimizer=case.optimizer)
        before = job.param_groups
        with pytest.raises(case.error, match=case.pattern):
            job.update_group(0, **case.options)
        assert job.param_groups == before


@of("in our terms")
def test_refused_in_our_terms(embedded: Server, case: Refusal) -> None:
    params, options, error, pattern = IN_OUR_TERMS[case.description]
    with pytest.raises(error, match=pattern):
        embedded.create_job("j", params, optimizer=case.optimizer, **options)
    assert issubclass(error, ValueError)
    assert embedded.jobs() == []


@of("numbers here")
def test_a_tensor_is_the_number_it_holds(embedded: Server, case: Refusal) -> None:
    job = embedded.create_job("j", {"w": W}, optimizer=case.optimizer, **case.options)
    (group,) = job.param_groups
    assert {name: group[name] for name in case.options} == {name: oracle.number(value) for name, value in case.options.items()}


@pytest.mark.parametrize(
    ("params", "pattern"),
    [
        ([], "optimizer got an empty parameter list"),
        ({}, "optimizer got an empty parameter list"),
        ([{"lr": 0.1}], r"a param group is a dict with the key \"params\"; got one with \['lr'\]"),
        ([{"params": {"w": W}}, {"lr": 0.1}], r"a param group is a dict with the key \"params\""),
        (W, "params must be a mapping of names to arrays.*got ndarray"),
        (np.float32(1), "params must be a mapping of names to arrays.*got float32"),
        (torch.ones(2, 2), "params must be a mapping of names to arrays.*got Tensor"),
        ("w", "params must be a mapping of names to arrays.*got str"),
        (3, "params must be a mapping of names to arrays.*got int"),
        ([{"params": W}], "params must be a mapping of names to arrays.*got ndarray"),
    ],
    ids=lambda entry: repr(entry)[:30],
)
def test_parameters_that_name_no_arrays(embedded: Server, params: Any, pattern: str) -> None:
    with pytest.raises(errors.InvalidArgumentError, match=pattern):
        embedded.create_job("j", params, optimizer="adam")
    assert embedded.jobs() == []
