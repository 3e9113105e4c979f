"""Runs long work as jobs: images and clips, and what makes new weights of the generator, adapting and tuning. One
thread a job, which mostly waits.

Knows nothing of HTTP.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextvars import copy_context
from functools import partial

from generator_service import access, registry
from generator_service.adaptation_run import AdaptationRun
from generator_service.backends.interface import Adaptation, Backend, Progress, WeightSet
from generator_service.batching import Generation
from generator_service.boundary import guard
from generator_service.engine import Engine
from generator_service.image_request import ImageOrder
from generator_service.jobs import JobRecord, JobTable
from generator_service.publications import Publications, is_part
from generator_service.published_models import PublishedModels
from generator_service.real_images import RealImages
from generator_service.results import Recorder
from generator_service.rl.clip_pairs import Source, Stateful
from generator_service.turns import turn
from generator_service.video_request import POLICY, VideoOrder
from generator_service.weights import WeightStore, info
from protocol.errors import InvalidRequest
from protocol.messages import AdaptJob, Message
from protocol.policy import PolicyJob
from protocol.tuning import ASIDE, TuneJob

UNFINISHED = ".unfinished-"  # how folders of jobs begin that are not done; no name of a set begins with a dot
TURN = ".turn-"  # and those of files by which equal jobs take turns
Learning = AdaptJob | TuneJob | PolicyJob
Order = ImageOrder | VideoOrder
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
        rewards: dict[str, str],
        published: PublishedModels,
        clip_rewards: dict[str, str],
        source: Source,
    ):
        """
        Args:
            backend: asked what it can do and depends on; used by the engine alone.
            real: what new weights are learnt from; None: no dataset is mounted.
            classes: of the dataset; empty without one.
            max_unfinished: as in `jobs`, one thread each.
            activate: what to do with weights that are to serve from now on.
            rewards: what a generator can be tuned by: name -> "module:function".
            published: models of trainers, whose features rewards may be of.
            clip_rewards: what a sampling policy can be learnt by, named likewise.
            source: what it is learnt from.
        """
        self._jobs, self._engine, self._backend, self._weights, self._recorder = (
            jobs,
            engine,
            backend,
            weights,
            recorder,
        )
        self._real, self._classes, self._activate = real, classes, activate
        self._rewards, self._published = rewards, published
        self._clip_rewards, self._source = clip_rewards, source
        self._threads = ThreadPoolExecutor(max_unfinished, thread_name_prefix="job")
        for folder in weights.root.glob(f"{UNFINISHED}*"):
            if folder.stat().st_mtime < time.time() - KEPT_S:
                shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        """Wait for the threads; the engine must have stopped, which ends every job."""
        self._threads.shutdown()

    # ------------------------------------------------------------ generation

    def generate(self, order: ImageOrder) -> JobRecord:
        """Raises QueueFull and NotReady."""
        return self._ordered("generate", order, order.sampling.steps, self._recorder.images_response)

    def video(self, order: VideoOrder) -> JobRecord:
        """Raises InvalidRequest, QueueFull and NotReady."""
        return self._ordered("video", order, None, self._recorder.videos_response)

    def _ordered(self, kind: str, order: Order, steps: int | None, respond: Callable[..., Message]) -> JobRecord:
        """`steps`: None: its progress tells. `respond`: makes the result of the order and what was generated."""
        owner = access.current().name
        record = self._jobs.create(kind, steps, owner)
        generation = Generation(order.weights, order.sampling, order.rows, owner=owner, on_step=record.progress)
        record.on_cancel(partial(self._engine.cancel, generation))
        try:
            self._engine.submit(generation)
        except BaseException:
            self._jobs.discard(record)
            raise

        def finish() -> None:
            record.succeed(respond(order, generation.future.result()).model_dump(mode="json"))

        self._threads.submit(copy_context().run, guard, finish, record.fail)
        return record

    # ------------------------------------------------------------ new weights

    def adapt(self, job: AdaptJob) -> JobRecord:
        """Raises InvalidRequest, UnknownWeights, QueueFull and NotReady."""
        self._engine.check_ready()
        base = self._weights.base if job.base is None else self._weights.resolve(job.base)
        if job.method not in self._backend.can.adaptations:
            known = " or ".join(self._backend.can.adaptations) or "its weights as they are"
            raise InvalidRequest(f"this backend is not adapted by {job.method!r}: use {known}", param="method")
        return self._begin(job, base, lambda: registry.load(registry.ADAPTATIONS, job.method))

    def tune(self, job: TuneJob) -> JobRecord:
        """Raises InvalidRequest, UnknownWeights, QueueFull and NotReady."""
        self._engine.check_ready()
        base = self._tuned_base(job)
        if self._backend.name not in registry.POLICIES:
            raise InvalidRequest(f"backend {self._backend.name!r} cannot be tuned by reward", param="type")
        from generator_service.rl.reward_terms import reward_functions  # late: it imports torch

        rewards = reward_functions(job, self._rewards)
        return self._begin(job, base, lambda: partial(_tune(), rewards=rewards, published=self._published))

    def _tuned_base(self, job: TuneJob) -> WeightSet:
        """What it starts from; a job that names no weights, and activated some of its own, goes on from what it began
        with."""
        base = self._weights.resolve(job.base)
        own = base.ref.name == job.name and base.metadata.get("options") == job.model_dump(mode="json", exclude=ASIDE)
        if job.base is None and own and base.base is not None and (is_part(base) or not job.again):
            return base.base
        return base

    def policy(self, job: PolicyJob) -> JobRecord:
        """Raises InvalidRequest, UnknownClass, NoFace, UnknownWeights, QueueFull and NotReady."""
        self._engine.check_ready()
        base = self._weights.resolve(job.base)
        if base.kind == POLICY and base.base is not None:
            base = base.base  # a policy is never learnt on another: what they choose for is the same
        if self._backend.can.makes != "clip" or not isinstance(self._backend, Stateful):
            raise InvalidRequest(
                f"backend {self._backend.name!r} makes no clips that a policy could choose the sampling of",
                param="type",
            )
        self._source.check(job)
        from generator_service.rl.reward_terms import reward_functions  # late: it imports torch

        rewards = reward_functions(job, self._clip_rewards, "generator.clip_rewards")
        learn = partial(_learn_policy(), rewards=rewards, source=self._source)
        return self._begin(job, base, lambda: learn, self._source.digest())

    def _begin(
        self, job: Learning, base: WeightSet, adaptation: Callable[[], Adaptation], beside: str = ""
    ) -> JobRecord:
        """`beside`: what else decides what the job makes."""
        self._weights.check_name(job.name)
        if self._real is None:
            raise InvalidRequest("there are no images to learn from: set generator.dataset.root", param="type")
        record = self._jobs.create(job.type, job.steps, access.current().name)
        learn = partial(self._learn, record, job, base, adaptation, beside)
        self._threads.submit(copy_context().run, guard, learn, record.fail)
        return record

    def _learn(
        self, record: JobRecord, job: Learning, base: WeightSet, adaptation: Callable[[], Adaptation], beside: str
    ) -> None:
        """Equal jobs of all replicas take turns, and one may be enough for all."""
        recipe = self._recipe(job, base, beside)
        cancelled = threading.Event()
        record.on_cancel(cancelled.set)
        with turn(self._weights.root / f"{TURN}{recipe[:16]}", cancelled):  # they share what is unfinished
            made = None if job.again else self._weights.find(job.name, {"recipe": recipe})
            made = made or self._make(record, job, base, recipe, adaptation())
        if job.activate:
            self._activate(made)
        record.succeed(info(made, self._weights.active().ref).model_dump(mode="json"))

    def _recipe(self, job: Learning, base: WeightSet, beside: str) -> str:
        """Hash of all that decides what a job makes: itself, base weights, other models, images and classes."""
        assert self._real is not None
        said = job.model_dump_json(exclude=ASIDE) + base.ref.digest + self._backend.beside_base() + beside
        content = hashlib.sha256("\n".join([said, *self._classes]).encode())
        content.update(self._real.digest().encode())
        content.update(json.dumps(self._real.captions).encode())
        return content.hexdigest()

    def _make(
        self, record: JobRecord, job: Learning, base: WeightSet, recipe: str, adaptation: Adaptation
    ) -> WeightSet:
        real, classes = self._real, self._classes
        assert real is not None
        unfinished = self._weights.root / f"{UNFINISHED}{recipe[:16]}"  # one that is not done finds it again
        activate = self._activate if job.activate else None
        publications = Publications(self._weights, job.name, base, classes, recipe, unfinished, activate)
        with self._weights.staging() as folder:
            run = AdaptationRun(
                base,
                begin=lambda backend: adaptation(backend, base, real, classes, job, folder, unfinished),
                on_progress=partial(_tell, record, publications),
            )
            future = self._engine.adapt(run)
            future.add_done_callback(lambda _: publications.end())
            record.on_cancel(partial(self._engine.cancel_adaptation, run))
            try:
                for weights in publications.published():
                    record.progress(weights.metadata["step"], job.steps, weights=str(weights.ref))
            except BaseException:
                self._engine.cancel_adaptation(run)
                wait([future])  # it uses the folders to its end
                raise
            kind, metadata = future.result()
            metadata = {**metadata, "recipe": recipe}
            made = self._weights.publish(folder, job.name, base, kind, self._classes, metadata)
        shutil.rmtree(unfinished, ignore_errors=True)
        return made


def _tell(record: JobRecord, publications: Publications, progress: Progress) -> None:
    """On the compute thread."""
    if progress.made is not None:
        publications.add(progress.made)
    if progress.loss is not None:
        record.progress(progress.step, progress.steps, loss=progress.loss, **progress.data)
    elif progress.data:
        record.progress(progress.step, progress.steps, **progress.data)


def _tune() -> Adaptation:
    from generator_service.rl.tune import tune  # late: it imports torch and timm

    return tune


def _learn_policy() -> Adaptation:
    from generator_service.rl.policy_job import learn_policy  # late, as above

    return learn_policy
