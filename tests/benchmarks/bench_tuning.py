"""Tuning by reward: rollout and update by our code against the plain shape of the same algorithm, in turns.

    python -m tests.benchmarks.bench_tuning          # small models on one CPU thread, a few minutes
    python -m tests.benchmarks.bench_tuning --gpu    # a model of DiT-XL/2's size at 256 pixels, bfloat16; wants CUDA

The plain shape (see `plain_shape`) concatenates its buffers at every denoising step, computes the reward's features of
one image at a time, and calls the model twice for guidance. Goal: three times the samples a second, same numbers, which
are compared before anything is timed. What each of the three parts costs is timed alone, in our code; the model's bare
passes, which both shapes have to make, say how much there is to be won at all.

Sizes: the embedded model of letters, with many rows and with few, and a DiT on latents with random weights. On a CPU a
pass over 2 B rows takes about as long as two over B, unless B is so small that calls cost more than arithmetic; so
guidance in one call wins most with few rows, and little else is to be won.

`--gpu` prints what our code reaches:
images and update steps a second, memory, and a roofline. It was written without a GPU at hand: only its tiny sibling,
on a CPU, is run by the tests (`tests/generator_service/rl/test_plain_shape.py`).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTTransformer2DModel
from torch.utils.flop_counter import FlopCounterMode

from generator_service.allocator import keep_freed_memory
from generator_service.backends.dit import LETTERS, Config, DiTBackend
from generator_service.real_images import RealImages
from protocol.tuning import TuneJob
from tests.benchmarks.plain_shape import PARTS, Numbers, Ours, Plain, Workplace, opened
from tests.benchmarks.side_by_side import compare
from tests.generator_service.tiny_dit import full

GOAL = 3.0
REAL = 4  # images of an identity


@dataclass(frozen=True)
class Size:
    """Of a model, of the reward's, and of a rollout."""

    name: str
    features: str
    features_size: int
    identities: int
    samples: int
    denoising_steps: int
    layers: int = 0  # of the transformer; 0: the embedded checkpoint
    heads: int = 0
    width: int = 0  # of a head
    latents: int = 0
    classes: int = 0
    vae: tuple[int, ...] = ()  # channels of its blocks
    vae_layers: int = 1

    @property
    def rows(self) -> int:
        return self.identities * self.samples


LETTERS_DIT = Size("letters", "timm:resnet10t", 32, identities=8, samples=8, denoising_steps=10)
FEW_LETTERS = replace(LETTERS_DIT, name="few-letters", identities=2, samples=2)
LATENT_DIT = Size("latents", "timm:resnet18", 64, 4, 2, 3, 6, 6, 32, latents=16, classes=10, vae=(16, 32, 32))
TINY = Size("tiny", "timm:test_resnet", 32, 2, 2, 3, 2, 2, 8, latents=8, classes=3, vae=(8, 8))
XL2 = Size(
    "of DiT-XL/2's size", "timm:resnet50", 224, 8, 8, 50, 28, 16, 72, 32, 1000, (128, 256, 512, 512), vae_layers=2
)
SIZES = {size.name: size for size in (LETTERS_DIT, FEW_LETTERS, LATENT_DIT)}


