"""The service put together: engine, stores, job runner, feedback desk and queue workers, from one settings table.

Starting returns at once; what needs the model is there when `engine.ready` is done. Knows nothing of HTTP.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
from dataclasses import dataclass
from functools import partial

from agent.captions import Perturber
from agent.settings import AgentConfig
from generator_service import image_request, real_images, registry
from generator_service.backends.interface import Backend, WeightSet
from generator_service.engine import Engine
from generator_service.expressions import Expressions
from generator_service.feedback import FeedbackDesk
from generator_service.feedback_quota import FeedbackQuota
from generator_service.image_request import ImageOrder
from generator_service.job_runner import JobRunner
from generator_service.jobs import JobTable
from generator_service.metrics.nearest import NearestReal
from generator_service.perturbation import perturber
from generator_service.published_models import PublishedModels
from generator_service.queue_worker import QueueWorkers
from generator_service.real_images import RealImages
from generator_service.replica import Membership
from generator_service.results import Recorder
from generator_service.rl.clip_pairs import Source
from generator_service.samples import SampleStore
from generator_service.settings import GeneratorConfig
from generator_service.telemetry import Telemetry
from generator_service.video_request import VideoOrder, order_video
from generator_service.weights import WeightStore
from protocol.broker import EMBEDDED
from protocol.bus import Bus, QueueConfig
from protocol.bus_audit import unanswered
from protocol.config import section
from protocol.dataset import Dataset
from protocol.errors import BrokerUnavailable, ConfigError, OnTheFlyError, Retryable
from protocol.messages import ImageGenerationRequest
from protocol.video import VideoGenerationRequest

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """What exists once the model does."""

    backend: Backend
    weights: WeightStore
    recorder: Recorder
    runner: JobRunner
    desk: FeedbackDesk
    perturber: Perturber
    expressions: Expressions | None  # None: the backend makes images
    dataset: Dataset | None  # None: not mounted


class Service:
    """One replica."""

    def __init__(self, config: GeneratorConfig, agent: AgentConfig, queue: QueueConfig):
        """A broker URL of "embedded" means none: an embedded broker belongs to the process that started it."""
        self.config = config
        self.jobs = JobTable(
            config.max_jobs,
            config.max_unfinished_jobs,
            max_own=config.limits.unfinished_jobs,
            max_result_bytes=config.limits.job_results_bytes,
        )
        self.samples = SampleStore(config.samples_dir, config.max_samples, config.max_image_bytes)
        self.published = PublishedModels(config.weights_dir / ".published")
        self.telemetry = Telemetry()
        self.engine = Engine(
            self._load,
            lambda weights: self.loaded.weights.verify(weights),
            self.telemetry,
            max_batch=config.max_batch,
            window_s=config.batch_window_ms / 1000,
            max_waiting_rows=config.max_waiting_rows,
            max_own_rows=config.limits.waiting_images,
        )
        self._agent, self._queue = agent, queue
        url = queue.resolved_url()
        self._broker_url = None if url == EMBEDDED else url
        self._bus = Bus(self._broker_url, queue, patient=False) if self._broker_url else None
        board = self._bus.board if self._bus is not None else None
        self._quota = FeedbackQuota(config.limits.feedback_units, partial(unanswered, url))
        self._name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(2)}"
        self.membership = Membership(self._name, board, self.engine, self.telemetry)
        self._loaded: Loaded | None = None
        self._workers: QueueWorkers | None = None
        self._lifecycle = threading.Lock()
        self._stopped = False

    # ------------------------------------------------------------ lifecycle

    def start(self) -> None:
        """Load the model on the compute thread, then serve requests and the queue."""
        self.engine.ready.add_done_callback(lambda ready: None if ready.exception() else self._serve_queue())
        self.engine.start()
        self.membership.start()

    def stop(self) -> None:
        """Finish the current batch, release leases, end every job. Safe to call twice."""
        with self._lifecycle:
            if self._stopped:
                return
            self._stopped = True
            self.membership.stopping()
            if self._workers is not None:
                self._workers.ask_to_stop()
            if self._loaded is not None:
                self._loaded.perturber.close()  # nobody waits for a language model any more
            if self._loaded is not None and self._loaded.expressions is not None:
                self._loaded.expressions.composer.close()
            self.engine.stop()
            if self._workers is not None:  # made meanwhile, when the model was still loading
                self._workers.ask_to_stop()
                self._workers.join()
            if self._loaded is not None:
                self._loaded.runner.close()
            self.membership.leave()
            if self._bus is not None:
                self._bus.close()

    def _load(self) -> tuple[Backend, WeightSet]:
        """Build everything that needs the model. Runs on the compute thread, the first to import torch."""
        config = self.config
        dataset = Dataset.open(config.dataset) if config.dataset is not None else None  # wrong data fail fast
        if config.threads is not None:
            import torch

            torch.set_num_threads(config.threads)
        backend = self._open_backend()
        weights = WeightStore(config.weights_dir, backend.folder, backend.name, backend.classes)
        frames = real_images.FRAMES if backend.can.makes == "clip" else None
        real = RealImages.read(dataset, backend.native_size(), frames) if dataset is not None else None
        nearest = NearestReal(real.images, real.ids) if real is not None else None
        recorder = Recorder(self.samples, nearest, config.near_copy_distance, self.telemetry, backend.can.blackens)
        perturb = perturber(self._agent, self.telemetry.captions)
        expressions = self._open_expressions(backend, dataset)
        self._loaded = Loaded(
            backend,
            weights,
            recorder,
            self._runner(backend, weights, recorder, real, dataset, expressions),
            FeedbackDesk(
                self._bus,
                self._agent,
                weights,
                dataset,
                backend.can.conditioning == "text",
                backend.native_size(),
                config.images.max_pixels,
                self._quota,
                expressions,
            ),
            perturb,
            expressions,
            dataset,
        )
        self.membership.loaded(weights)
        if self._broker_url is not None:
            self._workers = self._readers(self._loaded)
        return backend, weights.active()

    def _runner(
        self,
        backend: Backend,
        weights: WeightStore,
        recorder: Recorder,
        real: RealImages | None,
        dataset: Dataset | None,
        expressions: Expressions | None,
    ) -> JobRunner:
        config = self.config
        return JobRunner(
            self.jobs,
            self.engine,
            backend,
            weights,
            recorder,
            real,
            dataset.classes if dataset is not None else (),
            config.max_unfinished_jobs,
            self.membership.activate,
            registry.REWARDS | config.rewards,
            self.published,
            registry.CLIP_REWARDS | config.clip_rewards,
            Source(dataset, expressions, self._agent.expressions, config.faces, self._agent.negative_prompt),
        )

    def _readers(self, loaded: Loaded) -> QueueWorkers:
        return QueueWorkers(
            self._connect,
            self.engine,
            loaded.weights,
            loaded.dataset,
            loaded.recorder,
            self.telemetry,
            loaded.perturber,
            loaded.expressions.composer if loaded.expressions is not None else None,
            name=self._name,
            threads=self.config.queue_threads,
            deterministic=self.config.deterministic,
        )

    def _open_backend(self) -> Backend:
        config = self.config
        kind, settings = registry.backend(config.backend)
        table = f"generator.{config.backend}"
        backend = kind(section({table: config.backends.get(config.backend, {})}, table, settings))
        table, defaults = ("videos", config.videos) if backend.can.makes == "clip" else ("images", config.images)
        _check_schedulers(backend, {"agent": self._agent.scheduler, f"generator.{table}": defaults.scheduler})
        return backend

    def _open_expressions(self, backend: Backend, dataset: Dataset | None) -> Expressions | None:
        if backend.can.makes == "image":
            return None
        return Expressions.open(
            self._agent.expressions, self.config.faces, dataset, backend, self.telemetry.expressions
        )

    def _serve_queue(self) -> None:
        if self._stopped:
            return
        if self._workers is None:
            log.info("no broker: serving HTTP only, feedback is refused")
        else:
            self._workers.start()

    def _connect(self) -> Bus:
        assert self._broker_url is not None
        return Bus(self._broker_url, self._queue)

    # ------------------------------------------------------------ asked by the routes

    @property
    def loaded(self) -> Loaded:
        """Raises NotReady while the model loads, or when it could not be."""
        if self._loaded is None:
            self.engine.check_ready()
        assert self._loaded is not None
        return self._loaded

    @property
    def bus(self) -> Bus:
        """The queue, for callers that somebody waits for. Raises BrokerUnavailable when there is no broker."""
        if self._bus is None:
            raise BrokerUnavailable("this service has no broker: set broker.url to the one the trainer uses")
        return self._bus

    def order(self, request: ImageGenerationRequest, base_url: str = "") -> ImageOrder:
        """A request checked against the weights it names; links in its reply begin with `base_url`. Raises what
        `image_request.order` does, UnknownWeights and NotReady."""
        self.engine.check_ready()
        loaded = self.loaded
        weights = loaded.weights.resolve(request.model)
        return image_request.order(request, weights, loaded.backend, self.config.images, base_url)

    def order_video(self, request: VideoGenerationRequest, base_url: str = "") -> VideoOrder:
        """As `order`, for clips; raises what `video_request.order_video` does besides."""
        self.engine.check_ready()
        loaded = self.loaded
        weights = loaded.weights.resolve(request.model)
        return order_video(request, weights, loaded.backend, self.config.videos, base_url)

    def metrics(self) -> bytes:
        """The Prometheus page; without broker depths when the broker is away."""
        depths: dict[str, int] | None = {}
        if self._bus is not None:
            try:
                depths = self._bus.depths()
            except Retryable:
                depths = None
        try:
            active = self._loaded.weights.active().ref if self._loaded is not None else None
        except OnTheFlyError as error:
            active = None
            log.warning("no active weights in this scrape: %s", error)
        return self.telemetry.scrape(self.engine.waiting_rows(), depths, active)


def _check_schedulers(backend: Backend, named: dict[str, str]) -> None:
    """Raises ConfigError when a table names a sampler that the backend lacks."""
    for table, name in named.items():
        if name not in backend.can.schedulers:
            raise ConfigError(
                f"{table}.scheduler = {name!r}: backend {backend.name!r} has {', '.join(backend.can.schedulers)}",
                param=f"{table}.scheduler",
            )
