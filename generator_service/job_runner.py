"""Runs long work as jobs: image generation, and adaptation of the generator. One thread a job, which mostly waits.

Knows nothing of HTTP.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial

import numpy as np

from generator_service import access, registry
from generator_service.adaptation_run import AdaptationRun
from generator_service.backends.interface import WeightSet
from generator_service.batching import Generation
from generator_service.boundary import guard
from generator_service.engine import Engine
from generator_service.image_request import ImageOrder
from generator_service.jobs import JobRecord, JobTable
from generator_service.real_images import RealImages
from generator_service.results import Recorder
from generator_service.weights import WeightStore, info
from protocol.errors import InvalidRequest
from protocol.messages import AdaptJob


class JobRunner:
    def __init__(
        self,
        jobs: JobTable,
        engine: Engine,
        weights: WeightStore,
        recorder: Recorder,
        real: RealImages | None,
        classes: list[str],
        max_unfinished: int,
        activate: Callable[[WeightSet], None],
    ):
        """
        Args:
            real: what adaptations learn from; None: no dataset is mounted.
            classes: of the dataset; empty without one.
            max_unfinished: as in `jobs`, one thread each.
            activate: what to do with weights that are to serve from now on.
        """
        self._jobs, self._engine, self._weights, self._recorder = jobs, engine, weights, recorder
        self._real, self._classes, self._activate = real, classes, activate
        self._threads = ThreadPoolExecutor(max_unfinished, thread_name_prefix="job")

    def close(self) -> None:
        """Wait for the threads; the engine must have stopped, which ends every job."""
        self._threads.shutdown()

    # ------------------------------------------------------------ generation

    def generate(self, order: ImageOrder) -> JobRecord:
        """Raises QueueFull and NotReady."""
        owner = access.current().name
        record = self._jobs.create("generate", order.sampling.steps, owner)
        generation = Generation(order.weights, order.sampling, order.rows, owner=owner, on_step=record.progress)
        record.on_cancel(partial(self._engine.cancel, generation))
        try:
            self._engine.submit(generation)
        except BaseException:
            self._jobs.discard(record)
            raise
        finish = partial(self._finish_generation, record, order, generation)
        self._threads.submit(copy_context().run, guard, finish, record.fail)
        return record

    def _finish_generation(self, record: JobRecord, order: ImageOrder, generation: Generation) -> None:
        response = self._recorder.images_response(order, generation.future.result())
        record.succeed(response.model_dump(mode="json"))

    # ------------------------------------------------------------ adaptation

    def adapt(self, job: AdaptJob) -> JobRecord:
        """Raises InvalidRequest, UnknownWeights, QueueFull and NotReady."""
        self._engine.check_ready()
        base = self._weights.base if job.base is None else self._weights.resolve(job.base)
        self._weights.check_name(job.name)
        if self._real is None:
            raise InvalidRequest("an adaptation needs images: set generator.dataset.root", param="method")
        record = self._jobs.create("adapt", job.steps, access.current().name)
        self._threads.submit(copy_context().run, guard, partial(self._adapt, record, job, base), record.fail)
        return record

    def _adapt(self, record: JobRecord, job: AdaptJob, base: WeightSet) -> None:
        recipe = self._recipe(job, base)
        made = None if job.again else self._weights.find(job.name, recipe)
        made = made or self._make(record, job, base, recipe)
        if job.activate:
            self._activate(made)
        record.succeed(info(made, self._weights.active().ref).model_dump(mode="json"))

    def _recipe(self, job: AdaptJob, base: WeightSet) -> str:
        """Hash of all that decides what an adaptation makes: job, base weights, images and classes."""
        assert self._real is not None
        said = job.model_dump_json(exclude={"name", "again", "activate"}) + base.ref.digest + "\n".join(self._classes)
        content = hashlib.sha256(said.encode())
        content.update(np.ascontiguousarray(self._real.images).data)
        content.update(np.ascontiguousarray(self._real.labels).data)
        return content.hexdigest()

    def _make(self, record: JobRecord, job: AdaptJob, base: WeightSet, recipe: str) -> WeightSet:
        assert self._real is not None
        adaptation = registry.load(registry.ADAPTATIONS, job.method)
        with self._weights.staging() as folder:
            run = AdaptationRun(
                base,
                begin=lambda backend: adaptation(
                    backend, base, self._real.images, self._real.labels, self._classes, job, folder
                ),
                on_progress=lambda progress: record.progress(progress.step, progress.steps, loss=progress.loss),
            )
            future = self._engine.adapt(run)
            record.on_cancel(partial(self._engine.cancel_adaptation, run))
            kind, metadata = future.result()
            return self._weights.publish(folder, job.name, base, kind, self._classes, {**metadata, "recipe": recipe})
