"""Clips from a text-to-video model, one frame after the other, each made beside the frames before it (ARGen 3.1).

A queue holds the clean latents of the last K frames; it begins as K times the given frame. In each denoising step they
get that step's noise and stand in the first K places of the model's window (eq. 5), so that its temporal layers make
the frame in the last place go on from them. Once clean, that frame joins the queue, and the oldest leaves it.

Only the last place is ever denoised, for the others are replaced before the model sees them again. Knows nothing of
checkpoints or prompts: the backend brings a function that predicts.

    B batch, C channels, K = window - 1 frames that condition, M frames of a clip, h w in latents
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from diffusers import DDIMScheduler, SchedulerMixin

from generator_service.backends import denoising

SAMPLERS = ("ddim", "euler", "euler-a")
"""Those that look at one step alone. The others extrapolate from what the model said in the steps before, when the
frames beside the new one had other noise; nor can they go back a step, as resampling does."""

Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(latents [n B, C, K + 1, h, w], times [n B]) -> the model's output, of the latents' shape. Guided: n = 2, and the
first B rows are conditional, the others not; else n = 1."""


@dataclass(frozen=True)
class Process:
    """How the frames of a batch are denoised."""

    samplers: list[SchedulerMixin]  # one of each time that a step is taken, 1 + resampling: they count their steps
    times: torch.Tensor  # [steps], descending
    signal: list[float]  # [steps + 1]: factor of the clean latents in those before each step, and after the last
    noise: list[float]  # [steps + 1]: factor of the noise in them

    @classmethod
    def begin(cls, fresh: Callable[[], SchedulerMixin], steps: int, resampling: int, device: torch.device) -> Process:
        """
        Args:
            fresh: makes one of `SAMPLERS`.

        Raises InvalidRequest when the sampler cannot take so many steps.
        """
        samplers = [fresh() for _ in range(1 + resampling)]
        times = denoising.timesteps(samplers[0], steps, device)
        return cls(samplers, times, *_levels(samplers[0], times))

    @property
    def calls(self) -> int:
        """Steps of one frame, all repeats of them."""
        return len(self.times) * len(self.samplers)

    def again(self) -> None:
        """To the first step."""
        for sampler in self.samplers:
            sampler.set_timesteps(len(self.times), device=self.times.device)

    def noised(self, clean: torch.Tensor, noise: torch.Tensor, step: int) -> torch.Tensor:
        """Clean latents as they are before a step (eq. 5): of the same shape."""
        return self.signal[step] * clean + self.noise[step] * noise

    def renoised(self, latents: torch.Tensor, noise: torch.Tensor, step: int) -> torch.Tensor:
        """Latents that have taken a step as they are before it again: q(z_t | z_t-1), of the same shape."""
        kept = self.signal[step] / self.signal[step + 1]
        added = max(0.0, self.noise[step] ** 2 - (kept * self.noise[step + 1]) ** 2)
        return kept * latents + math.sqrt(added) * noise


@dataclass
class Continuation:
    """A batch of clips that are gone on with."""

    process: Process
    predict: Predict
    sources: Sequence[torch.Generator]  # of each row's noise, on the CPU, so that it never depends on batch-mates
    report: Callable[[], None]  # called after each step
    options: dict[str, object] = field(init=False)  # of the samplers' `step`

    def __post_init__(self) -> None:
        self.options = denoising.step_options(self.process.samplers[0], list(self.sources))

    def frames(self, first: torch.Tensor, guidance: torch.Tensor, window: int) -> torch.Tensor:
        """The frames after the first: clean latents float32 [B, M - 1, C, h, w].

        Args:
            first: clean latents of the given frames, float32 [B, C, h, w].
            guidance: of each frame, the given one included, float32 [B, M] on the CPU; 1 and less: none.
            window: frames that the model sees at once, K + 1.
        """
        queue = first[:, :, None].expand(-1, -1, window - 1, -1, -1)
        made = []
        for scales in guidance.clamp(min=1).unbind(dim=1)[1:]:
            column = scales[:, None, None, None].to(first.device) if (scales > 1).any() else None
            made.append(self._next(queue, column))
            queue = torch.cat([queue[:, :, 1:], made[-1][:, :, None]], dim=2)
        return torch.stack(made, dim=1)

    def _next(self, queue: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
        """The frame after those of the queue [B, C, K, h, w]: clean latents [B, C, h, w].

        It starts as the last of them does, noised to the first step. Each step draws noise anew.
        """
        process = self.process
        process.again()
        given = process.noised(queue, self._drawn(queue), 0)
        latents = given[:, :, -1]
        for step, time in enumerate(process.times):
            for repeat, sampler in enumerate(process.samplers):
                if repeat > 0:
                    latents = process.renoised(latents, self._drawn(latents), step)
                if repeat > 0 or step > 0:
                    given = process.noised(queue, self._drawn(queue), step)
                inputs = sampler.scale_model_input(torch.cat([given, latents[:, :, None]], dim=2), time)
                output = self._guided(inputs, time, scales)
                latents = sampler.step(output, time, latents, **self.options).prev_sample
                self.report()
        return latents

    def _guided(self, inputs: torch.Tensor, time: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
        """What the model says of the last frame, guided (eq. 11): [B, C, h, w]. None: one pass, without guidance."""
        if scales is None:
            return self.predict(inputs, time.expand(len(inputs)))[:, :, -1]
        both = self.predict(torch.cat([inputs, inputs]), time.expand(2 * len(inputs)))[:, :, -1]
        conditional, unconditional = both.chunk(2)
        return unconditional + scales * (conditional - unconditional)

    def _drawn(self, like: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.randn(like.shape[1:], generator=source) for source in self.sources]).to(like.device)


def _levels(sampler: SchedulerMixin, times: torch.Tensor) -> tuple[list[float], list[float]]:
    """(signal, noise) of `Process`: as in eq. 1, or for samplers after Euler with the clean latents unscaled."""
    if isinstance(sampler, DDIMScheduler):
        alphas = torch.cat([sampler.alphas_cumprod[times.cpu()], sampler.final_alpha_cumprod.reshape(1)]).double()
        return alphas.sqrt().tolist(), (1 - alphas).sqrt().tolist()
    return [1.0] * (len(times) + 1), sampler.sigmas.double().tolist()
