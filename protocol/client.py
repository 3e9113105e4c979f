"""The generator service over HTTP, synchronously and asynchronously.

Answers are the messages of `messages`; problems are raised as the errors of `errors`, as if the service were in this
process, and a service that gives no answer as ServiceUnreachable. What is asked and how answers read is in
`client_calls`; this module only carries it. Finished samples of a feedback do not come here but over `bus`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from types import TracebackType
from typing import Any, TypeVar

import httpx

from protocol import client_calls as calls
from protocol.client_calls import Call, EventStream, Readiness
from protocol.entries import Sample
from protocol.errors import Retryable
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

Answer = TypeVar("Answer", bound=Message)
TIMEOUT_S = 300.0  # for one answer: an image request waits for its turn on the GPU
_CONNECT_S = 5.0
_LOOPBACK = {"127.0.0.1", "localhost", "::1"}


def _options(url: str, api_key: str | None, timeout: float) -> dict[str, Any]:
    """Settings of an httpx client. Proxies of the environment are for other machines, not for this one.

    Raises:
        ConfigError: the URL does not parse, or the key is none.
    """
    try:
        host = httpx.URL(url).host
    except (httpx.InvalidURL, UnicodeError):
        raise calls.bad_address(url) from None  # the cause may quote a password
    return {
        "base_url": url,
        "headers": calls.default_headers(api_key),
        "timeout": httpx.Timeout(timeout, connect=min(_CONNECT_S, timeout)),
        "trust_env": host not in _LOOPBACK,
    }


def _events_timeout(timeout: httpx.Timeout) -> httpx.Timeout:
    return httpx.Timeout(calls.EVENT_READ_S, connect=timeout.connect)


class GeneratorClient:
    """Client for one service. A context manager; may be shared by threads."""

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        timeout: float = TIMEOUT_S,
        transport: httpx.BaseTransport | None = None,
    ):
        """`timeout`: seconds for one answer. `transport`: replaces the network in tests."""
        self.base_url = calls.base_url(base_url)
        self._http = httpx.Client(**_options(self.base_url, api_key, timeout), transport=transport)

    def __enter__(self) -> GeneratorClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

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

    def sample(self, sample_id: str) -> Sample:
        return self._send(calls.sample(sample_id))

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
        stream = EventStream(self.base_url, job_id, after)
        timeout = _events_timeout(self._http.timeout)
        while not stream.ended:
            cut: Exception | None = None
            try:
                with self._http.stream("GET", stream.path, headers=stream.headers(), timeout=timeout) as response:
                    if not response.is_success:
                        raise calls.problem(self.base_url, response.status_code, response.headers, response.read())
                    for chunk in response.iter_bytes():
                        yield from stream.feed(chunk)
            except httpx.RequestError as error:
                cut = error
            if not stream.ended:
                time.sleep(stream.dropped(cut))

    def _not_ready(self) -> Retryable | None:
        try:
            self._send(calls.ready())
        except Retryable as error:
            return error
        return None

    def _send(self, call: Call[Answer]) -> Answer:
        try:
            got = self._http.request(call.method, call.path, json=call.body, headers=call.headers)
        except httpx.RequestError as error:
            raise calls.unreachable(self.base_url, error) from error
        return calls.answer(call, self.base_url, got.status_code, got.headers, got.content)


class AsyncGeneratorClient:
    """`GeneratorClient` for asyncio: the same methods, awaited."""

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        timeout: float = TIMEOUT_S,
        transport: httpx.AsyncBaseTransport | None = None,
    ):
        """`timeout`: seconds for one answer. `transport`: an httpx.ASGITransport reaches an app without a network."""
        self.base_url = calls.base_url(base_url)
        self._http = httpx.AsyncClient(**_options(self.base_url, api_key, timeout), transport=transport)

    async def __aenter__(self) -> AsyncGeneratorClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

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

    async def sample(self, sample_id: str) -> Sample:
        return await self._send(calls.sample(sample_id))

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
        stream = EventStream(self.base_url, job_id, after)
        timeout = _events_timeout(self._http.timeout)
        while not stream.ended:
            cut: Exception | None = None
            try:
                async with self._http.stream("GET", stream.path, headers=stream.headers(), timeout=timeout) as response:
                    if not response.is_success:
                        content = await response.aread()
                        raise calls.problem(self.base_url, response.status_code, response.headers, content)
                    async for chunk in response.aiter_bytes():
                        for event in stream.feed(chunk):
                            yield event
            except httpx.RequestError as error:
                cut = error
            if not stream.ended:
                await asyncio.sleep(stream.dropped(cut))

    async def _not_ready(self) -> Retryable | None:
        try:
            await self._send(calls.ready())
        except Retryable as error:
            return error
        return None

    async def _send(self, call: Call[Answer]) -> Answer:
        try:
            got = await self._http.request(call.method, call.path, json=call.body, headers=call.headers)
        except httpx.RequestError as error:
            raise calls.unreachable(self.base_url, error) from error
        return calls.answer(call, self.base_url, got.status_code, got.headers, got.content)
