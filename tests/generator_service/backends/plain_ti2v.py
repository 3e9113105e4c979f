"""ARGen 3.1 and 3.3 written out plainly: one clip at a time, two calls of the UNet a step, every condition frame
encoded anew whenever it is used, all frames of the window denoised. Noise is drawn in our order, so that the frames are
ours but for rounding.

    K = window - 1 frames that condition, C channels, h w in latents
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet3DConditionModel
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

from generator_service.backends.interface import Row


class PlainTI2V:
    """A checkpoint read by diffusers itself. It counts its calls."""

    def __init__(self, folder: Path, window: int, *, velocity: bool = False):
        self.unet = UNet3DConditionModel.from_pretrained(folder / "unet").eval()
        self.vae = AutoencoderKL.from_pretrained(folder / "vae").eval()
        self.text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder").eval()
        self.tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        self.window, self.velocity = window, velocity
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        self.alphas = (1 - betas).cumprod(0).tolist()
        self.calls = self.encodes = 0

    @torch.no_grad()
    def __call__(self, row: Row, frames: int, steps: int, resampling: int = 0) -> np.ndarray:
        """uint8 [M, H, W, 3]."""
        latents = self.latents(row, frames, steps, resampling)
        decoded = [self.decode(frame) for frame in latents]
        return np.stack([self.fit(row.image), *decoded])

    @torch.no_grad()
    def latents(self, row: Row, frames: int, steps: int, resampling: int = 0) -> torch.Tensor:
        """Of the frames after the first, [M - 1, C, h, w]."""
        source = torch.Generator().manual_seed(row.seed)
        text, nothing = self.embed(row.prompt), self.embed(row.negative_prompt or "")
        times = [step * (1000 // steps) + 1 for step in reversed(range(steps))]
        queue: list[tuple[np.ndarray, torch.Tensor | None]] = [(self.fit(row.image), None)] * (self.window - 1)
        made = []
        for frame in range(2, frames + 1):
            scale = self.scale(row, frame, frames)
            clean = torch.stack([self.condition(*given) for given in queue])  # [K, C, h, w]

            def noised(alpha: float, clean: torch.Tensor = clean) -> torch.Tensor:
                drawn = torch.randn(clean.transpose(0, 1).shape, generator=source).transpose(0, 1)
                return alpha**0.5 * clean + (1 - alpha) ** 0.5 * drawn

            given = noised(self.alphas[times[0]])
            body = torch.cat([given, given[-1:]])
            for at, time in enumerate(times):
                alpha, after = self.alphas[time], self.alphas[times[at + 1] if at + 1 < steps else 0]
                for repeat in range(1 + resampling):
                    if repeat:
                        drawn = torch.randn(body[-1].shape, generator=source)
                        body[-1] = (alpha / after) ** 0.5 * body[-1] + (1 - alpha / after) ** 0.5 * drawn
                    if at or repeat:
                        body[:-1] = noised(alpha)
                    output = self.guided(body, time, text, nothing, scale)
                    body = self.stepped(body, output, alpha, after)
            made.append(body[-1].clone())
            queue = [*queue[1:], (self.decode(made[-1]), made[-1])]
        return torch.stack(made)

    def scale(self, row: Row, frame: int, frames: int) -> float:
        """Eq. 12."""
        if row.guidance is None:
            return row.guidance_scale
        curve, at = row.guidance, frame / frames
        return curve.minimum + (curve.maximum - curve.minimum) * at ** (curve.a - 1) * (1 - at) ** (curve.b - 1)

    def guided(self, body, time: int, text, nothing, scale: float) -> torch.Tensor:
        """Eq. 11, of all frames: [K + 1, C, h, w]."""
        conditional = self.predict(body, time, text)
        if scale <= 1:
            return conditional
        unconditional = self.predict(body, time, nothing)
        return unconditional + scale * (conditional - unconditional)

    def predict(self, body, time: int, text) -> torch.Tensor:
        self.calls += 1
        return self.unet(body.transpose(0, 1)[None], time, text).sample[0].transpose(0, 1)

    def stepped(self, body, output, alpha: float, after: float) -> torch.Tensor:
        """DDIM without noise of its own."""
        if self.velocity:
            noise = alpha**0.5 * output + (1 - alpha) ** 0.5 * body
            clean = alpha**0.5 * body - (1 - alpha) ** 0.5 * output
        else:
            noise, clean = output, (body - (1 - alpha) ** 0.5 * output) / alpha**0.5
        return after**0.5 * clean + (1 - after) ** 0.5 * noise

    def condition(self, pixels: np.ndarray, latents: torch.Tensor | None) -> torch.Tensor:
        """[C, h, w]. A frame that was made is encoded too, but its own latents stay: an autoencoder of random weights
        does not bring them back."""
        encoded = self.encode(pixels)
        return encoded if latents is None else latents

    def encode(self, pixels: np.ndarray) -> torch.Tensor:
        self.encodes += 1
        image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        return self.vae.encode(image).latent_dist.mode()[0] * self.vae.config.scaling_factor

    def decode(self, latents: torch.Tensor) -> np.ndarray:
        image = self.vae.decode(latents[None] / self.vae.config.scaling_factor).sample[0].clamp(-1, 1)
        return ((image + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()

    def fit(self, image: np.ndarray) -> np.ndarray:
        side = self.unet.config.sample_size * 2 ** (len(self.vae.config.block_out_channels) - 1)
        return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC))

    def embed(self, prompt: str) -> torch.Tensor:
        ids = self.tokenizer(prompt, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return self.text_encoder(ids).last_hidden_state
