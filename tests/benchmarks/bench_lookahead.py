"""An update with lookahead selection over its floor: `python -m tests.benchmarks.bench_lookahead`.

The floor is what the method cannot do without: forward, backward and forward again on the mixed batch, forward and
backward on the real rows and the kept synthetic ones. The optimizer's own step is common to both and left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import timm
import torch
from torch import Tensor, nn

from tests.benchmarks.side_by_side import compare
from trainer.losses.cross_entropy import cross_entropy
from trainer.selection.lookahead import lookahead
from trainer.tasks.small_cnn import SmallCNN

CLASSES = 10


def update(model: nn.Module, x: Tensor, y: Tensor) -> None:
    model.zero_grad()
    cross_entropy(model(x), y).mean().backward()


def floor(model: nn.Module, x: Tensor, y: Tensor, kept: Tensor) -> Callable[[], None]:
    x_kept, y_kept = x[kept], y[kept]

    def work() -> None:
        update(model, x, y)
        with torch.no_grad():
            cross_entropy(model(x), y)
        update(model, x_kept, y_kept)

    return work


def selected(model: nn.Module, x: Tensor, y: Tensor, synthetic: Tensor) -> Callable[[], None]:
    def work() -> None:
        kept = lookahead(model, cross_entropy, x, y, synthetic, virtual_lr=0.1)
        update(model, x[kept], y[kept])

    return work


def bench(name: str, model: nn.Module, batch: int, pixels: int, rounds: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 3, pixels, pixels, generator=generator)
    y = torch.randint(CLASSES, (batch,), generator=generator)
    synthetic = torch.arange(batch) % 2 == 1
    kept = lookahead(model.train(), cross_entropy, x, y, synthetic, virtual_lr=0.1)
    result = compare(selected(model, x, y, synthetic), floor(model, x, y, kept), rounds)
    print(f"{name}, batch {batch}, {pixels} px, lookahead over its floor: {result} goal <= 1.10")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=11)
    rounds = parser.parse_args().rounds
    torch.manual_seed(0)
    print(f"{torch.get_num_threads()} thread(s)")
    bench("ResNet-18", timm.create_model("resnet18", num_classes=CLASSES), 64, 64, rounds)
    bench("SmallCNN", SmallCNN(CLASSES, 8), 64, 8, 20 * rounds)
    bench("SmallCNN", SmallCNN(CLASSES, 32), 128, 32, rounds)


if __name__ == "__main__":
    main()
