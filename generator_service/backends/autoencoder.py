"""Between 8-bit images and the latents of a variational autoencoder, without randomness.

B batch, C channels, H W height and width in pixels, h w in latents
"""

from __future__ import annotations

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

VAE_BATCH = 16  # images encoded or decoded at once, so that memory does not grow with the batch


def fit(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """An image uint8 [any, any, 3] at size (H, W)."""
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC))


def pixels(images: np.ndarray, device: torch.device) -> torch.Tensor:
    """Images uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in [-1, 1]."""
    return torch.tensor(images, device=device).permute(0, 3, 1, 2).float() / 127.5 - 1


def levels(images: torch.Tensor) -> np.ndarray:
    """RGB float [B, 3, H, W] in [-1, 1] -> uint8 [B, H, W, 3]."""
    return ((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def scale_factor(vae: AutoencoderKL) -> int:
    """Pixels a latent, along each side."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


@torch.no_grad()
def encode(vae: AutoencoderKL, images: np.ndarray) -> torch.Tensor:
    """Images uint8 [B, H, W, 3] -> latents float32 [B, C, h, w]: the posterior's mode, times the scaling factor."""
    parts = (images[start : start + VAE_BATCH] for start in range(0, len(images), VAE_BATCH))
    modes = [vae.encode(pixels(part, vae.device).to(vae.dtype)).latent_dist.mode() for part in parts]
    return torch.cat(modes).float() * vae.config.scaling_factor


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Latents [B, C, h, w] -> RGB float32 [B, 3, H, W], clipped to [-1, 1]."""
    parts = (latents / vae.config.scaling_factor).to(vae.dtype).split(VAE_BATCH)
    return torch.cat([vae.decode(part).sample for part in parts]).float().clamp(-1, 1)
