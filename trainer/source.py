"""Where an iteration's synthetic samples come from: a live service, a pool made beforehand, or nowhere; and what the
service is asked about.

Each source answers the same two calls, so that the loop does not know which mode it runs in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from protocol import codec
from protocol.dataset import Dataset
from protocol.errors import GenerationFailed, NotReady
from protocol.messages import ClassShortage, Feedback, MarginalSample, class_source
from trainer.feed import Feed
from trainer.parallel import OneProcess
from trainer.pool import Candidate, Pool, image, packed, unpacked, without_copies
from trainer.settings import TrainerConfig
from trainer.shortages import before_training


@dataclass(frozen=True)
class Wanted:
    """What an iteration would have more of."""

    marginal: Sequence[int]  # dataset indices, most marginal first
    scores: Sequence[float]  # theirs
    classes: Sequence[ClassShortage] = ()  # that are scarce

    @property
    def nothing(self) -> bool:
        return not self.marginal and not self.classes


class Source(Protocol):
    def ask(self, iteration: int, model_version: int, wanted: Wanted) -> None:
        """Tell what is hard now."""
        ...

    def take(self, iteration: int, wanted: Wanted) -> list[Candidate]:
        """The candidates of this iteration, in the order (feedback, source, index)."""
        ...


class RealOnly:
    """No synthetic data: the baseline."""

    def ask(self, iteration: int, model_version: int, wanted: Wanted) -> None:
        pass

    def take(self, iteration: int, wanted: Wanted) -> list[Candidate]:
        return []


class RealSamples:
    """What feedback is about: the samples of the dataset, by index.

    Args:
        send_pixels: their images travel along; false: the service has the same dataset.
    """

    def __init__(self, dataset: Dataset, send_pixels: bool):
        self._dataset, self._send_pixels = dataset, send_pixels

    def named(self, index: int, score: float) -> MarginalSample:
        entry = self._dataset.samples[index]
        return MarginalSample(
            sample_id=entry.id,
            label=entry.label,
            class_name=entry.class_name,
            caption=entry.caption,
            score=score,
            pixels=codec.image_to_base64(self._dataset.image(index)) if self._send_pixels else None,
        )


class PoolMembers:
    """What feedback is about where a pool stands in for the real samples: its members, by index. Their images always
    travel along: the service's dataset does not hold them, and a new sample is to start from what was hard."""

    def __init__(self, members: Sequence[Candidate], dataset: Dataset):
        self._members, self._dataset = members, dataset

    def named(self, index: int, score: float) -> MarginalSample:
        sample = self._members[index].sample
        return MarginalSample(
            sample_id=sample.id,
            label=sample.label,
            class_name=sample.class_name,
            caption=self._dataset.by_id(sample.source_id).caption,
            score=score,
            pixels=codec.image_to_base64(image(self._members[index])),
        )


class LiveSource:
    """The generator service, asked every iteration; feedback starts K iterations before stage 2."""

    def __init__(self, config: TrainerConfig, samples: RealSamples | PoolMembers, feed: Feed):
        self._config, self._samples, self._feed = config, samples, feed
        self._first = config.warmup_iterations - config.staleness

    def ask(self, iteration: int, model_version: int, wanted: Wanted) -> None:
        if iteration < self._first or iteration >= self._config.iterations - self._config.staleness:
            return  # too early, or nobody would be left to train on the answers
        asked = self._feed.asked(iteration)
        if asked is None and not wanted.nothing:
            asked = question(self._config, self._samples, iteration, model_version, wanted)
        if asked is not None:
            self._feed.post(asked)

    def take(self, iteration: int, wanted: Wanted) -> list[Candidate]:
        return self._feed.take(iteration)


