"""What `bench_tuning` compares does the same work: tiny sizes, real parts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from generator_service.real_images import RealImages
from tests.benchmarks import bench_tuning
from tests.benchmarks.bench_tuning import check_equal
from tests.benchmarks.plain_shape import PARTS, Ours, Plain, opened
from tests.generator_service.rl.tiny_policy import checkpoint, job
from tests.generator_service.tiny_dit import CLASSES, full, open_backend, save_checkpoint


def real(size: int) -> RealImages:
    labels = np.repeat(np.arange(len(CLASSES)), 3)
    images = np.random.default_rng(0).integers(0, 256, (len(labels), size, size, 3), dtype=np.uint8)
    return RealImages(images, labels, [str(at) for at in range(len(labels))], [None] * len(labels))


@pytest.fixture(params=["pixels, guided", "pixels, not guided", "latents, variance told"])
def place(request, tmp_path):
    """Three identities of two samples in batches of 4 and 2."""
    rollout = {"guidance_scale": 1.0 if request.param == "pixels, not guided" else 2.5}
    if request.param == "latents, variance told":
        folder, size = save_checkpoint(tmp_path / "dit", vae=True, learned_sigma=True), 16
        rollout["variance"] = "learned"
    else:
        folder, size = checkpoint(tmp_path / "dit"), 8
    backend, wanted = open_backend(folder), job(rollout=rollout, features="timm:test_resnet")
    with opened(backend, full(backend), real(size), wanted, tmp_path) as place:
        yield place


def test_all_shapes_give_the_same_numbers(place):
    ours = Ours(place).numbers()
    assert ours.rewards.std() > 0.1 and math.isfinite(ours.loss) and ours.gradient.norm() > 0
    check_equal(ours, Plain(place).numbers())
    for part in PARTS:
        check_equal(ours, Ours(place, part).numbers())


def test_equality_is_not_given_away(place):
    ours = Ours(place).numbers()
    with torch.no_grad():
        next(iter(place.policy.parameters.values())).add_(0.1)
    with pytest.raises(AssertionError):
        check_equal(ours, Plain(place).numbers())


def test_a_step_of_both_ends_with_the_same_weights(place):
    """An optimiser's first step goes one learning rate in the direction of the gradient's sign: where that is near
    nothing, rounding decides."""
    begun = place.policy.state()
    ours, plain = Ours(place), Plain(place)
    ours()
    by_ours = place.policy.state()
    place.policy.restore(begun)
    plain()
    by_plain = place.policy.state()
    moved = torch.cat([(by_ours[name] - begun[name]).flatten() for name in begun])
    apart = torch.cat([(by_ours[name] - by_plain[name]).flatten() for name in begun])
    assert moved.abs().max() > 5e-3 and (apart.abs() < 1e-4).float().mean() > 0.99


def test_a_replay_on_unchanged_weights_is_exact(tmp_path):
    backend = open_backend(checkpoint(tmp_path / "dit"))
    wanted = job(rollout={"batch_size": 4, "guidance_scale": 2.5})
    with opened(backend, full(backend), real(8), wanted, tmp_path) as place:
        assert Ours(place).replayed() == (0.0, 0.0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gpus_figures_on_a_tiny_model(dtype, capsys):
    """The path that a GPU takes, with a VAE and a variance that is told."""
    bench_tuning.figures(bench_tuning.TINY, dtype, rounds=1)
    told = capsys.readouterr().out
    assert "images/s" in told and "update steps/s" in told and "TFLOP/s" in told and "nan" not in told
