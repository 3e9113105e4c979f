"""Runs long work as jobs: image generation, and adaptation of the generator. One thread a job, which mostly waits.

Knows nothing of HTTP.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from functools import partial

from generator_service import access, registry
from generator_service.adaptation_run import AdaptationRun
from generator_service.backends.interface import Backend, WeightSet
from generator_service.batching import Generation
from generator_service.boundary import guard
from generator_service.engine import Engine
from generator_service.image_request import ImageOrder
from generator_service.jobs import JobRecord, JobTable
from generator_service.real_images import RealImages
from generator_service.results import Recorder
from generator_service.weights import WeightStore, info
from protocol.errors import Cancelled, InvalidRequest
from protocol.messages import AdaptJob

UNFINISHED = ".unfinished-"  # how folders of adaptations begin that are not done; no name of a set begins with a dot
KEPT_S = 7 * 24 * 3600.0  # that they wait for somebody to go on with them, since they last changed


class JobRunner:
    def __init__(
        self,
        jobs: JobTable,
        engine: Engine,
        backend: Backend,
        weights: WeightStore,
        recorder: Recorder,
        real: RealImages | None,
        classes: list[str],
        max_unfinished: int,
        activate: Callable[[WeightSet], None],
    ):
        """
        Args:
            backend: asked what it can do and depends on; used by the engine alone.
            real: what adaptations learn from; None: no dataset is mounted.
            classes: of the dataset; empty without one.
            max_unfinished: as in `jobs`, one thread each.
            activate: what to do with weights that are to serve from now on.
        """
        self._jobs, self._engine, self._backend, self._weights, self._recorder = (
            jobs,
            engine,
            backend,
            weights,
            recorder,
        )
        self._real, self._classes, self._activate = real, classes, activate
        self._threads = ThreadPoolExecutor(max_unfinished, thread_name_prefix="job")
        self._turn = threading.Condition()
        self._adapting: set[str] = set()  # recipes
        for folder in weights.root.glob(f"{UNFINISHED}*"):
            if folder.stat().st_mtime < time.time() - KEPT_S:
                shutil.rmtree(folder, ignore_errors=True)

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
        if job.method not in self._backend.can.adaptations:
            raise InvalidRequest(
                f"this backend is not adapted by {job.method!r}: use {' or '.join(self._backend.can.adaptations)}",
                param="method",
            )
        if self._real is None:
            raise InvalidRequest("an adaptation needs images: set generator.dataset.root", param="method")
        record = self._jobs.create("adapt", job.steps, access.current().name)
        self._threads.submit(copy_context().run, guard, partial(self._adapt, record, job, base), record.fail)
        return record

    def _adapt(self, record: JobRecord, job: AdaptJob, base: WeightSet) -> None:
        recipe = self._recipe(job, base)
        with self._only_one(recipe, record):
            made = None if job.again else self._weights.find(job.name, recipe)
            made = made or self._make(record, job, base, recipe)
        if job.activate:
            self._activate(made)
        record.succeed(info(made, self._weights.active().ref).model_dump(mode="json"))

    @contextmanager
    def _only_one(self, recipe: str, record: JobRecord) -> Iterator[None]:
        """Equal adaptations run one after another: they share what is unfinished, and one may be enough for all.

        Raises Cancelled when that was asked for while others ran.
        """
        cancelled = threading.Event()

        def cancel() -> None:
            cancelled.set()
            with self._turn:
                self._turn.notify_all()

        record.on_cancel(cancel)
        with self._turn:
            self._turn.wait_for(lambda: recipe not in self._adapting or cancelled.is_set())
            if cancelled.is_set():
                raise Cancelled("cancelled: ask again if you still want it")
            self._adapting.add(recipe)
        try:
            yield
        finally:
            with self._turn:
                self._adapting.remove(recipe)
                self._turn.notify_all()

    def _recipe(self, job: AdaptJob, base: WeightSet) -> str:
        """Hash of all that decides what an adaptation makes: job, base weights, other models, images and classes."""
        assert self._real is not None
        said = (
            job.model_dump_json(exclude={"name", "again", "activate"}) + base.ref.digest + self._backend.beside_base()
        )
        content = hashlib.sha256("\n".join([said, *self._classes]).encode())
        content.update(self._real.digest().encode())
        content.update(json.dumps(self._real.captions).encode())
        return content.hexdigest()

    def _make(self, record: JobRecord, job: AdaptJob, base: WeightSet, recipe: str) -> WeightSet:
        assert self._real is not None
        adaptation = registry.load(registry.ADAPTATIONS, job.method)
        unfinished = self._weights.root / f"{UNFINISHED}{recipe[:16]}"  # one that is not done finds it again
        with self._weights.staging() as folder:
            run = AdaptationRun(
                base,
                begin=lambda backend: adaptation(backend, base, self._real, self._classes, job, folder, unfinished),
                on_progress=lambda progress: record.progress(progress.step, progress.steps, loss=progress.loss),
            )
            future = self._engine.adapt(run)
            record.on_cancel(partial(self._engine.cancel_adaptation, run))
            kind, metadata = future.result()
            metadata = {**metadata, "recipe": recipe}
            made = self._weights.publish(folder, job.name, base, kind, self._classes, metadata)
        shutil.rmtree(unfinished, ignore_errors=True)
        return made
