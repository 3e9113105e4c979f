"""What the generator service's clients ask and how they read the answers, whichever HTTP library carries it.

Requests are described, answers parsed, event streams decoded and resumed. Opens no connection.
"""

from __future__ import annotations

import json
import math
import re
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar
from urllib.parse import quote

from pydantic import ValidationError

from protocol import logs, tracing
from protocol.config import mask
from protocol.entries import Sample
from protocol.errors import (
    ConfigError,
    NotTheService,
    OnTheFlyError,
    Retryable,
    ServiceUnreachable,
    from_problem,
)
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

Answer = TypeVar("Answer", bound=Message | bytes)

EVENT_READ_S = 60.0  # a stream of events that is silent for longer is opened again
_EVENT_DROPS = 5  # in a row without one event, after which the stream is given up
_EVENT_DELAY_S = 0.5
_READY_POLL_S = 0.2
_GATEWAY = (429, 502, 503, 504)  # what a proxy says of a service that is away, or has too much to do
_KEY = re.compile(r"[!-~]([ -~]*[!-~])?")


@dataclass(frozen=True)
class Call(Generic[Answer]):
    """One request, and the kind of its answer; bytes: a file as it is; None: only the status matters."""

    method: str
    path: str
    kind: type[Answer] | None
    body: dict[str, Any] | None = None
    headers: dict[str, str] = field(default_factory=dict)
    job_id: str | None = None  # of the job that it is about, which one replica has
    content: bytes | Path | None = None  # what is sent as it is, or the file that holds it; None: `body`

    def all_headers(self) -> dict[str, str]:
        """With those that tell which request and which trace of the caller's this one belongs to."""
        request_id = logs.current().get("request_id")
        return self.headers | tracing.headers() | ({} if request_id is None else {"X-Request-ID": request_id})

    def keyed(self) -> Call[Answer]:
        """The same with an idempotency key, so that a service that is asked again does it once."""
        if self.method != "POST" or "Idempotency-Key" in self.headers:
            return self
        return replace(self, headers=self.headers | {"Idempotency-Key": uuid.uuid4().hex})

    @property
    def repeatable(self) -> bool:
        """Whether it may be done on two replicas, when it is not known whether one of them did it."""
        return self.method != "POST" or self.path == "/v1/feedback" or self.content is not None


def generate(request: ImageGenerationRequest, idempotency_key: str | None) -> Call[ImagesResponse]:
    return Call("POST", "/v1/images/generations", ImagesResponse, _body(request), _idempotency(idempotency_key))


def feedback(marginals: Feedback, idempotency_key: str | None) -> Call[FeedbackAccepted]:
    return Call("POST", "/v1/feedback", FeedbackAccepted, _body(marginals), _idempotency(idempotency_key))


def submit(request: JobRequest, idempotency_key: str | None) -> Call[Job]:
    return Call("POST", "/v1/jobs", Job, _body(request), _idempotency(idempotency_key))


def job(job_id: str) -> Call[Job]:
    return Call("GET", f"/v1/jobs/{_part(job_id)}", Job, job_id=job_id)


def jobs() -> Call[JobList]:
    return Call("GET", "/v1/jobs", JobList)


def cancel(job_id: str) -> Call[Job]:
    return Call("DELETE", f"/v1/jobs/{_part(job_id)}", Job, job_id=job_id)


def weights() -> Call[WeightsList]:
    return Call("GET", "/v1/weights", WeightsList)


def activate(name: str, version: int | None) -> Call[WeightsInfo]:
    return Call("POST", f"/v1/weights/{_part(name)}/activate", WeightsInfo, {"version": version})


def sample(sample_id: str) -> Call[Sample]:
    return Call("GET", f"/v1/samples/{_part(sample_id)}", Sample)


def video(sample_id: str, job_id: str | None) -> Call[bytes]:
    return Call("GET", f"/v1/samples/{_part(sample_id)}/video", bytes, job_id=job_id)


def dead_letters(limit: int, before: str | None) -> Call[DeadLetterList]:
    query = f"limit={limit}" + ("" if before is None else f"&before={_part(before)}")
    return Call("GET", f"/v1/dead-letters?{query}", DeadLetterList)


def retry_dead_letter(letter_id: str) -> Call[DeadLetterOutcome]:
    return Call("POST", f"/v1/dead-letters/{_part(letter_id)}/retry", DeadLetterOutcome)


def drop_dead_letter(letter_id: str) -> Call[DeadLetterOutcome]:
    return Call("DELETE", f"/v1/dead-letters/{_part(letter_id)}", DeadLetterOutcome)


def ready() -> Call[Message]:
    return Call("GET", "/readyz", None)


def _body(message: Message) -> dict[str, Any]:
    return message.model_dump(mode="json", exclude_none=True)


def _idempotency(key: str | None) -> dict[str, str]:
    return {} if key is None else {"Idempotency-Key": key}


