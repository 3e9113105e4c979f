"""Two generator replicas on two cores over one, through the real queue. Goal: 1.8 times the throughput.

    python -m tests.benchmarks.bench_scale

Each replica is a process on a core of its own and computes on one thread. The one works from a broker of its own, so
that it can be measured in turns with the two; whoever is not measured is idle.
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import ExitStack
from pathlib import Path

from protocol.broker import EmbeddedBroker
from tests.benchmarks.bench_service import Queue, save_checkpoint
from tests.benchmarks.processes import cores, generator
from tests.benchmarks.side_by_side import compare


def bench(rounds: int, images: int, steps: int, width: int, layers: int) -> None:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        checkpoint = save_checkpoint(folder / "checkpoint", width, layers, size=16)
        first, second = cores()[:2]
        queues = []
        for name, used in (("one", [first]), ("two", [first, second])):
            broker = stack.enter_context(EmbeddedBroker())
            replicas = [
                stack.enter_context(generator(folder / name / str(core), broker.url, core, checkpoint)) for core in used
            ]
            queues.append(Queue(broker.url, replicas[0].weights().active, steps))
            stack.callback(queues[-1].close)
        one, two = queues
        result = compare(lambda: one(images), lambda: two(images), rounds)
        print(f"one replica against two, {images} images: {result}")
        print(
            f"throughput: {images / result.first_s:.1f} and {images / result.second_s:.1f} images/s (goal: 1.8 times)"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=64, help="in each measurement, a multiple of 8")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps")
    parser.add_argument("--width", type=int, default=192, help="of the transformer, a multiple of 64")
    parser.add_argument("--layers", type=int, default=6)
    options = parser.parse_args()
    if len(cores()) < 2:
        print("this machine has one core: two replicas cannot have one each")
        return
    bench(options.rounds, options.images, options.steps, options.width, options.layers)


if __name__ == "__main__":
    main()
