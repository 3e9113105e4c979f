"""The generator service over HTTP, for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
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


class AsyncGeneratorClient:
    """`GeneratorClient` for asyncio: the same arguments, the same methods, awaited."""

    def __init__(
        self,
        base_url: str | Sequence[str],
        *,
        api_key: str | None = None,
        timeout: float = TIMEOUT_S,
        retries: int = RETRIES,
        deadline: float = DEADLINE_S,
        transport: httpx.AsyncBaseTransport | None = None,
    ):
        """`timeout`: seconds for one answer. `transport`: an httpx.ASGITransport reaches an app without a network."""
        self._retries, self._deadline = retries, deadline
        self._replicas = Replicas(base_url)
        self._https = [
            httpx.AsyncClient(**options(url, api_key, timeout), transport=transport) for url in self._replicas.urls
        ]

    async def __aenter__(self) -> AsyncGeneratorClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        for http in self._https:
            await http.aclose()

    @property
    def base_url(self) -> str:
        """Of the replica that answered last."""
        return self._replicas.urls[self._replicas.first]

    async def generate(self, request: ImageGenerationRequest, idempotency_key: str | None = None) -> ImagesResponse:
        return await self._send(calls.generate(request, idempotency_key))

    async def feedback(self, feedback: Feedback, idempotency_key: str | None = None) -> FeedbackAccepted:
        return await self._send(calls.feedback(feedback, idempotency_key))

    async def submit(self, request: JobRequest, idempotency_key: str | None = None) -> Job:
        return await self._send(calls.submit(request, idempotency_key))

    async def job(self, job_id: str) -> Job:
        return await self._send(calls.job(job_id))

    async def jobs(self) -> JobList:
        return await self._send(calls.jobs())

    async def cancel(self, job_id: str) -> Job:
        return await self._send(calls.cancel(job_id))

    async def weights(self) -> WeightsList:
        return await self._send(calls.weights())

    async def activate(self, name: str, version: int | None = None) -> WeightsInfo:
        """Make a weight set the active one; None: its newest version."""
        return await self._send(calls.activate(name, version))

    async def publish_model(
        self, name: str, model: bytes | str | Path, idempotency_key: str | None = None
    ) -> PublishedModel:
        """Make safetensors, or a file of them, the next version of a published model; the same bytes again change
        nothing. Raises BadFile, and InvalidRequest: they do not fit the timm model that they name."""
        return await self._send(uploads.publish_model(name, model, idempotency_key))

    async def published_models(self) -> PublishedModelList:
        return await self._send(uploads.published_models())

    async def sample(self, sample_id: str) -> Sample:
        return await self._send(calls.sample(sample_id))

    async def video(self, sample_id: str, job_id: str | None = None) -> bytes:
        """The file of a clip that a `VideoJob` made; `job_id`: of that, for a service of several replicas."""
        return await self._send(calls.video(sample_id, job_id))

    async def dead_letters(self, limit: int = 100, before: str | None = None) -> DeadLetterList:
        """The newest first; `before`: those older than the one of this id."""
        return await self._send(calls.dead_letters(limit, before))

    async def retry_dead_letter(self, letter_id: str) -> DeadLetterOutcome:
        return await self._send(calls.retry_dead_letter(letter_id))

    async def drop_dead_letter(self, letter_id: str) -> DeadLetterOutcome:
        return await self._send(calls.drop_dead_letter(letter_id))

    async def ready(self) -> bool:
        """Whether the service can generate now; False when it does not answer, too."""
        return await self._not_ready() is None

    async def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Returns once the service is ready. Raises its last error (NotReady, ServiceUnreachable) after the timeout."""
        waiting = Readiness(timeout_s)
        while (error := await self._not_ready()) is not None:
            await asyncio.sleep(waiting.delay(error))

    async def events(self, job_id: str, after: int = 0) -> AsyncIterator[JobEvent]:
        """Events of a job past number `after`, until its last one; reconnects when the stream breaks off."""
        index = self._replicas.order(job_id)[0]
        stream, http = EventStream(self._replicas.urls[index], job_id, after), self._https[index]
        timeout = events_timeout(http.timeout)
        while not stream.ended:
            cut: Exception | None = None
            try:
                async with http.stream("GET", stream.path, headers=stream.headers(), timeout=timeout) as response:
                    if not response.is_success:
                        content = await response.aread()
                        raise calls.problem(stream.url, response.status_code, response.headers, content)
                    async for chunk in response.aiter_bytes():
                        for event in stream.feed(chunk):
                            yield event
            except httpx.RequestError as error:
                cut = error
            if not stream.ended:
                await asyncio.sleep(stream.dropped(cut))

    async def _not_ready(self) -> Retryable | None:
        try:
            await self._attempt(Attempts(calls.ready(), 0, self._deadline))
        except Retryable as error:
            return error
        return None

    async def _send(self, call: Call[Answer]) -> Answer:
        attempts = Attempts(call, self._retries, self._deadline)
        while True:
            try:
                return await self._attempt(attempts)
            except Retryable as error:
                await asyncio.sleep(attempts.delay(error))

    async def _attempt(self, attempts: Attempts[Answer]) -> Answer:
        """Asks one replica after the other."""
        *others, last = self._replicas.order(attempts.call.job_id)
        for index in others:
            try:
                return await self._ask(index, attempts)
            except (ServiceUnreachable, NotReady) as error:
                if not may_go_elsewhere(attempts.call, error):
                    raise
        return await self._ask(last, attempts)

    async def _ask(self, index: int, attempts: Attempts[Answer]) -> Answer:
        url, http, call = self._replicas.urls[index], self._https[index], attempts.call
        timeout = attempts.timeout(http.timeout)
        self._replicas.first = index
        try:
            headers = call.all_headers()
            body = uploads.sent_async(call, attempts.until)
            got = await http.request(call.method, call.path, **body, headers=headers, timeout=timeout)
        except httpx.RequestError as error:
            raise calls.unreachable(url, error) from error
        answer = calls.answer(call, url, got.status_code, got.headers, got.content)
        self._replicas.answered(index, answer)
        return answer
