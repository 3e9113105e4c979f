"""A small run's folder, written by the real writers, whose numbers can be worked out by hand.

Four iterations of 10 s each, two of them warm-up, K = 1. Within each: score 0-1, wait 1-2 (stage 2), vog 2-3 (stage 2),
train 3-9, evaluate 9-10. Feedback 1 and 2 ask for 2 samples each of 5 real ones.

    feedback  unit  samples  generated at  what becomes of them
    1         0     8        12 - 18       iteration 2: one near copy, 2 dropped by VoG, 5 trained on
    1         1     2        26 - 30       come after iteration 2 has taken its samples: stale in iteration 3
    2         0     4        21.5 - 25     iteration 3: 1 dropped by VoG, 3 trained on
    2         1     failed   24 - 28
    2         2     2        32 - 34       come after the last iteration has taken its samples: unused
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from protocol import codec, config
from protocol.dataset import Dataset, DatasetConfig
from protocol.entries import Sample, SampleBatch
from protocol.errors import GenerationFailed
from protocol.messages import Feedback, FeedbackAccepted, MarginalSample, WeightsRef, sample_id, seed_of
from trainer.durable import write_durably
from trainer.journal import Journal
from trainer.pool import Candidate, Pool
from trainer.settings import TrainerConfig

WEIGHTS = WeightsRef(name="prior", version=1, digest="d")
SIZE = 8


def write_dataset(root: Path, classes: Sequence[str] = ("cat", "dog"), each: int = 5) -> Dataset:
    """Class folders of random 8 x 8 pictures."""
    draw = np.random.default_rng(0)
    for name in classes:
        (root / "train" / name).mkdir(parents=True)
        for number in range(each):
            pixels = draw.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "train" / name / f"{number}.png")
    return Dataset.open(DatasetConfig(root=root, split="train"))


class RunFolder:
    """Writes what a run writes, step by step. `start` is the unix time of the run's second 0."""

    def __init__(self, folder: Path, dataset: Dataset, data: DatasetConfig, **settings: object):
        self.config = TrainerConfig.model_validate(
            {
                "run": folder.name,
                "runs_dir": folder.parent,
                "dataset": data,
                "iterations": 4,
                "warmup_iterations": 2,
                "drop_near_copies": True,
                **settings,
            }
        )
        self.dataset, self.folder = dataset, folder
        self.journal, self.pool = Journal(folder), Pool(folder / "batches")
        self.start = float(int(time.time()))
        (folder / "feedback").mkdir()
        (folder / "accepted").mkdir()
        config.write_resolved({"trainer": self.config}, folder / "settings.toml")

    def ask(self, feedback: int, indices: Sequence[int], each: int = 2) -> None:
        """Feedback on dataset indices, hardest first, and the service's promise."""
        chosen = [self.dataset.samples[index] for index in indices]
        samples = [
            MarginalSample(sample_id=e.id, label=e.label, class_name=e.class_name, caption=None, score=0.1 * position)
            for position, e in enumerate(chosen)
        ]
        asked = Feedback(
            run=self.config.run, feedback=feedback, model_version=0, samples=samples, images_per_sample=each
        )
        promise = FeedbackAccepted(
            run=self.config.run, feedback=feedback, units=3, samples=len(samples) * each, weights=WEIGHTS
        )
        for name, message in (("feedback", asked), ("accepted", promise)):
            write_durably(self.folder / name / f"{feedback:06d}.json", message.model_dump_json().encode())

    def answer(
        self,
        feedback: int,
        unit: int,
        when: tuple[float, float],
        indices: Sequence[int],
        images: np.ndarray | None = None,
        near_copies: Sequence[int] = (),
        each: int = 2,
        failed: bool = False,
    ) -> None:
        """A batch arrives: `each` samples of each source, or none of them when it failed.

        Args:
            when: seconds from `start`. images: uint8 [rows, H, W, 3]; None: random. near_copies: rows flagged as such.
        """
        entries = [self.dataset.samples[index] for index in indices for _ in range(each)]
        samples = [self._sample(feedback, entry, row % each, row in near_copies) for row, entry in enumerate(entries)]
        missing, samples = ([sample.id for sample in samples], []) if failed else ([], samples)
        if images is None:
            draw = np.random.default_rng(100 * feedback + unit)
            images = draw.integers(0, 256, (len(samples), SIZE, SIZE, 3), dtype=np.uint8)
        batch = SampleBatch(
            unit_id=f"{self.config.run}.{feedback}.{unit}.x",
            run=self.config.run,
            feedback=feedback,
            unit=unit,
            units=3,
            model_version=0,
            weights=WEIGHTS,
            samples=samples,
            missing=missing,
            blob=None,
            error=GenerationFailed("the backend raised").to_problem() if failed else None,
            worker="w",
            started=self.start + when[0],
            finished=self.start + when[1],
        )
        assert self.pool.admit(batch, codec.encode({"images": images}) if samples else None)
        self.journal.interval("generator", "generate", batch.started, batch.finished, feedback=feedback, unit=unit)

    def _sample(self, feedback: int, entry, index: int, near_copy: bool) -> Sample:
        name = sample_id(self.config.run, feedback, entry.id, index)
        return Sample(
            id=name,
            run=self.config.run,
            feedback=feedback,
            model_version=0,
            source_id=entry.id,
            index=index,
            seed=seed_of(name),
            label=entry.label,
            class_name=entry.class_name,
            prompt=entry.class_name,
            guidance_scale=2.0,
            steps=20,
            scheduler="ddim",
            strength=0.6,
            weights=WEIGHTS,
            created=self.start,
            nearest_real=entry.id,
            nearest_distance=0.01 if near_copy else 0.3,
            near_copy=near_copy,
        )

    def trainer(self, what: str, start: float, end: float, iteration: int) -> None:
        self.journal.interval("trainer", what, self.start + start, self.start + end, iteration=iteration)

    def select(self, iteration: int, scores: Sequence[float], dropped: Sequence[int]) -> dict[str, int]:
        """Take what has come, drop near copies and the rows `dropped` of the rest; the counts for the metrics."""
        oldest = iteration - self.config.staleness
        if self.config.mode == "offline":
            taken = self.pool.everything()
        else:
            self.journal.dropped(iteration, self.pool.drop_stale(oldest), "stale")
            taken = self.pool.take(oldest)
        copies = [c for c in taken if self.config.drop_near_copies and c.sample.near_copy]
        self.journal.dropped(iteration, copies, "near copy")
        allowed: list[Candidate] = [c for c in taken if not (self.config.drop_near_copies and c.sample.near_copy)]
        scores = scores or [math.nan] * len(allowed)
        self.journal.selection(iteration, allowed, scores, [row not in dropped for row in range(len(allowed))])
        return {"candidates": len(taken), "near_copies": len(taken) - len(allowed), "vog_dropped": len(dropped)}

    def finish(self, iteration: int, counts: dict[str, int] | None = None, **more: object) -> None:
        """The iteration's line of metrics: the fields of `trainer.run.Run.measure`."""
        counts = {"candidates": 0, "near_copies": 0, "vog_dropped": 0, "similarity_dropped": 0} | (counts or {})
        synthetic = counts["candidates"] > 0
        top1 = 0.5 + 0.1 * iteration
        row = {
            "iteration": iteration,
            "updates": 40 * (iteration + 1),
            "learning_rate": 0.1,
            "loss_real": 1.0 / (iteration + 1),
            "loss_synthetic": 2.0 / (iteration + 1) if synthetic else None,
            "train_top1": top1 + 0.1,
            "gradient_real": 3.0 - 0.5 * iteration,
            "gradient_synthetic": 3.5 - 0.5 * iteration if synthetic else None,
            **counts,
            "real_rows": 400,
            "synthetic_rows": 100 if synthetic else 0,
            "lookahead_seen": 200 if synthetic else 0,
            "stale": self.pool.stale,
            "test_top1": top1,
            "worst_case_disparity": 0.8,
            "per_class": [top1 - 0.05, top1 + 0.05],
            "train_val_gap": 0.1,
        }
        self.journal.metrics({k: v for k, v in {**row, **more}.items() if v != "absent"})


