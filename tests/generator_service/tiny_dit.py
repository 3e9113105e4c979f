"""Tiny DiT checkpoints with random weights, saved by diffusers itself."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTTransformer2DModel

from generator_service.backends.dit import Config, DiTBackend
from generator_service.backends.interface import WeightSet
from protocol.messages import WeightsRef

CLASSES = ("alpha", "beta", "gamma")


def save_checkpoint(folder: Path, *, vae: bool = False, learned_sigma: bool = False, channels: int = 1) -> Path:
    """A diffusers folder: 8 x 8 images; with a VAE, 16 x 16 images of 8 x 8 latents."""
    torch.manual_seed(7)
    in_channels = 4 if vae else channels
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=in_channels,
        out_channels=2 * in_channels if learned_sigma else in_channels,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=len(CLASSES),
        norm_num_groups=1,
    )
    transformer.save_pretrained(folder / "transformer")
    DDIMScheduler(clip_sample=not vae, prediction_type="epsilon").save_pretrained(folder / "scheduler")
    if vae:
        AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            latent_channels=4,
            sample_size=16,
            scaling_factor=0.5,
        ).save_pretrained(folder / "vae")
    index = {"_class_name": "DiTPipeline", "id2label": dict(enumerate(CLASSES))}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def open_backend(folder: Path, **settings) -> DiTBackend:
    return DiTBackend(Config(checkpoint=str(folder), device="cpu", **settings))


def full(backend: DiTBackend, folder: Path | None = None, name: str = "base") -> WeightSet:
    ref = WeightsRef(name=name, version=1, digest=name)
    return WeightSet(ref, "dit", "full", None, backend.classes, folder or backend.folder)


def class_embedding(base: WeightSet, folder: Path, classes: tuple[str, ...], name: str = "adapted") -> WeightSet:
    ref = WeightsRef(name=name, version=1, digest=name)
    return WeightSet(ref, "dit", "class_embedding", base, classes, folder)
