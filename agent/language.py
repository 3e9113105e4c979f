"""Language models as the agent asks them: conversations in, texts out; and those behind an OpenAI-compatible endpoint.

Models on this machine live in `generator_service/language/` behind the same interface. Knows nothing of captions.
"""

from __future__ import annotations

import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from typing import Any, Literal, NamedTuple, Protocol, TypedDict

import httpx
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from agent.rest import Rest
from protocol.config import MASK, mask
from protocol.errors import ConfigError, LanguageUnavailable

KEY_VARIABLES = ("ONTHEFLY_LANGUAGE_API_KEY", "OPENAI_API_KEY")  # the first that is set
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 60.0  # between attempts; an endpoint that asks for longer is given up
PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})  # statuses that may be another the next time
REFUSING = frozenset({401, 403, 404})  # statuses that every question would get; any others are about the question
MOST_BYTES = 2**20  # of a reply; a longer one is no answer to a question of ours
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


class TextPart(TypedDict):
    type: Literal["text"]
    text: str


class ImageURL(TypedDict):
    url: str  # data URL of the picture


class ImagePart(TypedDict):
    type: Literal["image_url"]
    image_url: ImageURL


class Turn(TypedDict):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str | Sequence[TextPart | ImagePart]  # parts, as OpenAI's vision format has them, of models that see


Conversation = Sequence[Turn]


class ChatModel(Protocol):
    """Something that answers conversations. May be shared by threads."""

    name: str  # tells models apart whose answers differ

    def complete(self, conversations: Sequence[Conversation], seeds: Sequence[int]) -> list[str | LanguageUnavailable]:
        """Answer all conversations, at once as far as the model can; one seed each. An answer that cannot be had is
        an error in its place: nothing is raised."""
        ...

    def close(self) -> None:
        """Give up what is being answered; later questions are answered with errors."""
        ...


class OpenAIConfig(BaseModel):
    """An endpoint that speaks OpenAI's chat completions: OpenAI's own, vLLM, llama.cpp, Ollama, ..."""

    model_config = ConfigDict(extra="forbid")

    url: str = "http://127.0.0.1:11434/v1"  # without /chat/completions
    model: str = "llama2"  # as the endpoint calls it
    api_key: str | None = None  # None: ONTHEFLY_LANGUAGE_API_KEY or OPENAI_API_KEY of the environment, if any
    timeout_s: float = Field(default=60.0, gt=0.0)  # for one answer, and for each wait for more of it; not asked again
    retries: int = Field(default=3, ge=0, le=20)  # attempts after the first, for failures that may pass soon
    concurrency: int = Field(default=8, ge=1, le=256)  # questions at a time; as many as the endpoint serves at once
    temperature: float | None = Field(default=0.7, ge=0.0, le=2.0)  # 0: its likeliest answer; None: the endpoint's own
    max_tokens: int | None = Field(default=1024, ge=1)  # of an answer; None: the endpoint's own limit
    seeded: bool = True  # send a seed along, for endpoints that know it: the same question has the same answer
    extra: dict[str, Any] = {}  # more members of the request body, such as {top_p = 0.9}


