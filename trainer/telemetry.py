"""Prometheus metrics of one run, on a page of the trainer's own. Knows nothing of who scrapes them.

What is so now is read off the run at each scrape; what happened is heard from its journal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, ProcessCollector, start_http_server

from protocol.errors import ConfigError
from trainer.run import Run
from trainer.summary import headline_of

LOSSES = {"real": "loss_real", "synthetic": "loss_synthetic"}
ACCURACIES = {"train": "train_top1", "test": "test_top1", "synthetic": "synthetic_top1"}


class Telemetry:
    """The metrics of a run; `hear` is a listener of its journal."""

    def __init__(self, run: Run):
        registry = self.registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._run = run
        self._newest_answer: int | None = None  # feedback

        def gauge(name: str, help: str, *labels: str) -> Gauge:
            return Gauge(f"onthefly_trainer_{name}", help, ("run", *labels), registry=registry)

        def counter(name: str, help: str, *labels: str) -> Counter:
            return Counter(f"onthefly_trainer_{name}", help, ("run", *labels), registry=registry)

        for name, help, value in (
            ("iteration", "Iteration in work, from 0.", lambda: run.at.iteration),
            ("iterations", "Iterations of the run.", lambda: run.config.iterations),
            ("updates", "Optimiser updates done.", lambda: run.at.updates),
            ("unused_samples", "Samples that have come and no iteration took yet.", lambda: run.pool.unused),
            ("stale_samples", "Samples dropped for coming too late.", lambda: run.pool.stale),
            ("answer_lag_iterations", "Iterations that the newest answer is behind the one in work.", self._lag),
        ):
            gauge(name, help).labels(run.config.run).set_function(value)
        self._loss = gauge("loss", "Mean loss of the latest iteration's rows.", "rows")
        self._accuracy = gauge("accuracy", "Top-1 accuracy after the latest iteration.", "split")
        self._score = gauge("score", "The task's main figure after the latest iteration.", "figure")
        self._peer_up = gauge("peer_up", "0 while an outage of the peer lasts.", "peer")
        for peer in ("generator service", "broker"):
            self._peer_up.labels(run.config.run, peer).set(1)
        self._phases = counter("phase_seconds", "Time spent in each phase of the iterations.", "phase")
        self._samples = counter("samples", "Synthetic samples, by what became of them.", "fate")
        self._events = counter("events", "Events, as in events.jsonl.", "event")

    def hear(self, file: str, row: Mapping[str, Any]) -> None:
        """A line of the journal."""
        run = self._run.config.run
        if file == "metrics.jsonl":
            for gauge, fields in ((self._loss, LOSSES), (self._accuracy, ACCURACIES)):
                for label, field in fields.items():
                    if row.get(field) is not None:
                        gauge.labels(run, label).set(row[field])
            headline = headline_of(row)
            if headline is not None:
                self._score.labels(run, headline).set(row[headline])
        elif file == "selection.jsonl":
            self._samples.labels(run, row["fate"]).inc()
        elif file == "events.jsonl":
            self._events.labels(run, row["event"]).inc()
            if row["event"] in ("outage", "recovery"):
                self._peer_up.labels(run, row["peer"].removeprefix("the ")).set(row["event"] == "recovery")
        elif row["who"] == "trainer":  # trace.jsonl
            self._phases.labels(run, row["what"]).inc(row["end"] - row["start"])
        else:
            self._newest_answer = max(row["feedback"], self._newest_answer or 0)

    def _lag(self) -> float:
        """NaN until an answer has come."""
        return float("nan") if self._newest_answer is None else self._run.at.iteration - self._newest_answer


@contextmanager
def served(run: Run) -> Iterator[Telemetry]:
    """The metrics of a run, on `http://{metrics_host}:{metrics_port}/metrics` within the block.

    Raises:
        ConfigError: the port is taken, or the host is not this machine's.
    """
    telemetry = Telemetry(run)
    host, port = run.config.metrics_host, run.config.metrics_port
    try:
        server, thread = start_http_server(port, host, telemetry.registry)
    except OSError as error:
        raise ConfigError(
            f"cannot serve metrics on {host}:{port} ({error.strerror}): choose another trainer.metrics_port, or 0",
            param="trainer.metrics_port",
        ) from error
    run.journal.listeners.append(telemetry.hear)
    try:
        yield telemetry
    finally:
        run.journal.listeners.remove(telemetry.hear)
        server.shutdown()
        server.server_close()
        thread.join()
