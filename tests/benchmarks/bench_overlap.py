"""Training and generating beside each other over the longer of the two alone, and what the model of throughput says.

    python -m tests.benchmarks.bench_overlap

Trainer and generator are processes on a core each. How many samples an iteration asks for is varied, so that first the
training and then the generating takes longer. At each point a synchronous run tells how long training (T) and
generating (G) take alone: there, one waits while the other works. Goal: an asynchronous stage-2 iteration takes at
most 1.10 max(T, G). The model (`agent.sizing`) is given the synchronous run of one point and predicts all others.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
from collections import defaultdict
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from agent.sizing import Load
from protocol.broker import EmbeddedBroker
from tests.benchmarks.bench_service import save_checkpoint
from tests.benchmarks.processes import cores, generator, train
from trainer import record
from trainer.summary import intersection, length, spans

REAL = 40  # images; half of them are asked about
WARMUP = 2


@dataclass(frozen=True)
class Measured:
    """Medians over the stage-2 iterations of a run, in seconds; idle shares over all of them together."""

    wall_s: float
    train_s: float  # without waiting
    generate_s: float
    trainer_idle: float
    generator_idle: float


def write_images(root: Path) -> Path:
    rng = np.random.default_rng(0)
    for number in range(REAL):
        place = root / str(number % 2)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16), dtype=np.uint8)).save(place / f"{number}.png")
    return root


def measure(folder: Path) -> Measured:
    """A run's trace, from the second stage-2 iteration to the last but one: whole iterations, in their stride."""
    trace = record.rows(folder / "trace.jsonl")
    starts = {row["iteration"]: row["start"] for row in trace if row["what"] == "score"}
    inner = range(WARMUP + 1, max(starts))
    whole = (starts[inner[0]], starts[inner[-1] + 1])
    waits = spans([row for row in trace if row["what"] == "wait"])
    busy = spans([row for row in trace if row["what"] == "generate"])
    walls = [(starts[i], starts[i + 1]) for i in inner]
    waited = [length(intersection([wall], waits)) for wall in walls]
    generating = [
        length(spans([row for row in trace if row["what"] == "generate" and row["feedback"] == i])) for i in inner
    ]
    return Measured(
        wall_s=statistics.median(end - start for start, end in walls),
        train_s=statistics.median(end - start - wait for (start, end), wait in zip(walls, waited, strict=True)),
        generate_s=statistics.median(generating),
        trainer_idle=sum(waited) / (whole[1] - whole[0]),
        generator_idle=1 - length(intersection([whole], busy)) / (whole[1] - whole[0]),
    )


def median(rounds: list[Measured]) -> Measured:
    """Of each number by itself."""
    return Measured(*(statistics.median(numbers) for numbers in zip(*map(astuple, rounds), strict=True)))


def bench(each: list[int], rounds: int, iterations: int, updates: int, steps: int) -> None:
    """`each`: images for each hard sample, a point each."""
    trainer_core, generator_core = cores()[:2]
    with tempfile.TemporaryDirectory() as temporary, EmbeddedBroker() as broker:
        folder = Path(temporary)
        data = write_images(folder / "data")
        checkpoint = save_checkpoint(folder / "checkpoint", width=128, layers=4, size=16)
        tables = {
            "generator": {"dataset": {"root": str(data)}},
            "agent": {"steps": steps, "strength": 1.0, "guidance_scale": 2.0, "unit_size": 8},
        }
        trainer = {
            "runs_dir": str(folder / "runs"),
            "dataset": {"root": str(data)},
            "test_split": "",
            "model": {"image_size": 16},
            "iterations": WARMUP + iterations,
            "warmup_iterations": WARMUP,
            "steps_per_iteration": updates,
            "batch_size": 32,
        }
        found = defaultdict(list)
        with generator(folder / "service", broker.url, generator_core, checkpoint, **tables) as client:
            trainer["service"] = {"url": client.base_url}
            for number, m, mode in itertools.product(range(rounds), each, ("sync", "async")):
                feedback = {"fraction": 0.5, "images_per_sample": m}
                run = {"run": f"{mode}-{m}-{number}", "mode": mode, "feedback": feedback}
                train(folder / "trainer", broker.url, trainer_core, trainer | run)
                found[m, mode].append(measure(folder / "runs" / run["run"]))
    report(each, {point: median(rounds) for point, rounds in found.items()})


def report(each: list[int], measured: dict[tuple[int, str], Measured]) -> None:
    middle = each[len(each) // 2]
    known = measured[middle, "sync"]
    rate = middle * REAL // 2 / known.generate_s
    overhead = known.wall_s - known.train_s - known.generate_s
    print(f"the model knows: {rate:.1f} samples/s, T = {known.train_s:.2f} s, overhead {overhead:.2f} s")
    for m in each:
        alone, beside = measured[m, "sync"], measured[m, "async"]
        longer = max(alone.train_s, alone.generate_s)
        load = Load(m * REAL // 2, known.train_s, rate, overhead)
        print(
            f"{load.samples} samples: alone T = {alone.train_s:.2f} s, G = {alone.generate_s:.2f} s; "
            f"async {beside.wall_s:.2f} s (model {load.async_s(1):.2f}), sync {alone.wall_s:.2f} s "
            f"(model {load.sync_s(1):.2f}); async over the longer: {beside.wall_s / longer:.3f} (goal 1.10), "
            f"sync {alone.wall_s / longer:.3f}; idle in async: trainer {beside.trainer_idle:.0%}, "
            f"generator {beside.generator_idle:.0%}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, nargs="+", default=[2, 8], help="images for each hard sample")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each kind at each point")
    parser.add_argument("--iterations", type=int, default=6, help="stage-2 iterations of a run")
    parser.add_argument("--updates", type=int, default=60, help="of each iteration")
    parser.add_argument("--steps", type=int, default=10, help="denoising steps")
    options = parser.parse_args()
    if len(cores()) < 2:
        print("this machine has one core: trainer and generator cannot have one each")
        return
    bench(options.each, options.rounds, options.iterations, options.updates, options.steps)


if __name__ == "__main__":
    main()
