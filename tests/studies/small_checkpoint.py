"""Trains a small Stable Diffusion of the real classes on captioned photos of 32 pixels, and saves it for diffusers.

Every stage is kept in a folder, so that a second run only reads. The CLIP towers, the autoencoder and the UNet see the
same photos. Knows nothing of adaptation.

    B batch, D width of the text embedding
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from generator_service.backends.clip_vision import clip_pixels

SIDE, WIDTH, TOKENS = 32, 128, 24  # pixels; width of the text embedding; positions of a prompt
BATCH = 32
WORDS = (
    "a an the of in on at and with which is are photo picture image small large big little young old two one standing "
    "sitting flying running driving parked red green blue white black brown grey yellow orange dark bright sky sea "
    "water grass field road street snow sand tree wall "
    "airplane automobile bird cat deer dog frog horse ship truck"
)
NO_PROMPT = 0.1  # part of the rows trained without a prompt, for guidance


@dataclass(frozen=True)
class Photos:
    images: np.ndarray  # uint8 [N, 32, 32, 3]
    labels: np.ndarray  # int64 [N], into `classes`
    classes: tuple[str, ...]

    @classmethod
    def read(cls, path: Path, split: str) -> Photos:
        """ "train" or "test" of an archive of JPEGs end to end: {split}_jpeg, {split}_offsets, {split}_labels."""
        with np.load(path) as archive:
            data, offsets = archive[f"{split}_jpeg"], archive[f"{split}_offsets"]
            files = [data[start:stop].tobytes() for start, stop in pairwise(offsets)]
            images = np.stack([np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files])
            return cls(images, archive[f"{split}_labels"].astype(np.int64), tuple(map(str, archive["class_names"])))

    def of(self, classes: Sequence[str], each: int | None = None) -> Photos:
        """Those of some classes, labelled anew; the first so many of each."""
        rows = [np.flatnonzero(self.labels == self.classes.index(name))[:each] for name in classes]
        labels = np.repeat(np.arange(len(rows)), [len(part) for part in rows])
        return Photos(self.images[np.concatenate(rows)], labels, tuple(classes))


def prompt(name: str) -> str:
    return f"a photo of {name}"


@contextmanager
def timed(stage: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    print(f"{stage}: {time.monotonic() - started:.0f} s", flush=True)


def train(
    parameters: Sequence[nn.Parameter],
    loss: Callable[[], Tensor],
    steps: int,
    rate: float,
    name: str,
    *,
    bfloat16: bool = True,
) -> None:
    """AdamW with a one-cycle rate; forward passes in bfloat16, if that is on."""
    optimizer = torch.optim.AdamW(parameters, lr=rate)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    total = 0.0
    for step in range(1, steps + 1):
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            value = loss()
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        cycle.step()
        total += value.item()
        if step % max(1, steps // 5) == 0:
            print(f"  {name} step {step}: loss {total / max(1, steps // 5):.4f}", flush=True)
            total = 0.0


def build(folder: Path, photos: Photos, effort: float = 1.0) -> Path:
    """The checkpoint, trained; what `folder` holds already is taken from there.

    Args:
        effort: of the number of training steps; 1: some ten minutes on two cores.
    """
    stages: list[tuple[str, Callable[[], None]]] = [
        ("tokenizer", lambda: tokenizer().save_pretrained(folder / "tokenizer")),
        ("vae", lambda: _train_autoencoder(folder, photos, int(700 * effort))),
        ("image_encoder", lambda: _train_towers(folder, photos, int(400 * effort))),
        ("unet", lambda: _train_unet(folder, photos, int(1400 * effort))),
    ]
    for number, (name, make) in enumerate(stages):
        if not (folder / name).is_dir():
            torch.manual_seed(number)
            with timed(name):
                make()
    StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(folder / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(folder / "unet"),
        scheduler=_scheduler(),
        image_encoder=CLIPVisionModelWithProjection.from_pretrained(folder / "image_encoder"),
        safety_checker=None,
        feature_extractor=CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}),
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def tokenizer(words: str = WORDS, length: int = TOKENS) -> CLIPTokenizer:
    """These words whole, the others letter by letter; at most `length` tokens."""
    letters = "abcdefghijklmnopqrstuvwxyz,.-0123456789"
    pieces, merges = [*letters, *(f"{letter}</w>" for letter in letters)], []
    for word in words.split():
        head = ""
        for letter in (*word[:-1], f"{word[-1]}</w>"):
            if head and head + letter not in pieces:
                pieces.append(head + letter)
                merges.append((head, letter))
            head += letter
    by_piece = {piece: index for index, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=by_piece, merges=merges, model_max_length=length)


def _scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def signed(images: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def _train_autoencoder(folder: Path, photos: Photos, steps: int) -> None:
    vae = AutoencoderKL(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=16,
        latent_channels=4,
        sample_size=SIDE,
    )
    rng = np.random.default_rng(0)

    def loss() -> Tensor:
        images = signed(photos.images[rng.integers(len(photos.images), size=BATCH // 2)])
        posterior = vae.encode(images).latent_dist
        error = vae.decode(posterior.sample()).sample.float() - images
        return error.square().mean() + 0.2 * error.abs().mean() + 1e-5 * posterior.kl().mean() / SIDE

    train(list(vae.parameters()), loss, steps, 2e-3, "vae")
    with torch.no_grad():
        spread = vae.encode(signed(photos.images[:512])).latent_dist.mode().std().item()
    vae.register_to_config(scaling_factor=1 / spread)
    vae.save_pretrained(folder / "vae")


def _train_towers(folder: Path, photos: Photos, steps: int) -> None:
    """CLIP's loss: a photo against the prompts of all classes, for in a batch a class comes many times."""
    words = tokenizer()
    sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_attention_heads": 4, "projection_dim": WIDTH}
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words),
            num_hidden_layers=2,
            max_position_embeddings=TOKENS,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
            **sizes,
        )
    )
    vision = CLIPVisionModelWithProjection(
        CLIPVisionConfig(num_hidden_layers=3, image_size=SIDE, patch_size=4, **sizes)
    )
    ids = _ids(words, [prompt(name) for name in photos.classes])
    pixels, labels = clip_pixels(photos.images, SIDE), torch.from_numpy(photos.labels)
    scale, rng = nn.Parameter(torch.tensor(2.0)), torch.Generator().manual_seed(0)

    def loss() -> Tensor:
        rows = torch.randint(len(pixels), (2 * BATCH,), generator=rng)
        images = pixels[rows]
        images = torch.where((torch.rand(2 * BATCH, generator=rng) < 0.5)[:, None, None, None], images.flip(3), images)
        seen = F.normalize(vision(images).image_embeds.float(), dim=1)
        read = F.normalize(text(ids).pooler_output.float(), dim=1)
        return F.cross_entropy(scale.exp() * seen @ read.T, labels[rows])

    train([*text.parameters(), *vision.parameters(), scale], loss, steps, 1e-3, "clip")
    text.save_pretrained(folder / "text_encoder")
    vision.save_pretrained(folder / "image_encoder")