def write_run(folder: Path, dataset: Dataset, data: DatasetConfig, **settings: object) -> RunFolder:
    """The run that the module's table describes."""
    run = RunFolder(folder, dataset, data, **settings)
    counts: dict[int, dict[str, int]] = {}
    for iteration in range(4):
        at = 10.0 * iteration
        run.trainer("score", at, at + 1, iteration)
        if iteration in (1, 2):
            run.ask(iteration, range(5))
        if iteration >= 2:
            run.trainer("wait", at + 1, at + 2, iteration)
            if iteration == 2:
                counts[2] = run.select(2, [0.5, 0.1, 0.9, 0.3, 0.2, 0.8, 0.7], dropped=(1, 4))
            else:
                counts[3] = run.select(3, [0.6, 0.4, 0.2, 0.9], dropped=(2,))
            run.trainer("vog", at + 2, at + 3, iteration)
        if iteration == 1:
            run.answer(1, 0, (12, 18), range(4), near_copies=(3,))
        if iteration == 2:
            run.answer(2, 0, (21.5, 25), range(2))
            run.answer(2, 1, (24, 28), [2, 3], failed=True)
            run.answer(1, 1, (26, 30), [4])
        if iteration == 3:
            run.answer(2, 2, (32, 34), [4])
        run.trainer("train", at + 3, at + 9, iteration)
        run.trainer("evaluate", at + 9, at + 10, iteration)
        run.finish(iteration, counts.get(iteration))
    return run
