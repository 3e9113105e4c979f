"""A rollout of tuning by reward with its update: by our code, and in the plain shape of the same algorithm.

The plain shape differs in three parts: buffers that grow by concatenation at each denoising step, reward features of
one image at a time, and guidance as two calls of the model. Each part can also be put into our code, alone. Same model,
same formulas, hence the same numbers but for rounding. Knows nothing of clocks.

    n rows of a rollout, B of one batch, T denoising steps, C channels of the latents, h w their height and width
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from generator_service import registry
from generator_service.backends.dit import DiTBackend
from generator_service.backends.interface import WeightSet
from generator_service.published_models import PublishedModels
from generator_service.real_images import RealImages
from generator_service.rl import dpok, logprob, rollout
from generator_service.rl.advantage import Advantage
from generator_service.rl.dit_policy import DiTPolicy
from generator_service.rl.features import Extractor
from generator_service.rl.judge import Judge
from generator_service.rl.policy import Policy
from generator_service.rl.reverse_process import ReverseProcess, RowNoise, next_latents
from generator_service.rl.reward_terms import reward_functions
from generator_service.rl.rollout import Rollout, Wanted
from generator_service.rl.trajectories import Ring, SampledBatch, Trajectories, Transitions
from generator_service.rl.update import Learner, Learnt, Sums
from generator_service.rl.value import NoBaseline
from protocol.tuning import TuneJob

Outcome = TypeVar("Outcome")
Part = Literal["concatenation", "one image at a time", "two calls"]
PARTS: tuple[Part, ...] = ("concatenation", "one image at a time", "two calls")
MOVED = 0.02  # how far parameters are from where training begins, so that distance and gradients are none of them 0


def run(pieces: Generator[object, None, Outcome]) -> Outcome:
    """To its end."""
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            return end.value


@dataclass(frozen=True)
class Numbers:
    """What a rollout came to, and the gradient that was learnt from it; before the optimiser's step."""

    images: np.ndarray  # uint8 [n, H, W, 3]
    rewards: Tensor  # float32 [n]
    loss: float
    gradient: Tensor  # float32, of all parameters one after the other


@dataclass(frozen=True)
class Workplace:
    """What both shapes work on."""

    policy: DiTPolicy
    job: TuneJob  # baseline "none", one optimiser step, one epoch
    wanted: Wanted
    null: int  # label of the null class
    judge: Callable[[bool], Judge]  # whether it looks at one image at a time

    def gradient(self) -> Tensor:
        """What has been added up, which is then gone."""
        parameters = self.policy.parameters.values()
        found = torch.cat([value.grad.flatten() for value in parameters if value.grad is not None])
        for value in parameters:
            value.grad = None
        return found


@contextmanager
def opened(backend: DiTBackend, base: WeightSet, real: RealImages, job: TuneJob, place: Path) -> Iterator[Workplace]:
    """`place`: a folder, which stays empty."""
    assert (job.update.baseline, job.update.optimizer_steps, job.update.epochs) == ("none", 1, 1)
    rng = torch.Generator().manual_seed(job.seed)
    options, known = job.rollout, np.unique(real.labels).tolist()
    with DiTPolicy.opened(backend, base, base.classes, job) as policy:
        with torch.no_grad():
            for value in policy.parameters.values():
                value.add_(torch.randn(value.shape, generator=rng).to(value.device) * MOVED)

        def judge(one_at_a_time: bool) -> Judge:
            functions, published = reward_functions(job, registry.REWARDS), PublishedModels(place)
            made = Judge(job, functions, real, published, policy.space.device, holder="bench")
            run(made.open())
            assert made.extractor is not None
            made.extractor = OneAtATime(**vars(made.extractor)) if one_at_a_time else made.extractor
            return made

        wanted = rollout.draw(known, options.identities, options.samples, rng)
        yield Workplace(policy, job, wanted, len(base.classes), judge)


# ---------------------------------------------------------------- ours


