"""Tuning beside a training: a thread begins the job, follows it, and begins it again when the generator dies.

What goes wrong with it is told and does not stop the training, which goes on with the weights that are served. Knows
neither the trainer nor how tuning is done.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType

from agent.follow import notable
from protocol.client import GeneratorClient
from protocol.errors import GenerationFailed, NotReady, OnTheFlyError, ServiceUnreachable, UnknownJob, from_problem
from protocol.tuning import TuneJob

READY_S = 1.0  # between two looks whether the training is over, while there is no generator, or no model of features


class LiveTuning:
    """A context: within it a generator is tuned. A job that is not done when it is left is cancelled: what it published
    stays, and the same job goes on from its checkpoint when it is begun another time.

    Args:
        client: talks to the generators; may be used by others meanwhile.
        gone: whether there is no generator any more, and will be none.
        say: gets what a user should read.
    """

    def __init__(self, client: GeneratorClient, job: TuneJob, gone: Callable[[], bool], say: Callable[[str], None]):
        self._client, self._job, self._gone, self._say = client, job, gone, say
        self._over = threading.Event()
        self._id: str | None = None
        self._thread = threading.Thread(target=self._persist, name="tuning", daemon=True)

    def __enter__(self) -> LiveTuning:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        self._cancel()
        self._thread.join()

    def _cancel(self) -> None:
        if self._id is not None:
            with suppress(OnTheFlyError):  # it is done, or its service is gone
                self._client.cancel(self._id)

    def _persist(self) -> None:
        """Follow the job to its end, through the deaths of its generator."""
        while not self._over.is_set():
            try:
                self._follow()
                return
            except (ServiceUnreachable, NotReady, UnknownJob) as error:
                again = self._ready()
                if self._over.is_set():
                    return
                self._say(f"the tuning is {'begun again' if again else 'given up'}: {error}")
                if not again:
                    return
            except OnTheFlyError as error:
                if not self._over.is_set():
                    self._say(f"the tuning ended; the training goes on with the weights that are served: {error}")
                return

    def _ready(self) -> bool:
        """Wait for a generator; False when the training is over before, or there is none any more."""
        while not (self._over.is_set() or self._gone()):
            with suppress(ServiceUnreachable, NotReady):
                self._client.wait_ready(READY_S)
                return True
        return False

    def _await_features(self) -> None:
        """The model that gives the features may be that of the training, whose first iteration has to end before."""
        source, _, name = self._job.features.partition(":")
        while source == "published" and not self._over.is_set():
            if name.split("@")[0] in {model.name for model in self._client.published_models().data}:
                return
            self._over.wait(READY_S)

    def _follow(self) -> None:
        """Raises what the job failed with."""
        self._await_features()
        if self._over.is_set():
            return
        self._id = self._client.submit(self._job).id
        if self._over.is_set():
            self._cancel()
        for event in self._client.events(self._id):
            if event.kind == "progress":
                for line in notable(event.data):
                    self._say(f"tuning, {line}")
        job = self._client.job(self._id)
        if job.status != "succeeded":
            raise from_problem(job.problem) if job.problem else GenerationFailed(f"job {job.id} ended as {job.status}")
