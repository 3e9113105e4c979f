"""Feedback on its way out: kept on disk before it is sent, sent until it is accepted, and again when answers are lost.

Knows nothing of the queue, nor of when feedback is stale.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

from protocol.client import GeneratorClient
from protocol.errors import DiskFull, Retryable
from protocol.messages import Feedback, FeedbackAccepted
from trainer import correlation, outage
from trainer.durable import write_durably
from trainer.outage import Peers
from trainer.pool import Pool


class Outbox:
    """The feedback of one run. Thread-safe.

    Args:
        folder: the run's folder; each feedback is kept in `feedback/` before it is sent, so that a resumed run asks
            the same question again, and what the service promised for it in `accepted/`.
    """

    def __init__(self, client: GeneratorClient, pool: Pool, peers: Peers, folder: Path):
        self._client, self._pool, self._peers = client, pool, peers
        self._folder, self._promises = folder / "feedback", folder / "accepted"
        for place in (self._folder, self._promises):
            place.mkdir(parents=True, exist_ok=True)
        self._asked = {int(path.stem): Feedback.model_validate_json(path.read_bytes()) for path in _kept(self._folder)}
        self._promised = {
            int(path.stem): FeedbackAccepted.model_validate_json(path.read_bytes()) for path in _kept(self._promises)
        }
        self._waiting: set[int] = set()  # feedback to send
        self._lock = threading.Lock()
        self._send_after = 0.0  # monotonic: the service asked not to be asked before

    def asked(self, number: int) -> Feedback | None:
        """A feedback that was asked, before a crash or since."""
        return self._asked.get(number)

    def promised(self, number: int) -> FeedbackAccepted | None:
        """What the service replied to a feedback. Waits for a reply under way, which answers may overtake."""
        with self._lock:
            return self._promised.get(number)

    def answered(self, number: int) -> bool:
        """Whether all answers to a feedback have come; there may be none to come."""
        promised = self._promised.get(number)
        return (promised is not None and promised.units == 0) or self._pool.complete(number)

    def put(self, feedback: Feedback) -> None:
        """Keep feedback, to be sent. Raises DiskFull: it is not kept; call again."""
        write_durably(self._folder / f"{feedback.feedback:06d}.json", feedback.model_dump_json().encode())
        with self._lock:
            self._asked[feedback.feedback] = feedback
            self._waiting.add(feedback.feedback)

    def ask_again(self, oldest: int) -> None:
        """Send once more what is not answered whole, from feedback `oldest` on. What was planned already is not planned
        again, and a batch that comes twice is admitted once."""
        with self._lock:
            self._waiting |= {n for n in self._asked if n >= oldest and not self._pool.complete(n)}

    def give_up(self, oldest: int) -> list[int]:
        """Send nothing older than feedback `oldest`; returns what was neither accepted nor answered."""
        with self._lock:
            late = sorted(number for number in self._waiting if number < oldest)
            self._waiting.difference_update(late)
        return [number for number in late if not self._pool.complete(number)]  # it may have been sent again

    def send(self) -> None:
        """Try to send everything, oldest first; what is refused for now stays.

        Raises:
            InvalidRequest, NotFound, Unauthorized: the service refuses this feedback for good.
        """
        with self._lock:
            for number in sorted(self._waiting):
                if time.monotonic() < self._send_after:
                    return
                try:
                    with correlation.sending(self._asked[number]):
                        promised = self._client.feedback(self._asked[number])
                    write_durably(self._promises / f"{number:06d}.json", promised.model_dump_json().encode())
                except (Retryable, DiskFull) as error:  # on a full disk, it cannot be noted that it was sent
                    self._send_after = time.monotonic() + (error.retry_after or outage.RETRY_S)
                    self._peers.failed(error)
                    return
                self._peers.accepted()
                self._promised[number] = promised
                self._waiting.discard(number)


def _kept(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.json"))
