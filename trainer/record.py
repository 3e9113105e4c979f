"""What a run's folder says, read back: settings, metrics, trace, selection, events, questions and answers.

Reads only; the writers are `journal`, `feed` and `pool`. Loads no torch, and does not know what the record is for.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protocol import config
from protocol.entries import Sample, SampleBatch
from protocol.errors import ConfigError
from protocol.messages import Feedback, FeedbackAccepted
from trainer.settings import TrainerConfig

Row = dict[str, Any]


@dataclass(frozen=True)
class Record:
    """One run, as far as it has come. Everything but `config` and `settings` may be empty."""

    folder: Path
    config: TrainerConfig
    settings: str  # the text of settings.toml
    metrics: list[Row]  # one an iteration that is finished
    trace: list[Row]  # one an interval
    selection: list[Row]  # one a sample and iteration
    events: list[Row]
    feedback: list[Feedback]  # by iteration
    accepted: list[FeedbackAccepted]  # by iteration; what the service promised for it
    batches: list[SampleBatch]  # by (feedback, unit); failed units included

    @classmethod
    def open(cls, folder: Path) -> Record:
        """Read a run's folder.

        Raises:
            ConfigError: the folder holds no run, or its settings cannot be read.
        """
        file = folder / "settings.toml"
        if not file.is_file():
            raise ConfigError(
                f"{folder} holds no run (it has no settings.toml): name the folder of a run, which is "
                "trainer.runs_dir/trainer.run of the settings it was started with"
            )
        return cls(
            folder=folder,
            config=config.section(config.load(file), "trainer", TrainerConfig),
            settings=file.read_text(encoding="utf-8"),
            metrics=rows(folder / "metrics.jsonl"),
            trace=rows(folder / "trace.jsonl"),
            selection=rows(folder / "selection.jsonl"),
            events=rows(folder / "events.jsonl"),
            feedback=[Feedback.model_validate_json(path.read_bytes()) for path in _documents(folder / "feedback")],
            accepted=[
                FeedbackAccepted.model_validate_json(path.read_bytes()) for path in _documents(folder / "accepted")
            ],
            batches=[SampleBatch.model_validate_json(path.read_bytes()) for path in _documents(folder / "batches")],
        )

    def samples(self) -> list[Sample]:
        """Every synthetic sample that arrived."""
        return [sample for batch in self.batches for sample in batch.samples]

    def class_names(self) -> dict[int, str]:
        """Label -> class name, as far as questions and answers name them."""
        asked = {sample.label: sample.class_name for feedback in self.feedback for sample in feedback.samples}
        made = {s.label: s.class_name for s in self.samples() if s.label is not None and s.class_name is not None}
        short = {shortage.label: shortage.class_name for feedback in self.feedback for shortage in feedback.classes}
        return short | asked | made

    def intervals(self, who: str, what: str | None = None) -> list[Row]:
        """The trace's intervals of one side, of one kind if `what` is given."""
        return [row for row in self.trace if row["who"] == who and what in (None, row["what"])]


def rows(path: Path) -> list[Row]:
    """All rows of a JSON-lines file; [] when there is none. A line that a crash cut short is left out."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def _documents(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.json"))
