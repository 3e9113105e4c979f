"""How a policy learns from a rollout (DPOK; RL-identity eq. 1): clipped policy gradient, distance to the frozen base.

On weights that have not changed since the rollout a transition's log-probability is that of the rollout, to the bit,
and its ratio exactly 1: where the pieces that are learnt from are the batches that were sampled, that is where
`update.batch_size` is at least `rollout.batch_size` and less than twice that. Other sizes differ in the last bits, as
batches of other sizes do. Knows nothing of rewards, of rollouts' number or of checkpoints.

    B transitions of a piece, C channels of the latents
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from generator_service.rl import dpok, logprob
from generator_service.rl.reverse_process import ReverseProcess
from generator_service.rl.rollout import Rollout
from generator_service.rl.trajectories import Trajectories, Transitions, in_pieces
from protocol.errors import TrainingDiverged
from protocol.tuning import UpdateOptions

Advantage = Callable[[Transitions], torch.Tensor]  # [B], reward minus baseline
SMALLEST_SCALE = 2.0**-10  # of float16's losses; what overflows even so is no matter of the scale


@dataclass(frozen=True)
class Learnt:
    """Over all of a rollout's updates."""

    loss: float  # mean
    ratio: float  # mean
    ratio_max: float  # the one farthest above 1
    clip_share: float  # of the transitions that had no gradient
    kl: float  # mean squared distance to the frozen base's predictions
    gradient_norm: float  # the largest, before it was clipped


class Sums:
    """Statistics, kept on the device until somebody asks."""

    def __init__(self) -> None:
        self.count = 0
        self._sums: torch.Tensor | float = 0.0
        self._ratio_max: torch.Tensor = torch.tensor(-math.inf)
        self.norms: list[float] = []

    def add(self, loss: torch.Tensor, surrogate: dpok.Surrogate, distance: torch.Tensor) -> None:
        """Each [B]."""
        columns = torch.stack([loss, surrogate.ratio, surrogate.clipped.float(), distance]).detach()
        self._sums = self._sums + columns.sum(1)
        self._ratio_max = torch.maximum(self._ratio_max.to(columns.device), surrogate.ratio.max())
        self.count += len(loss)

    def told(self) -> Learnt:
        loss, ratio, clipped, distance = (torch.as_tensor(self._sums) / self.count).tolist()
        return Learnt(loss, ratio, self._ratio_max.item(), clipped, distance, max(self.norms, default=0.0))


class Learner:
    """The policy's optimiser."""

    def __init__(self, process: ReverseProcess, options: UpdateOptions):
        self._process, self._policy, self._options = process, process.policy, options
        device = self._policy.space.device
        half = options.precision == "float16"  # small gradients vanish in it
        self._scaler = torch.amp.GradScaler(device.type, enabled=half)
        self.begin_anew(options.learning_rate)

    def begin_anew(self, learning_rate: float) -> None:
        """An optimiser that knows nothing of what was learnt before."""
        self.learning_rate = learning_rate
        self._optimizer = torch.optim.AdamW(self._policy.parameters.values(), lr=learning_rate, weight_decay=0.0)

    def learn(
        self, rollout: Rollout, trajectories: Trajectories, advantage: Advantage, rng: torch.Generator
    ) -> Generator[None, None, Learnt]:
        """Some passes over a rollout's transitions, in an order that rng draws; yields after each piece.

        At the first optimiser step every ratio is 1. Later ones find the weights displaced, and where a step's variance
        is small the gradient is many times as large; Adam's second moments would remember that for long, and learning
        would stall. So no later gradient counts for more than the first, unless clipping is off.

        Raises TrainingDiverged on a NaN or infinite loss or gradient, which is not applied.
        """
        sums = Sums()
        plan = [chosen for _ in range(self._options.epochs) for chosen in self._shuffled(rollout, rng)]
        for number, chosen in enumerate(plan, 1):
            yield from self.accumulate(rollout, trajectories, chosen, advantage, sums)
            if number < len(plan):
                trajectories.weights_change()
            self._apply(sums)
        return sums.told()

    def _shuffled(self, rollout: Rollout, rng: torch.Generator) -> list[list[tuple[int, int]]]:
        """For each optimiser step the (batch, denoising step) pairs that it learns from; those of a batch ascend, as
        the order within a sum is of no interest, and may be the order in which they are made again."""
        pairs = [(batch, step) for batch in range(len(rollout.batches)) for step in self._process.learnt]
        order = torch.randperm(len(pairs), generator=rng)
        parts = order.tensor_split(min(self._options.optimizer_steps, len(pairs)))
        return [sorted(pairs[at] for at in part.tolist()) for part in parts]

    def accumulate(
        self,
        rollout: Rollout,
        trajectories: Trajectories,
        chosen: Sequence[tuple[int, int]],
        advantage: Advantage,
        sums: Sums,
    ) -> Generator[None, None, None]:
        """Add up the gradient of the mean loss over the chosen (batch, step) pairs; yields after each piece."""
        steps_of = defaultdict(list)
        for batch, step in chosen:
            steps_of[batch].append(step)
        total = sum(len(rollout.batches[batch].rows) for batch, _ in chosen)
        self._optimizer.zero_grad()
        for batch, steps in steps_of.items():
            parts = trajectories.read(batch, rollout.batches[batch], steps)
            for piece in in_pieces(parts, self._options.batch_size, self._process.options.batch_size):
                self._backward(piece, advantage(piece), total, sums)
                yield

    def _backward(self, piece: Transitions, advantage: torch.Tensor, total: int, sums: Sums) -> None:
        options, channels = self._options, piece.before.shape[1]
        with self._policy.in_use():
            output, transition = self._process.forward(piece.before, piece.labels, piece.steps)
            reference = self._process.reference(piece.before, piece.labels, piece.steps)
            now = logprob.log_prob(transition, piece.after)
            surrogate = dpok.surrogate(now, piece.log_prob, advantage, options.clip)
            distance = dpok.distance(output, reference, channels)
            losses = surrogate.loss + options.kl * distance
            self._scaler.scale(losses.sum() / total).backward()
        sums.add(losses, surrogate, distance)

    def _apply(self, sums: Sums) -> None:
        """One optimiser step with the gradient as it has been added up, clipped."""
        self._scaler.unscale_(self._optimizer)
        parameters = list(self._policy.parameters.values())
        norm = torch.nn.utils.clip_grad_norm_(parameters, self._largest(sums)).item()
        loss = sums.told().loss
        overflown = self._scaler.is_enabled() and self._scaler.get_scale() > SMALLEST_SCALE
        if not math.isfinite(loss) or not (math.isfinite(norm) or overflown):
            self._optimizer.zero_grad()
            raise TrainingDiverged(
                f"tuning: loss {loss}, gradient of norm {norm}; lower update.learning_rate or raise update.kl"
            )
        self._scaler.step(self._optimizer)  # of a gradient that float16 could not hold: nothing, and a smaller scale
        self._scaler.update()
        self._optimizer.zero_grad()
        if math.isfinite(norm):
            sums.norms.append(norm)

    def _largest(self, sums: Sums) -> float:
        """Norm that the next gradient may have."""
        most = self._options.max_gradient_norm
        return min(most, *sums.norms[:1], math.inf) if most else math.inf

    # ------------------------------------------------------------ state

    def state(self) -> dict[str, Any]:
        """For `restore`."""
        return {
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "learning_rate": self.learning_rate,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.begin_anew(state["learning_rate"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
