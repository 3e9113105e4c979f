"""A job of the generator service, followed on a terminal. Knows nothing of what the job does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from protocol.client import GeneratorClient
from protocol.errors import GenerationFailed, from_problem
from protocol.messages import Job, JobRequest

console = Console(stderr=True)


def follow(client: GeneratorClient, request: JobRequest) -> Job:
    """Submit a job, show its progress, and return it when it has succeeded.

    Raises:
        the error that the job failed with.
    """
    job = client.submit(request)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(job.type, total=None)
        try:
            for event in client.events(job.id):
                if event.kind == "progress":
                    said = {"completed": event.data["step"], "total": event.data["steps"]}
                    bar.update(task, description=_described(job.type, event.data), **said)
                    for line in notable(event.data):
                        console.print(line)
        except KeyboardInterrupt:
            client.cancel(job.id)
            raise
    job = client.job(job.id)
    if job.status != "succeeded":
        raise from_problem(job.problem) if job.problem else GenerationFailed(f"job {job.id} ended as {job.status}")
    return job


def _described(kind: str, data: Mapping[str, Any]) -> str:
    """How far a job is, beside its bar."""
    if data.get("loss") is None:
        return f"{kind}, {data['clips']} clips made" if "clips" in data else kind
    if "entropy" in data:
        return f"{kind}, reward {data['reward']:.4f}, entropy {data['entropy']:.2f}"
    if "total" in data:
        return f"{kind}, reward {data['total']:.4f}, KL {data['kl']:.2g}"
    return f"{kind}, loss {data['loss']:.4f}"


def notable(data: Mapping[str, Any]) -> Iterator[str]:
    """What is said on lines of its own, to stay on the screen."""
    yield from (f"step {data['step']}: {finding['message']}" for finding in data.get("findings", ()))
    if measured := data.get("validation"):
        told = ", ".join(f"{name} {_mean(measured[name])}" for name in ("learned", "fixed", "random", "oracle"))
        yield f"step {data['step']}: reward in {measured['states']} held-out states: {told}"
    if weights := data.get("weights"):
        yield f"step {data['step']}: weights {weights}"


def _mean(measured: Mapping[str, Any]) -> str:
    """With its standard error, where it has one."""
    return f"{measured['mean']:.3f}" + ("" if measured["error"] is None else f" +- {measured['error']:.3f}")
