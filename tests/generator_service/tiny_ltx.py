"""Tiny LTX-Video checkpoints with random weights: the real classes, saved by diffusers and transformers."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKLLTXVideo, FlowMatchEulerDiscreteScheduler, LTXVideoTransformer3DModel
from transformers import T5Config, T5EncoderModel, T5TokenizerFast

WIDTH = 16  # of the text encoder


def save_checkpoint(folder: Path, *, denoising_decoder: bool = False, seed: int = 7) -> Path:
    """A diffusers folder: latents are a quarter of the pixels a side, and of the frames after the first.

    Args:
        denoising_decoder: its decoder is told a time, and takes noise off too.
    """
    torch.manual_seed(seed)
    _transformer().save_pretrained(folder / "transformer")
    _vae(denoising_decoder).save_pretrained(folder / "vae")
    FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1).save_pretrained(folder / "scheduler")
    words = tokenizer()
    words.save_pretrained(folder / "tokenizer")
    T5EncoderModel(
        T5Config(vocab_size=len(words), d_model=WIDTH, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    ).save_pretrained(folder / "text_encoder")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "LTXPipeline"}))
    return folder


def tokenizer() -> T5TokenizerFast:
    """Letter by letter."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz,.-0123456789"]
    return T5TokenizerFast(vocab=[(piece, -1.0) for piece in pieces], extra_ids=0, model_max_length=128)


def _transformer() -> LTXVideoTransformer3DModel:
    return LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=WIDTH,
    )


def _vae(denoising: bool) -> AutoencoderKLLTXVideo:
    return AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False, False, False, False, False),
        upsample_residual=(False, False, False, False),
        upsample_factor=(1, 1, 1, 1),
        timestep_conditioning=denoising,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )
