"""An LTX-Video checkpoint as diffusers' image-to-video pipeline runs it: from first frames and prompts to clips.

Knows nothing of weight set names, nor of who asks.

    B batch, M frames of a clip, C channels, H W height and width in pixels, h w in latents, f latents in time
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTXImageToVideoPipeline,
    LTXVideoTransformer3DModel,
)
from PIL import Image
from transformers import T5EncoderModel, T5TokenizerFast

from generator_service.backends import autoencoder
from generator_service.backends.components import load_component, read_json
from protocol.errors import ConfigError

KINDS = ("LTXPipeline", "LTXImageToVideoPipeline")  # of one set of components
MAX_TOKENS = 128  # of a prompt
DECODE_TIME, DECODE_NOISE = 0.05, 0.025  # what its authors advise for an autoencoder that denoises too


class LTXCheckpoint:
    """One checkpoint on one device, frozen."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype):
        """Raises ConfigError when the folder does not hold such a checkpoint; WeightsCorrupt when its tensors do not
        fit."""
        self.folder = folder
        found = read_json(folder / "model_index.json").get("_class_name")
        if found not in KINDS:
            raise ConfigError(
                f"{folder} is a {found}, and this backend runs {KINDS[1]}: use a checkpoint of the kind of "
                '"Lightricks/LTX-Video"',
                param="checkpoint",
            )
        tokenizer = _tokenizer(folder / "tokenizer")
        self._counting, self._counts = copy.deepcopy(tokenizer), threading.Lock()  # tokenizers keep state
        self.pipeline = LTXImageToVideoPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler.from_config(
                read_json(folder / "scheduler/scheduler_config.json")
            ),
            vae=load_component(AutoencoderKLLTXVideo, folder / "vae", device, dtype),
            text_encoder=load_component(T5EncoderModel, folder / "text_encoder", device, dtype),
            tokenizer=tokenizer,
            transformer=load_component(LTXVideoTransformer3DModel, folder / "transformer", device, dtype),
        )
        self.pipeline.set_progress_bar_config(disable=True)
        self.ratio = self.pipeline.vae_spatial_compression_ratio  # pixels a latent, along each side

    @property
    def least_steps(self) -> int:
        """A schedule that is stretched to end at a given level has no end after one."""
        return 2 if self.pipeline.scheduler.config.shift_terminal else 1

    def prompt_length(self, prompt: str) -> tuple[int, int]:
        """(tokens, the most that are read). May be called from any thread."""
        with self._counts:
            return len(self._counting(prompt, truncation=False, verbose=False).input_ids), MAX_TOKENS

    @torch.no_grad()
    def clips(
        self,
        images: Sequence[np.ndarray],
        prompts: Sequence[str],
        negative_prompts: Sequence[str | None],
        seeds: Sequence[int],
        *,
        frames: int,
        steps: int,
        guidance_scale: float,
        frame_rate: float,
        report: Callable[[], None],
    ) -> np.ndarray:
        """uint8 [B, M, H, W, 3], with the first frames as the autoencoder brings them back.

        Args:
            images: B first frames, uint8 [H, W, 3]. frames: M.
            frame_rate: frames a second, which the motion is made for.
            report: called after each step.
        """
        pipeline, (height, width) = self.pipeline, images[0].shape[:2]
        every = pipeline.vae_temporal_compression_ratio
        whole = 1 + -(-(frames - 1) // every) * every  # frames come so many at a time after the first; the rest goes
        sources = [torch.Generator().manual_seed(seed) for seed in seeds]

        def stepped(_: object, step: int, time: object, tensors: dict) -> dict:
            report()
            return tensors

        latents = pipeline(
            image=[Image.fromarray(image) for image in images],
            prompt=list(prompts),
            negative_prompt=[negative or "" for negative in negative_prompts],
            height=height,
            width=width,
            num_frames=whole,
            frame_rate=frame_rate,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=sources,
            max_sequence_length=MAX_TOKENS,
            callback_on_step_end=stepped,
            output_type="latent",
        ).frames
        shape = ((whole - 1) // every + 1, height // self.ratio, width // self.ratio)
        each = zip(latents.split(1), sources, strict=True)
        return np.stack([self._decode(packed, shape, source)[:frames] for packed, source in each])

    def _decode(self, packed: torch.Tensor, shape: tuple[int, int, int], source: torch.Generator) -> np.ndarray:
        """One clip from its latents as the transformer has them, uint8 [M, H, W, 3]. The pipeline's own decoding takes
        no generator for each row."""
        pipeline, vae = self.pipeline, self.pipeline.vae
        patches = pipeline.transformer_spatial_patch_size, pipeline.transformer_temporal_patch_size
        latents = pipeline._unpack_latents(packed, *shape, *patches)
        latents = pipeline._denormalize_latents(
            latents, vae.latents_mean, vae.latents_std, vae.config.scaling_factor
        ).to(vae.dtype)
        time = None
        if vae.config.timestep_conditioning:
            noise = torch.randn(latents.shape, generator=source).to(latents)
            latents = (1 - DECODE_NOISE) * latents + DECODE_NOISE * noise
            time = torch.tensor([DECODE_TIME]).to(latents)
        pixels = vae.decode(latents, time, return_dict=False)[0]
        return autoencoder.levels(pixels[0].transpose(0, 1).float().clamp(-1, 1))


def _tokenizer(folder: Path) -> T5TokenizerFast:
    if not any((folder / name).is_file() for name in ("tokenizer.json", "spiece.model")):
        raise ConfigError(f"{folder} holds no T5 tokenizer: fetch or make the checkpoint again")
    try:
        return T5TokenizerFast.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"{folder} cannot be read ({error}): fetch or make the checkpoint again") from error
