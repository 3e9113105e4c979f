"""Tunes a generator by reward (DPOK; RL-identity, section 4.2): rollouts, rewards, updates, and guard rails.

The tuned weights count inside a denoising step or a piece of an update only, so that the backend may serve any weights
between two. Knows nothing of jobs, of the dataset's files or of where weight sets are kept.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from generator_service import registry
from generator_service.adapt import resume
from generator_service.backends.interface import Backend, Progress, WeightSet
from generator_service.published_models import PublishedModels
from generator_service.real_images import RealImages
from generator_service.rl import intermediate_sets, rollout
from generator_service.rl.advantage import Advantage
from generator_service.rl.grid import grid
from generator_service.rl.guard import Finding, Guard, Observation
from generator_service.rl.judge import Judge, Verdict
from generator_service.rl.policy import Policy
from generator_service.rl.reverse_process import ReverseProcess
from generator_service.rl.rewards import Reward
from generator_service.rl.trajectories import Replay, Ring, Trajectories
from generator_service.rl.tune_state import History, State, identity
from generator_service.rl.update import Learner, Learnt
from generator_service.rl.value import open_baseline
from protocol.errors import GenerationFailed
from protocol.tuning import TuneJob

log = logging.getLogger(__name__)

Outcome = TypeVar("Outcome")


def tune(
    backend: Backend,
    base: WeightSet,
    real: RealImages,
    classes: Sequence[str],
    job: TuneJob,
    folder: Path,
    unfinished: Path,
    *,
    rewards: Mapping[str, Reward],
    published: PublishedModels,
) -> Generator[Progress, None, tuple[str, dict[str, Any]]]:
    """See `interface.Adaptation`; on a CPU an equal job gives equal bits, resumed or not, unless its features follow a
    model that is published meanwhile.

    Args:
        rewards: the job's, by name, their options bound. published: where the trainer's models lie.

    Raises:
        TrainingDiverged: a loss or gradient is NaN or infinite.
        GenerationFailed: a reward raises or is not finite, or it does not fit into the GPU's memory.
        InvalidRequest: the base cannot be tuned, or not so.
    """
    opened = registry.load(registry.POLICIES, backend.name).opened(backend, base, classes, job)
    with _memory_told(), opened as policy:
        judge = Judge(job, rewards, real, published, policy.space.device, holder=unfinished.name.lstrip("."))
        tuning = Tuning(policy, judge, job, np.unique(real.labels).tolist(), len(classes))
        yield from tuning.run(unfinished, identity(base, real, classes, job))
        kind, metadata = policy.save(folder)
    judge.let_go(all_of_them=True)
    return kind, tuning.metadata() | metadata


@contextmanager
def _memory_told() -> Iterator[None]:
    """Raises GenerationFailed, saying what to do, where the block finds no room in the GPU's memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise GenerationFailed(
            "tuning does not fit into the GPU's memory: lower update.batch_size and rollout.batch_size alike, set "
            'policy.offload = true or policy.keep = "recompute", policy.parameters = "lora", or update.precision = '
            '"bfloat16"'
        ) from error


