"""Tiny text-to-video checkpoints with random weights: ModelScopeT2V's classes, saved by diffusers and transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet3DConditionModel
from torch import nn
from transformers import CLIPTextModel

from generator_service.backends.interface import WeightSet
from generator_service.backends.ti2v import Config, TI2VBackend
from protocol.messages import WeightsRef
from tests.generator_service.tiny_sd import WIDTH, scheduler, text_config, tokenizer

FACTOR = 8  # pixels a latent, along each side


def save_checkpoint(
    folder: Path,
    *,
    size: int = 32,
    channels: tuple[int, ...] = (16, 32),
    prediction: str = "epsilon",
    seed: int = 7,
) -> Path:
    """A diffusers folder as `TextToVideoSDPipeline.save_pretrained` leaves it.

    Args:
        size: height and width of a frame in pixels; its latents have an eighth. channels: of the UNet's blocks.
        prediction: "epsilon" or "v_prediction".
    """
    torch.manual_seed(seed)
    unet(size // FACTOR, channels).save_pretrained(folder / "unet")
    vae().save_pretrained(folder / "vae")
    scheduler(prediction).save_pretrained(folder / "scheduler")
    tokenizer().save_pretrained(folder / "tokenizer")
    CLIPTextModel(text_config()).save_pretrained(folder / "text_encoder")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "TextToVideoSDPipeline"}))
    return folder


def unet(latents: int, channels: tuple[int, ...] = (16, 32), width: int = WIDTH) -> UNet3DConditionModel:
    """A UNet whose frames depend on each other.

    Args:
        latents: height and width. width: of the text embedding.
    """
    made = UNet3DConditionModel(
        sample_size=latents,
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock3D",) * (len(channels) - 1) + ("DownBlock3D",),
        up_block_types=("UpBlock3D",) + ("CrossAttnUpBlock3D",) * (len(channels) - 1),
        attention_head_dim=4,
        norm_num_groups=8,
        cross_attention_dim=width,
    )
    for name, parameter in made.named_parameters():
        if "temp_convs" in name and not parameter.any():  # zero before training, so that no frame would see another
            nn.init.normal_(parameter, std=0.1)
    return made


def vae() -> AutoencoderKL:
    blocks = FACTOR.bit_length()
    return AutoencoderKL(
        block_out_channels=(8,) * blocks,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.5,
    )


def open_backend(folder: Path, **settings: Any) -> TI2VBackend:
    return TI2VBackend(Config(checkpoint=str(folder), device="cpu", **settings))


def full(backend: TI2VBackend, folder: Path | None = None, name: str = "base") -> WeightSet:
    ref = WeightsRef(name=name, version=1, digest=name)
    return WeightSet(ref, backend.name, "full", None, (), folder or backend.folder)
