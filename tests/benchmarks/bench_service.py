"""The service against a bare diffusers loop at the same batch, and against one request at a time.

    python -m tests.benchmarks.bench_service

Everything runs side by side in one run, in turns, and ratios are medians over the rounds. Torch computes on one thread;
the HTTP clients are a process of their own. Goals: requests and queue >= 0.97 of the bare loop; batched requests >= 3
times one request at a time, which needs hardware whose batch costs less than its rows.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import httpx
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel

from generator_service.allocator import keep_freed_memory
from protocol.broker import EmbeddedBroker
from protocol.bus import Bus, QueueConfig
from protocol.entries import WorkRow, WorkUnit
from protocol.messages import FeedbackAccepted, WeightsRef
from tests.benchmarks.side_by_side import compare
from tests.generator_service.tiny_service import make_service, served, started

CLIENTS = 8
BATCH = 8
GUIDANCE = 2.0
CLASSES = [str(digit) for digit in range(10)]


def save_checkpoint(folder: Path, width: int, layers: int, size: int) -> Path:
    """A pixel DiT with random weights."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=width // 64,
        attention_head_dim=64,
        in_channels=1,
        out_channels=1,
        num_layers=layers,
        sample_size=size,
        patch_size=2,
        num_embeds_ada_norm=len(CLASSES),
    )
    transformer.save_pretrained(folder / "transformer")
    DDIMScheduler().save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps({"id2label": dict(enumerate(CLASSES))}))
    parameters = sum(parameter.numel() for parameter in transformer.parameters())
    print(f"DiT of {parameters / 1e6:.2f} M parameters, {size}x{size} pixels, on {device()}")
    return folder


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class BareLoop:
    """What the service has to keep up with: the model and its scheduler, nothing else."""

    def __init__(self, checkpoint: Path, steps: int):
        self._model = DiTTransformer2DModel.from_pretrained(checkpoint / "transformer").eval().to(device())
        self._scheduler = DDIMScheduler.from_pretrained(checkpoint / "scheduler")
        self._steps, self._size = steps, self._model.config.sample_size

    @torch.inference_mode()
    def __call__(self, images: int) -> None:
        for start in range(0, images, BATCH):
            seeds = range(start, start + BATCH)
            shape = (1, self._size, self._size)
            noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
            latents = torch.stack(noise).to(device())
            labels = torch.tensor([3] * BATCH + [len(CLASSES)] * BATCH, device=device())
            self._scheduler.set_timesteps(self._steps, device=device())
            for time in self._scheduler.timesteps:
                both = torch.cat([latents, latents])
                output = self._model(both, timestep=time.expand(2 * BATCH), class_labels=labels).sample
                conditional, unconditional = output.chunk(2)
                output = unconditional + GUIDANCE * (conditional - unconditional)
                latents = self._scheduler.step(output, time, latents).prev_sample
            ((latents.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu().numpy()


# ---------------------------------------------------------------- requests


class Clients:
    """Callers in a process of their own, each with one connection and one request at a time."""

    def __init__(self, url: str, steps: int):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_clients, args=(url, steps, theirs), daemon=True)
        self._process.start()

    def __call__(self, clients: int, images: int) -> None:
        self._pipe.send((clients, images))
        self._pipe.recv()

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join()


def _clients(url: str, steps: int, pipe: Connection) -> None:
    body = {"prompt": "3", "seed": 1, "num_inference_steps": steps, "guidance_scale": GUIDANCE}
    connections = [httpx.Client(base_url=url, timeout=600.0) for _ in range(CLIENTS)]

    def ask(connection: httpx.Client, images: int) -> None:
        for _ in range(images):
            connection.post("/v1/images/generations", json=body).raise_for_status()

    with ThreadPoolExecutor(CLIENTS) as pool:
        while (task := pipe.recv()) is not None:
            clients, images = task
            list(pool.map(ask, connections[:clients], [images // clients] * clients))
            pipe.send("done")


# ---------------------------------------------------------------- queue


class Queue:
    """A trainer's side of the queue: publishes units of one batch each, and takes the batches in."""

    def __init__(self, url: str, weights: WeightsRef, steps: int):
        self._bus = Bus(url, QueueConfig(url=url))
        self._weights, self._steps = weights, steps
        self._feedback = 0

    def __call__(self, images: int) -> None:
        self._feedback += 1
        units = [self._unit(number, images // BATCH) for number in range(images // BATCH)]
        reply = FeedbackAccepted(
            run="bench", feedback=self._feedback, units=len(units), samples=images, weights=self._weights
        )
        self._bus.publish_plan("bench", self._feedback, str(self._feedback), units, {}, reply)
        taken = 0
        while taken < len(units):
            if (delivery := self._bus.next_batch("bench", "bench", 1.0)) is not None:
                self._bus.get_blob(delivery.message.blob)
                self._bus.ack_batch(delivery)
                taken += 1

    def _unit(self, number: int, units: int) -> WorkUnit:
        rows = [
            WorkRow(
                sample_id=f"{self._feedback}-{number}-{index}",
                source_id="class:3",
                index=index,
                seed=index,
                label=3,
                class_name="3",
                prompt="3",
                guidance_scale=GUIDANCE,
            )
            for index in range(BATCH)
        ]
        return WorkUnit(
            id=f"bench.{self._feedback}.{number}",
            run="bench",
            feedback=self._feedback,
            unit=number,
            units=units,
            model_version=0,
            weights=self._weights,
            steps=self._steps,
            scheduler="ddim",
            strength=1.0,
            rows=rows,
        )

    def close(self) -> None:
        self._bus.close()


def bench(names: set[str], rounds: int, images: int, steps: int, width: int, layers: int, size: int) -> None:
    """Compare on one model; `names` chooses from the comparisons."""
    with tempfile.TemporaryDirectory() as temporary, EmbeddedBroker() as broker:
        folder = Path(temporary)
        checkpoint = save_checkpoint(folder / "checkpoint", width, layers, size)
        bare = BareLoop(checkpoint, steps)
        settings = {"dit": {"checkpoint": str(checkpoint)}, "max_batch": BATCH, "batch_window_ms": 10.0}
        service = make_service(folder, broker.url, **settings)
        with started(service), served(service) as url:
            clients, queue = Clients(url, steps), Queue(broker.url, service.loaded.weights.base.ref, steps)
            work = {
                "8 clients over the bare loop": (lambda: bare(images), lambda: clients(CLIENTS, images)),
                "queue over the bare loop": (lambda: bare(images), lambda: queue(images)),
                "8 clients over one request at a time": (lambda: clients(1, images), lambda: clients(CLIENTS, images)),
            }
            for name in (name for name in work if name in names):
                print(f"{name}, {images} images: {compare(*work[name], rounds)}", flush=True)
            clients.close()
            queue.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=64, help="in each measurement, a multiple of 8")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps")
    parser.add_argument("--width", type=int, default=192, help="of the transformer, a multiple of 64")
    parser.add_argument("--layers", type=int, default=6)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # for both sides alike, as the launcher does
    settings = (options.rounds, options.images, options.steps)
    overhead = {"8 clients over the bare loop", "queue over the bare loop"}
    bench(overhead, *settings, width=options.width, layers=options.layers, size=16)
    bench({"8 clients over one request at a time"}, *settings, width=64, layers=6, size=8)  # as the embedded default


if __name__ == "__main__":
    main()