def _ids(words: CLIPTokenizer, prompts: Sequence[str]) -> Tensor:
    return words(list(prompts), padding="max_length", max_length=TOKENS, return_tensors="pt").input_ids


@torch.no_grad()
def _train_inputs(folder: Path, photos: Photos) -> tuple[Tensor, Tensor]:
    """Scaled latents of all photos, and the embedding of each class's prompt, then that of no prompt."""
    vae = AutoencoderKL.from_pretrained(folder / "vae").eval()
    text = CLIPTextModel.from_pretrained(folder / "text_encoder").eval()
    parts = np.array_split(photos.images, max(1, len(photos.images) // 128))
    latents = torch.cat([vae.encode(signed(part)).latent_dist.mode() for part in parts])
    prompts = [*(prompt(name) for name in photos.classes), ""]
    return latents * vae.config.scaling_factor, text(_ids(tokenizer(), prompts)).last_hidden_state


def _train_unet(folder: Path, photos: Photos, steps: int) -> None:
    latents, contexts = _train_inputs(folder, photos)
    labels = torch.from_numpy(photos.labels)
    unet = UNet2DConditionModel(
        sample_size=SIDE // 4,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=16,
        cross_attention_dim=WIDTH,
    )
    schedule, rng = DDPMScheduler.from_config(_scheduler().config), torch.Generator().manual_seed(0)
    average = torch.optim.swa_utils.AveragedModel(unet, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99))

    def loss() -> Tensor:
        rows = torch.randint(len(latents), (BATCH,), generator=rng)
        without = torch.rand(BATCH, generator=rng) < NO_PROMPT
        times = torch.randint(schedule.config.num_train_timesteps, (BATCH,), generator=rng)
        noise = torch.randn(latents[rows].shape, generator=rng)
        noisy = schedule.add_noise(latents[rows], noise, times)
        average.update_parameters(unet)
        told = contexts[labels[rows].masked_fill(without, len(contexts) - 1)]
        return F.mse_loss(unet(noisy, times, told).sample.float(), noise)

    train(list(unet.parameters()), loss, steps, 1e-3, "unet")
    average.module.save_pretrained(folder / "unet")
