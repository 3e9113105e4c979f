"""Tells operators how a run does, over the broker, from a thread of its own: a broker that is slow, or gone, holds no
training up.

What it tells comes from the journal, while it is written, and from the run's folder. Knows nothing of who reads it.
"""

from __future__ import annotations

import logging
import threading
import time
from types import TracebackType

from protocol.bus import Bus
from protocol.errors import Retryable
from protocol.messages import Feedback
from protocol.operations import HardSample, RunPoint, RunStatus
from trainer import record
from trainer.record import Row
from trainer.run import Run
from trainer.summary import headline_of, length, spans

log = logging.getLogger("trainer")

LOOK_S = 0.5  # between looks at whether something changed
BEAT_S = 3.0  # between reports when nothing did
HARD = 8  # samples told


class Reporter:
    """Reports one run while the context lasts, and how it ended. Only the run's first process has one.

    Args:
        bus: closed at the end.
    """

    def __init__(self, run: Run, bus: Bus):
        self._run, self._bus, self._journal = run, bus, run.journal
        self._started = time.time()
        self._lock = threading.Lock()  # of what the journal's writers tell
        self._curve = [_point(row) for row in record.rows(run.config.folder / "metrics.jsonl")]
        self._waited_s = 0.0
        self._generated: list[Row] = []  # intervals
        self._asked: Feedback | None = None
        self._told: tuple[RunStatus, float] | None = None  # the latest report, and when; monotonic
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._report_on, name="board", daemon=True)

    def __enter__(self) -> Reporter:
        self._journal.listeners.append(self._hear)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._journal.listeners.remove(self._hear)
        self._stop.set()
        self._thread.join()
        self._report(self._end(error))
        self._bus.close()

    def _end(self, error: BaseException | None) -> RunStatus:
        if isinstance(error, Exception):
            return self.status("failed", str(error) or type(error).__name__)
        return self.status("done" if self._run.at.iteration >= self._run.config.iterations else "stopped")

    # ------------------------------------------------------------ what is heard

    def _hear(self, name: str, row: Row) -> None:
        """A line of the journal, from whichever thread wrote it."""
        with self._lock:
            if name == "metrics.jsonl":
                self._curve.append(_point(row))
            elif name == "trace.jsonl" and (row["who"], row["what"]) == ("trainer", "wait"):
                self._waited_s += row["end"] - row["start"]
            elif name == "trace.jsonl" and row["who"] == "generator":
                self._generated.append(row)

    def _newest_feedback(self) -> Feedback | None:
        """The latest question of the run, as it was kept before it was sent; None: none yet, or all at once."""
        pool = self._run.config.has_pool  # which feedback 0 asks for, whatever is hard
        paths = sorted((self._run.config.folder / "feedback").glob("*.json"))[pool:]
        if paths and (self._asked is None or self._asked.feedback != int(paths[-1].stem)):
            self._asked = Feedback.model_validate_json(paths[-1].read_bytes())
        return self._asked

    # ------------------------------------------------------------ what is told

    def status(self, state: str, problem: str | None = None) -> RunStatus:
        """How the run does now."""
        run, config, now, asked = self._run, self._run.config, time.time(), self._newest_feedback()
        waiting, at = self._journal.doing, run.at  # read first: the curve has a point of each iteration before
        with self._lock:
            waited_s = self._waited_s + (now - waiting[1] if waiting is not None and waiting[0] == "wait" else 0.0)
            generated, curve = spans(self._generated), list(self._curve)
            self._generated = [{"start": start, "end": end} for start, end in generated]
        since_first = now - generated[0][0] if generated else 0.0
        return RunStatus(
            run=config.run,
            mode=config.mode,
            state=state,
            iteration=at.iteration,
            iterations=config.iterations,
            updates=at.updates,
            max_staleness=config.staleness,
            started=self._started,
            seen=now,
            trainer_idle=_part(waited_s, now - self._started),
            generator_idle=None if since_first <= 0.0 else 1.0 - _part(length(generated), since_first),
            unused=run.pool.unused,
            stale=run.pool.stale,
            newest_feedback=None if asked is None else asked.feedback,
            oldest_useful=None if asked is None else max(0, at.iteration - config.staleness),
            curve=curve,
            hard=[
                HardSample(sample_id=sample.sample_id, class_name=sample.class_name, score=sample.score)
                for sample in (asked.samples[:HARD] if asked is not None else ())
            ],
            problem=problem,
        )

    def _report_on(self) -> None:
        try:
            while not self._stop.is_set():
                doing = self._journal.doing
                status = self.status("waiting" if doing is not None and doing[0] == "wait" else "training")
                if self._is_news(status):
                    self._report(status)
                self._stop.wait(LOOK_S)
        except Exception:  # the run goes on without it
            log.exception("the run's state is told no more")

    def _is_news(self, status: RunStatus) -> bool:
        if self._told is None or time.monotonic() - self._told[1] >= BEAT_S:
            return True
        return _news(self._told[0]) != _news(status)

    def _report(self, status: RunStatus) -> None:
        self._told = (status, time.monotonic())
        try:
            self._bus.board.report(status)
        except Retryable as error:
            log.debug("the run's state is not told: %s", error.message)


def _news(status: RunStatus) -> tuple[object, ...]:
    return status.state, status.iteration, status.newest_feedback, len(status.curve)


def _point(row: Row) -> RunPoint:
    dropped = sum(row.get(name, 0) for name in ("near_copies", "privacy_dropped", "vog_dropped", "similarity_dropped"))
    headline = headline_of(row)
    return RunPoint(
        iteration=row["iteration"],
        updates=row["updates"],
        headline=headline,
        score=row.get(headline),
        test_top1=row.get("test_top1"),
        train_top1=row["train_top1"],
        candidates=int(row["candidates"]),
        kept=int(row["candidates"] - dropped),
    )


def _part(seconds: float, of: float) -> float:
    return min(1.0, seconds / of) if of > 0.0 else 0.0
