from __future__ import annotations

import time

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.metrics.retrieval import Labelled, Retrieval, ranked, retrieval


def plain(query: Labelled, gallery: Labelled, distances: torch.Tensor, ranks: int = 50) -> Retrieval:
    """The protocol as it is told: one query after the other, one picture after the other."""
    precisions, reached, without = [], [0] * ranks, 0
    for q in range(len(distances)):
        who, camera = int(query.identities[q]), int(query.cameras[q])
        good, hits, looked_at = 0, [], 0
        for g in sorted(range(distances.shape[1]), key=lambda g: (distances[q, g].item(), g)):
            same = who >= 0 and int(gallery.identities[g]) == who
            if same and camera >= 0 and int(gallery.cameras[g]) == camera:
                continue
            looked_at += 1
            if same:
                good += 1
                hits.append((good / looked_at, looked_at))
        if not hits:
            without += 1
            continue
        precisions.append(sum(precision for precision, _ in hits) / len(hits))
        for rank in range(hits[0][1] - 1, ranks):
            reached[rank] += 1
    n = len(precisions)
    return Retrieval(sum(precisions) / n if n else 0.0, [r / n if n else 0.0 for r in reached], n, without)


def close(one: Retrieval, other: Retrieval) -> bool:
    return (
        one.mean_average_precision == pytest.approx(other.mean_average_precision, abs=1e-12)
        and one.cmc == pytest.approx(other.cmc, abs=1e-12)
        and (one.queries, one.without_match) == (other.queries, other.without_match)
    )


def test_by_hand():
    """One query, camera 0. Ranked: its own camera's picture (passed over), another's, a hit, a distractor, a hit."""
    query = Labelled(torch.tensor([[0.0]]), torch.tensor([7]), torch.tensor([0]))
    gallery = Labelled(
        torch.tensor([[0.4], [0.1], [0.2], [0.3], [0.5]]),
        torch.tensor([-1, 7, 3, 7, 7]),
        torch.tensor([2, 0, 0, 1, 2]),
    )
    found = retrieval(query, gallery, distance="euclidean", ranks=4)
    # what counts: [3 at 0.2, 7 at 0.3, -1 at 0.4, 7 at 0.5]: precision 1/2 and 2/4
    assert found == Retrieval(0.5, [0.0, 1.0, 1.0, 1.0], 1, 0)


def test_a_query_that_only_its_own_camera_saw_is_left_out_and_counted():
    query = Labelled(torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([1, 2, 5]), torch.tensor([0, 0, 0]))
    gallery = Labelled(torch.tensor([[1.0], [0.0]]), torch.tensor([2, 1]), torch.tensor([1, 0]))
    found = retrieval(query, gallery, distance="euclidean", ranks=2)
    assert found == Retrieval(1.0, [1.0, 1.0], 1, 2)
    nothing = Labelled(gallery.features, torch.tensor([-1, -1]), gallery.cameras)
    assert retrieval(query, nothing, ranks=2) == Retrieval(0.0, [0.0, 0.0], 0, 3)


def test_unknown_cameras_exclude_nothing():
    unknown = torch.tensor([-1])
    query = Labelled(torch.tensor([[1.0, 0.0]]), torch.tensor([4]), unknown)
    gallery = Labelled(torch.tensor([[1.0, 0.1]]), torch.tensor([4]), unknown)
    assert retrieval(query, gallery).queries == 1


def test_equal_distances_keep_the_gallerys_order():
    matches = torch.tensor([[False, True, True], [True, False, True]])
    precision, first = ranked(torch.zeros(2, 3), matches, torch.zeros(2, 3, dtype=torch.bool))
    assert precision.tolist() == pytest.approx([(1 / 2 + 2 / 3) / 2, (1 + 2 / 3) / 2])
    assert first.tolist() == [1, 0]


def test_cosine_looks_at_directions_only():
    query = Labelled(torch.tensor([[1.0, 0.0]]), torch.tensor([0]), torch.tensor([0]))
    features = torch.tensor([[100.0, 10.0], [0.5, 0.5]])  # the first is nearer by angle, the second by distance
    gallery = Labelled(features, torch.tensor([0, 1]), torch.tensor([1, 1]))
    assert retrieval(query, gallery, distance="cosine").mean_average_precision == 1.0
    assert retrieval(query, gallery, distance="euclidean").mean_average_precision == 0.5


@st.composite
def cases(draw: st.DrawFn) -> tuple[Labelled, Labelled]:
    """Small integers: distances are exact in float32, and ties are many."""

    def side(rows: int) -> Labelled:
        numbers = st.lists(st.integers(-3, 3), min_size=2 * rows, max_size=2 * rows)
        features = torch.tensor(draw(numbers), dtype=torch.float32).view(rows, 2)
        identities = draw(st.lists(st.integers(-1, 3), min_size=rows, max_size=rows))
        cameras = draw(st.lists(st.integers(-1, 2), min_size=rows, max_size=rows))
        return Labelled(features, torch.tensor(identities), torch.tensor(cameras))

    return side(draw(st.integers(1, 6))), side(draw(st.integers(1, 14)))


@given(cases())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_it_is_the_plain_protocol(sides: tuple[Labelled, Labelled]):
    query, gallery = sides
    distances = (query.features[:, None] - gallery.features[None]).square().sum(2)
    found = retrieval(query, gallery, distance="euclidean", ranks=10)
    assert close(found, plain(query, gallery, distances, ranks=10))


def synthetic(queries: int, gallery: int, identities: int, size: int) -> tuple[Labelled, Labelled]:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(identities, size, generator=generator)

    def side(rows: int, distractors: float) -> Labelled:
        who = torch.randint(0, identities, (rows,), generator=generator)
        features = centres[who] + 3.0 * torch.randn(rows, size, generator=generator)
        cameras = torch.randint(0, 6, (rows,), generator=generator)
        nobody = torch.rand(rows, generator=generator) < distractors
        return Labelled(features, who.masked_fill(nobody, -1), cameras)

    return side(queries, 0.0), side(gallery, 0.15)


def test_several_chunks_are_the_plain_protocol():
    query, gallery = synthetic(600, 90, 30, 8)
    inner = F.normalize(query.features, dim=1) @ F.normalize(gallery.features, dim=1).T
    rows = torch.cat([-inner[start : start + 256] for start in range(0, 600, 256)])
    assert close(retrieval(query, gallery), plain(query, gallery, rows))


def test_market_1501_takes_seconds():
    """3,368 queries and 15,913 gallery pictures."""
    query, gallery = synthetic(3368, 15913, 750, 256)
    start = time.process_time()
    found = retrieval(query, gallery)
    assert time.process_time() - start < 30.0  # a loop over queries and pictures takes minutes
    assert found.queries + found.without_match == 3368 and 0.0 < found.mean_average_precision < found.cmc[-1] <= 1.0
