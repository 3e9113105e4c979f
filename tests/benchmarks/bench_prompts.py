"""Prompts composed a second, by fixed phrases and by a model's answers: `python -m tests.benchmarks.bench_prompts`.

A fake endpoint on this machine answers `capacity` questions at a time, each after a fixed time, over real HTTP; its
bound is capacity / latency. First frames are noise of 256 pixels a side, the worst there is to encode.
"""

from __future__ import annotations

import argparse
import re
import statistics
from time import perf_counter

import numpy as np

from agent.expressions.compose import Asked, TemplateComposer
from agent.expressions.knowledge import KnowledgeBase
from agent.expressions.settings import ExpressionsConfig
from agent.expressions.vision import VisionComposer
from agent.language import OpenAIChat
from tests.agent.fake_endpoint import Reply, endpoint, said

EMOTIONS = ("surprise", "disgust", "fear")
FRAME = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)


def asked(begin: int, count: int) -> list[Asked]:
    return [Asked(f"{n:032x}", n, EMOTIONS[n % 3], None, lambda: FRAME) for n in range(begin, begin + count)]


def answer(body: dict) -> Reply:
    text = body["messages"][0]["content"][0]["text"]
    emotion = re.search(r"Target emotion: (.*)\.", text)[1]
    codes = re.findall(r"AU\d\d", text.rsplit("Cite no", 1)[1])[:3]
    changes = ", ".join(f"it moves ({code})" for code in codes)
    return said(f"Identity: male, short hair; Expression: {emotion}; {changes}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=5000, help="by fixed phrases (default: %(default)s)")
    parser.add_argument("--latency", type=float, default=0.2, help="seconds of an answer (default: %(default)s)")
    parser.add_argument("--capacity", type=int, default=8, help="answers at a time (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    options = parser.parse_args()
    base = KnowledgeBase.open(ExpressionsConfig())
    template, rates, made = TemplateComposer(base, ExpressionsConfig()), [], []
    for number in range(options.rounds):
        began = perf_counter()
        made = template(asked(number * options.prompts, options.prompts))
        rates.append(options.prompts / (perf_counter() - began))
    distinct = len({one.prompt for one in made}) / len(made)
    print(f"fixed phrases: {statistics.median(rates):.0f} prompts a second, {distinct:.1%} of them distinct")
    bound, count = options.capacity / options.latency, 10 * options.capacity
    with endpoint(answer, options.capacity, options.latency) as server:
        config = ExpressionsConfig.model_validate({"openai": {"url": server.url, "concurrency": options.capacity}})
        compose, rates = VisionComposer(OpenAIChat(config.openai), base, config), []
        compose(asked(0, options.capacity))
        for number in range(1, options.rounds + 1):
            began = perf_counter()
            compose(asked(number * count, count))
            rates.append(count / (perf_counter() - began))
        compose.close()
    found = statistics.median(rates)
    print(f"a model's answers: {found:.1f} prompts a second, {found / bound:.1%} of the endpoint's bound")


if __name__ == "__main__":
    main()
