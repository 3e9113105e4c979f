"""Captions perturbed a second, by how many are asked for at a time: `python -m tests.benchmarks.bench_captions`.

A fake endpoint on this machine answers `capacity` questions at a time, each after a fixed time, over real HTTP; its
bound is capacity / latency. Asking more at a time must help until the endpoint is that bound, and not hurt after it.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from time import perf_counter

from agent.captions import Perturber, Subject
from agent.language import OpenAIChat, OpenAIConfig
from agent.planner import PlannerConfig
from tests.agent.fake_endpoint import Reply, endpoint, said

M = 5
CONCURRENCIES = (1, 2, 4, 8, 16)
_numbers = itertools.count()


def answer(body: dict) -> Reply:
    return said("\n".join(f"{n}. a dog in scene {body['seed']} {n}" for n in range(1, M + 1)))


def rate(url: str, concurrency: int, calls: int) -> float:
    """Captions a second; none of them was asked about before."""
    model = OpenAIChat(OpenAIConfig(url=url, model="fake", concurrency=concurrency))
    perturb = Perturber(model, PlannerConfig().captioned_prompt)
    perturb([Subject("dog", f"warm-up {next(_numbers)}") for _ in range(concurrency)], M)
    subjects = [Subject("dog", f"scene {next(_numbers)}") for _ in range(calls)]
    began = perf_counter()
    made = perturb(subjects, M)
    took = perf_counter() - began
    perturb.close()
    assert all(versions.by == ["fake"] * M for versions in made.values())
    return calls / took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latency", type=float, default=0.1, help="seconds of an answer (default: %(default)s)")
    parser.add_argument("--capacity", type=int, default=8, help="answers at a time (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    options = parser.parse_args()
    bound = options.capacity / options.latency
    print(f"an endpoint of {options.capacity} at a time, {options.latency * 1e3:.0f} ms each: {bound:.0f} a second")
    rates: dict[int, list[float]] = {concurrency: [] for concurrency in CONCURRENCIES}
    with endpoint(answer, options.capacity, options.latency) as server:
        for _ in range(options.rounds):
            for concurrency in CONCURRENCIES:
                rates[concurrency].append(rate(server.url, concurrency, 10 * min(concurrency, options.capacity)))
    one = statistics.median(rates[1])
    for concurrency in CONCURRENCIES:
        found = statistics.median(rates[concurrency])
        own = min(concurrency, options.capacity) / options.latency
        print(
            f"concurrency {concurrency:2}: {found:6.1f} captions a second, {found / one:5.2f} times that of 1; "
            f"{found / own:.1%} of what the endpoint allows (goal >= 90%), {found / bound:.1%} of its bound"
        )


if __name__ == "__main__":
    main()
