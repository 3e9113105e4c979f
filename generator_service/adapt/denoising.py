"""The denoising objective: what is drawn, what the model has to predict, and how its errors count.

Pure functions of tensors. Knows nothing of checkpoints, conditions or images.

    B batch, C channels, h w height and width of the latents, J classes in the batch
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DDPMScheduler


def draw(schedule: DDPMScheduler, shape: Sequence[int], rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise float32 of a shape [B, C, h, w] and times int64 [B], drawn in this order; on the CPU, as rng is."""
    noise = torch.randn(*shape, generator=rng)
    return noise, torch.randint(schedule.config.num_train_timesteps, (shape[0],), generator=rng)


def wanted(schedule: DDPMScheduler, latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    """What a model of the schedule's prediction type has to say of the noisy latents, [B, C, h, w]."""
    return {
        "epsilon": lambda: noise,
        "sample": lambda: latents,
        "v_prediction": lambda: schedule.get_velocity(latents, noise, times),
    }[schedule.config.prediction_type]()


def signal_to_noise(schedule: DDPMScheduler, times: torch.Tensor) -> torch.Tensor:
    """SNR(t) = alpha_bar / (1 - alpha_bar), float32 [B], for times int64 [B]."""
    kept = schedule.alphas_cumprod.to(times.device)[times]
    return kept / (1 - kept)


def min_snr_weights(snr: torch.Tensor, gamma: float, prediction: str) -> torch.Tensor:
    """Weight of each row's squared error, [B] (Hang et al. 2023, Min-SNR-gamma): min(SNR, gamma) on the clean image,
    said in terms of what the model predicts.

    Args:
        snr: float [B]. gamma: 0: all rows alike. prediction: "epsilon", "v_prediction" or "sample".
    """
    if gamma == 0:
        return torch.ones_like(snr)
    return {
        "epsilon": lambda: (gamma / snr).clamp(max=1),
        "v_prediction": lambda: snr.clamp(max=gamma) / (snr + 1),
        "sample": lambda: snr.clamp(max=gamma),
    }[prediction]()


def weighted_mse(error: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Mean over rows of weight times mean squared error; a scalar. error: [B, C, h, w]. weights: [B]."""
    return (weights * error.square().flatten(1).mean(1)).mean()


def noise_error(error: torch.Tensor, snr: torch.Tensor, prediction: str) -> torch.Tensor:
    """The error of the noise that an error of the prediction amounts to, at the same noisy latents, [B, C, h, w]."""
    factor = {
        "epsilon": lambda: torch.ones_like(snr),
        "v_prediction": lambda: (snr / (snr + 1)).sqrt(),
        "sample": lambda: -snr.sqrt(),
    }[prediction]()
    return factor[:, None, None, None] * error


def discrepancy(error: torch.Tensor, weights: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Batch-mean discrepancy (Real-Fake): mean squared difference between the weighted sums of predicted and of true
    noise, each sum over the rows of one class; a scalar.

    Args:
        error: predicted minus true noise, [B, C, h, w]. weights: of each row, [B]. labels: int64 [B].
    """
    membership = (labels.unique()[:, None] == labels).to(error)  # [J, B]
    sums = (membership * weights) @ error.flatten(1)
    return sums.square().mean()
