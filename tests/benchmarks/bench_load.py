"""Many REST clients at a time, with valid and invalid requests, while an adaptation runs.

    python -m tests.benchmarks.bench_load [--seconds 60] [--clients 64]

The service is a process of its own with the embedded model; the clients are in this one. Goals: no status 5xx but 503
with Retry-After, and a resident set that does not grow: its median in the last third over that in the middle third is
at most 1.05.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import random
import re
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from protocol.broker import EmbeddedBroker
from protocol.client import GeneratorClient
from protocol.messages import AdaptJob
from tests.benchmarks.processes import cores, generator
from tests.generator_service.tiny_service import SIZE

CLASSES = ("A", "B")  # two of the embedded model's letters
IMAGES = "/v1/images/generations"
LOOK_S = 0.5  # between looks at the service's memory


def picture() -> str:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


def requests() -> list[tuple[str, str, dict[str, Any] | bytes | None]]:
    """What clients ask, one as often as the other: method, path, body."""
    good = {"prompt": CLASSES[0], "num_inference_steps": 4}
    return [
        ("POST", IMAGES, good),
        ("POST", IMAGES, good | {"n": 4, "output_format": "webp"}),
        ("POST", IMAGES, good | {"image": picture(), "strength": 0.5, "response_format": "url"}),
        ("POST", "/v1/jobs", {"type": "generate", "request": good | {"n": 2}}),
        ("GET", "/v1/jobs", None),
        ("GET", "/v1/weights", None),
        ("GET", "/metrics", None),
        ("GET", "/v1/samples/nothing", None),
        ("POST", IMAGES, good | {"prompt": "no class"}),
        ("POST", IMAGES, good | {"n": True}),
        ("POST", IMAGES, good | {"image": "AAAA"}),
        ("POST", IMAGES, b"{"),
        ("POST", IMAGES, good | {"user": "x" * 1_000_000}),
        ("POST", "/v1/feedback", {"run": "../up"}),
        ("DELETE", "/v1/jobs/nothing", None),
        ("PUT", "/v1/jobs", None),
    ]


class Tally:
    """Replies by what was asked."""

    def __init__(self) -> None:
        self.statuses: Counter[str] = Counter()
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.faults: list[str] = []

    def add(self, asked: str, reply: httpx.Response, seconds: float) -> None:
        self.statuses[str(reply.status_code)] += 1
        self.seconds[asked].append(seconds)
        if reply.status_code >= 500 and not (reply.status_code == 503 and "retry-after" in reply.headers):
            self.faults.append(f"{asked}: {reply.status_code} {reply.text[:200]}")

    def show(self) -> None:
        total = sum(self.statuses.values())
        print(f"{total} replies: {', '.join(f'{n} of {status}' for status, n in sorted(self.statuses.items()))}")
        for asked, seconds in sorted(self.seconds.items()):
            cuts = statistics.quantiles(seconds, n=100)
            print(f"  {asked:32} {len(seconds):6} replies, p50 {cuts[49] * 1e3:7.1f} ms, p99 {cuts[98] * 1e3:7.1f} ms")
        print(f"5xx other than 503 with Retry-After, and broken connections: {len(self.faults)}")
        for fault in self.faults[:10]:
            print(f"  {fault}")


async def ask(http: httpx.AsyncClient, tally: Tally, until: float, seed: int) -> None:
    chooser, asked = random.Random(seed), requests()
    while time.monotonic() < until:
        method, path, body = chooser.choice(asked)
        content = {"content": body} if isinstance(body, bytes) else {"json": body} if body is not None else {}
        headers = {"Content-Type": "application/json"} if isinstance(body, bytes) else {}
        began = time.perf_counter()
        try:
            reply = await http.request(method, path, headers=headers, **content)
        except httpx.HTTPError as error:
            tally.faults.append(f"{method} {path}: {type(error).__name__} {error}")
            continue
        tally.add(f"{method} {path}", reply, time.perf_counter() - began)
        if reply.status_code in (429, 503):
            await asyncio.sleep(float(reply.headers["retry-after"]) * chooser.uniform(0.5, 1.0))


async def load(url: str, clients: int, seconds: float) -> tuple[Tally, list[tuple[float, float]]]:
    """Replies, and the service's resident MiB at so many seconds."""
    tally, sizes = Tally(), []
    began = time.monotonic()
    limits = httpx.Limits(max_connections=clients + 1, max_keepalive_connections=clients + 1)
    async with httpx.AsyncClient(base_url=url, timeout=120.0, limits=limits) as http:

        async def watch() -> None:
            while time.monotonic() < began + seconds:
                page = (await http.get("/metrics")).text
                resident = re.search(r"^process_resident_memory_bytes (\S+)", page, re.MULTILINE)
                sizes.append((time.monotonic() - began, float(resident[1]) / 2**20))
                await asyncio.sleep(LOOK_S)

        await asyncio.gather(watch(), *(ask(http, tally, began + seconds, seed) for seed in range(clients)))
    return tally, sizes


def memory(sizes: list[tuple[float, float]], seconds: float) -> str:
    thirds = [[size for at, size in sizes if seconds * i / 3 <= at < seconds * (i + 1) / 3] for i in range(3)]
    early, middle, late = (statistics.median(third) for third in thirds)
    slope = statistics.linear_regression(*zip(*[look for look in sizes if look[0] >= seconds / 3], strict=True)).slope
    return (
        f"resident {early:.0f}, {middle:.0f}, {late:.0f} MiB in each third; last over middle {late / middle:.3f} (goal "
        f"<= 1.05), {slope * 60:+.1f} MiB a minute after the first third"
    )


def write_pictures(root: Path) -> Path:
    noise = np.random.default_rng(0)
    for name in CLASSES:
        (root / name).mkdir(parents=True)
        for index in range(20):
            pixels = noise.integers(0, 256, (SIZE, SIZE), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    return root


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--clients", type=int, default=64)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, EmbeddedBroker() as broker:
        folder = Path(temporary)
        dataset = {"root": str(write_pictures(folder / "pictures"))}
        settings = {"dataset": dataset, "dit": {"checkpoint": "embedded"}}
        with generator(folder / "service", broker.url, cores()[0], Path("embedded"), generator=settings) as client:
            job = start_adapting(client)
            tally, sizes = asyncio.run(load(client.base_url, options.clients, options.seconds))
            adapting = client.job(job)
            client.cancel(job)
    print(f"{options.clients} clients for {options.seconds:.0f} s; the adaptation is {adapting.status}, ", end="")
    print(f"{adapting.step} steps done")
    tally.show()
    print(memory(sizes, options.seconds))


def start_adapting(client: GeneratorClient) -> str:
    return client.submit(AdaptJob(name="load", steps=1_000_000, batch_size=8)).id


if __name__ == "__main__":
    main()
