"""What the demo shows: processes that train together, a checkpoint that is restored, and the summary."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import click

from optserve.cli.demo import curve, digits, model
from optserve.cli.demo.curve import Pass
from optserve.cli.demo.processes import Children, Report
from optserve.cli.demo.training import CHECKPOINT, Plan, attach
from optserve.wire.errors import InternalError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

JOB = "digits"


@dataclass
class Story:
    """What the workers reported, put together."""

    workers: int
    passes: list[Pass] = field(default_factory=lambda: [Pass()])
    saved: Report = field(default_factory=dict)
    restored: list[Report] = field(default_factory=list)
    done: list[Report] = field(default_factory=list)
    _open: dict[tuple[int, int], list[Report]] = field(default_factory=lambda: defaultdict(list))
    _restores: dict[int, int] = field(default_factory=lambda: defaultdict(int))

    def add(self, report: Report) -> Pass | None:
        """Takes a report. Returns the pass that a step was added to, once every rank has told its share of the loss."""
        rank, kind = report["rank"], report["kind"]
        if kind == "saved":
            self.saved = report
        elif kind == "restored":
            self.restored.append(report)
            self._restores[rank] += 1
        elif kind == "done":
            self.done.append(report)
        elif kind == "step":
            number = self._restores[rank]
            shares = self._open[number, report["step"]]
            shares.append(report)
            if len(shares) == self.workers:
                return self._close(number, report["step"])
        return None

    def _close(self, number: int, step: int) -> Pass:
        shares = sorted(self._open.pop((number, step)), key=lambda share: share["rank"])
        while len(self.passes) <= number:
            self.passes.append(Pass())
        stretch = self.passes[number]
        stretch.steps.append(step)
        total = sum(share["size"] for share in shares)
        stretch.losses.append(sum(share["loss"] * share["size"] for share in shares) / total)
        stretch.learning_rates.append(tuple(shares[0]["lr"]))
        return stretch


def run(workers: int, epochs: int, output: Path, backend: str) -> float:
    """The whole demo. Returns the test accuracy."""
    output.mkdir(parents=True, exist_ok=True)
    data = digits.load()
    plan = Plan(epochs, workers, data.steps_per_epoch, rehearse=True)
    began = time.perf_counter()
    with TemporaryDirectory(prefix="optserve-demo-") as folder, Children(Path(folder)) as children:
        address = children.start_server(backend)
        from optserve.client import connect

        with connect(address) as server:
            info = server.info()
            click.echo(f"server at {address}, {info.backend} kernels; {workers} workers, Adam, {plan.steps} steps")
            job = attach(server, JOB, plan)
            for rank in range(workers):
                arguments = ["--connect", address, "--job", JOB, "--workers", str(workers), "--epochs", str(epochs)]
                children.start_worker(rank, arguments)
            story = _watch(children, plan)
            weights = job.pull()
    _check(story, plan)
    loss, accuracy = model.evaluate(weights, data.test_images, data.test_labels)
    picture = output / "loss.png"
    title = f"digits, {workers} workers, Adam through optserve: test accuracy {accuracy:.3f}"
    curve.draw(picture, story.passes, plan.save_at, data.steps_per_epoch, title)
    _print_summary(story, plan, loss, time.perf_counter() - began, picture)
    return accuracy


def _watch(children: Children, plan: Plan) -> Story:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    story = Story(plan.workers)
    columns = (
        TextColumn("training"),
        BarColumn(20),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
    )
    console = Console(highlight=False, soft_wrap=True)
    with Progress(*columns, console=console, disable=not sys.stdout.isatty()) as progress:
        task = progress.add_task("", total=plan.steps)
        for report in children.reports():
            told = len(story.restored)
            stretch = story.add(report)
            if stretch is not None:
                _show_step(progress, task, stretch, plan)
            if report["kind"] == "saved":
                progress.console.print(_stand("checkpoint", report))
            elif len(story.restored) > told == 0:
                progress.console.print(_stand("restored", report))
    return story


def _stand(what: str, report: Report) -> str:
    return f"{what} {CHECKPOINT!r}: step {report['step']}, test loss {report['test_loss']:.6f}"


def _show_step(progress: Progress, task: TaskID, stretch: Pass, plan: Plan) -> None:
    step, loss = stretch.steps[-1] + 1, stretch.losses[-1]
    rates = " / ".join(f"{rate:g}" for rate in stretch.learning_rates[-1])
    line = f"loss {loss:.4f}  lr {rates}"
    progress.update(task, completed=step, description=line)
    every = max(1, plan.epochs // 6) * plan.steps_per_epoch
    if progress.disable and step % every == 0:
        click.echo(f"epoch {step // plan.steps_per_epoch:>3} of {plan.epochs}, step {step:>4}: {line}")


def _check(story: Story, plan: Plan) -> None:
    """InternalError unless the restored job was the saved one, and training on from it repeated the same steps."""
    if len(story.restored) != plan.workers or any(
        report[key] != story.saved[key] for report in story.restored for key in ("step", "fingerprint", "test_loss")
    ):
        raise InternalError(f"the restored job is not the saved one: saved {story.saved}, restored {story.restored}")
    first, second = story.passes
    before = dict(zip(first.steps, first.losses, strict=True))
    if any(before.get(step, loss) != loss for step, loss in zip(second.steps, second.losses, strict=True)):
        raise InternalError("training on from the checkpoint gave other losses than the first time")


def _print_summary(story: Story, plan: Plan, loss: float, seconds: float, picture: Path) -> None:
    from optserve.cli.output import print_pairs

    steps = max(report["steps"] for report in story.done)
    busy = max(report["seconds"] for report in story.done)
    moved = sum(report["bytes"] for report in story.done)
    repeated = sum(step >= plan.save_at for step in story.passes[0].steps)
    rates = list(dict.fromkeys(rates for stretch in story.passes for rates in stretch.learning_rates))
    click.echo()
    print_pairs(
        [
            (
                "restored",
                f"weights and test loss equal the checkpoint's; the {repeated} steps after it gave the same losses again",
            ),
            ("learning rates", "  then  ".join(" / ".join(f"{rate:g}" for rate in group) for group in rates)),
            ("steps/s", f"{steps / busy:.0f}"),
            ("MB/s", f"{moved / busy / 1e6:.1f} pushed and pulled by {plan.workers} workers"),
            ("test loss", f"{loss:.4f}"),
            ("loss curve", picture),
            ("took", f"{seconds:.1f} s"),
        ]
    )
