"""A process of ours that kills itself at a named point: `python -m tests.soak.failpoints --at POINT:NTH MODULE -- ...`.

Wraps functions of the product, which knows nothing of it, and then runs the module as `python -m` would. At the NTH
passage of the point the process gets SIGKILL, so that nothing of it runs any more.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import json
import os
import re
import runpy
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Strike = Callable[[], None]  # called at each passage; kills at the one that was asked for


@dataclass(frozen=True)
class Call:
    """Before or after a function, named as "module:Class.function"."""

    function: str
    after: bool = False

    def arm(self, strike: Strike) -> None:
        module, path = self.function.split(":")
        *owners, name = path.split(".")
        owner = functools.reduce(getattr, owners, importlib.import_module(module))
        original = getattr(owner, name)

        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if not self.after:
                strike()
            result = original(*args, **kwargs)
            if self.after:
                strike()
            return result

        setattr(owner, name, wrapped)


@dataclass(frozen=True)
class Rename:
    """Before or after a file gets its name, which the regular expression finds in its path."""

    target: str
    after: bool = False

    def arm(self, strike: Strike) -> None:
        for name in ("rename", "replace"):
            setattr(os, name, self._wrapped(getattr(os, name), strike))

    def _wrapped(self, original: Callable[..., None], strike: Strike) -> Callable[..., None]:
        def wrapped(source: Any, target: Any, **kwargs: Any) -> None:
            meant = re.search(self.target, os.fspath(target)) is not None
            if meant and not self.after:
                strike()
            original(source, target, **kwargs)
            if meant and self.after:
                strike()

        return wrapped


@dataclass(frozen=True)
class HalfLine:
    """In the middle of a line of one of the run's journals."""

    name: str

    def arm(self, strike: Strike) -> None:
        from trainer.journal import Journal

        original = Journal._append

        def wrapped(journal: Journal, name: str, row: dict[str, Any]) -> None:
            if name == self.name:
                with (journal.folder / name).open("a") as file:
                    whole = file.tell()
                    file.write(json.dumps(row)[:20])
                strike()
                os.truncate(journal.folder / name, whole)
            original(journal, name, row)

        Journal._append = wrapped


Point = Call | Rename | HalfLine

POINTS: dict[str, dict[str, Point]] = {
    "generator_service": {
        "before-publication": Call("protocol.bus:Bus.finish_work"),  # one script publishes and acknowledges
        "after-publication": Call("protocol.bus:Bus.finish_work", after=True),
        "before-planning": Call("protocol.bus:Bus.publish_plan"),
        "planned-not-told": Call("protocol.bus:Bus.publish_plan", after=True),
        "denoising": Call("generator_service.engine:Engine._after_step"),
        "before-activation": Rename(r"\.active\.json$"),
        "after-activation": Rename(r"\.active\.json$", after=True),
    },
    "trainer": {
        "before-ack": Call("protocol.bus:Bus.ack_batch"),  # between admission and ack
        "after-ack": Call("protocol.bus:Bus.ack_batch", after=True),
        "before-pixels": Rename(r"batches/[^/]*\.safetensors$"),
        "pixels-no-record": Rename(r"batches/[^/]*\.safetensors$", after=True),
        "before-checkpoint": Rename(r"checkpoints/[^/]*\.pt$"),
        "checkpoint-no-manifest": Rename(r"checkpoints/[^/]*\.pt$", after=True),
        "after-manifest": Rename(r"checkpoints/checkpoint\.json$", after=True),
        "asked-not-sent": Rename(r"feedback/[^/]*\.json$", after=True),
        "sent-not-noted": Rename(r"accepted/[^/]*\.json$"),
        "chosen-not-trained": Call("trainer.journal:Journal.selection", after=True),
        "measured-not-saved": Call("trainer.journal:Journal.metrics", after=True),
        "half-a-line": HalfLine("selection.jsonl"),
        "rewound": Call("trainer.journal:Journal.rewind", after=True),
    },
}
ON_DEMAND = ("before-activation", "after-activation")  # passed only when somebody activates weights


def arm(module: str, at: str, log: Path | None) -> None:
    """Have this process die at "POINT:NTH"; what struck is added to the log first."""
    name, _, number = at.rpartition(":")
    passages, lock = itertools.count(1), threading.Lock()

    def strike() -> None:
        with lock:
            if next(passages) != int(number):
                return
            if log is not None:
                with log.open("a") as file:
                    file.write(f"{os.getpid()} {name}\n")
            os.kill(os.getpid(), signal.SIGKILL)

    POINTS[module][name].arm(strike)


def admit_twice() -> None:
    """Take de-duplication out of the trainer: a batch that is delivered twice becomes two sets of samples, as in a
    consumer that trusts every delivery to be a new one."""
    from trainer.pool import Pool, _candidates

    admit = Pool.admit

    def naive_admit(pool: Pool, batch: Any, data: bytes | None) -> bool:
        copies = (batch.unit + copy * batch.units for copy in itertools.count())
        unit = next(unit for unit in copies if (batch.feedback, unit) not in pool._batches)
        return admit(pool, batch.model_copy(update={"unit": unit}), data)

    def naive_enlist(pool: Pool, batch: Any) -> None:
        pool._batches[batch.feedback, batch.unit] = batch
        for candidate in _candidates(batch, pool._file(batch).with_suffix(".safetensors")):
            copy = batch.unit // batch.units
            key = f"{candidate.sample.id}#{copy}" if copy else candidate.sample.id
            if key not in pool._used and key not in pool._stale:
                pool._unused[key] = candidate

    def naive_complete(pool: Pool, feedback: int) -> bool:
        answers = [batch for (number, _), batch in list(pool._batches.items()) if number == feedback]
        return bool(answers) and len({batch.unit % batch.units for batch in answers}) == answers[0].units

    Pool.admit, Pool._enlist, Pool.complete = naive_admit, naive_enlist, naive_complete
    Pool.answered = lambda pool, batch: False


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.soak.failpoints", description=__doc__.splitlines()[0])
    parser.add_argument("--at", metavar="POINT:NTH", help="where to die; default: nowhere")
    parser.add_argument("--log", type=Path, help="file that gets a line 'PID POINT' when the process dies there")
    parser.add_argument("--without-dedup", action="store_true", help="trainer: admit every delivery")
    parser.add_argument("module", choices=sorted(POINTS))
    parser.add_argument("arguments", nargs="*", help="of the module, after --")
    options = parser.parse_args(arguments)
    if options.at:
        arm(options.module, options.at, options.log)
    if options.without_dedup:
        admit_twice()
    sys.argv = [options.module, *options.arguments]
    runpy.run_module(options.module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
