"""Trains a small text-to-video model of the real classes on drawn clips, and saves it for diffusers.

It sees a general world: people whom no dataset of a study shows, and all emotions alike, as a model of the hub has seen
the web. As of those, autoencoder and text encoder are trained before, and frozen: a text encoder that learns with the
UNet from nothing comes to say the same of every text. Every stage is kept in a folder, so that a second run only reads.
Knows nothing of policies, rewards or recognition.

    B clips, W window in frames
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet3DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AddedToken, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from protocol.clips import spread
from tests.expressions.world import people
from tests.studies.expressions import sentences
from tests.studies.small_checkpoint import signed, timed, tokenizer, train

SIDE, WINDOW, FRAMES = 32, 8, 8  # pixels; frames that the UNet sees together; frames of a clip
CHANNELS = 16  # of the latents, which have a quarter of the pixels a side: eyes and brows are three pixels high
WIDTH, TOKENS = 64, 64  # of the text embedding; positions of a prompt
CLIPS, PEOPLE, SEED = 300, 700, 90210  # of each emotion; in all; of the general world
CONTRASTED = 96  # clips of a batch of the text encoder's
BATCH, NO_PROMPT = 8, 0.1  # clips; part of them trained without a prompt, for guidance


class World:
    """The general world's clips: uint8 [N, FRAMES, SIDE, SIDE, 3], and each one's captions."""

    def __init__(self, file: Path):
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            with timed("clips"):
                _write(file)
        with np.load(file, allow_pickle=False) as archive:
            self.frames, self.captions = archive["frames"], [json.loads(text) for text in archive["captions"]]


def _write(file: Path) -> None:
    frames, captions = [], []
    for clip, told in sentences.told_clips(people("general", SEED, PEOPLE), CLIPS, SEED, size=SIDE, frames=2 * FRAMES):
        frames.append(clip.frames[[0, *spread(2 * FRAMES, FRAMES)[1:]]])
        captions.append(json.dumps(told))
    with file.open("wb") as out:
        np.savez(out, frames=np.stack(frames), captions=np.array(captions))


def build(folder: Path, effort: float = 1.0) -> Path:
    """The checkpoint, trained; what `folder` holds already is taken from there.

    Args:
        effort: of the number of training steps; 1: an hour on one core.
    """
    world = World(folder.with_name("general.npz"))
    stages: list[tuple[str, Callable[[], None]]] = [
        ("tokenizer", lambda: _tokenizer().save_pretrained(folder / "tokenizer")),
        ("vae", lambda: _train_autoencoder(folder, world, int(6000 * effort))),
        ("text_encoder", lambda: _train_text_encoder(folder, world, int(1500 * effort))),
        ("unet", lambda: _train_unet(folder, world, int(5400 * effort))),
    ]
    for number, (name, make) in enumerate(stages):
        if not (folder / name).is_dir():
            torch.manual_seed(number)
            with timed(name):
                make()
    _schedule().save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "TextToVideoSDPipeline"}))
    return folder


def _tokenizer() -> CLIPTokenizer:
    """The words of sentences whole, all others letter by letter."""
    tokens = tokenizer("", TOKENS)
    tokens.add_tokens([AddedToken(word, single_word=True) for word in sentences.words()])
    tokens.add_tokens([AddedToken(sign) for sign in ":;'()"])
    return tokens


def _schedule() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def _train_autoencoder(folder: Path, world: World, steps: int) -> None:
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=CHANNELS,
        sample_size=SIDE,
    )
    rng, frames = np.random.default_rng(0), world.frames.reshape(-1, SIDE, SIDE, 3)

    def loss() -> Tensor:
        images = signed(frames[rng.integers(len(frames), size=8)])
        mode = vae.encode(images).latent_dist.mode()  # a sample would begin with more noise than signal
        error = vae.decode(mode + 0.05 * torch.randn_like(mode)).sample - images
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        return error.abs().mean() + edges + 1e-3 * mode.square().mean()

    train(list(vae.parameters()), loss, steps, 2e-3, "vae", bfloat16=False)
    with torch.no_grad():
        spread = vae.encode(signed(frames[:: len(frames) // 512])).latent_dist.mode().std().item()
    vae.register_to_config(scaling_factor=1 / spread)
    vae.save_pretrained(folder / "vae")


def _text_encoder(tokens: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokens),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_attention_heads=4,
            num_hidden_layers=2,
            max_position_embeddings=TOKENS,
            bos_token_id=tokens.bos_token_id,
            eos_token_id=tokens.eos_token_id,
            pad_token_id=tokens.pad_token_id,
        )
    )


def _unet() -> UNet3DConditionModel:
    return UNet3DConditionModel(
        sample_size=SIDE // 4,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=(48, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        attention_head_dim=16,
        norm_num_groups=8,
        cross_attention_dim=WIDTH,
    )


@torch.no_grad()
def _latents(folder: Path, world: World) -> Tensor:
    """Scaled, [N, CHANNELS, W - 1 + FRAMES, h, w]: a queue of the first frame stands before each clip."""
    vae = AutoencoderKL.from_pretrained(folder / "vae").eval()
    found = []
    for part in np.array_split(world.frames, len(world.frames) // 32):
        mode = vae.encode(signed(part.reshape(-1, SIDE, SIDE, 3))).latent_dist.mode() * vae.config.scaling_factor
        found.append(mode.unflatten(0, (len(part), FRAMES)).transpose(1, 2))
    latents = torch.cat(found)
    return torch.cat([latents[:, :, :1].expand(-1, -1, WINDOW - 1, -1, -1), latents], 2)


def _train_text_encoder(folder: Path, world: World, steps: int) -> None:
    """CLIP's loss, of captions against clips: how these end, and what has changed till then."""
    latents, tokens = _latents(folder, world), CLIPTokenizer.from_pretrained(folder / "tokenizer")
    ids = [_ids(tokens, captions) for captions in world.captions]
    seen = torch.cat([latents[:, :, -1], latents[:, :, -1] - latents[:, :, 0]], 1).flatten(1)
    tower = nn.Sequential(nn.Linear(seen.shape[1], 256), nn.GELU(), nn.Linear(256, WIDTH))
    text, scale, rng = _text_encoder(tokens), nn.Parameter(torch.tensor(2.5)), np.random.default_rng(0)

    def loss() -> Tensor:
        rows = rng.integers(len(seen), size=CONTRASTED)
        told = torch.stack([ids[row][rng.integers(len(ids[row]))] for row in rows])
        shown = tower(seen[rows] + 0.3 * torch.randn(CONTRASTED, seen.shape[1]))
        read = F.normalize(text(told).pooler_output, dim=1)
        logits = scale.exp() * F.normalize(shown, dim=1) @ read.T
        return (
            F.cross_entropy(logits, torch.arange(CONTRASTED)) + F.cross_entropy(logits.T, torch.arange(CONTRASTED))
        ) / 2

    train([*text.parameters(), *tower.parameters(), scale], loss, steps, 2e-3, "text encoder", bfloat16=False)
    text.save_pretrained(folder / "text_encoder")


