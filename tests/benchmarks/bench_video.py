"""Clips: our backend against the plain shape of the same algorithm, and a batch of clips against one at a time.

    python -m tests.benchmarks.bench_video          # small models on one CPU thread
    python -m tests.benchmarks.bench_video --gpu    # seconds a clip of ModelScopeT2V's size at 256 pixels, float16

The plain shape calls the UNet twice for guidance, encodes every condition frame anew for each frame that is made, and
denoises the whole window. Same random weights, noise and guidance on both sides, hence the same frames; in one process,
in turns; ratios are medians over the rounds. Goals: the plain shape takes 1.8 times as long, and 8 clips one at a time
take twice as long as a batch of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet3DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from generator_service.allocator import keep_freed_memory
from generator_service.backends.interface import Row, Sampling
from generator_service.backends.ti2v import Config, TI2VBackend
from protocol.video import GuidanceCurve
from tests.benchmarks.side_by_side import compare
from tests.generator_service import tiny_t2v
from tests.generator_service.backends.plain_ti2v import PlainTI2V
from tests.generator_service.tiny_sd import TOKENS, scheduler, tokenizer

FRAMES = WINDOW = 16
CLIPS = 8
STEPS = (5, 10, 15, 20)  # of the GPU's clips
PROMPT = "there is an expression of slight surprise on the face of a woman"


def row(seed: int, size: int) -> Row:
    image = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Row(seed, None, prompt=PROMPT, image=image, guidance=GuidanceCurve())


def sampling(steps: int) -> Sampling:
    return Sampling(steps, "ddim", guided=True, frames=FRAMES)


@dataclass
class Counts:
    """Of our side, counted by hooks."""

    calls: int = 0
    encodes: int = 0

    def of(self, backend: TI2VBackend, rows: list[Row], steps: int) -> Counts:
        """One run."""
        weights = tiny_t2v.full(backend)
        checkpoint = backend.checkpoint(weights)

        def encoded(images: np.ndarray) -> None:
            self.encodes += len(images)

        def called(*_: object) -> None:
            self.calls += 1

        handles = [
            checkpoint.unet.register_forward_pre_hook(called),
            checkpoint.vae.encoder.register_forward_pre_hook(lambda _, inputs: encoded(inputs[0])),
        ]
        backend.generate(weights, rows, sampling(steps))
        for handle in handles:
            handle.remove()
        return self


def against_plain(folder: Path, backend: TI2VBackend, steps: int, rounds: int) -> None:
    plain, weights, clip = PlainTI2V(folder, WINDOW), tiny_t2v.full(backend), row(1, 32)
    expected = plain(clip, FRAMES, steps)
    calls, encodes = plain.calls, plain.encodes
    found = Counts().of(backend, [clip], steps)
    print(f"one clip of {FRAMES} frames, {steps} steps: {found.calls} network calls against {calls}, ", end="")
    print(f"{found.encodes} encode against {encodes}")
    off = np.abs(backend.generate(weights, [clip], sampling(steps))[0].astype(int) - expected).max()
    print(f"frames differ by {off} of 255 at most")
    result = compare(
        lambda: plain(clip, FRAMES, steps), lambda: backend.generate(weights, [clip], sampling(steps)), rounds
    )
    print(f"plain shape over ours (goal 1.8): {result}")


def batch_against_single(backend: TI2VBackend, steps: int, rounds: int) -> None:
    weights, rows = tiny_t2v.full(backend), [row(seed, 32) for seed in range(CLIPS)]
    result = compare(
        lambda: [backend.generate(weights, [clip], sampling(steps)) for clip in rows],
        lambda: backend.generate(weights, rows, sampling(steps)),
        rounds,
    )
    print(f"{CLIPS} clips one at a time over a batch of them, {steps} steps (goal 2): {result}")


# ---------------------------------------------------------------- ModelScopeT2V's size


def save_large(folder: Path) -> Path:
    """A checkpoint with random weights of ModelScopeT2V's size, at 256 pixels."""
    torch.manual_seed(0)
    unet = UNet3DConditionModel(sample_size=32)  # diffusers' defaults are that model
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        scaling_factor=0.18215,
    )
    words = tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=23,
        num_attention_heads=16,
        max_position_embeddings=TOKENS,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
    )
    for name, part in {"unet": unet, "vae": vae, "text_encoder": CLIPTextModel(text)}.items():
        part.to(torch.float16).save_pretrained(folder / name)
    words.save_pretrained(folder / "tokenizer")
    scheduler("epsilon").save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "TextToVideoSDPipeline"}))
    print(f"UNet of {sum(parameter.numel() for parameter in unet.parameters()) / 1e6:.0f} M parameters")
    return folder


def on_gpu(rounds: int) -> None:
    """Seconds a clip for each number of steps, alone and in a batch."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = save_large(Path(temporary))
        backend = TI2VBackend(Config(checkpoint=str(folder), device="cuda", dtype="float16"))
        weights = tiny_t2v.full(backend)
        for clips in (1, CLIPS):
            rows = [row(seed, 256) for seed in range(clips)]
            backend.generate(weights, rows, sampling(1))
            for steps in STEPS:
                spent = statistics.median(_seconds(backend, rows, steps) for _ in range(rounds))
                print(f"batch of {clips}, {steps} steps: {spent / clips:.2f} s a clip of {FRAMES} frames")
        print(f"at most {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


def _seconds(backend: TI2VBackend, rows: list[Row], steps: int) -> float:
    started = perf_counter()
    backend.generate(tiny_t2v.full(backend), rows, sampling(steps))  # its pixels are on the CPU when it is done
    return perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="denoising steps of each frame, on the CPU")
    parser.add_argument("--gpu", action="store_true", help="ModelScopeT2V's size; wants a GPU")
    options = parser.parse_args()
    if options.gpu:
        return on_gpu(options.rounds)
    torch.set_num_threads(1)
    keep_freed_memory()  # for both sides alike, as the launcher does
    with tempfile.TemporaryDirectory() as temporary:
        folder = tiny_t2v.save_checkpoint(Path(temporary))
        backend = tiny_t2v.open_backend(folder, window=WINDOW)
        against_plain(folder, backend, options.steps, options.rounds)
        batch_against_single(backend, options.steps, options.rounds)


if __name__ == "__main__":
    main()
