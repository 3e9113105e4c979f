"""What a LoRA is trained for (Real-Fake): the checkpoint's denoising loss and discrepancy on rows of a training set.

Knows nothing of optimisers, nor of which adapter is in use.

    B batch, C channels, h w height and width of the latents
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from generator_service.adapt import denoising
from generator_service.adapt.training_set import TrainingSet
from generator_service.backends.sd_checkpoint import SDCheckpoint
from protocol.messages import LoraOptions


class Losses(NamedTuple):
    """Scalars."""

    denoising: torch.Tensor  # with min-SNR weights
    discrepancy: torch.Tensor  # as it is: what weight it has is the caller's


class Objective:
    def __init__(self, checkpoint: SDCheckpoint, data: TrainingSet, options: LoraOptions):
        self.checkpoint, self.data = checkpoint, data
        self._gamma, self._precision = options.min_snr_gamma, getattr(torch, options.precision)

    def __call__(self, rows: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> Losses:
        """Losses on rows int64 [B], at noise float32 [B, C, h, w] and times int64 [B]."""
        checkpoint, schedule = self.checkpoint, self.checkpoint.forward_process
        latents, conditions = self.data.latents(rows), self.data.conditions(rows)
        noise, times = noise.to(checkpoint.device), times.to(checkpoint.device)
        noisy = schedule.add_noise(latents, noise, times)
        with torch.autocast(checkpoint.device.type, self._precision, enabled=self._precision != torch.float32):
            predicted = checkpoint.predict(noisy, times, conditions)
        error = predicted - denoising.wanted(schedule, latents, noise, times)
        prediction, snr = schedule.config.prediction_type, denoising.signal_to_noise(schedule, times)
        weights = denoising.min_snr_weights(snr, self._gamma, prediction)
        noise_weights = denoising.min_snr_weights(snr, self._gamma, "epsilon")
        noise_error = denoising.noise_error(error, snr, prediction)
        labels = self.data.labels[rows].to(checkpoint.device)
        return Losses(denoising.weighted_mse(error, weights), denoising.discrepancy(noise_error, noise_weights, labels))
