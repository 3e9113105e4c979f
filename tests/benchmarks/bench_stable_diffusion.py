"""Stable Diffusion: the engine with 8 clients against the stock diffusers pipeline called once a request.

    python -m tests.benchmarks.bench_stable_diffusion            # a small model on one CPU thread
    python -m tests.benchmarks.bench_stable_diffusion --sd15     # of SD 1.5's size at 512 pixels, bfloat16, on a GPU

Same random weights, prompts, steps and guidance on both sides, in one process, in turns; ratios are medians over the
rounds. Goal: at least twice the images a second, which needs a batch that costs less than its rows: on a CPU, a model
whose calls cost more than its arithmetic. Then the share of a batch's time that is not the UNet's.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from generator_service.allocator import keep_freed_memory
from generator_service.backends.interface import Row, Sampling
from generator_service.backends.stable_diffusion import Config, StableDiffusionBackend
from generator_service.batching import Batch, Generation
from generator_service.engine import Engine
from tests.benchmarks.side_by_side import compare
from tests.generator_service.tiny_sd import TOKENS, full, scheduler, tokenizer

CLIENTS = 8
GUIDANCE = 7.5
PROMPT = "a photo of an owl, which is brown and white, on a branch"
NEGATIVE = "distorted, unrealistic, blurry, out of frame"


@dataclass(frozen=True)
class Size:
    """Of a checkpoint."""

    unet: tuple[int, ...]  # channels of its blocks; all but the last have attention
    unet_layers: int
    latents: int  # height and width
    vae: tuple[int, ...]
    vae_layers: int
    text_width: int
    text_layers: int


SMALL = Size(unet=(32, 64), unet_layers=1, latents=8, vae=(16, 32), vae_layers=1, text_width=32, text_layers=2)
SD15 = Size(
    unet=(320, 640, 1280, 1280),
    unet_layers=2,
    latents=64,
    vae=(128, 256, 512, 512),
    vae_layers=2,
    text_width=768,
    text_layers=12,
)


def save_checkpoint(folder: Path, size: Size, dtype: torch.dtype) -> Path:
    """A checkpoint with random weights."""
    torch.manual_seed(0)
    blocks, groups = len(size.unet), min(32, size.vae[0] // 2)
    unet = UNet2DConditionModel(
        sample_size=size.latents,
        block_out_channels=size.unet,
        layers_per_block=size.unet_layers,
        down_block_types=("CrossAttnDownBlock2D",) * (blocks - 1) + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (blocks - 1),
        attention_head_dim=8,
        norm_num_groups=min(32, size.unet[0] // 2),
        cross_attention_dim=size.text_width,
    )
    vae = AutoencoderKL(
        block_out_channels=size.vae,
        layers_per_block=size.vae_layers,
        down_block_types=("DownEncoderBlock2D",) * len(size.vae),
        up_block_types=("UpDecoderBlock2D",) * len(size.vae),
        norm_num_groups=groups,
        latent_channels=4,
        scaling_factor=0.18215,
    )
    words = tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=size.text_width,
        intermediate_size=4 * size.text_width,
        num_hidden_layers=size.text_layers,
        num_attention_heads=max(2, size.text_width // 64),
        max_position_embeddings=TOKENS,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
    )
    for name, part in {"unet": unet, "vae": vae, "text_encoder": CLIPTextModel(text)}.items():
        part.to(dtype).save_pretrained(folder / name)
    words.save_pretrained(folder / "tokenizer")
    scheduler("epsilon").save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    parameters = sum(parameter.numel() for parameter in unet.parameters())
    print(f"UNet of {parameters / 1e6:.1f} M parameters, latents of {size.latents}, {dtype} on {device()}")
    return folder


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Stock:
    """The pipeline as its documentation has it, one request at a time."""

    def __init__(self, folder: Path, steps: int, dtype: torch.dtype):
        self._steps = steps
        self._pipeline = StableDiffusionPipeline(
            vae=AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=dtype),
            text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=dtype),
            tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
            unet=UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=dtype),
            scheduler=scheduler("epsilon"),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).to(device())
        self._pipeline.set_progress_bar_config(disable=True)

    def __call__(self, images: int) -> None:
        for seed in range(images):
            self._pipeline(
                PROMPT,
                negative_prompt=NEGATIVE,
                guidance_scale=GUIDANCE,
                num_inference_steps=self._steps,
                generator=torch.Generator().manual_seed(seed),
                output_type="np",
            )


class NoMetrics:
    def batch_done(self, batch: Batch, started: float, finished: float) -> None: ...

    def adaptation_step(self, loss: float) -> None: ...


class Clients:
    """Callers of the engine, each with one request of one image at a time."""

    def __init__(self, backend: StableDiffusionBackend, steps: int):
        self._weights, self._sampling = full(backend), Sampling(steps, "ddim", guided=True)
        self._engine = Engine(
            lambda: (backend, self._weights),
            lambda weights: None,
            NoMetrics(),
            max_batch=CLIENTS,
            window_s=0.01,
            max_waiting_rows=256,
        )
        self._engine.start()
        self._engine.ready.result()
        self._pool = ThreadPoolExecutor(CLIENTS)

    def __call__(self, images: int) -> None:
        list(self._pool.map(self._ask, range(CLIENTS), [images // CLIENTS] * CLIENTS))

    def _ask(self, client: int, images: int) -> None:
        for number in range(images):
            row = Row(client + CLIENTS * number, None, GUIDANCE, PROMPT, NEGATIVE)
            self._engine.submit(Generation(self._weights, self._sampling, [row])).result()

    def close(self) -> None:
        self._pool.shutdown()
        self._engine.stop()


@contextmanager
def timed(unet: UNet2DConditionModel) -> Iterator[list[float]]:
    """Seconds of the UNet's calls, each of which is waited for."""
    spent, begun = [], [0.0]

    def begin(*_: object) -> None:
        begun[0] = now()

    handles = [
        unet.register_forward_pre_hook(begin),
        unet.register_forward_hook(lambda *_: spent.append(now() - begun[0])),
    ]
    yield spent
    for handle in handles:
        handle.remove()


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return perf_counter()


