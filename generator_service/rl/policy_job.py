"""Learns a sampling policy (ARGen Algorithm 1, stage 1): draws actions, has their clips judged, and updates.

Clips are made in batches between which the backend serves others. Knows nothing of jobs, of the dataset's files or of
where weight sets are kept.

    B pairs of an update, K candidates of each, V pairs that the policy is measured on, A actions
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from generator_service.adapt import resume
from generator_service.backends.interface import Backend, Progress, Row, WeightSet
from generator_service.faces.interface import open_reader
from generator_service.real_images import RealImages
from generator_service.rl import policy_validation
from generator_service.rl.clip_judge import ClipJudge, Key
from generator_service.rl.clip_pairs import Pair, Source
from generator_service.rl.clip_rewards import ClipReward, relative
from generator_service.rl.reinforce import Learner, compared
from generator_service.rl.sampling_policy import RandomPolicy, SamplingPolicy, Sizes, stacked, write_policy
from protocol.policy import PolicyJob
from protocol.tuning import ASIDE

log = logging.getLogger(__name__)

Outcome = TypeVar("Outcome")
State = tuple[torch.Tensor, torch.Tensor]
KIND = "policy"  # of the weight sets
KEEP_BYTES = 2**30  # of states kept in memory
SETTLED = 0.1  # of the entropy of an indifferent policy: below it, hardly anything else is drawn any more


def learn_policy(
    backend: Backend,
    base: WeightSet,
    real: RealImages,
    classes: Sequence[str],
    job: PolicyJob,
    folder: Path,
    unfinished: Path,
    *,
    rewards: Mapping[str, ClipReward],
    source: Source,
) -> Generator[Progress, None, tuple[str, dict[str, Any]]]:
    """See `interface.Adaptation`; on a CPU an equal job gives equal bits, resumed or not.

    Args:
        rewards: the job's, by name, their options bound. source: what states are made of; it has been checked.

    Raises:
        TrainingDiverged: a loss or gradient is not finite.
        GenerationFailed: a reward fails, or a clip does not fit into the GPU's memory.
        InvalidRequest: the sampler cannot take one of the numbers of steps.
    """
    train, held_out = source.split(job)
    pairs = [*train, *held_out]
    latents, text = States(backend, base, source, pairs)[0]
    sizes = Sizes(
        actions=job.actions, method=job.method, channels=len(latents), text_width=text.shape[1], seed=job.seed
    )
    about = {"people": len({pair.person for pair in pairs}), "pairs": len(train), "classes": _classes(pairs)}
    told = {"method": job.method, "options": job.model_dump(mode="json", exclude=ASIDE)} | about
    if job.method == "random":
        write_policy(folder, RandomPolicy(sizes))
        return KIND, told
    assert source.faces is not None
    reader = open_reader(source.faces)
    pairs = yield from _served(source.worded(pairs, job, unfinished), lambda: Progress(0, job.steps, None))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        policy = SamplingPolicy(sizes)
    identity = "\n".join([job.model_dump_json(exclude=ASIDE), base.ref.digest, source.digest(), reader.identity])
    judge = ClipJudge(backend, base, source, reader, rewards, job, pairs, policy.actions, unfinished, identity)
    learning = Learning(policy, judge, States(backend, base, source, pairs), list(rewards), job, len(train))
    yield from learning.run(unfinished, identity)
    write_policy(folder, policy)
    return KIND, told | {"faces": reader.identity} | learning.metadata()


def _classes(pairs: Sequence[Pair]) -> list[str]:
    return sorted({pair.class_name for pair in pairs})


def _served(
    pieces: Generator[object, None, Outcome], between: Callable[[], Progress]
) -> Generator[Progress, None, Outcome]:
    """The pieces, with room to serve others between them; what they come to."""
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            return end.value
        yield between()


class States:
    """What the policy sees of each pair, on the CPU: computed alone, so that it never depends on others, and kept while
    there is room."""

    def __init__(self, backend: Backend, base: WeightSet, source: Source, pairs: Sequence[Pair]):
        self._backend, self._base, self._source, self._pairs = backend, base, source, pairs
        self._kept: dict[int, State] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, pair: int) -> State:
        """Latents [C, h, w] and text [T, D]."""
        if pair in self._kept:
            return self._kept[pair]
        wanted = self._pairs[pair]
        row = Row(seed=0, label=None, prompt=wanted.prompt, image=self._source.first_frame(wanted))
        latents, text = (part[0].cpu() for part in self._backend.state(self._base, [row]))
        if self._bytes < KEEP_BYTES:
            self._kept[pair] = latents, text
            self._bytes += latents.nbytes + text.nbytes
        return latents, text

    def of(self, pairs: Sequence[int]) -> State:
        """[B, C, h, w] and [B, T, D]."""
        return stacked([self[pair] for pair in pairs])


@dataclass
class History:
    """What has happened so far."""

    step: int = 0  # updates done
    first: dict[str, Any] = field(default_factory=dict)  # what the first one showed
    last: dict[str, Any] = field(default_factory=dict)  # and the last one
    validation: dict[str, Any] = field(default_factory=dict)  # the last measurement
    seconds: float = 0.0  # what was served meanwhile counts too


class Learning:
    """A policy, its optimiser, and how far they are."""

    def __init__(
        self,
        policy: SamplingPolicy,
        judge: ClipJudge,
        states: States,
        names: Sequence[str],
        job: PolicyJob,
        train: int,
    ):
        """names: of the rewards. train: how many of the pairs are learnt from; the others it is measured on."""
        self._policy, self._judge, self._states, self._names = policy, judge, states, names
        self._job, self._train = job, train
        self._held_out = range(train, len(states))
        self._learner = Learner(policy, job.learning_rate)
        self._rng = torch.Generator().manual_seed(job.seed)
        self._history = History()
        self._table = np.empty((0, len(policy.actions)))  # [V, A], once measured

    def run(self, unfinished: Path, identity: str) -> Generator[Progress, None, None]:
        """Learn to the end, from the newest checkpoint in `unfinished`."""
        began, history, job = time.monotonic(), self._history, self._job
        if (state := resume.load(unfinished, identity)) is not None:
            self._restore(state)
            history = self._history
            log.info("learning a policy resumed after update %d", history.step)
        before = history.seconds
        if not len(self._table):
            self._table = yield from self._tabulated()
            if job.checkpoint_every:
                resume.save(unfinished, 0, self._state(), identity)
        while history.step < job.steps:
            told = yield from self._update()
            history.step += 1
            if history.step % job.validate_every == 0 or history.step == job.steps:
                told |= self._validated(told["entropy"])
            history.seconds = before + time.monotonic() - began
            if job.checkpoint_every and history.step % job.checkpoint_every == 0:
                resume.save(unfinished, history.step, self._state(), identity)
            yield Progress(history.step, job.steps, told.pop("loss"), told)

    def _update(self) -> Generator[Progress, None, dict[str, Any]]:
        """Lines 3 to 9; what its event tells."""
        job, policy = self._job, self._policy
        pairs = torch.randint(0, self._train, (job.batch_size,), generator=self._rng).tolist()
        state = self._states.of(pairs)
        chosen = policy.sample(*state, job.candidates, self._rng)
        keys = [[(pair, action) for action in row] for pair, row in zip(pairs, chosen.tolist(), strict=True)]
        worth = yield from self._worth([key for row in keys for key in row], self._history.step + 1)
        rewards = np.array([[self._judge.total(worth[key]) for key in row] for row in keys])
        learnt = relative(rewards, job.top, job.penalty)
        entropy = float(policy.entropy(*state).mean())
        loss = self._learner.learn(*state, chosen, compared(torch.from_numpy(learnt), job.baseline))
        means = np.mean([worth[key] for row in keys for key in row], axis=0).tolist()
        told = {
            "reward": float(rewards.mean()),  # eq. 18 without penalty
            "rewarded": float(learnt.mean()),  # with it
            "rewards": dict(zip(self._names, means, strict=True)),
            "entropy": entropy,
        }
        self._history.first = self._history.first or told
        self._history.last = told
        return told | {"loss": loss, "clips": self._judge.made}

    def _worth(self, keys: Sequence[Key], draw: int) -> Generator[Progress, None, dict[Key, np.ndarray]]:
        def between() -> Progress:
            return Progress(self._history.step, self._job.steps, None, {"clips": self._judge.made})

        return (yield from _served(self._judge.worth(keys, draw), between))

    def _tabulated(self) -> Generator[Progress, None, np.ndarray]:
        """The reward of every action in each state that is measured: [V, A]."""
        actions = range(len(self._policy.actions))
        worth = yield from self._worth([(pair, action) for pair in self._held_out for action in actions], 0)
        return np.array([[self._judge.total(worth[pair, action]) for action in actions] for pair in self._held_out])

    def _validated(self, entropy: float) -> dict[str, Any]:
        """What an event tells of the policy in the states that it is measured on."""
        chosen, history = self._chosen(), self._history
        history.validation = policy_validation.report(self._table, chosen)
        settled = entropy < SETTLED * math.log(len(self._policy.actions))
        if self._job.baseline != "none" or not settled or not policy_validation.misses(self._table, chosen):
            return {"validation": history.validation}
        message = (
            "the policy has settled on one action for every state, and another one is worth more: without a baseline "
            'whatever is drawn is learnt while rewards are above 0; try baseline = "state", or a lower learning_rate'
        )
        return {
            "validation": history.validation,
            "findings": [{"kind": "settled", "message": message, "breach": False}],
        }

    def _chosen(self) -> np.ndarray:
        """The policy's action in each of them: int64 [V]."""
        return np.array([int(self._policy.likeliest(*self._states.of([pair]))) for pair in self._held_out])

    # ------------------------------------------------------------ state

    def _state(self) -> dict[str, Any]:
        return {
            "history": asdict(self._history),
            "learner": self._learner.state(),
            "made": self._judge.made,
            "table": torch.from_numpy(self._table),
            "rng": self._rng.get_state(),
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        self._history = History(**state["history"])
        self._learner.restore(state["learner"])
        self._judge.made = max(self._judge.made, state["made"])
        self._table = state["table"].numpy()
        self._rng.set_state(state["rng"])

    def metadata(self) -> dict[str, Any]:
        """What the weight set's metadata tell of the learning."""
        history = self._history
        measured = policy_validation.each_action(self._table, self._chosen(), self._policy.actions)
        return {
            "step": history.step,
            "first": history.first,
            **history.last,
            "validation": history.validation | {"actions": measured},
            "clips": self._judge.made,
            "seconds": history.seconds,
        }