def save_checkpoint(folder: Path, size: Size) -> Path:
    """Random weights, a learned variance, and a VAE."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=size.heads,
        attention_head_dim=size.width,
        in_channels=4,
        out_channels=8,
        num_layers=size.layers,
        sample_size=size.latents,
        patch_size=2,
        num_embeds_ada_norm=size.classes,
        norm_num_groups=1,
    )
    blocks = len(size.vae)
    vae = AutoencoderKL(
        block_out_channels=size.vae,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        layers_per_block=size.vae_layers,
        norm_num_groups=min(32, size.vae[0] // 2),
        latent_channels=4,
        sample_size=size.latents * 2 ** (blocks - 1),
    )
    transformer.save_pretrained(folder / "transformer")
    vae.save_pretrained(folder / "vae")
    DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text('{"_class_name": "DiTPipeline"}')
    return folder


@contextmanager
def workplace(size: Size, dtype: str = "float32", batch_size: int | None = None) -> Iterator[Workplace]:
    """On the GPU where there is one; batches of the whole rollout unless said otherwise."""
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        folder = save_checkpoint(place / "dit", size) if size.layers else LETTERS
        backend = DiTBackend(Config(checkpoint=str(folder), dtype=dtype))
        base, batch = full(backend), batch_size or size.rows
        labels = np.repeat(np.arange(size.identities), REAL)
        images = np.random.default_rng(0).integers(0, 256, (len(labels), *backend.native_size(), 3), dtype=np.uint8)
        real = RealImages(images, labels, [str(at) for at in range(len(labels))], [None] * len(labels))
        job = TuneJob.model_validate(
            {
                "name": "bench",
                "rollout": {
                    "identities": size.identities,
                    "samples": size.samples,
                    "denoising_steps": size.denoising_steps,
                    "guidance_scale": 2.0,
                    "batch_size": batch,
                },
                "update": {"batch_size": batch, "baseline": "none", "precision": dtype},
                "features": size.features,
                "features_size": size.features_size,
                "pretrained": False,
            }
        )
        with opened(backend, base, real, job, place / "published") as opened_place:
            yield opened_place


# ---------------------------------------------------------------- side by side


def check_equal(ours: Numbers, plain: Numbers) -> None:
    """Raises AssertionError unless they are the same but for rounding, which may move a pixel by a level."""
    levels = np.abs(ours.images.astype(int) - plain.images.astype(int))
    assert levels.max() <= 1 and (levels > 0).mean() < 1e-3, f"images: {levels.max()} levels, {(levels > 0).mean()}"
    rewards = (ours.rewards - plain.rewards).abs().max().item()
    assert rewards < 5e-3, f"rewards: {rewards}"
    loss = abs(ours.loss - plain.loss)
    assert loss < 5e-3 * max(abs(ours.loss), 0.1), f"loss: {loss}"
    gradient = ((ours.gradient - plain.gradient).norm() / ours.gradient.norm()).item()
    assert gradient < 5e-3, f"gradient: {gradient}"
    print(
        f"  same numbers: pixels that differ by a level {(levels > 0).mean():.1e}; largest differences: rewards "
        f"{rewards:.1e}, loss {loss:.1e} of {ours.loss:.3g}, gradient {gradient:.1e} of its norm"
    )


def side_by_side(size: Size, rounds: int, batch_size: int | None) -> None:
    with workplace(size, batch_size=batch_size) as place:
        ours, plain = Ours(place), Plain(place)
        print(
            f"{size.name}: {size.identities} x {size.samples} samples of {size.denoising_steps} guided steps, "
            f"{place.job.rollout.batch_size} rows at a time; {size.features} at {size.features_size} px; "
            f"{torch.get_num_threads()} thread(s)"
        )
        off, ratio_off = ours.replayed()
        exact = "exactly 0 and 1" if off == ratio_off == 0 else "NOT exact"
        print(
            f"  replay on unchanged weights: log-probabilities differ by {off}, ratios from 1 by {ratio_off}: {exact}"
        )
        expected = ours.numbers()
        check_equal(expected, plain.numbers())
        result = compare(plain, ours, rounds)
        rates = f"{size.rows / result.second_s:.1f} samples/s, {size.rows / result.first_s:.1f} of the plain shape"
        met = "met" if result.ratio >= GOAL else "missed"
        print(f"  {rates}: {result}; goal >= {GOAL:.0f}: {met}")
        for part in PARTS:
            print(f"    of it {part}, alone: {compare(Ours(place, part), ours, rounds)}")
        bare = compare(ours, lambda: passes(ours, place), rounds)
        print(f"  ours over the model's bare passes: {bare}")
        most = result.ratio * bare.ratio
        print(f"  bound: these passes and nothing else would be {most:.2f} times the plain shape's rate")
    figures(size, "float32", rounds, batch_size)


def passes(ours: Ours, place: Workplace) -> None:
    """What any shape has to compute with the model: every step of the rollout, and its update's three passes."""
    policy, process, labels = place.policy, ours.process, place.wanted.labels.to(place.policy.space.device)
    guidance, batch_size = place.job.rollout.guidance_scale, place.job.rollout.batch_size
    latents = torch.zeros(len(labels), *policy.space.latent_shape, device=labels.device)
    with policy.in_use():
        for rows in torch.arange(len(labels), device=labels.device).split(batch_size):
            given = (latents[rows], process.times[:1].expand(len(rows)), labels[rows], guidance)
            for step in range(len(process.times)):
                with torch.no_grad():
                    policy.predict(*given)
                if step in process.learnt:
                    policy.reference(*given)
                    policy.predict(*given).sum().backward()
    place.gradient()


# ---------------------------------------------------------------- what is reached


