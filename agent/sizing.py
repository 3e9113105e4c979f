"""How many generators a trainer keeps busy, and how long an iteration takes: a model of throughput.

An iteration wants D samples and trains for T seconds; R replicas make g samples a second each. Generating takes
G = D / (R g). Beside the training (async) an iteration takes max(T, G), after one another (sync) T + G; what neither
side can hide (posting, queue, first and last batch) is added to both.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from protocol.errors import ConfigError
from protocol.messages import FeedbackAccepted


@dataclass(frozen=True)
class Load:
    """What one stage-2 iteration asks for, and what one replica gives."""

    samples: int  # D = k m, before any filter
    train_s: float  # T: scoring, filtering and training, without waiting
    rate: float  # g, samples a second of one replica while it is busy
    overhead_s: float = 0.0  # of an iteration, whatever the number of replicas

    def generate_s(self, replicas: int) -> float:
        """G, seconds."""
        return self.samples / (replicas * self.rate)

    def async_s(self, replicas: int) -> float:
        """Seconds of an iteration whose samples are made beside the training of the one before."""
        return max(self.train_s, self.generate_s(replicas)) + self.overhead_s

    def sync_s(self, replicas: int) -> float:
        """Seconds of an iteration that waits for its samples."""
        return self.train_s + self.generate_s(replicas) + self.overhead_s

    def replicas(self) -> int:
        """The fewest replicas that a trainer in mode async never waits for."""
        return math.ceil(self.samples / (self.rate * self.train_s))


def demand(run: Path) -> tuple[int, float]:
    """D and T of a run, from its folder: samples that an iteration was promised, whether or not they came in time, and
    seconds that a stage-2 iteration took without waiting; means.

    Raises:
        ConfigError: no stage-2 iteration is in the folder.
    """
    promised = [FeedbackAccepted.model_validate_json(path.read_bytes()) for path in run.glob("accepted/*.json")]
    trace = run / "trace.jsonl"
    spans = [json.loads(line) for line in trace.read_text().splitlines()] if trace.exists() else []
    own = [span for span in spans if span["who"] == "trainer"]
    waited = {span["iteration"] for span in own if span["what"] == "wait"}
    busy: dict[int, float] = defaultdict(float)
    for span in own:
        if span["what"] != "wait" and span["iteration"] in waited:
            busy[span["iteration"]] += span["end"] - span["start"]
    if not promised or not busy:
        raise ConfigError(f"{run} holds no iteration that asked for samples: name the folder of such a run")
    return round(sum(reply.samples for reply in promised) / len(promised)), sum(busy.values()) / len(busy)
