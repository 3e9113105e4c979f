"""A Stable Diffusion checkpoint (1.x, 2.x or XL), frozen: pixels, latents, prompts, and the UNet's predictions.

LoRAs are adapters of the one UNet in memory: switching between them moves no parameters. All of the UNet's parameters
can be arguments, where they are trained. Knows nothing of sampling loops, guidance or weight set names.

    B batch, C channels, H W height and width in pixels, h w in latents, D width of the text embedding
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    ModelMixin,
    PNDMScheduler,
    SchedulerMixin,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from torch.func import functional_call

from generator_service.backends import adapters, autoencoder
from generator_service.backends.clip_vision import ImageEncoder
from generator_service.backends.components import load_component, read_json
from generator_service.backends.prompt_embedding import Conditions, PromptEmbedding
from generator_service.backends.tuned_model import read_model
from generator_service.manifest import digest, hash_files
from protocol.errors import ConfigError

SAMPLERS: dict[str, type[SchedulerMixin]] = {
    "ddim": DDIMScheduler,
    "dpm-solver": DPMSolverMultistepScheduler,
    "euler": EulerDiscreteScheduler,
    "euler-a": EulerAncestralDiscreteScheduler,
    "pndm": PNDMScheduler,
    "unipc": UniPCMultistepScheduler,
}
LATENT = {"clip_sample": False, "thresholding": False}  # only pixels are known to lie in [-1, 1]


class SDCheckpoint:
    """One checkpoint on one device. Its own parameters take no gradients; those of LoRAs added to the UNet may."""

    unet_kind: type[ModelMixin] = UNet2DConditionModel

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        dtype: torch.dtype,
        image_size: int | None = None,
        image_encoder: Path | None = None,
    ):
        """
        Args:
            image_size: height and width of its images in pixels; None: what the UNet was trained on.
            image_encoder: folder of a CLIP vision model with projection; None: the checkpoint's own, if it has one.

        Raises ConfigError when the folder does not hold such a checkpoint; WeightsCorrupt when its tensors do not fit.
        """
        self.folder, self.device, self.dtype = folder, device, dtype
        index = read_json(folder / "model_index.json")
        self.scheduler_config = read_json(folder / "scheduler" / "scheduler_config.json")
        self.forward_process = DDPMScheduler.from_config(self.scheduler_config)  # adds noise as in training
        self.unet: UNet2DConditionModel = load_component(self.unet_kind, folder / "unet", device, dtype)
        self.vae: AutoencoderKL = load_component(AutoencoderKL, folder / "vae", device, _vae_dtype(folder, dtype))
        self.latent_shape = self._latent_shape(image_size)
        factor = autoencoder.scale_factor(self.vae)
        self.size = (self.latent_shape[1] * factor, self.latent_shape[2] * factor)  # (H, W) of its images
        self._prompts = PromptEmbedding(folder, index, self.size, device, dtype)
        self.width = self._prompts.width  # D
        if self.width != self.unet.config.cross_attention_dim:
            raise ConfigError(f"{folder}: the UNet does not read embeddings as wide as the text encoder's")
        own = folder / "image_encoder"
        self._image_encoder_folder = image_encoder or (own if own.is_dir() else None)
        self._image_encoder: ImageEncoder | None = None  # None: not needed so far

    def with_unet(self, folder: Path, digest: str) -> SDCheckpoint:
        """This checkpoint with another UNet; all else is shared.

        Args:
            folder: as `tuned_model.write_model` left it. digest: of this checkpoint.

        Raises WeightsCorrupt unless it fits exactly.
        """
        other = copy.copy(self)
        other.unet = read_model(self.unet, folder, self.device, self.dtype, digest)
        return other

    def _latent_shape(self, image_size: int | None) -> tuple[int, int, int]:
        config, factor = self.unet.config, autoencoder.scale_factor(self.vae)
        channels = self.vae.config.latent_channels
        if (config.in_channels, config.out_channels) != (channels, channels):
            raise ConfigError(
                f"{self.folder}: a UNet from {config.in_channels} to {config.out_channels} channels does not make "
                f"images from text alone: use a text-to-image checkpoint whose VAE has as many channels"
            )
        if image_size is not None and image_size % factor:
            raise ConfigError(f"image_size = {image_size}: use a multiple of {factor}", param="image_size")
        side = config.sample_size if image_size is None else image_size // factor
        return channels, side, side

    # ------------------------------------------------------------ the model

    def conditions(self, prompts: Sequence[str | None], visual: torch.Tensor | None = None) -> Conditions:
        """What the UNet is told of each row; row i depends on prompt i and visual token i alone.

        Args:
            prompts: B of them. None: no prompt, as in the unconditional pass of guidance.
            visual: float32 [B, D], written over the last token position; a row of NaN: no visual token.
        """
        return self._prompts(prompts, visual)

    def prompt_length(self, prompt: str) -> tuple[int, int]:
        """(tokens, the most that are read). May be called from any thread."""
        return self._prompts.length(prompt)

    def predict(
        self,
        latents: torch.Tensor,
        times: torch.Tensor,
        conditions: Conditions,
        parameters: Mapping[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """What the UNet predicts (noise, for prediction type "epsilon"), float32 [B, C, h, w].

        Args:
            latents: float [B, C, h, w], scaled as the sampler wants them. times: [B].
            parameters: to put in the place of the UNet's own; they may require gradients. None: its own.
        """
        inputs = (latents.to(self.dtype), times, conditions.embeddings)
        added = {"added_cond_kwargs": conditions.added()}
        if parameters is None:
            return self.unet(*inputs, **added).sample.float()
        cast = {name: value.to(self.dtype) for name, value in parameters.items()}
        return functional_call(self.unet, cast, inputs, added).sample.float()

    def scheduler(self, name: str) -> SchedulerMixin:
        """A fresh sampler, one of `SAMPLERS`, on the checkpoint's noise schedule. PNDM without its Runge-Kutta steps,
        as Stable Diffusion's own checkpoints have it."""
        options = {"skip_prk_steps": True} if name == "pndm" else {}
        kind = SAMPLERS[name]
        known = {key: value for key, value in (LATENT | options).items() if key in kind().config}
        return kind.from_config(self.scheduler_config | known)

    def visual_features(self, images: np.ndarray) -> torch.Tensor:
        """Projected CLIP features of images uint8 [N, H, W, 3]: float32 [N, D]. Raises ConfigError."""
        if self._image_encoder_folder is None:
            raise ConfigError(
                'visual tokens need a CLIP image encoder: set image_encoder, for SD 1.x to "openai/clip-vit-large-'
                'patch14", or adapt with visual = "none"',
                param="image_encoder",
            )
        if self._image_encoder is None:
            self._image_encoder = ImageEncoder(self._image_encoder_folder, self.device, self.dtype)
        if self._image_encoder.width != self._prompts.width:
            raise ConfigError(
                f"the features of {self._image_encoder_folder} are {self._image_encoder.width} wide and the prompts' "
                f'{self._prompts.width}: set another image_encoder, or adapt with visual = "none"',
                param="image_encoder",
            )
        return self._image_encoder(images)

    @cached_property
    def image_encoder_digest(self) -> str | None:
        """Hash of the files of the image encoder; None: there is none."""
        folder = self._image_encoder_folder
        return None if folder is None else digest(hash_files(folder))

    def use(self, adapter: str | None, scale: float = 1.0) -> None:
        """From now on this LoRA of the UNet counts, `scale` times, and no other; None: none does.

        Its parameters require gradients while it is used, those of the others do not.
        """
        adapters.use(self.unet, adapter, scale)

    # ------------------------------------------------------------ pixels

    def fit(self, image: np.ndarray) -> np.ndarray:
        """An image uint8 [any, any, 3] at the checkpoint's size, still uint8 [H, W, 3]."""
        return autoencoder.fit(image, self.size)

    def pixels(self, images: np.ndarray) -> torch.Tensor:
        """Images uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in [-1, 1]."""
        return autoencoder.pixels(images, self.device)

    def encode(self, images: np.ndarray) -> torch.Tensor:
        """Images uint8 [N, H, W, 3] at the checkpoint's size -> scaled latents float32 [N, C, h, w], the mode."""
        return autoencoder.encode(self.vae, images)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Scaled latents [B, C, h, w] -> RGB float32 [B, 3, H, W], clipped to [-1, 1]."""
        return autoencoder.decode(self.vae, latents)


def _vae_dtype(folder: Path, dtype: torch.dtype) -> torch.dtype:
    """SDXL's VAE overflows in half precision, and says so."""
    upcast = dtype == torch.float16 and read_json(folder / "vae" / "config.json").get("force_upcast", False)
    return torch.float32 if upcast else dtype
