"""What replicas and trainers tell of themselves, for operators to see: replicas, runs, recent samples. Also which
weights all replicas shall serve.

Small bodies that run out by themselves. Operators want to know most when the broker is out of memory, so only samples
are refused then. Knows nothing of streams. Every method raises BrokerUnavailable when the broker does not answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import redis
from pydantic import ValidationError

from protocol import bus_scripts, keys
from protocol.broker import broker_errors
from protocol.errors import UnknownRun
from protocol.messages import Message, WeightsRef
from protocol.operations import Replica, RunStatus, ShownSample

Body = TypeVar("Body", bound=Message)


class Board:
    """The notice board of one broker. May be shared by threads."""

    def __init__(self, client: redis.Redis, url: str):
        self._client, self._url = client, url
        self._tell = client.register_script(bus_scripts.TELL)
        self._keep_choice = client.register_script(bus_scripts.KEEP_CHOICE)

    # ------------------------------------------------------------ replicas

    def announce(self, replica: Replica) -> None:
        """Say how a replica does; to be said again before `keys.REPLICA_TTL_S` is over."""
        self._say(keys.replica(replica.name), keys.REPLICAS, replica.name, replica, keys.REPLICA_TTL_S)

    def withdraw(self, name: str) -> None:
        """A replica is gone."""
        with broker_errors(self._url):
            self._client.unlink(keys.replica(name))
            self._client.srem(keys.REPLICAS, name)

    def replicas(self) -> list[Replica]:
        """Those that announced themselves lately, by name."""
        return sorted(self._said(keys.REPLICAS, keys.replica, Replica), key=lambda replica: replica.name)

    # ------------------------------------------------------------ weights

    def choose_weights(self, ref: WeightsRef) -> None:
        """Have all replicas serve this set. The choice lasts while any of them does."""
        with broker_errors(self._url):
            self._tell(keys=[keys.CHOICE], args=[ref.model_dump_json(), keys.CHOICE_TTL_S])

    def chosen_weights(self) -> WeightsRef | None:
        """The set that all replicas shall serve; None: nobody chose one."""
        with broker_errors(self._url):
            body = self._client.get(keys.CHOICE)
        return None if body is None else WeightsRef.model_validate_json(body)

    def keep_choice(self, ref: WeightsRef) -> None:
        """A replica that serves this set prolongs its choice, if it is the one."""
        with broker_errors(self._url):
            self._keep_choice(keys=[keys.CHOICE], args=[ref.model_dump_json(), keys.CHOICE_TTL_S])

    # ------------------------------------------------------------ runs

    def report(self, status: RunStatus) -> None:
        """Say how a run does."""
        self._say(keys.run(status.run), keys.RUNS, status.run, status, keys.RUN_TTL_S)

    def runs(self) -> list[RunStatus]:
        """Every run told of lately, the one heard from last first."""
        return sorted(self._said(keys.RUNS, keys.run, RunStatus), key=lambda status: -status.seen)

    def run(self, name: str) -> RunStatus:
        """Raises UnknownRun."""
        with broker_errors(self._url):
            body = self._client.get(keys.run(name))
        if body is None:
            raise UnknownRun(f"no run {name!r} was told of in the last {keys.RUN_TTL_S // 86400} days")
        return RunStatus.model_validate_json(body)

    def forget(self, run: str) -> None:
        """Take down what was told of a run, and its samples."""
        with broker_errors(self._url):
            self._client.unlink(keys.run(run), keys.shown(run))
            self._client.srem(keys.RUNS, run)

    # ------------------------------------------------------------ samples

    def show(self, run: str, samples: Sequence[ShownSample]) -> None:
        """Add recent samples of a run, newest last; the oldest past `keys.SHOWN_LIMIT` go. Raises BrokerFull."""
        key = keys.shown(run)
        with broker_errors(self._url):
            pipeline = self._client.pipeline()
            pipeline.lpush(key, *(sample.model_dump_json() for sample in samples))
            pipeline.ltrim(key, 0, keys.SHOWN_LIMIT - 1)
            pipeline.expire(key, keys.SHOWN_TTL_S)
            pipeline.execute()

    def samples(self, run: str, limit: int, sources: Sequence[str] = ()) -> list[ShownSample]:
        """Recent samples of a run, newest first.

        Args:
            sources: only those made from these; () for all.
        """
        with broker_errors(self._url):
            bodies = self._client.lrange(keys.shown(run), 0, -1 if sources else limit - 1)
        found = _read(ShownSample, bodies)
        return [shown for shown in found if not sources or shown.sample.source_id in sources][:limit]

    # ------------------------------------------------------------ inside

    def _say(self, key: str, index: str, name: str, body: Message, ttl_s: int) -> None:
        with broker_errors(self._url):
            self._tell(keys=[key, index], args=[body.model_dump_json(), ttl_s, name])

    def _said(self, index: str, key: Callable[[str], str], kind: type[Body]) -> list[Body]:
        """The bodies of all names in an index, which loses those that ran out."""
        with broker_errors(self._url):
            names = sorted(name.decode() for name in self._client.smembers(index))
            bodies = self._client.mget([key(name) for name in names]) if names else []
            if gone := [name for name, body in zip(names, bodies, strict=True) if body is None]:
                self._client.srem(index, *gone)  # one that speaks at this moment is back the next time it does
        return _read(kind, [body for body in bodies if body is not None])


def _read(kind: type[Body], bodies: Sequence[bytes]) -> list[Body]:
    """Those that can be read: a process of another version may say what this one does not know."""
    found = []
    for body in bodies:
        try:
            found.append(kind.model_validate_json(body))
        except ValidationError:
            continue
    return found
