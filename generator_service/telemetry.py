"""Prometheus metrics of one service, in a registry of its own. Knows nothing of who scrapes them.

Labels have few values each: no runs, units or samples. Those are in the log lines; a run's trainer has its own page.
"""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector, generate_latest

from generator_service.batching import Batch
from protocol import tracing
from protocol.messages import WeightsRef

FAST = [0.001 * 4**i for i in range(9)]  # seconds: 1 ms to 65 s
SLOW = [0.01 * 2**i for i in range(16)]  # seconds: 10 ms to 5.5 min


class Telemetry:
    """What happened so far, and how deep the queues are now. Thread-safe."""

    def __init__(self) -> None:
        self.images, self.busy_s = 0, 0.0  # made, and seconds of denoising, since the start
        registry = self._registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        build = Info("onthefly_build", "What runs here.", registry=registry)
        build.info({"version": _version(), "python": platform.python_version()})

        def counter(name: str, help: str, *labels: str) -> Counter:
            return Counter(f"onthefly_{name}", help, labels, registry=registry)

        def gauge(name: str, help: str, *labels: str) -> Gauge:
            return Gauge(f"onthefly_{name}", help, labels, registry=registry)

        def histogram(name: str, help: str, buckets: list[float], *labels: str) -> Histogram:
            return Histogram(f"onthefly_{name}", help, labels, buckets=buckets, registry=registry)

        self._requests = counter("requests", "HTTP requests answered.", "method", "route", "status")
        self._took = histogram("request_seconds", "From request to the reply's end.", FAST, "method", "route")
        self._images = counter("images", "Images generated.")
        self._batch_rows = histogram("batch_rows", "Rows in a GPU batch.", [2**i for i in range(11)])
        self._denoise = histogram("denoise_seconds", "Denoising time of a batch.", SLOW)
        self._wait = histogram("wait_seconds", "Wait for the GPU, before the first row is denoised.", SLOW, "lane")
        self._waiting = gauge("waiting_rows", "Rows waiting for the GPU.", "lane")
        self._near_copies = counter("near_copies", "Images that nearly are a real one.")
        self._captions = counter("captions", "Versions of captions, by who made them.", "by")
        self._captions_refused = counter("captions_refused", "Versions that a language model made in vain.", "reason")
        self._prompts = counter("prompts", "Prompts composed from action units, by who made them.", "by")
        self._prompt_answers = counter(
            "prompt_answers", "Answers of a vision-language model, all of them and those that were no good.", "which"
        )
        self._units = counter("units", "Work units that this replica is done with.", "outcome")
        self._taken_over = counter("units_taken_over", "Work units claimed that had been delivered before.")
        self._queued = histogram("unit_queued_seconds", "Time of a claimed work unit on the broker's stream.", SLOW)
        self._publish = histogram("publish_seconds", "From a unit's images to its published batch.", FAST)
        self._broker = gauge("broker_up", "0 while the broker does not answer.")
        self._depth = gauge("broker_entries", "Entries of a broker stream.", "stream")
        self._weights = Info("onthefly_active_weights", "The active weight set.", registry=registry)
        self._activations = counter("activations", "Times that other weights became active.")
        self._loss = gauge("adaptation_loss", "Loss of the latest optimiser step.")
        self._steps = counter("adaptation_steps", "Optimiser steps done.")

    # ------------------------------------------------------------ requests

    def request_done(self, method: str, route: str, status: int) -> None:
        """A reply has begun, or there will be none."""
        self._requests.labels(method, route, str(status)).inc()

    def request_took(self, method: str, route: str, seconds: float) -> None:
        """A reply has ended."""
        self._took.labels(method, route).observe(seconds)

    # ------------------------------------------------------------ the engine's work

    def batch_done(self, batch: Batch, started: float, finished: float) -> None:
        """Rows were denoised; unix seconds."""
        rows, seconds = len(batch.rows), finished - started
        self.images, self.busy_s = self.images + rows, self.busy_s + seconds
        self._images.inc(rows)
        self._batch_rows.observe(rows)
        self._denoise.observe(seconds)
        for generation, part in batch.parts:
            if part.start == 0:
                self._wait.labels(generation.lane).observe(batch.taken - generation.arrived)
        origins = [generation.origin for generation in batch.generations]
        tracing.record("batch", started, finished, links=origins, rows=rows, weights=batch.generations[0].weights.ref)

    def adaptation_step(self, loss: float) -> None:
        self._loss.set(loss)
        self._steps.inc()

    def activated(self) -> None:
        self._activations.inc()

    def near_copies(self, images: int) -> None:
        self._near_copies.inc(images)

    def captions(self, what: str, how_many: int) -> None:
        """As `agent.captions.Count`."""
        if what in ("model", "template", "cache"):
            self._captions.labels(what).inc(how_many)
        else:
            self._captions_refused.labels(what).inc(how_many)

    def expressions(self, what: str, how_many: int) -> None:
        """As `agent.expressions.vision.Count`."""
        if what in ("model", "template", "cache"):
            self._prompts.labels(what).inc(how_many)
        else:
            self._prompt_answers.labels(what).inc(how_many)

    # ------------------------------------------------------------ work units

    def unit_claimed(self, queued_s: float, deliveries: int) -> None:
        """`deliveries` of the unit, this one included."""
        self._queued.observe(queued_s)
        if deliveries > 1:
            self._taken_over.inc()

    def unit_published(self, seconds: float) -> None:
        """Its answer took so long from its images on."""
        self._publish.observe(seconds)

    def unit_ended(self, outcome: str) -> None:
        """`outcome`: published, superseded (another delivery was first), failed, released or lease_lost."""
        self._units.labels(outcome).inc()

    # ------------------------------------------------------------ scrapes

    def scrape(self, waiting: dict[str, int], depths: dict[str, int] | None, active: WeightsRef | None) -> bytes:
        """The metrics page.

        Args:
            waiting: rows in each lane of the engine.
            depths: entries in each broker stream; empty when there is no broker; None: it does not answer.
            active: None while the model loads.
        """
        for lane, rows in waiting.items():
            self._waiting.labels(lane).set(rows)
        self._depth.clear()
        for stream, entries in (depths or {}).items():
            self._depth.labels(stream).set(entries)
        self._broker.set(depths is not None)
        if active is not None:
            self._weights.info({"name": active.name, "version": str(active.version), "digest": active.digest})
        return generate_latest(self._registry)


def _version() -> str:
    try:
        return version("onthefly")
    except PackageNotFoundError:
        return "not installed"
