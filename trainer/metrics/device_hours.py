"""What a run cost: device hours by stage (GenDataAgent Figure 4). A device is a GPU, or a CPU where there is none.

Reads a run's record; measures nothing itself.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

from trainer.durable import write_durably
from trainer.record import Record, Row
from trainer.spans import length, spans

STAGES = {  # in the order of the work, and how they are called
    "adapt": "adapting the generator",  # and tuning it
    "caption": "perturbing captions",
    "generate": "generating",
    "score": "scoring real samples",
    "wait": "waiting for samples",
    "privacy": "nearness to real samples",
    "vog": "variance of gradients",
    "similarity": "similarity to real samples",
    "train": "training",
    "evaluate": "evaluating",
    "save": "saving",
    "publish": "publishing the model",
}
ADAPTATION = "adaptation.json"


def device_hours(record: Record) -> dict[str, float]:
    """Stage -> device hours; without those of which nothing is known.

    A trainer's stage counts on each of its devices, waiting included; generating and perturbing captions count on each
    worker. Adapting counts once for each weight set that made this run's samples, or that such a one was made from,
    although other runs may use it too.
    """
    seconds: dict[str, float] = defaultdict(float)
    devices = record.metrics[-1].get("devices", 1) if record.metrics else 1
    for row in record.intervals("trainer"):
        seconds[row["what"]] += devices * (row["end"] - row["start"])
    for worker in _by_worker(record).values():
        seconds["generate"] += length(spans(worker))
    if any(batch.captions_s for batch in record.batches):
        seconds["caption"] = sum(batch.captions_s for batch in record.batches)
    if (record.folder / ADAPTATION).exists():
        seconds["adapt"] = sum(read_adaptation(record.folder).values())
    return {stage: seconds[stage] / 3600 for stage in STAGES if stage in seconds}


def write_adaptation(folder: Path, seconds: dict[str, float]) -> None:
    """Keep in a run's folder what it cost to adapt the weights that made its samples, beside what it holds already.

    Args:
        seconds: "name@version" -> device seconds.
    """
    write_durably(folder / ADAPTATION, json.dumps(read_adaptation(folder) | seconds).encode())


def read_adaptation(folder: Path) -> dict[str, float]:
    """What was kept: "name@version" -> device seconds; nothing where nothing was."""
    path = folder / ADAPTATION
    return json.loads(path.read_text()) if path.exists() else {}


def _by_worker(record: Record) -> dict[str, list[Row]]:
    """Worker -> when it was at work for this run."""
    workers: dict[str, list[Row]] = defaultdict(list)
    for batch in record.batches:
        workers[batch.worker].append({"start": batch.started, "end": batch.finished})
    return workers
