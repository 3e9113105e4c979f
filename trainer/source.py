"""Where an iteration's synthetic samples come from: a live service, a pool made beforehand, or nowhere.

Each source answers the same two calls, so that the loop does not know which mode it runs in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from protocol import codec
from protocol.dataset import Dataset
from protocol.messages import Feedback, MarginalSample
from trainer.feed import Feed
from trainer.parallel import OneProcess
from trainer.pool import Candidate, packed, unpacked
from trainer.settings import TrainerConfig


class Source(Protocol):
    def ask(self, iteration: int, model_version: int, marginal: Sequence[int], scores: Sequence[float]) -> None:
        """Tell what is hard now: dataset indices, most marginal first, and their scores."""
        ...

    def take(self, iteration: int, marginal: Sequence[int]) -> list[Candidate]:
        """The candidates of this iteration, in the order (feedback, source, index)."""
        ...


class RealOnly:
    """No synthetic data: the baseline."""

    def ask(self, iteration: int, model_version: int, marginal: Sequence[int], scores: Sequence[float]) -> None:
        pass

    def take(self, iteration: int, marginal: Sequence[int]) -> list[Candidate]:
        return []


class LiveSource:
    """The generator service, asked every iteration; feedback starts K iterations before stage 2."""

    def __init__(self, config: TrainerConfig, dataset: Dataset, feed: Feed):
        self._config, self._dataset, self._feed = config, dataset, feed
        self._first = config.warmup_iterations - config.staleness

    def ask(self, iteration: int, model_version: int, marginal: Sequence[int], scores: Sequence[float]) -> None:
        if iteration < self._first or iteration >= self._config.iterations - self._config.staleness:
            return  # too early, or nobody would be left to train on the answers
        asked = self._feed.asked(iteration)
        self._feed.post(asked or question(self._config, self._dataset, iteration, model_version, marginal, scores))

    def take(self, iteration: int, marginal: Sequence[int]) -> list[Candidate]:
        return self._feed.take(iteration)


class OfflinePool:
    """A pool made beforehand: m images for every real sample, asked for once. Entries are drawn again and again.

    With match "marginal" an iteration takes the entries whose source is among its marginal samples
    (GenDataAgent appendix G); with "all" it takes the whole pool, which is a static augmentation.
    """

    def __init__(self, config: TrainerConfig, dataset: Dataset, feed: Feed):
        self._match, self._dataset, self._feed = config.pool_match, dataset, feed
        if not feed.pool.complete(0):
            everything = range(len(dataset.samples))
            asked = feed.asked(0) or question(config, dataset, 0, 0, everything, [0.0] * len(everything))
            with feed.journal.timed("wait", iteration=0):
                feed.post(asked)
                feed.take(0)

    def ask(self, iteration: int, model_version: int, marginal: Sequence[int], scores: Sequence[float]) -> None:
        pass

    def take(self, iteration: int, marginal: Sequence[int]) -> list[Candidate]:
        everything = self._feed.pool.everything()
        if self._match == "all":
            return everything
        sources = {self._dataset.samples[index].id for index in marginal}
        return [candidate for candidate in everything if candidate.sample.source_id in sources]


class Shared:
    """The first process's source, for all processes of a run; only that one has it."""

    def __init__(self, processes: OneProcess, source: Source | None):
        self._processes, self._source = processes, source

    def ask(self, iteration: int, model_version: int, marginal: Sequence[int], scores: Sequence[float]) -> None:
        self._processes.first(lambda: self._source.ask(iteration, model_version, marginal, scores))

    def take(self, iteration: int, marginal: Sequence[int]) -> list[Candidate]:
        return self._processes.first(lambda: self._source.take(iteration, marginal), pack=packed, unpack=unpacked)


def question(
    config: TrainerConfig,
    dataset: Dataset,
    iteration: int,
    model_version: int,
    marginal: Sequence[int],
    scores: Sequence[float],
) -> Feedback:
    """The feedback of one iteration (GenDataAgent 2.2)."""
    chosen = [dataset.samples[index] for index in marginal]
    pixels = [
        codec.image_to_base64(dataset.image(index)) if config.feedback.send_pixels else None for index in marginal
    ]
    return Feedback(
        run=config.run,
        feedback=iteration,
        model_version=model_version,
        images_per_sample=config.feedback.images_per_sample,
        model=config.feedback.model,
        samples=[
            MarginalSample(
                sample_id=entry.id,
                label=entry.label,
                class_name=entry.class_name,
                caption=entry.caption,
                score=score,
                pixels=picture,
            )
            for entry, score, picture in zip(chosen, scores, pixels, strict=True)
        ],
    )