def _ids(tokens: CLIPTokenizer, texts: list[str]) -> Tensor:
    return tokens(texts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt").input_ids


def _train_unet(folder: Path, world: World, steps: int) -> None:
    latents, tokens = _latents(folder, world), CLIPTokenizer.from_pretrained(folder / "tokenizer")
    text = CLIPTextModel.from_pretrained(folder / "text_encoder").eval().requires_grad_(False)
    unet, rng = _unet(), np.random.default_rng(0)
    schedule, noise_rng, average = (
        DDPMScheduler.from_config(_schedule().config),
        torch.Generator().manual_seed(0),
        _average(unet),
    )

    def loss() -> Tensor:
        rows, starts = rng.integers(len(latents), size=BATCH), rng.integers(1, FRAMES, size=BATCH)
        clean = torch.stack([latents[row, :, at : at + WINDOW] for row, at in zip(rows, starts, strict=True)])
        told = ["" if rng.random() < NO_PROMPT else str(rng.choice(world.captions[row])) for row in rows]
        times = torch.randint(schedule.config.num_train_timesteps, (BATCH,), generator=noise_rng)
        noise = torch.randn(clean.shape, generator=noise_rng)
        average.update_parameters(unet)
        noisy = schedule.add_noise(clean, noise, times)
        error = (unet(noisy, times, text(_ids(tokens, told)).last_hidden_state).sample.float() - noise).square()
        return (error.mean() + error[:, :, -1].mean()) / 2  # the last frame is the one that TI2V takes

    train(list(unet.parameters()), loss, steps, 2e-3, "unet", bfloat16=False)
    average.module.save_pretrained(folder / "unet")


def _average(model: torch.nn.Module) -> torch.optim.swa_utils.AveragedModel:
    return torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--effort", type=float, default=1.0, help="of the training steps (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    build(options.out / "film", options.effort)


if __name__ == "__main__":
    main()
