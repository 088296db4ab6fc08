"""`optserve demo --connect`: one worker of the demo's training on a server that somebody else runs."""

from __future__ import annotations

import click

from optserve.cli.demo import digits, model
from optserve.cli.demo.processes import Report
from optserve.cli.demo.training import Plan, Trainer, attach
from optserve.client import Server, connect
from optserve.wire.errors import JobLostError, JobNotFoundError


def run(address: str, name: str, workers: int, epochs: int, rank: int | None) -> float:
    """Trains from where the job stands to the end of the schedule, whoever made it. Returns the test accuracy."""
    data = digits.load()
    plan = Plan(epochs, workers, data.steps_per_epoch)
    with connect(address) as server:
        while True:
            try:
                weights = _train(server, name, plan, data, rank)
                break
            except (JobLostError, JobNotFoundError) as error:
                click.echo(f"beginning anew: {error}")
    return model.evaluate(weights, data.test_images, data.test_labels)[1]


def _train(server: Server, name: str, plan: Plan, data: digits.Digits, rank: int | None) -> model.Weights:
    job = attach(server, name, plan)
    step = job.info().position.step
    if step >= plan.steps:
        standing = f"step {step}" if step == plan.steps else f"step {step}, more than the {plan.steps} asked for"
        click.echo(f"{name!r} is trained already: {standing}")
        return job.pull()
    with job.join(rank=rank) as worker:
        click.echo(f"joined {name!r} as rank {worker.rank} of {plan.workers}")
        return Trainer(job, worker, plan, data, lambda report: _tell(report, plan)).run()


def _tell(report: Report, plan: Plan) -> None:
    """One line for what a person wants to know of a report."""
    step = report.get("step", 0)
    if report["kind"] in ("joined", "restored"):
        click.echo(f"{report['kind']}: from step {step} of {plan.steps}, test loss {report['test_loss']:.4f}")
    elif report["kind"] == "step" and (step + 1) % plan.steps_per_epoch == 0:
        rates = " / ".join(f"{rate:g}" for rate in report["lr"])
        click.echo(f"epoch {(step + 1) // plan.steps_per_epoch:>3} of {plan.epochs}: loss {report['loss']:.4f}  lr {rates}")