def figures(size: Size, dtype: str, rounds: int, batch_size: int | None = None) -> None:
    """Rates, memory and roofline of our code."""
    with workplace(size, dtype, batch_size) as place:
        ours, device = Ours(place), place.policy.space.device
        with FlopCounterMode(display=False) as counted:  # and what is allocated or chosen on first use
            made = ours.sample()
        sampling = counted.get_total_flops()
        rewards = ours.rewards(made)
        with FlopCounterMode(display=False) as counted:
            ours.learn(made, rewards)
        learning = counted.get_total_flops()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        sample_s, reward_s, learn_s = (
            statistics.median(column) for column in zip(*(_phases(ours, place) for _ in range(rounds)), strict=True)
        )
        peak, bandwidth = machine(device, getattr(torch, dtype))
        pieces = len(ours.process.learnt) * len(made.batches)
        whole = sample_s + reward_s + learn_s
        print(f"  {size.name}, {dtype} on {device.type}; matrix products reach {peak / 1e12:.3g} TFLOP/s:")
        print(f"    rollout {size.rows / sample_s:.3g} images/s, {_rate(sampling, sample_s, peak)}")
        print(
            f"    update {pieces / learn_s:.3g} update steps/s (forward and backward, of {len(made.batches[0].rows)} "
            f"transitions), {_rate(learning, learn_s, peak)}"
        )
        shares = f"rollout {sample_s / whole:.0%}, rewards {reward_s / whole:.0%}, update {learn_s / whole:.0%}"
        print(f"    of the time: {shares}")
        weights = sum(value.numel() * value.element_size() for value in place.policy.space.transformer.parameters())
        calls = len(ours.process.times) * len(made.batches)
        intensity = sampling / calls / weights
        bound = "arithmetic" if intensity > peak / bandwidth else "reading the weights"
        print(
            f"    roofline of a denoising step: {intensity:.3g} FLOP a byte of weights, {peak / bandwidth:.3g} where "
            f"memory ({bandwidth / 1e9:.3g} GB/s) and arithmetic take equally long: bound by {bound}; "
            "what it stays below is spent on calls, and on operations that are small or no matrix products"
        )
        if device.type == "cuda":
            print(f"    peak memory: {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")


def _rate(flops: float, seconds: float, peak: float) -> str:
    return f"{flops / seconds / 1e12:.3g} TFLOP/s ({flops / seconds / peak:.0%} of a matrix product's)"


def _phases(ours: Ours, place: Workplace) -> tuple[float, float, float]:
    """Seconds of rollout, rewards and update."""
    device = place.policy.space.device
    sample_s, made = timed(ours.sample, device)
    reward_s, rewards = timed(lambda: ours.rewards(made), device)
    learn_s, _ = timed(lambda: ours.learn(made, rewards), device)
    return sample_s, reward_s, learn_s


def timed(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds until the device is done, and what came of it."""
    began = _now(device)
    outcome = work()
    return _now(device) - began, outcome


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return perf_counter()


def machine(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """What the device does at best: FLOP/s of a large matrix product, and bytes/s of a copy, read and written."""
    side, length = (8192, 2**28) if device.type == "cuda" else (1024, 2**24)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source = torch.zeros(length, device=device)
    target = torch.zeros_like(source)
    product = min(timed(lambda: a @ b, device)[0] for _ in range(5))
    copy = min(timed(lambda: target.copy_(source), device)[0] for _ in range(5))
    return 2 * side**3 / product, 2 * 4 * length / copy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--identities", type=int, help="in a rollout")
    parser.add_argument("--samples", type=int, help="of an identity")
    parser.add_argument("--steps", type=int, help="denoising steps")
    parser.add_argument("--batch", type=int, help="rows denoised, and transitions learnt from, together; else all rows")
    parser.add_argument("--gpu", action="store_true", help="DiT-XL/2's size at 256 px in bfloat16; wants a GPU")
    options = parser.parse_args()
    asked = {"identities": options.identities, "samples": options.samples, "denoising_steps": options.steps}
    changed = {name: value for name, value in asked.items() if value is not None}
    if options.gpu:
        if not torch.cuda.is_available():
            parser.error("--gpu: there is no CUDA device here")
        return figures(replace(XL2, **changed), "bfloat16", options.rounds, options.batch)
    torch.set_num_threads(1)
    keep_freed_memory()  # for both shapes alike, as the launcher does
    for name in options.sizes:
        side_by_side(replace(SIZES[name], **changed), options.rounds, options.batch)


if __name__ == "__main__":
    main()
