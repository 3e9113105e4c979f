"""The generator service over HTTP, synchronously; `client_async` is the same for asyncio.

Answers are the messages of `messages`; problems are raised as the errors of `errors`, as if the service were in this
process, and a service that gives no answer as ServiceUnreachable. What is asked and how answers read is in
`client_calls`; this module only carries it. Finished samples of a feedback do not come here but over `bus`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import httpx

from protocol import client_calls as calls
from protocol import client_uploads as uploads
from protocol.client_calls import Call, EventStream, Readiness
from protocol.client_http import (
    DEADLINE_S,
    RETRIES,
    TIMEOUT_S,
    Attempts,
    Replicas,
    events_timeout,
    may_go_elsewhere,
    options,
)
from protocol.entries import Sample
from protocol.errors import NotReady, Retryable, ServiceUnreachable
from protocol.messages import (
    Feedback,
    FeedbackAccepted,
    ImageGenerationRequest,
    ImagesResponse,
    Job,
    JobEvent,
    JobList,
    JobRequest,
    Message,
    WeightsInfo,
    WeightsList,
)
from protocol.operations import DeadLetterList, DeadLetterOutcome
from protocol.published import PublishedModel, PublishedModelList

Answer = TypeVar("Answer", bound=Message | bytes)


class GeneratorClient:
    """Client for one service, of one replica or several: when one gives no answer or is not ready, the next is asked.
    A job is asked after where it was begun; samples are known to the replica that made them only. A context manager;
    may be shared by threads.

    What fails and may pass (no connection, 429, 502, 503, 504) is asked again, after pauses that grow, are random, and
    are at least what Retry-After says. A POST takes an idempotency key of its own along, so that it is done once; a
    DELETE is repeated only if it was not done. The last error is raised, as it would be without retries.
    """

    def __init__(
        self,
        base_url: str | Sequence[str],
        *,
        api_key: str | None = None,
        timeout: float = TIMEOUT_S,
        retries: int = RETRIES,
        deadline: float = DEADLINE_S,
        transport: httpx.BaseTransport | None = None,
    ):
        """
        Args:
            base_url: http://host:port, or several.
            api_key: sent as a bearer token; None: none.
            timeout: seconds for one answer.
            retries: attempts after the first one; 0: none, and no idempotency keys but those that are given.
            deadline: seconds for one call with all its attempts.
            transport: replaces the network in tests.

        Raises:
            ConfigError: an address that is no URL, or a key that no header can carry.
        """
        self._retries, self._deadline = retries, deadline
        self._replicas = Replicas(base_url)
        self._https = [
            httpx.Client(**options(url, api_key, timeout), transport=transport) for url in self._replicas.urls
        ]

    def __enter__(self) -> GeneratorClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        for http in self._https:
            http.close()

    @property
    def base_url(self) -> str:
        """Of the replica that answered last."""
        return self._replicas.urls[self._replicas.first]

    def generate(self, request: ImageGenerationRequest, idempotency_key: str | None = None) -> ImagesResponse:
        return self._send(calls.generate(request, idempotency_key))

    def feedback(self, feedback: Feedback, idempotency_key: str | None = None) -> FeedbackAccepted:
        return self._send(calls.feedback(feedback, idempotency_key))

    def submit(self, request: JobRequest, idempotency_key: str | None = None) -> Job:
        return self._send(calls.submit(request, idempotency_key))

    def job(self, job_id: str) -> Job:
        return self._send(calls.job(job_id))

    def jobs(self) -> JobList:
        return self._send(calls.jobs())

    def cancel(self, job_id: str) -> Job:
        return self._send(calls.cancel(job_id))

    def weights(self) -> WeightsList:
        return self._send(calls.weights())

    def activate(self, name: str, version: int | None = None) -> WeightsInfo:
        """Make a weight set the active one; None: its newest version."""
        return self._send(calls.activate(name, version))

    def publish_model(self, name: str, model: bytes | str | Path, idempotency_key: str | None = None) -> PublishedModel:
        """Make safetensors, or a file of them, the next version of a published model; the same bytes again change
        nothing. Raises BadFile, and InvalidRequest: they do not fit the timm model that they name."""
        return self._send(uploads.publish_model(name, model, idempotency_key))

    def published_models(self) -> PublishedModelList:
        return self._send(uploads.published_models())

    def sample(self, sample_id: str) -> Sample:
        return self._send(calls.sample(sample_id))

    def video(self, sample_id: str, job_id: str | None = None) -> bytes:
        """The file of a clip that a `VideoJob` made; `job_id`: of that, for a service of several replicas."""
        return self._send(calls.video(sample_id, job_id))

    def dead_letters(self, limit: int = 100, before: str | None = None) -> DeadLetterList:
        """The newest first; `before`: those older than the one of this id."""
        return self._send(calls.dead_letters(limit, before))

    def retry_dead_letter(self, letter_id: str) -> DeadLetterOutcome:
        return self._send(calls.retry_dead_letter(letter_id))

    def drop_dead_letter(self, letter_id: str) -> DeadLetterOutcome:
        return self._send(calls.drop_dead_letter(letter_id))

    def ready(self) -> bool:
        """Whether the service can generate now; False when it does not answer, too."""
        return self._not_ready() is None

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Returns once the service is ready. Raises its last error (NotReady, ServiceUnreachable) after the timeout."""
        waiting = Readiness(timeout_s)
        while (error := self._not_ready()) is not None:
            time.sleep(waiting.delay(error))

    def events(self, job_id: str, after: int = 0) -> Iterator[JobEvent]:
        """Events of a job past number `after`, until its last one; reconnects when the stream breaks off."""
        index = self._replicas.order(job_id)[0]
        stream, http = EventStream(self._replicas.urls[index], job_id, after), self._https[index]
        timeout = events_timeout(http.timeout)
        while not stream.ended:
            cut: Exception | None = None
            try:
                with http.stream("GET", stream.path, headers=stream.headers(), timeout=timeout) as response:
                    if not response.is_success:
                        raise calls.problem(stream.url, response.status_code, response.headers, response.read())
                    for chunk in response.iter_bytes():
                        yield from stream.feed(chunk)
            except httpx.RequestError as error:
                cut = error
            if not stream.ended:
                time.sleep(stream.dropped(cut))

    def _not_ready(self) -> Retryable | None:
        try:
            self._attempt(Attempts(calls.ready(), 0, self._deadline))
        except Retryable as error:
            return error
        return None

    def _send(self, call: Call[Answer]) -> Answer:
        attempts = Attempts(call, self._retries, self._deadline)
        while True:
            try:
                return self._attempt(attempts)
            except Retryable as error:
                time.sleep(attempts.delay(error))

    def _attempt(self, attempts: Attempts[Answer]) -> Answer:
        """Asks one replica after the other."""
        *others, last = self._replicas.order(attempts.call.job_id)
        for index in others:
            try:
                return self._ask(index, attempts)
            except (ServiceUnreachable, NotReady) as error:
                if not may_go_elsewhere(attempts.call, error):
                    raise
        return self._ask(last, attempts)

    def _ask(self, index: int, attempts: Attempts[Answer]) -> Answer:
        url, http, call = self._replicas.urls[index], self._https[index], attempts.call
        timeout = attempts.timeout(http.timeout)
        self._replicas.first = index
        try:
            headers = call.all_headers()
            body = uploads.sent(call, attempts.until)
            got = http.request(call.method, call.path, **body, headers=headers, timeout=timeout)
        except httpx.RequestError as error:
            raise calls.unreachable(url, error) from error
        answer = calls.answer(call, url, got.status_code, got.headers, got.content)
        self._replicas.answered(index, answer)
        return answer