class Tuning:
    """A policy, its optimiser, and how far they are."""

    def __init__(self, policy: Policy, judge: Judge, job: TuneJob, known: list[int], classes: int):
        """known: labels that have real images. classes: labels in all."""
        self._policy, self._judge, self._job, self._known = policy, judge, job, known
        self._process = ReverseProcess(policy, job.rollout, job.update.precision)
        self._learner = Learner(self._process, job.update)
        self._baseline = open_baseline(
            job.update.baseline, classes, policy.space.latent_shape, job.seed, policy.space.device
        )
        self._trajectories = self._room()
        self._guard = Guard(job.guard)
        self._rng = torch.Generator().manual_seed(job.seed)
        self._history = History()
        self._good: State = policy.state()  # the last one that a check found nothing wrong with

    def _room(self) -> Trajectories:
        """For the transitions of one rollout."""
        job, space = self._job, self._policy.space
        if job.policy.keep == "recompute":
            return Replay(self._process)
        rows = min(job.rollout.identities, len(self._known)) * job.rollout.samples
        size = min(job.rollout.batch_size, rows)
        batches, steps = math.ceil(rows / size), job.rollout.denoising_steps
        return Ring(batches, size, steps, space.latent_shape, space.device, job.policy.offload)

    def run(self, unfinished: Path, identity: str) -> Generator[Progress, None, None]:
        """Tune to the end, from the newest checkpoint in `unfinished`. The policy ends with the last update's weights;
        where a breach ended it, with its last good ones."""
        began = time.monotonic()
        yield from self._begin(unfinished, identity)
        history, job, before = self._history, self._job, self._history.seconds
        while history.step < job.steps and history.stopped is None:
            if history.step % job.refresh_every == 0:
                yield from self._served(self._judge.refresh())
            if not job.checkpoint_every:
                self._judge.let_go()
            told = yield from self._rollout()
            history.seconds = before + time.monotonic() - began
            if job.checkpoint_every and history.step % job.checkpoint_every == 0:
                resume.save(unfinished, history.step, self._state(), identity)
                self._judge.let_go()
            yield Progress(history.step, job.steps, told.pop("loss"), told)
            if job.publish_every and history.step % job.publish_every == 0 and self._to_be_published():
                made = intermediate_sets.write(unfinished, history.step, self._save)
                yield Progress(history.step, job.steps, None, made=made)

    def _begin(self, unfinished: Path, identity: str) -> Generator[Progress, None, None]:
        """Go on where a checkpoint says, or begin; tell of the sets that nobody published."""
        state = resume.load(unfinished, identity)
        yield from self._served(self._judge.open(None if state is None else state["history"]["features"]["exactly"]))
        if state is not None:
            self._restore(state)
            log.info("tuning resumed after rollout %d", self._history.step)
        for made in intermediate_sets.left(unfinished):
            yield Progress(self._history.step, self._job.steps, None, made=made)

    def _rollout(self) -> Generator[Progress, None, dict[str, Any]]:
        """Samples, their rewards, an update, and a look at what came of it; what its event tells."""
        options, history = self._job.rollout, self._history
        wanted = rollout.draw(self._known, options.identities, options.samples, self._rng)
        sampled = rollout.sample(self._process, wanted, options.batch_size, self._trajectories)
        samples = yield from self._served(sampled)
        verdict = yield from self._served(self._judge.judge(samples.images, samples.labels))
        before = self._policy.state()  # what the samples were made with
        advantage = Advantage(self._process, self._baseline, verdict.rewards, self._job.update.baseline == "value")
        learnt = yield from self._served(self._learner.learn(samples, self._trajectories, advantage, self._rng))
        advantage.fit(samples.labels)
        history.step += 1
        history.features = self._judge.features
        history.showed(verdict, learnt.kl)
        findings = self._check(verdict, learnt, before)
        told = _told(verdict, learnt, findings) | {"features_version": self._judge.features["version"]}
        told |= {"learning_rate": self._learner.learning_rate}
        every = self._job.grid_every
        shown = every and (history.step % every == 0 or history.step == 1)
        return told | ({"grid": grid(samples.images, samples.labels.numpy())} if shown else {})

    def _check(self, verdict: Verdict, learnt: Learnt, before: State) -> list[Finding]:
        """What the guard finds; after a breach the last good weights are those of the policy."""
        history, options = self._history, self._job.guard
        observed = Observation(learnt.kl, verdict.diversity, verdict.nearest, verdict.contributions, verdict.total)
        findings = self._guard.check(observed)
        breaches = [finding.message for finding in findings if finding.breach]
        if not breaches:
            self._good, history.good_step = before, history.step - 1
            return findings
        self._policy.restore(self._good)
        if options.on_breach == "rollback" and history.rollbacks < options.rollbacks:
            history.rollbacks += 1
            self._learner.begin_anew(self._learner.learning_rate / 2)
        else:
            history.stopped = "; ".join(breaches)
        log.warning("rollout %d: %s", history.step, "; ".join(breaches))
        return findings

    def _to_be_published(self) -> bool:
        """The set after the last rollout is the job's result."""
        return self._history.step < self._job.steps and self._history.stopped is None

    def _save(self, folder: Path) -> tuple[str, dict[str, Any]]:
        """The last good weights: nobody has looked at samples of newer ones yet, and these are going to be served."""
        now = self._policy.state()
        self._policy.restore(self._good)
        try:
            kind, metadata = self._policy.save(folder)
        finally:
            self._policy.restore(now)
        return kind, self.metadata() | metadata

    def _served(self, pieces: Generator[object, None, Outcome]) -> Generator[Progress, None, Outcome]:
        """The pieces, with room to serve others between them; what they come to."""
        while True:
            try:
                next(pieces)
            except StopIteration as end:
                return end.value
            yield Progress(self._history.step, self._job.steps, None)

    # ------------------------------------------------------------ state

    def _state(self) -> dict[str, Any]:
        return {
            "history": self._history.state(),
            "policy": self._policy.state(),
            "good": self._good,
            "learner": self._learner.state(),
            "baseline": self._baseline.state(),
            "guard": self._guard.state(),
            "rng": self._rng.get_state(),
        }

    def _restore(self, state: dict[str, Any]) -> None:
        self._history = History(**state["history"])
        self._policy.restore(state["policy"])
        self._good = state["good"]
        self._learner.restore(state["learner"])
        self._baseline.restore(state["baseline"])
        self._guard.restore(state["guard"])
        self._rng.set_state(state["rng"])

    def metadata(self) -> dict[str, Any]:
        """What the weight set's metadata tell of the tuning."""
        return self._history.metadata(self._job)


def _told(verdict: Verdict, learnt: Learnt, findings: Sequence[Finding]) -> dict[str, Any]:
    """A rollout as its event tells it."""
    return {
        "loss": learnt.loss,
        "rewards": verdict.components,
        "total": verdict.total,
        "kl": learnt.kl,
        "ratio": learnt.ratio,
        "ratio_max": learnt.ratio_max,
        "clip_share": learnt.clip_share,
        "gradient_norm": learnt.gradient_norm,
        "diversity": verdict.diversity,
        "nearest": verdict.nearest,
        "findings": [asdict(finding) for finding in findings],
    }
