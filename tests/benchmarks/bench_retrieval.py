"""mAP and CMC at Market-1501's size: `python -m tests.benchmarks.bench_retrieval`.

3,368 queries, 15,913 gallery pictures of 750 identities and of nobody, 6 cameras, 2048 random features around each
identity's own. Against a plain reference that takes one query after the other, on some of the queries, from which the
time of all is extrapolated; there both must be equal to 1e-12, in float64, where rounding does not change ranks.
"""

from __future__ import annotations

import argparse
import statistics
from time import perf_counter

import numpy as np
import torch

from tests.benchmarks.side_by_side import compare
from trainer.metrics.retrieval import Labelled, Retrieval, retrieval

QUERIES, GALLERY, DISTRACTORS = 3368, 15_913, 2798
IDENTITIES, CAMERAS, FEATURES, RANKS = 750, 6, 2048, 50
SPREAD = 3.5  # of an identity's pictures, as part of the distance between identities
TOLERANCE = 1e-12


def market(rng: torch.Generator) -> tuple[Labelled, Labelled]:
    """Queries and gallery."""
    centres = torch.randn(IDENTITIES, FEATURES, generator=rng)

    def pictures(count: int, of_nobody: int) -> Labelled:
        identities = torch.randint(IDENTITIES, (count - of_nobody,), generator=rng)
        own = torch.cat([centres[identities], torch.randn(of_nobody, FEATURES, generator=rng)])
        features = own + SPREAD * torch.randn(count, FEATURES, generator=rng)
        everybody = torch.cat([identities, torch.full((of_nobody,), -1)])
        order = torch.randperm(count, generator=rng)
        cameras = torch.randint(CAMERAS, (count,), generator=rng)
        return Labelled(features[order], everybody[order], cameras)

    return pictures(QUERIES, 0), pictures(GALLERY, DISTRACTORS)


def some(pictures: Labelled, count: int) -> Labelled:
    return Labelled(pictures.features[:count], pictures.identities[:count], pictures.cameras[:count])


def exact(pictures: Labelled) -> Labelled:
    return Labelled(pictures.features.double(), pictures.identities, pictures.cameras)


def plain(query: Labelled, gallery: Labelled) -> Retrieval:
    """One query after the other: rank the whole gallery, pass over what is to be passed over, count."""
    identities, cameras = gallery.identities.numpy(), gallery.cameras.numpy()
    known = gallery.features.numpy()
    known = known / np.linalg.norm(known, axis=1, keepdims=True)
    precisions, reached = [], np.zeros(RANKS)
    for feature, who, camera in zip(query.features.numpy(), query.identities, query.cameras, strict=True):
        order = np.argsort(1 - known @ (feature / np.linalg.norm(feature)), kind="stable")
        same = identities[order] == who.item()
        counts = same[~(same & (cameras[order] == camera.item()))]
        places = np.flatnonzero(counts)
        if len(places):
            precisions.append(float(np.mean(np.arange(1, len(places) + 1) / (places + 1))))
            reached[places[0] :] += 1
    answered = len(precisions)
    share = reached / max(answered, 1)
    return Retrieval(sum(precisions) / max(answered, 1), share.tolist(), answered, len(query.features) - answered)


def largest_difference(one: Retrieval, other: Retrieval) -> float:
    assert (one.queries, one.without_match) == (other.queries, other.without_match)
    of_ranks = max(abs(a - b) for a, b in zip(one.cmc, other.cmc, strict=True))
    return max(of_ranks, abs(one.mean_average_precision - other.mean_average_precision))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--queries", type=int, default=256, help="of the subset that the plain reference takes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    query, gallery = market(torch.Generator().manual_seed(0))
    subset = some(query, options.queries)

    off = largest_difference(retrieval(exact(subset), exact(gallery)), plain(exact(subset), exact(gallery)))
    print(f"{options.queries} queries, float64: largest difference from the plain reference {off:.1e}, goal <= 1e-12")
    assert off <= TOLERANCE
    off = largest_difference(retrieval(subset, gallery), plain(subset, gallery))
    print(f"the same in float32, where rounding may exchange neighbours: {off:.1e}")

    seconds = []
    for _ in range(options.rounds):
        began = perf_counter()
        found = retrieval(query, gallery)
        seconds.append(perf_counter() - began)
    whole = statistics.median(seconds)
    print(
        f"{QUERIES} queries x {GALLERY} pictures, float32, {torch.get_num_threads()} thread(s): {whole:.2f} s "
        f"({min(seconds):.2f} to {max(seconds):.2f}); mAP "
        f"{found.mean_average_precision:.3f}, Rank-1 {found.cmc[0]:.3f}, {found.queries} queries with a match"
    )
    result = compare(lambda: plain(subset, gallery), lambda: retrieval(subset, gallery), options.rounds)
    print(f"plain reference over ours, {options.queries} queries: {result}")
    print(f"extrapolated to all queries, the plain reference takes {result.first_s * QUERIES / options.queries:.0f} s")


if __name__ == "__main__":
    main()