class OpenAIChat:
    """Asks an endpoint, several questions at a time. A `ChatModel`. An endpoint that failed is left alone for a while,
    by the questions that wait already too (see `Rest`)."""

    def __init__(self, config: OpenAIConfig, clock: Callable[[], float] = time.monotonic, table: str = "agent.openai"):
        """Connects on first use. `clock`: seconds, from any origin. `table`: of the settings, for messages. Raises
        ConfigError for a URL or a key that cannot be used."""
        self.name = config.model
        self._config, self._table = config, table
        self._key = _key(config)
        self._client = _client(config, self._key, table)
        self._clock, self._rest = clock, Rest(clock)
        self._pool = ThreadPoolExecutor(config.concurrency, thread_name_prefix="language")
        self._closed = threading.Event()
        self._lock = threading.Lock()  # so that nothing is asked after closing

    def complete(self, conversations: Sequence[Conversation], seeds: Sequence[int]) -> list[str | LanguageUnavailable]:
        """See `ChatModel`. At most `concurrency` questions are under way, those of all callers together."""
        with self._lock:
            if self._closed.is_set():
                return [self._closing()] * len(conversations)
            futures = [self._pool.submit(self._ask, *asked) for asked in zip(conversations, seeds, strict=True)]
        answers: list[str | LanguageUnavailable] = []
        for future in futures:
            try:
                answers.append(future.result())
            except LanguageUnavailable as error:
                answers.append(error)
            except CancelledError:
                answers.append(self._closing())
        return answers

    def close(self) -> None:
        """See `ChatModel`."""
        with self._lock:
            self._closed.set()
            self._pool.shutdown(wait=False, cancel_futures=True)
        self._client.close()

    def _ask(self, conversation: Conversation, seed: int) -> str:
        """One answer, with as many attempts as it may take; one alone after a rest. Raises LanguageUnavailable."""
        refusal = self._rest.refusal()
        if refusal is not None:
            raise LanguageUnavailable(refusal.message)
        body = self._body(conversation, seed)
        for attempt in range(self._config.retries + 1):
            answer = self._post(body)
            if not isinstance(answer, _Failure):
                self._rest.worked()
                return answer
            at_random = 0.5 + secrets.randbelow(1000) / 2000  # callers that failed together do not come back so
            pause = min(FIRST_PAUSE_S * 2**attempt * at_random, LONGEST_PAUSE_S)
            pause = max(pause, answer.error.retry_after or 0.0)
            last = attempt == self._config.retries or not answer.passing or pause > LONGEST_PAUSE_S
            if last or self._rest.reason is not None or self._closed.wait(pause) or self._rest.reason is not None:
                break
        if answer.of_all:
            self._rest.failed(answer.error)
        else:
            self._rest.worked()
        raise answer.error

    def _body(self, conversation: Conversation, seed: int) -> dict[str, Any]:
        config = self._config
        chosen = {"temperature": config.temperature, "max_tokens": config.max_tokens}
        chosen["seed"] = seed % 2**31 if config.seeded else None
        given = {name: value for name, value in chosen.items() if value is not None}
        return {"model": config.model, "messages": list(conversation)} | given | config.extra

    def _post(self, body: dict[str, Any]) -> str | _Failure:
        """One attempt."""
        try:
            status, headers, content = self._exchange(body)
        except httpx.TimeoutException as error:
            told = f"does not answer within {self._config.timeout_s:g} s ({str(error) or type(error).__name__})"
            return self._failure(f"{told}: see whether it hangs, or raise {self._table}.timeout_s", of_all=True)
        except (httpx.HTTPError, RuntimeError) as error:  # RuntimeError: closed meanwhile
            told = f"does not answer ({str(error) or type(error).__name__}): start it, or check {self._table}.url"
            return self._failure(told, passing=True, of_all=True)
        if len(content) > MOST_BYTES:
            return self._failure(f"answered with more than {MOST_BYTES} bytes: lower {self._table}.max_tokens")
        if status != 200:
            told = f"answered with status {status}: {self._hidden(content.decode(errors='replace'))[:200]}"
            told += f"; check {self._table}.url, model and api_key"
            passing = status in PASSING
            return self._failure(told, passing, passing or status in REFUSING, _seconds(headers.get("retry-after")))
        try:
            return _Completion.model_validate_json(content).choices[0].message.content or ""
        except ValidationError:
            told = f"answered with what is no chat completion: check that {self._table}.url ends as its API does"
            return self._failure(told, passing=True, of_all=True)

    def _exchange(self, body: dict[str, Any]) -> tuple[int, httpx.Headers, bytes]:
        """Status, headers and body of a reply; of one that is too long the first `MOST_BYTES` and some more. Raises
        httpx.HTTPError; its TimeoutException also when the reply goes on for longer than `timeout_s`."""
        until = self._clock() + self._config.timeout_s
        content = bytearray()
        with self._client.stream("POST", "chat/completions", json=body) as reply:
            for part in reply.iter_bytes():
                content += part
                if len(content) > MOST_BYTES:
                    break
                if self._clock() > until:
                    raise httpx.ReadTimeout("its answer does not come to an end")
        return reply.status_code, reply.headers, bytes(content)

    def _failure(self, told: str, passing: bool = False, of_all: bool = False, retry_after: float = 0.0) -> _Failure:
        message = self._hidden(f"the language model {self.name!r} at {mask(self._config.url)} {told}")
        return _Failure(LanguageUnavailable(message, retry_after=retry_after), passing, of_all)

    def _hidden(self, text: str) -> str:
        """The begin of a text of the endpoint's, without the key, which some repeat."""
        return mask((text.replace(self._key, MASK) if self._key else text)[:1000])

    def _closing(self) -> LanguageUnavailable:
        return LanguageUnavailable(f"language model {self.name!r} is not asked any more: the service stops")


class _Failure(NamedTuple):
    """Why there is no answer."""

    error: LanguageUnavailable
    passing: bool  # another attempt may have one
    of_all: bool  # other questions would get none either


class _Message(BaseModel):
    content: str | None = None  # None: it refused, or called a tool


class _Choice(BaseModel):
    message: _Message


class _Completion(BaseModel):
    """What is read of an answer; the rest is left alone."""

    choices: list[_Choice] = Field(min_length=1)


def _key(config: OpenAIConfig) -> str | None:
    """Raises ConfigError."""
    key = config.api_key or next((value for name in KEY_VARIABLES if (value := os.environ.get(name))), None)
    if key is not None and not re.fullmatch(r"[!-~]+", key):
        raise ConfigError("the key of the language model has characters that no header can carry: check it")
    return key


def _client(config: OpenAIConfig, key: str | None, table: str) -> httpx.Client:
    try:
        url = httpx.URL(config.url)
    except (httpx.InvalidURL, UnicodeError):
        url = httpx.URL()
    if url.scheme not in ("http", "https") or not url.host:
        raise ConfigError(
            f"{table}.url = {mask(config.url)!r} is no URL: write http://host:port/v1", param=f"{table}.url"
        )
    return httpx.Client(
        base_url=url,
        headers={"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {key}"} if key else {}),
        timeout=httpx.Timeout(config.timeout_s, pool=None),
        limits=httpx.Limits(max_connections=config.concurrency, max_keepalive_connections=config.concurrency),
        trust_env=url.host not in LOOPBACK,  # proxies of the environment are for other machines
    )


def _seconds(retry_after: str | None) -> float:
    """What a Retry-After header asks for, which is seconds or a date; 0 when there is none that can be read."""
    try:
        return max(0.0, float(retry_after or 0.0))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(retry_after or "").timestamp() - time.time())
    except ValueError:
        return 0.0