def _part(text: str) -> str:
    """One segment of a path, whatever characters it has."""
    return quote(text, safe="")


# ---------------------------------------------------------------- answers


def base_url(url: str) -> str:
    """The service's address without a trailing slash or the `/v1` that OpenAI's clients want.

    Raises:
        ConfigError: not an http:// or https:// URL.
    """
    if not url.startswith(("http://", "https://")):
        raise bad_address(url)
    return url.rstrip("/").removesuffix("/v1")


def bad_address(url: str) -> ConfigError:
    return ConfigError(f"the service's address {mask(url)!r} is not a URL: write http://host:port")


def default_headers(api_key: str | None) -> dict[str, str]:
    """Raises ConfigError for a key that no header can carry; never quotes it."""
    if api_key is None:
        return {}
    if not _KEY.fullmatch(api_key):
        raise ConfigError(
            "the API key is empty, or has characters that are not printable ASCII, or spaces around it: check "
            "api_key, or the environment variable ONTHEFLY_API_KEY"
        )
    return {"Authorization": f"Bearer {api_key}"}


def answer(call: Call[Answer], url: str, status: int, headers: Mapping[str, str], content: bytes) -> Answer | None:
    """The answer to a call, parsed if it is a message. Raises the error that a problem document stands for."""
    if not 200 <= status < 300:
        raise problem(url, status, headers, content)
    if call.kind is None:
        return None
    if call.kind is bytes:
        return content
    try:
        return call.kind.model_validate_json(content)
    except ValidationError as error:
        raise NotTheService(
            f"{mask(url)} answered {call.method} {call.path} with something that is not a {call.kind.__name__}: check "
            "that this is the generator service, of the same version"
        ) from error


def problem(url: str, status: int, headers: Mapping[str, str], content: bytes) -> OnTheFlyError:
    """The error of an answer that is no success; also of one that did not come from the service itself."""
    retry_after = _seconds(headers.get("retry-after"))
    try:
        document = json.loads(content)
    except ValueError:
        document = None
    if isinstance(document, dict) and isinstance(document.get("error"), dict):
        return from_problem(document, retry_after=retry_after)
    message = f"{mask(url)} answered with status {status} and no problem document: check that the service runs there"
    kind = ServiceUnreachable if status in _GATEWAY else NotTheService
    return kind(message, retry_after=1.0 if retry_after is None else retry_after)


def unreachable(url: str, error: Exception) -> ServiceUnreachable:
    """The error of a request that got no answer."""
    cause = str(error) or type(error).__name__
    return ServiceUnreachable(
        f"no answer from the generator service at {mask(url)} ({cause}): start it (`onthefly serve`), or check the "
        "address"
    )


def _seconds(header: str | None) -> float | None:
    try:
        seconds = float(header or "")
    except ValueError:
        return None  # absent, or a date
    return seconds if math.isfinite(seconds) and seconds >= 0 else None


# ---------------------------------------------------------------- waiting


class Readiness:
    """How long to go on waiting for a service that is not ready."""

    def __init__(self, timeout_s: float):
        self._deadline = time.monotonic() + timeout_s

    def delay(self, error: Retryable) -> float:
        """Seconds until the next look; raises `error` once the time is up."""
        if time.monotonic() >= self._deadline:
            raise error
        return _READY_POLL_S


class EventStream:
    """The server-sent events of one job, across as many connections as it takes."""

    def __init__(self, url: str, job_id: str, after: int):
        """`after`: number of the last event already had; 0: none."""
        self.path = f"/v1/jobs/{_part(job_id)}/events"
        self.ended = False
        self.url = url
        self._last = after
        self._drops = 0
        self._rest = b""
        self._data: list[bytes] = []

    def headers(self) -> dict[str, str]:
        """Of the next connection: go on after the last event had."""
        self._rest, self._data = b"", []
        return {"Accept": "text/event-stream"} | ({"Last-Event-ID": str(self._last)} if self._last else {})

    def feed(self, chunk: bytes) -> Iterator[JobEvent]:
        """The events that this piece of the stream completes."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            line = line.removesuffix(b"\r")
            if line:
                name, _, value = line.partition(b":")
                if name == b"data":
                    self._data.append(value.removeprefix(b" "))
            elif self._data:
                event = JobEvent.model_validate_json(b"\n".join(self._data))
                self._data, self._drops, self._last = [], 0, event.seq
                self.ended = event.kind == "end"
                yield event

    def dropped(self, error: Exception | None) -> float:
        """Note that a connection broke off. Returns the seconds to wait before the next one.

        Raises:
            ServiceUnreachable: too many broke off in a row.
        """
        self._drops += 1
        if self._drops >= _EVENT_DROPS:
            raise unreachable(self.url, error or ConnectionError("its event stream keeps closing")) from error
        return _EVENT_DELAY_S
