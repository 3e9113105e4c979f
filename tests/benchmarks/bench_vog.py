"""VoG over its floor, over a plain per-image loop, and its peak memory: `python -m tests.benchmarks.bench_vog`.

The floor is one batched input-only backward a checkpoint, on models that are loaded already. The plain loop takes one
image and one checkpoint at a time and calls `backward()`; a second one asks autograd for the inputs' gradient only.
"""

from __future__ import annotations

import argparse
import copy
import resource
import subprocess
import sys

import timm
import torch
from torch import Tensor, nn

from tests.benchmarks.side_by_side import compare
from trainer.selection.vog import vog
from trainer.tasks.small_cnn import SmallCNN

IMAGES, PIXELS, CHECKPOINTS, CLASSES = 64, 64, 3, 10


def checkpoints(dtype: torch.dtype = torch.float32) -> list[nn.Module]:
    models = []
    for seed in range(CHECKPOINTS):
        torch.manual_seed(seed)
        models.append(timm.create_model("resnet18", num_classes=CLASSES).to(dtype).eval())
    return models


def rows(count: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 3, PIXELS, PIXELS, generator=generator, dtype=dtype)
    return x, torch.randint(CLASSES, (count,), generator=generator)


def floor(models: list[nn.Module], x: Tensor, y: Tensor) -> None:
    for model in models:
        inputs = x.detach().requires_grad_()
        torch.autograd.grad(model(inputs).gather(1, y[:, None]).sum(), inputs)


def per_image(models: list[nn.Module], x: Tensor, y: Tensor, *, inputs_only: bool = False) -> Tensor:
    scores = []
    for image, label in zip(x, y, strict=True):
        gradients = []
        for model in models:
            pixels = image[None].clone().requires_grad_()
            logit = model(pixels)[0, label]
            if inputs_only:
                (gradient,) = torch.autograd.grad(logit, pixels)
            else:
                model.zero_grad()
                logit.backward()
                gradient = pixels.grad
            gradients.append(gradient[0].mean(0))
        scores.append(torch.stack(gradients).std(0, correction=0).mean())
    return torch.stack(scores)


def largest_relative_error() -> float:
    """Of `vog` against the plain loop, in float64."""
    models, (x, y) = checkpoints(torch.float64), rows(IMAGES, torch.float64)
    expected = per_image(models, x, y)
    scores = vog(models[0], [model.state_dict() for model in models], x, y)
    return ((scores - expected).abs() / expected).max().item()


def peak_mib(count: int) -> float:
    """Peak resident memory of a process that scores with so many checkpoints; three snapshots take turns."""
    command = [sys.executable, "-m", "tests.benchmarks.bench_vog", "--memory", str(count)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure_memory(count: int) -> None:
    torch.manual_seed(0)
    models = [SmallCNN(CLASSES, PIXELS) for _ in range(3)]
    x, y = rows(256)
    vog(models[0], [models[i % 3].state_dict() for i in range(count)], x, y, batch_size=256)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--memory", type=int, metavar="CHECKPOINTS", help="print this process's peak MiB and stop")
    arguments = parser.parse_args()
    if arguments.memory:
        return measure_memory(arguments.memory)

    models, (x, y) = checkpoints(), rows(IMAGES)
    frozen = [copy.deepcopy(model).requires_grad_(False) for model in models]
    snapshots = [model.state_dict() for model in frozen]

    def ours() -> Tensor:
        return vog(models[0], snapshots, x, y)

    print(f"ResNet-18, {IMAGES} images, {PIXELS} px, {CHECKPOINTS} checkpoints, {torch.get_num_threads()} thread(s)")
    print("vog over its floor:", compare(ours, lambda: floor(frozen, x, y), arguments.rounds), "goal <= 1.05")
    loop = compare(lambda: per_image(models, x, y), ours, max(3, arguments.rounds // 3))
    print("plain per-image loop over vog:", loop, "goal >= 4")
    lean = compare(lambda: per_image(frozen, x, y, inputs_only=True), ours, max(3, arguments.rounds // 3))
    print("input-only per-image loop over vog:", lean)
    print(f"largest relative difference from the plain loop, float64: {largest_relative_error():.1e}, goal <= 1e-6")
    for count in (3, 12):
        print(f"peak memory, 256 images, {count} checkpoints: {peak_mib(count):.0f} MiB")


if __name__ == "__main__":
    main()
