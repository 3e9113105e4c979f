"""Tiny Stable Diffusion checkpoints with random weights: the real classes, saved by diffusers and transformers."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from generator_service.backends.interface import WeightSet
from generator_service.backends.stable_diffusion import Config, StableDiffusionBackend
from protocol.messages import WeightsRef

TOKENS = 77
WIDTH = 16  # of a text encoder
SIZE = 16  # pixels a side; latents have 8


def save_checkpoint(
    folder: Path, *, xl: bool = False, prediction: str = "epsilon", image_encoder: int | None = WIDTH, seed: int = 7
) -> Path:
    """A diffusers folder: 16 x 16 images of 8 x 8 latents.

    Args:
        xl: of the classes and conditions of SDXL. prediction: "epsilon" or "v_prediction".
        image_encoder: width of the CLIP image features; None: the folder holds no image encoder.
    """
    torch.manual_seed(seed)
    encoders = 2 if xl else 1
    _unet(WIDTH * encoders, xl).save_pretrained(folder / "unet")
    _vae().save_pretrained(folder / "vae")
    scheduler(prediction).save_pretrained(folder / "scheduler")
    tokenizer().save_pretrained(folder / "tokenizer")
    CLIPTextModel(text_config()).save_pretrained(folder / "text_encoder")
    index = {"_class_name": "StableDiffusionPipeline"}
    if xl:
        tokenizer().save_pretrained(folder / "tokenizer_2")
        CLIPTextModelWithProjection(text_config(projection=8)).save_pretrained(folder / "text_encoder_2")
        index = {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True}
    if image_encoder is not None:
        save_image_encoder(folder / "image_encoder", image_encoder)
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def save_image_encoder(folder: Path, width: int = WIDTH) -> Path:
    """A CLIP vision model whose projected features are `width` wide."""
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        projection_dim=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=12,
        patch_size=4,
    )
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    return folder


def open_backend(folder: Path, **settings) -> StableDiffusionBackend:
    return StableDiffusionBackend(Config(checkpoint=str(folder), device="cpu", **settings))


def full(backend: StableDiffusionBackend, folder: Path | None = None, name: str = "base") -> WeightSet:
    ref = WeightsRef(name=name, version=1, digest=name)
    return WeightSet(ref, backend.name, "full", None, (), folder or backend.folder)


def lora_set(base: WeightSet, folder: Path, classes: tuple[str, ...] = (), visual: str = "none") -> WeightSet:
    """The weight set of kind "lora" whose files lie in a folder."""
    ref = WeightsRef(name=folder.name, version=1, digest=folder.name)
    return WeightSet(ref, base.backend, "lora", base, classes, folder, metadata={"visual": visual})


def save_lora(folder: Path, unet: UNet2DConditionModel, seed: int, class_means: torch.Tensor | None = None) -> Path:
    """A LoRA with random weights, learnt on another copy of `unet`, saved as diffusers saves it."""
    copy = UNet2DConditionModel.from_config(unet.config)
    torch.manual_seed(seed)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    copy.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights="gaussian"))
    for name, parameter in copy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=get_peft_model_state_dict(copy),
        unet_lora_adapter_metadata=copy.peft_config["default"].to_dict(),
    )
    if class_means is not None:
        save_file({"class_means": class_means}, folder / "visual_tokens.safetensors")
    return folder


def _unet(context: int, xl: bool) -> UNet2DConditionModel:
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 8 + 6 * 4,
    }
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=8,
        cross_attention_dim=context,
        **(added if xl else {}),
    )


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=SIZE,
        scaling_factor=0.5,
    )


def scheduler(prediction: str) -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction,
    )


def tokenizer() -> CLIPTokenizer:
    """Letter by letter, with two merges."""
    letters = "abcdefghijklmnopqrstuvwxyz,.-0123456789"
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "an", "of</w>", "<|startoftext|>", "<|endoftext|>"]
    ids = {piece: index for index, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=ids, merges=[("a", "n"), ("o", "f</w>")], model_max_length=TOKENS)


def text_config(projection: int = WIDTH) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer()),
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=projection,
        max_position_embeddings=TOKENS,
        bos_token_id=len(tokenizer()) - 2,
        eos_token_id=len(tokenizer()) - 1,
        pad_token_id=len(tokenizer()) - 1,
    )
