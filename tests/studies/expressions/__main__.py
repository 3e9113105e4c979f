"""Expression video from action units, end to end on drawn faces, in numbers.

    python -m tests.studies.expressions models --out DIR                      # landmarks, judge, text to video
    python -m tests.studies.expressions policy --out DIR --seeds 0            # does the policy learn?
    python -m tests.studies.expressions recognition --out DIR --seeds 0 1 2  # do its clips help, how near are they?

All through the real service, over HTTP and the queue. What DIR holds already is not made again. The models have seen a
general world of other people; every reward and measurement reads pixels.
"""

from __future__ import annotations

import argparse
import math
import statistics
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from tests.studies.expressions import annotated, choosing, film, judge, recognition

console = Console(width=150)


def models(options: argparse.Namespace) -> None:
    annotated.build(options.out / "landmarks")
    judge.build(options.out / "judge.pt")
    film.build(options.out / "film")
    console.print(annotated.measure(options.out / "landmarks"))


def policy(options: argparse.Namespace) -> None:
    found = [choosing.study(options.out, seed, options.steps, options.frames) for seed in options.seeds]
    table = Table(
        "seed", "reward, first tenth", "last tenth", "random", "best fixed", "learned", "oracle", "learned - fixed"
    )
    for seed, one in zip(options.seeds, found, strict=True):
        tenth = max(1, len(one["curve"]) // 10)
        ends = [statistics.fmean(u["reward"] for u in part) for part in (one["curve"][:tenth], one["curve"][-tenth:])]
        told = [one["validation"][name] for name in ("random", "fixed", "learned", "oracle", "gain")]
        table.add_row(
            str(seed), *(f"{end:.3f}" for end in ends), *(f"{t['mean']:.3f} ± {t['error']:.3f}" for t in told)
        )
    console.print(table)
    for action in found[0]["validation"]["actions"]:
        console.print(action)


def recognised(options: argparse.Namespace) -> None:
    weights = choosing.study(options.out, 0, options.steps, options.frames)["weights"]
    found = [recognition.study(options.out, seed, weights) for seed in options.seeds]
    columns = list(found[0]["ARGen"])
    table = Table("", *columns, title=f"mean ± standard error of {len(found)} seeds")
    for arm in recognition.ARMS:
        table.add_row(arm, *(_estimate([one[arm].get(column) for one in found]) for column in columns))
    console.print(table)


def _estimate(values: list[Any]) -> str:
    if None in values:
        return ""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return f"{mean:.3f}"
    return f"{mean:.3f} ± {statistics.stdev(values) / math.sqrt(len(values)):.3f}"


STUDIES = {"models": models, "policy": policy, "recognition": recognised}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400, help="updates of the policy (default: %(default)s)")
    parser.add_argument("--frames", type=int, default=5, help="of clips that it learns from (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    STUDIES[options.study](options)


if __name__ == "__main__":
    main()