class OfflinePool:
    """A pool made beforehand: m images for every real sample, and some for each scarce class. Entries are drawn again
    and again.

    With match "marginal" an iteration takes the entries whose source is among its marginal samples (GenDataAgent
    appendix G) or its scarce classes; with "all" it takes the whole pool, which is a static augmentation.
    """

    def __init__(self, config: TrainerConfig, dataset: Dataset, pool: Pool):
        self._match, self._dataset, self._pool = config.pool_match, dataset, pool

    def ask(self, iteration: int, model_version: int, wanted: Wanted) -> None:
        pass

    def take(self, iteration: int, wanted: Wanted) -> list[Candidate]:
        everything = self._pool.everything()
        if self._match == "all":
            return everything
        sources = {self._dataset.samples[index].id for index in wanted.marginal}
        sources |= {class_source(shortage.class_name) for shortage in wanted.classes}
        return [candidate for candidate in everything if candidate.sample.source_id in sources]


def make_pool(config: TrainerConfig, dataset: Dataset, feed: Feed) -> None:
    """Ask for images of every real sample, and of scarce classes, as feedback 0, and wait for them; a pool that is
    whole is not made again."""
    if not feed.pool.complete(0):
        everything = range(len(dataset) if config.feedback.enabled else 0)
        short = before_training(config, dataset) if config.mode == "offline" else []
        wanted = Wanted(everything, [0.0] * len(everything), short)
        samples = RealSamples(dataset, config.feedback.send_pixels)
        asked = feed.asked(0) or question(config, samples, 0, 0, wanted)
        if config.mode == "synthetic":
            asked = asked.model_copy(update={"images_per_sample": 1})
        feed.post(asked)
        with feed.journal.timed("wait", iteration=0):
            feed.wait(0)


def stand_ins(config: TrainerConfig, dataset: Dataset, feed: Feed) -> tuple[list[Candidate], list[Candidate]]:
    """The samples that stand in for the real ones (GenDataAgent 3.1): one synthetic sample for each, made once. And
    those dropped now as near copies of a real one (if set).

    Raises:
        NotReady: the pool is not whole yet.
        GenerationFailed: it lacks a class.
    """
    make_pool(config, dataset, feed)
    if not feed.pool.complete(0):
        raise NotReady("the pool that is to stand in for the real samples is not whole yet: start the run again later")
    taken = feed.pool.take(0, newest=0)  # none, in a run that is resumed
    whole = [candidate for candidate in feed.pool.everything() if candidate.sample.feedback == 0]
    members, _ = without_copies(whole, config.drop_near_copies)
    new, copies = without_copies(taken, config.drop_near_copies)
    feed.journal.dropped(0, copies, "near copy")
    feed.journal.dropped(0, new, "pool")
    if missing := sorted(set(dataset.classes) - {member.sample.class_name for member in members}):
        raise GenerationFailed(
            f"the pool that is to stand in for the real samples has none of class {', '.join(missing)}: the service's "
            "log says why they failed; start anew with --fresh"
        )
    return members, copies


class Shared:
    """The first process's source, for all processes of a run; only that one has it."""

    def __init__(self, processes: OneProcess, source: Source | None):
        self._processes, self._source = processes, source

    def ask(self, iteration: int, model_version: int, wanted: Wanted) -> None:
        self._processes.first(lambda: self._source.ask(iteration, model_version, wanted))

    def take(self, iteration: int, wanted: Wanted) -> list[Candidate]:
        return self._processes.first(lambda: self._source.take(iteration, wanted), pack=packed, unpack=unpacked)


def question(
    config: TrainerConfig,
    samples: RealSamples | PoolMembers,
    iteration: int,
    model_version: int,
    wanted: Wanted,
) -> Feedback:
    """The feedback of one iteration: hard samples (GenDataAgent 2.2) and scarce classes (ARGen 3)."""
    return Feedback(
        run=config.run,
        feedback=iteration,
        model_version=model_version,
        images_per_sample=config.feedback.images_per_sample,
        model=config.feedback.model,
        samples=[samples.named(index, score) for index, score in zip(wanted.marginal, wanted.scores, strict=True)],
        classes=list(wanted.classes),
    )
