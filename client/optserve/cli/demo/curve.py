"""The demo's picture: the loss of every step, the checkpoint and what was repeated from it, the learning rates."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK, _PALE, _SHADE = "#1f5fa8", "#a9c4e4", "#f3e3c3"


@dataclass
class Pass:
    """A stretch of steps without a restore in it. `learning_rates` has one entry a group for each step."""

    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    learning_rates: list[tuple[float, ...]] = field(default_factory=list)


def draw(path: Path, passes: list[Pass], checkpoint_step: int, steps_per_epoch: int, title: str) -> None:
    """Writes a PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(9, 6), height_ratios=(3, 1), layout="constrained")
    repeated_until = passes[0].steps[-1] + 1
    for axes in (above, below):
        axes.axvspan(checkpoint_step, repeated_until, color=_SHADE, lw=0)
        axes.set_yscale("log")
    above.axvline(
        checkpoint_step, color="#7a5c12", ls="--", lw=1.2, label=f"checkpoint, and back to it from step {repeated_until}"
    )
    _draw_losses(above, passes, steps_per_epoch)
    above.set(ylabel="training loss, mean over the ranks", title=title)
    _draw_rates(below, passes)
    below.set(xlabel="step", ylabel="learning rate")
    for axes in (above, below):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_losses(axes: Axes, passes: list[Pass], steps_per_epoch: int) -> None:
    """Each step pale, each epoch's mean on top. Where two passes cover a step, their losses are the same."""
    losses = {step: loss for stretch in passes for step, loss in zip(stretch.steps, stretch.losses, strict=True)}
    steps = sorted(losses)
    axes.plot(steps, [losses[step] for step in steps], color=_PALE, lw=0.8, label="each step")
    epochs = [steps[begin : begin + steps_per_epoch] for begin in range(0, len(steps), steps_per_epoch)]
    middles = [(epoch[0] + epoch[-1]) / 2 for epoch in epochs]
    means = [sum(losses[step] for step in epoch) / len(epoch) for epoch in epochs]
    axes.plot(middles, means, color=_INK, lw=2, marker="o", ms=3, label="each epoch's mean")


def _draw_rates(axes: Axes, passes: list[Pass]) -> None:
    rates = {step: rates for stretch in passes for step, rates in zip(stretch.steps, stretch.learning_rates, strict=True)}
    steps = sorted(rates)
    for group, values in enumerate(zip(*(rates[step] for step in steps), strict=True)):
        axes.step(steps, values, where="post", label=f"group {group}")