class Ours:
    """As `tune.Tuning` does it, with the product's own parts, but for one that is named."""

    def __init__(self, place: Workplace, plain: Part | None = None):
        self._place, job = place, place.job
        policy: Policy = TwoCalls(place.policy, place.null) if plain == "two calls" else place.policy
        self.process = ReverseProcess(policy, job.rollout, job.update.precision)
        self._learner = Learner(self.process, job.update)
        self._judge = place.judge(plain == "one image at a time")
        self.trajectories = Concatenated() if plain == "concatenation" else self._ring()
        self._rng = torch.Generator().manual_seed(job.seed)

    def _ring(self) -> Trajectories:
        rows, options, space = len(self._place.wanted.labels), self._place.job.rollout, self._place.policy.space
        size, steps, offload = min(options.batch_size, rows), options.denoising_steps, self._place.job.policy.offload
        return Ring(math.ceil(rows / size), size, steps, space.latent_shape, space.device, offload)

    def __call__(self) -> Learnt:
        """A rollout, its rewards, and its update."""
        made = self.sample()
        return self.learn(made, self.rewards(made))

    def sample(self) -> Rollout:
        batch_size = self._place.job.rollout.batch_size
        return run(rollout.sample(self.process, self._place.wanted, batch_size, self.trajectories))

    def rewards(self, made: Rollout) -> Tensor:
        """float32 [n]."""
        return run(self._judge.judge(made.images, made.labels)).rewards

    def learn(self, made: Rollout, rewards: Tensor) -> Learnt:
        advantage = Advantage(self.process, NoBaseline(), rewards, of_latents=False)
        return run(self._learner.learn(made, self.trajectories, advantage, self._rng))

    def numbers(self) -> Numbers:
        """Those of the same work, without the optimiser's step."""
        made = self.sample()
        rewards, sums = self.rewards(made), Sums()
        advantage = Advantage(self.process, NoBaseline(), rewards, of_latents=False)
        pairs = [(batch, step) for batch in range(len(made.batches)) for step in self.process.learnt]
        run(self._learner.accumulate(made, self.trajectories, pairs, advantage, sums))
        return Numbers(made.images, rewards, sums.told().loss, self._place.gradient())

    def replayed(self) -> tuple[float, float]:
        """How far the log-probability of a transition, computed anew on unchanged weights as an update does, is from
        that of its rollout, and how far its ratio from 1: the largest absolute values."""
        made, off, ratio_off = self.sample(), 0.0, 0.0
        for number, batch in enumerate(made.batches):
            for piece in self.trajectories.read(number, batch, self.process.learnt):
                with self.process.policy.in_use():
                    _, transition = self.process.forward(piece.before, piece.labels, piece.steps)
                difference = (logprob.log_prob(transition, piece.after) - piece.log_prob).detach()
                off = max(off, difference.abs().max().item())
                ratio_off = max(ratio_off, (difference.exp() - 1).abs().max().item())
        return off, ratio_off


# ---------------------------------------------------------------- the plain parts


class TwoCalls:
    """A policy whose guidance calls its model twice: for the class, then for none. See `policy.Policy`."""

    def __init__(self, policy: DiTPolicy, null: int):
        self._policy, self._null = policy, null
        self.space, self.parameters, self.learned_variance = policy.space, policy.parameters, policy.learned_variance

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    def in_use(self) -> AbstractContextManager[None]:
        return self._policy.in_use()

    def predict(self, latents: Tensor, times: Tensor, labels: Tensor, guidance_scale: float) -> Tensor:
        return self._guided(self._policy.predict, latents, times, labels, guidance_scale)

    def reference(self, latents: Tensor, times: Tensor, labels: Tensor, guidance_scale: float) -> Tensor:
        return self._guided(self._policy.reference, latents, times, labels, guidance_scale)

    def _guided(
        self, says: Callable[..., Tensor], latents: Tensor, times: Tensor, labels: Tensor, guidance_scale: float
    ) -> Tensor:
        conditional = says(latents, times, labels, 1.0)
        if guidance_scale <= 1:
            return conditional
        unconditional = says(latents, times, torch.full_like(labels, self._null), 1.0)
        (wanted, variance), free = conditional.tensor_split([latents.shape[1]], 1), unconditional[:, : latents.shape[1]]
        return torch.cat([free + guidance_scale * (wanted - free), variance], 1)


class OneAtATime(Extractor):
    def __call__(self, images: np.ndarray) -> Tensor:
        parent = super().__call__
        return torch.cat([parent(image[None]) for image in images])


