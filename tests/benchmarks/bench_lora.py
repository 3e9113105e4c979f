"""LoRA steps with cached latents and text against computing them each time: `python -m tests.benchmarks.bench_lora`.

On a Stable Diffusion with random weights. Encoding an image takes 1.3 times the multiply-adds of the UNet's forward
pass (1.4 in SD 1.5); the time of each part is printed. The checkpoint's own memory of prompts is off.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from generator_service.adapt.lora import lora
from generator_service.backends import prompt_embedding
from generator_service.backends.interface import Progress, WeightSet
from generator_service.backends.stable_diffusion import Config, StableDiffusionBackend
from generator_service.real_images import RealImages
from protocol.messages import AdaptJob, LoraOptions, WeightsRef
from tests.benchmarks.side_by_side import compare
from tests.studies.small_checkpoint import TOKENS, tokenizer

SIDE, WIDTH, IMAGES, BATCH = 64, 64, 64, 8


def save_checkpoint(folder: Path) -> None:
    """64 x 64 images of 8 x 8 latents, eight times smaller as in SD 1.5."""
    torch.manual_seed(0)
    words = tokenizer()
    ends = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    text = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        **ends,
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        norm_num_groups=16,
        sample_size=SIDE,
    )
    unet = UNet2DConditionModel(
        sample_size=SIDE // 8,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=16,
        cross_attention_dim=WIDTH,
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=words,
        unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def dataset() -> RealImages:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (IMAGES, SIDE, SIDE, 3), dtype=np.uint8)
    captions: list[str | None] = [f"number {at}" for at in range(IMAGES)]
    return RealImages(images, np.arange(IMAGES) % 4, [str(at) for at in range(IMAGES)], captions)


def open_backend(folder: Path) -> StableDiffusionBackend:
    return StableDiffusionBackend(Config(checkpoint=str(folder), device="cpu"))


def base_of(backend: StableDiffusionBackend) -> WeightSet:
    ref = WeightsRef(name="base", version=1, digest="bench")
    return WeightSet(ref, "stable_diffusion", "full", None, (), backend.folder)


def adaptation(backend: StableDiffusionBackend, place: Path, *, cache: bool) -> Iterator[Progress]:
    options = LoraOptions(cache=cache, visual="none", validation=0.0, checkpoint_every=None)
    job = AdaptJob(method="lora", name="bench", steps=10**6, batch_size=BATCH, learning_rate=1e-4, lora=options)
    return lora(backend, base_of(backend), dataset(), ("cat", "dog", "ship", "truck"), job, place, place / "unfinished")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    prompt_embedding.REMEMBERED = 0
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        save_checkpoint(place)
        computed, kept = (adaptation(open_backend(place), place, cache=cache) for cache in (False, True))
        for _ in range(8 * IMAGES // BATCH):  # until nearly every image is in the cache
            next(kept)
        print(f"batch of {BATCH}, {SIDE} px, {torch.get_num_threads()} thread(s)")
        result = compare(lambda: next(computed), lambda: next(kept), rounds)
        print("step without cache over one with it:", result, "goal >= 1.5")
        backend, images = open_backend(place), dataset().images[:BATCH]
        checkpoint = backend.checkpoint(base_of(backend))
        parts = compare(lambda: checkpoint.encode(images), lambda: checkpoint.conditions(["a photo"] * BATCH), rounds)
        print(f"of it the latents {parts.first_s * 1e3:.1f} ms, the prompts {parts.second_s * 1e3:.1f} ms")


if __name__ == "__main__":
    main()