def outside_unet(backend: StableDiffusionBackend, steps: int) -> tuple[float, float]:
    """(share of a batch's time that is not the UNet's, images a second of bare batches)."""
    weights, sampling = full(backend), Sampling(steps, "ddim", guided=True)
    rows = [Row(seed, None, GUIDANCE, PROMPT, NEGATIVE) for seed in range(CLIENTS)]
    backend.generate(weights, rows, sampling)
    with timed(backend.checkpoint(weights).unet) as spent:
        started = now()
        backend.generate(weights, rows, sampling)
        whole = now() - started
    return 1 - sum(spent) / whole, CLIENTS / whole


def bench(size: Size, dtype: torch.dtype, rounds: int, images: int, steps: int, compiled: bool) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = save_checkpoint(Path(temporary), size, dtype)
        stock = Stock(folder, steps, dtype)
        name = str(dtype).removeprefix("torch.")
        backend = StableDiffusionBackend(Config(checkpoint=str(folder), dtype=name, compile=compiled))
        clients = Clients(backend, steps)
        result = compare(lambda: stock(images), lambda: clients(images), rounds)
        clients.close()
        print(f"8 clients over one stock call a request, {images} images of {steps} steps: {result}")
        print(f"images/s: {images / result.second_s:.2f} with 8 clients, {images / result.first_s:.2f} of the stock's")
        share, rate = outside_unet(backend, steps)
        print(f"outside the UNet: {share:.1%} of a batch of {CLIENTS} ({rate:.2f} images/s)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=16, help="in each measurement, a multiple of 8")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps")
    parser.add_argument("--sd15", action="store_true", help="SD 1.5's size at 512 pixels in bfloat16; wants a GPU")
    parser.add_argument("--compile", action="store_true", help="torch.compile the engine's UNet")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # for both sides alike, as the launcher does
    size, dtype = (SD15, torch.bfloat16) if options.sd15 else (SMALL, torch.float32)
    bench(size, dtype, options.rounds, options.images, options.steps, options.compile)


if __name__ == "__main__":
    main()
