"""Prometheus metrics of one service, in a registry of its own. Knows nothing of who scrapes them."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest

from protocol.messages import WeightsRef


class Telemetry:
    """What happened so far, and how deep the queues are now. Thread-safe."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self._requests = Counter(
            "onthefly_requests", "HTTP requests answered.", ("method", "route", "status"), registry=registry
        )
        self._images = Counter("onthefly_images", "Images generated.", registry=registry)
        self._batch_rows = Histogram(
            "onthefly_batch_rows", "Rows in a GPU batch.", buckets=[2**i for i in range(11)], registry=registry
        )
        self._denoise = Histogram(
            "onthefly_denoise_seconds",
            "Denoising time of a batch.",
            buckets=[0.01 * 2**i for i in range(16)],
            registry=registry,
        )
        self._waiting = Gauge("onthefly_waiting_rows", "Rows waiting for the GPU.", ("lane",), registry=registry)
        self._depth = Gauge("onthefly_broker_entries", "Entries of a broker stream.", ("stream",), registry=registry)
        self._weights = Info("onthefly_active_weights", "The active weight set.", registry=registry)
        self._loss = Gauge("onthefly_adaptation_loss", "Loss of the latest optimiser step.", registry=registry)
        self._steps = Counter("onthefly_adaptation_steps", "Optimiser steps done.", registry=registry)

    def request_done(self, method: str, route: str, status: int) -> None:
        self._requests.labels(method, route, str(status)).inc()

    def batch_done(self, rows: int, seconds: float) -> None:
        self._images.inc(rows)
        self._batch_rows.observe(rows)
        self._denoise.observe(seconds)

    def adaptation_step(self, loss: float) -> None:
        self._loss.set(loss)
        self._steps.inc()

    def scrape(self, waiting: dict[str, int], depths: dict[str, int], active: WeightsRef | None) -> bytes:
        """The metrics page.

        Args:
            waiting: rows in each lane of the engine.
            depths: entries in each broker stream; empty when there is no broker.
            active: None while the model loads.
        """
        for lane, rows in waiting.items():
            self._waiting.labels(lane).set(rows)
        self._depth.clear()
        for stream, entries in depths.items():
            self._depth.labels(stream).set(entries)
        if active is not None:
            self._weights.info({"name": active.name, "version": str(active.version), "digest": active.digest})
        return generate_latest(self._registry)