class Concatenated:
    """Transitions of a rollout in two tensors that grow at every step. See `trajectories.Trajectories`."""

    def begin(self, batch: int, first: Tensor) -> None:
        if batch == 0:
            self._before, self._after, self._starts = first[:0], first[:0], list[int]()
        self._starts.append(len(self._before))
        self._latents = first

    def add(self, batch: int, step: int, latents: Tensor) -> None:
        self._before = torch.cat([self._before, self._latents])
        self._after = torch.cat([self._after, latents])
        self._latents = latents

    def read(self, number: int, batch: SampledBatch, steps: Sequence[int]) -> Iterator[Transitions]:
        size = len(batch.rows)
        for step in steps:
            rows = slice(self._starts[number] + step * size, self._starts[number] + (step + 1) * size)
            yield batch.transitions(step, self._before[rows], self._after[rows])

    def weights_change(self) -> None:
        pass


# ---------------------------------------------------------------- all of them together, written out


@dataclass
class Buffers:
    """The transitions of a rollout, m of them so far. They grow."""

    before: Tensor  # float32 [m, C, h, w]
    after: Tensor  # float32 [m, C, h, w]
    steps: Tensor  # int64 [m], which say the times
    labels: Tensor  # int64 [m]
    rows: Tensor  # int64 [m], of the rollout
    log_prob: Tensor  # float32 [m]

    def add(self, **columns: Tensor) -> None:
        for name, values in columns.items():
            setattr(self, name, torch.cat([getattr(self, name), values]))


class Plain:
    def __init__(self, place: Workplace):
        self._place, job = place, place.job
        self._process = ReverseProcess(TwoCalls(place.policy, place.null), job.rollout, job.update.precision)
        self._judge = place.judge(True)
        self._parameters = list(place.policy.parameters.values())
        self._optimizer = torch.optim.AdamW(self._parameters, lr=job.update.learning_rate, weight_decay=0.0)

    def __call__(self) -> None:
        """A rollout, its rewards, and its update."""
        self._accumulate()
        torch.nn.utils.clip_grad_norm_(self._parameters, self._place.job.update.max_gradient_norm or math.inf)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def numbers(self) -> Numbers:
        """Those of the same work, without the optimiser's step."""
        images, rewards, loss = self._accumulate()
        return Numbers(images, rewards, loss, self._place.gradient())

    def _sample(self) -> tuple[Buffers, np.ndarray]:
        wanted, process = self._place.wanted, self._process
        policy, device, shape = process.policy, process.policy.space.device, process.policy.space.latent_shape
        values, numbers = torch.zeros(0, device=device), torch.zeros(0, dtype=torch.int64, device=device)
        latents_kept = values.reshape(0, *shape)
        kept, images = Buffers(latents_kept, latents_kept, numbers, numbers, numbers, values), []
        for rows in torch.arange(len(wanted.labels)).split(process.options.batch_size):
            noise = RowNoise([wanted.seeds[row] for row in rows], shape, device)
            rows, labels, latents = rows.to(device), wanted.labels[rows].to(device), noise.draw()
            for step in range(len(process.times)):
                steps = torch.full_like(labels, step)
                with torch.no_grad(), policy.in_use():
                    _, transition = process.forward(latents, labels, steps)
                    after = next_latents(transition, noise.draw())
                    if step in process.learnt:
                        log_prob = logprob.log_prob(transition, after)
                        kept.add(before=latents, after=after, steps=steps, labels=labels, rows=rows, log_prob=log_prob)
                latents = after
            levels = ((policy.space.decode(latents) + 1) * 127.5).round().to(torch.uint8)
            images.append(levels.permute(0, 2, 3, 1).cpu().numpy())
        return kept, np.concatenate(images)

    def _accumulate(self) -> tuple[np.ndarray, Tensor, float]:
        """Images, rewards and mean loss; the gradient is in the parameters."""
        with torch.no_grad():
            kept, images = self._sample()
        rewards = run(self._judge.judge(images, self._place.wanted.labels)).rewards
        options, policy, count, total = self._place.job.update, self._process.policy, len(kept.rows), 0.0
        for at in torch.arange(count, device=kept.rows.device).split(options.batch_size):
            before, labels, steps = kept.before[at], kept.labels[at], kept.steps[at]
            with policy.in_use():
                output, transition = self._process.forward(before, labels, steps)
                reference = self._process.reference(before, labels, steps)
                now = logprob.log_prob(transition, kept.after[at])
                advantage = rewards.to(now.device)[kept.rows[at]]
                surrogate = dpok.surrogate(now, kept.log_prob[at], advantage, options.clip)
                losses = surrogate.loss + options.kl * dpok.distance(output, reference, before.shape[1])
                (losses.sum() / count).backward()
            total += losses.detach().sum().item()
        return images, rewards, total / count
