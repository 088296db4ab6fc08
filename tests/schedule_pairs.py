"""The same schedule in torch and in optserve, moved together and compared bit for bit after each move."""

from __future__ import annotations

import copy
import math
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR

from optserve.server import schedules
from optserve.wire.arguments import Factors
from optserve.wire.errors import MissingFunctionError

RATES = (0.1, 3e-4, 1, 0.0)


def warmup(epoch: int) -> float:
    return min(1.0, (epoch + 1) / 7)


def decay(epoch: int) -> float:
    return 0.95 + 0.04 * math.sin(epoch)


CASES: list[tuple[str, dict[str, Any]]] = [
    ("StepLR", {"step_size": 7}),
    ("StepLR", {"step_size": 3, "gamma": 0.97}),
    ("StepLR", {"step_size": 2.5, "gamma": 0.9}),
    ("MultiStepLR", {"milestones": (3, 50, 50, 50, 120)}),
    ("MultiStepLR", {"milestones": (), "gamma": 0.5}),
    ("MultiStepLR", {"milestones": (120, 7, 0), "gamma": 0.3}),
    ("ConstantLR", {}),
    ("ConstantLR", {"factor": 0.7, "total_iters": 60}),
    ("ConstantLR", {"factor": 1.0, "total_iters": 0}),
    ("ConstantLR", {"factor": 0.0, "total_iters": 1000}),
    ("LinearLR", {}),
    ("LinearLR", {"start_factor": 0.01, "end_factor": 0.7, "total_iters": 150}),
    ("LinearLR", {"start_factor": 1.0, "end_factor": 0.0, "total_iters": 33}),
    ("LinearLR", {"total_iters": 0}),
    ("ExponentialLR", {"gamma": 0.987}),
    ("ExponentialLR", {"gamma": -0.9}),
    ("PolynomialLR", {}),
    ("PolynomialLR", {"total_iters": 150, "power": 2.7}),
    ("PolynomialLR", {"total_iters": 70.5, "power": 0.3}),
    ("PolynomialLR", {"total_iters": 0}),
    ("CosineAnnealingLR", {"T_max": 30}),
    ("CosineAnnealingLR", {"T_max": 30.0, "eta_min": 1e-3}),
    ("CosineAnnealingLR", {"T_max": 1, "eta_min": 0.01}),
    ("CosineAnnealingLR", {"T_max": 12.5, "eta_min": 5}),
    ("CosineAnnealingLR", {"T_max": 1000}),
    ("CosineAnnealingWarmRestarts", {"T_0": 7}),
    ("CosineAnnealingWarmRestarts", {"T_0": 5, "T_mult": 3, "eta_min": 1e-3}),
    ("CosineAnnealingWarmRestarts", {"T_0": 1, "eta_min": -2}),
    ("ReduceLROnPlateau", {"patience": 2}),
    ("ReduceLROnPlateau", {"mode": "max", "factor": 0.5, "patience": 0, "cooldown": 3, "min_lr": (0.01, 0, 0.5, 0.1)}),
    ("ReduceLROnPlateau", {"threshold_mode": "abs", "threshold": 0.3, "patience": 1, "eps": 1e-3, "min_lr": 1e-3}),
    ("ReduceLROnPlateau", {"mode": "max", "threshold_mode": "abs", "factor": -0.5, "patience": -1}),
    ("CyclicLR", {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 7}),
    ("CyclicLR", {"base_lr": (0.01, 0.2, 0, 3), "max_lr": (1, 0.1, 0.5, 7), "step_size_up": 5, "step_size_down": 11}),
    ("CyclicLR", {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 2.5, "mode": "triangular2", "base_momentum": 0.5}),
    ("CyclicLR", {"base_lr": 1, "max_lr": 2, "step_size_up": 13, "mode": "exp_range", "gamma": 0.99, "scale_mode": "cycle"}),
    ("CyclicLR", {"base_lr": 0.3, "max_lr": 0.1, "step_size_up": 9, "step_size_down": 0, "cycle_momentum": False}),
    ("CyclicLR", {"base_lr": 0.1, "max_lr": 0.2, "step_size_up": 4, "max_momentum": (0.9, 0.8, 0.7, 1.5)}),
    ("OneCycleLR", {"max_lr": 0.1, "total_steps": 200}),
    ("OneCycleLR", {"max_lr": (1, 0.2, 3e-4, 5.0), "epochs": 20, "steps_per_epoch": 11, "anneal_strategy": "linear"}),
    ("OneCycleLR", {"max_lr": 0.1, "total_steps": 230, "three_phase": True, "pct_start": 0.4, "cycle_momentum": False}),
    (
        "OneCycleLR",
        {"max_lr": 0.1, "total_steps": 211, "div_factor": 3, "final_div_factor": 0.5, "base_momentum": (0, 0.1, 0.2, 0.3)},
    ),
    ("OneCycleLR", {"max_lr": -1.0, "total_steps": 333, "pct_start": 1.0, "three_phase": True, "anneal_strategy": "linear"}),
    ("SWALR", {"swa_lr": 0.05}),
    ("SWALR", {"swa_lr": (0.05, 1, 0.0, 2e-4), "anneal_epochs": 60, "anneal_strategy": "linear"}),
    ("SWALR", {"swa_lr": 0.05, "anneal_epochs": 0}),
    ("LambdaLR", {"lr_lambda": warmup}),
    ("LambdaLR", {"lr_lambda": [warmup, decay, lambda epoch: epoch // 30, lambda _: -1]}),
    ("MultiplicativeLR", {"lr_lambda": decay}),
    ("MultiplicativeLR", {"lr_lambda": [decay, warmup, lambda epoch: 1 / epoch, lambda _: 0]}),
    (
        "SequentialLR",
        {"schedulers": [("LinearLR", {"total_iters": 5}), ("CosineAnnealingLR", {"T_max": 20})], "milestones": (5,)},
    ),
    (
        "SequentialLR",
        {
            "schedulers": [
                ("ConstantLR", {"factor": 0.1}),
                ("CosineAnnealingWarmRestarts", {"T_0": 4, "T_mult": 2}),
                ("StepLR", {"step_size": 3, "gamma": 0.9}),
                ("PolynomialLR", {"total_iters": 30}),
                ("MultiStepLR", {"milestones": (0, 2, 9)}),
                ("ExponentialLR", {"gamma": 0.95}),
                ("ConstantLR", {"total_iters": 0}),
                ("LinearLR", {}),
            ],
            "milestones": (3, 40, 60, 90, 110, 130, 150),
        },
    ),
    (
        "SequentialLR",
        {
            "schedulers": [
                ("OneCycleLR", {"max_lr": 0.2, "total_steps": 50}),
                ("CyclicLR", {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 3}),
                ("LambdaLR", {"lr_lambda": warmup}),
                ("MultiplicativeLR", {"lr_lambda": [decay] * 4}),
                ("SWALR", {"swa_lr": 0.05, "anneal_epochs": 40}),
            ],
            "milestones": (41, 80, 100, 140),
        },
    ),
    (
        "SequentialLR",
        {
            "schedulers": [
                (
                    "SequentialLR",
                    {
                        "schedulers": [
                            (
                                "ChainedScheduler",
                                {"schedulers": [("LinearLR", {}), ("MultiplicativeLR", {"lr_lambda": decay})]},
                            ),
                            ("LambdaLR", {"lr_lambda": warmup}),
                            ("CosineAnnealingWarmRestarts", {"T_0": 3}),
                        ],
                        "milestones": (1, 9),
                    },
                ),
                ("StepLR", {"step_size": 5, "gamma": 0.8}),
            ],
            "milestones": (20,),
        },
    ),
    ("SequentialLR", {"schedulers": [("StepLR", {"step_size": 5}), ("ExponentialLR", {"gamma": 0.9})], "milestones": (0,)}),
    ("SequentialLR", {"schedulers": [("StepLR", {"step_size": 2}), ("LinearLR", {})], "milestones": (9,), "last_epoch": 3}),
    (
        "ChainedScheduler",
        {"schedulers": [("ConstantLR", {"factor": 0.1, "total_iters": 4}), ("ExponentialLR", {"gamma": 0.9})]},
    ),
    (
        "ChainedScheduler",
        {
            "schedulers": [
                ("SequentialLR", {"schedulers": [("LinearLR", {}), ("LambdaLR", {"lr_lambda": decay})], "milestones": (8,)}),
                ("CyclicLR", {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 3, "mode": "triangular2"}),
                ("MultiplicativeLR", {"lr_lambda": warmup}),
            ]
        },
    ),
]
"""Usual and extreme arguments, for SGD with four groups of RATES; a composed schedule's `schedulers` as a user gives them."""

WITHOUT_LAST_EPOCH = ("ChainedScheduler", "ReduceLROnPlateau")


def optimizer(rates: Sequence[float] = RATES, kind: type[torch.optim.Optimizer] = torch.optim.SGD) -> torch.optim.Optimizer:
    momentum = {"momentum": 0.5} if kind is torch.optim.SGD else {}
    return kind([{"params": [torch.zeros(1)], "lr": rate} for rate in rates], **momentum)


def torch_scheduler(name: str, arguments: dict[str, Any], found: torch.optim.Optimizer) -> Any:
    given = {key: list(value) if isinstance(value, tuple) else value for key, value in arguments.items()}
    if "schedulers" in given:
        given["schedulers"] = [torch_scheduler(part, inner, found) for part, inner in given["schedulers"]]
    if name == "ChainedScheduler":
        return lr_scheduler.ChainedScheduler(**given)
    kind = SWALR if name == "SWALR" else getattr(lr_scheduler, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kind(found, **given)


def split(arguments: dict[str, Any]) -> tuple[dict[str, Any], list[Any]]:
    """The arguments without their functions, and those in depth-first order."""
    rest, functions = {}, []
    for key, value in arguments.items():
        if key == "lr_lambda":
            functions.append(value)
        elif key == "schedulers":
            parts = [(part, *split(inner)) for part, inner in value]
            rest[key] = tuple((part, inner) for part, inner, _ in parts)
            functions += [function for _, _, inner in parts for function in inner]
        else:
            rest[key] = value
    return rest, functions


def called(functions: Sequence[Any], awaited: Sequence[int]) -> list[Factors]:
    """What a client answers."""
    factors = []
    for function, epoch in zip(functions, awaited, strict=True):
        if epoch < 0:
            factors.append(Factors(epoch))
        elif callable(function):
            factors.append(Factors(epoch, (float(function(epoch)),), True))
        else:
            factors.append(Factors(epoch, tuple(float(one(epoch)) for one in function)))
    return factors


def answered(functions: Sequence[Any], call: Callable[[list[Factors]], Any]) -> Any:
    """The call with the factors that it says it awaits."""
    try:
        return call([])
    except MissingFunctionError as error:
        return call(called(functions, [int(entry) for entry in error.metadata["awaited"].split(",")]))


def bits(value: Any) -> Any:
    """Comparable bit for bit, but for int and float, which torch mixes."""
    if isinstance(value, tuple | list):
        return [bits(entry) for entry in value]
    return value if value is None or isinstance(value, bool | str) else float(value).hex()


def hexes(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: bits(value) for key, value in sorted(group.items()) if key != "params"} for group in groups]


def metrics(seed: int = 0) -> Iterator[float]:
    """A loss that falls, stops, jumps about, and now and then is no number."""
    draw = random.Random(seed)
    for at in range(10_000):
        yield draw.choice([1 / (at + 1), 0.3, draw.uniform(-1, 1), math.inf, -0.5]) if at % 17 else math.nan


class Pair:
    """A schedule here and in torch, for optimizers with the same groups."""

    def __init__(
        self,
        name: str,
        arguments: dict[str, Any],
        groups: list[dict[str, Any]] | None = None,
        kind: type[torch.optim.Optimizer] = torch.optim.SGD,
    ) -> None:
        self.name, self.arguments = name, arguments
        self.optimizer = optimizer(kind=kind)
        if groups is not None:
            for mine, theirs in zip(groups, self.optimizer.param_groups, strict=True):
                theirs.update(mine)
        self.groups = [{key: value for key, value in g.items() if key != "params"} for g in self.optimizer.param_groups]
        self.scheduler = torch_scheduler(name, arguments, self.optimizer)
        self.metrics = metrics() if name == "ReduceLROnPlateau" else None
        given, self.functions = split(arguments)
        before = copy.deepcopy(self.groups)
        self.state, edits = answered(self.functions, lambda factors: schedules.create(name, given, self.groups, factors))
        assert self.groups == before
        self.compare(edits)

    def compare(self, edits: list[dict[str, Any]]) -> None:
        for group, edit in zip(self.groups, edits, strict=True):
            group.update(edit)
        assert hexes(self.groups) == hexes(self.optimizer.param_groups)
        assert self.state.last_epoch == self.epoch(self.scheduler)

    def epoch(self, scheduler: Any) -> int:
        return scheduler.last_epoch if hasattr(scheduler, "last_epoch") else self.epoch(scheduler._schedulers[0])

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            metric = next(self.metrics) if self.metrics else None
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.scheduler.step(*(() if metric is None else (metric,)))
            factors = called(self.functions, schedules.awaited(self.state, self.groups))
            self.state, edits = schedules.step(self.state, self.groups, metric, factors)
            self.compare(edits)

    def edit(self, index: int, **values: Any) -> None:
        self.groups[index].update(values)
        self.optimizer.param_groups[index].update(values)

    def add_group(self, lr: float, **more: Any) -> None:
        """To both, and to torch's what `extend` writes into it, which torch does not."""
        self.optimizer.add_param_group({"params": [torch.zeros(1)], "lr": lr, **more})
        added = self.optimizer.param_groups[-1]
        group = {key: value for key, value in added.items() if key != "params"}
        self.state, edits = schedules.extend(self.state, group, len(self.groups))
        self.groups.append(group)
        self.edit(-1, **edits)

    def teach_torch_the_group(self) -> None:
        """Gives torch's schedulers of the last group what `extend` gives ours."""
        for scheduler in singles(self.scheduler):
            group = self.groups[-1]
            cyclic = isinstance(scheduler, lr_scheduler.CyclicLR)
            for name in ("max_lrs", "base_momentums", "max_momentums", "lr_lambdas"):
                if hasattr(scheduler, name):
                    getattr(scheduler, name).append(getattr(scheduler, name)[0])
            scheduler.base_lrs.append(scheduler.base_lrs[0] if cyclic else group.get("initial_lr", group["lr"]))

    def load_into_torch(self, state_dict: dict[str, Any]) -> None:
        """A new torch scheduler, put where the state_dict stands, in the place of the one so far."""
        groups = copy.deepcopy(self.optimizer.param_groups)
        self.scheduler = torch_scheduler(self.name, self.arguments, self.optimizer)
        self.scheduler.load_state_dict(state_dict)
        for group, before in zip(self.optimizer.param_groups, groups, strict=True):
            group.clear()
            group.update(before)


def singles(scheduler: Any) -> list[Any]:
    """torch's schedulers in one, without the composed ones."""
    parts = getattr(scheduler, "_schedulers", None)
    return [scheduler] if parts is None else [one for part in parts for one in singles(part)]
