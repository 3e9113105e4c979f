"""Three real processes against one: shares, exchanges, batch normalisation, updates and lookahead, by numbers."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from protocol.errors import ConfigError
from tests.trainer import ranks
from trainer.batch_norm import SynchronisedBatchNorm
from trainer.parallel import OneProcess, device_of

ALONE = OneProcess("cpu")


def run_ranks(folder: Path, how: str) -> list[str]:
    """Three processes of `ranks`; how each of them ended."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.trainer.ranks"])  # torch is imported once for all of them
    processes = [context.Process(target=ranks.main, args=(rank, store.port, folder, how)) for rank in range(ranks.SIZE)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0] * ranks.SIZE
    return [(folder / f"{rank}.txt").read_text() for rank in range(ranks.SIZE)]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """By process."""
    folder = tmp_path_factory.mktemp("ranks")
    assert run_ranks(folder, "well") == ["well"] * ranks.SIZE
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(ranks.SIZE)]


def test_parts_follow_each_other_and_differ_by_one_row_at_most(answers):
    assert [answer["parts"] for answer in answers] == [[[0, 2], [0, 0]], [[2, 4], [0, 1]], [[4, 7], [1, 2]]]


def test_every_process_gathers_all_rows_in_order(answers):
    for answer in answers:
        assert [rows.tolist() for rows in answer["gathered"]] == [[0.0, 1.5, 3.0, 4.5, 6.0, 7.5, 9.0], [0.0, 1.5]]
        assert torch.equal(answer["masks"], torch.arange(14).view(7, 2) % 3 == 0)
        assert answer["totals"] == {"a": 3.0, "b": 1.5}


def test_every_process_hears_what_the_first_found(answers):
    for answer in answers:
        assert answer["first"]["rank"] == 0
        assert answer["first"]["tensor"].tolist() == [0, 1, 2]
        assert answer["first"]["nothing"] is None
    assert [answer["packed"] for answer in answers] == [[0], [0, "told"], [0, "told"]]


def test_what_fails_in_one_process_fails_in_all_and_is_told_by_that_one(answers):
    assert [answer["first_failed"] for answer in answers] == ["DatasetError", "PeerFailed", "PeerFailed"]
    assert [answer["last_failed"] for answer in answers] == ["PeerFailed", "PeerFailed", "InvalidImage"]
    assert [answer["nobody_failed"] for answer in answers] == ["none"] * ranks.SIZE


@pytest.mark.parametrize("number", range(len(ranks.BATCHES)))
def test_an_update_is_that_of_one_process_also_where_a_process_has_no_rows(answers, number: int):
    expected = ranks.one_update(ALONE, ranks.BATCHES[number])
    found = [answer["updates"][number] for answer in answers]
    _assert_same_update(found, expected)


def test_an_update_on_chosen_rows_is_the_mean_over_all_of_them_however_they_are_spread(answers):
    expected = ranks.one_update(ALONE, 7, torch.tensor(ranks.KEPT))
    _assert_same_update([answer["selected"] for answer in answers], expected)


def _assert_same_update(found: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    close = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(torch.cat([one["outputs"] for one in found]), expected["outputs"], **close)
    # each process goes backward from its own part of the sum, which the average divides by their number
    inputs = torch.cat([one["inputs"] for one in found]) / ranks.SIZE
    torch.testing.assert_close(inputs, expected["inputs"], **close)
    for one in found:
        assert one["loss"] == pytest.approx(expected["loss"], rel=1e-6)  # rows are counted, losses told, in float32
        torch.testing.assert_close(one["gradients"], expected["gradients"], **close)
        torch.testing.assert_close(one["buffers"], expected["buffers"], **close)


def test_lookahead_ranks_the_rows_of_all_processes_after_one_virtual_step(answers):
    expected = [ranks.choices(ALONE, rows) for rows in ranks.BATCHES]
    scores = [ranks.scores(ALONE, rows) for rows in ranks.BATCHES]
    for answer in answers:
        assert answer["choices"] == expected
        torch.testing.assert_close(answer["scores"], scores, rtol=1e-9, atol=1e-12)
    assert len({tuple(chosen) for chosen in expected[0]}) > 3  # so that there was something to choose


def test_each_process_draws_its_own_numbers(answers):
    assert len({answer["drawn"][0] for answer in answers}) == ranks.SIZE


def test_the_others_end_when_one_makes_a_mistake(tmp_path: Path):
    assert run_ranks(tmp_path, "one") == ["PeerFailed", "ValueError", "PeerFailed"]


def test_a_mistake_of_all_is_told_by_one(tmp_path: Path):
    assert sorted(run_ranks(tmp_path, "all")) == ["PeerFailed", "PeerFailed", "ValueError"]


def test_the_others_notice_one_that_hangs(tmp_path: Path):
    """It goes on once they have, so that nobody's end is what they notice."""
    ended = run_ranks(tmp_path, "stall")
    assert ended[1] == "well" and "well" not in (ended[0], ended[2])


def test_one_gpu_for_each_process():
    assert device_of("cpu", 3).type == "cpu"
    with pytest.raises(ConfigError, match="names one GPU for several"):
        device_of("cuda:0", 1)
    with pytest.raises(ConfigError, match="start fewer processes"):
        device_of("cuda", 10_000)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batch_normalisation_on_a_gpu(tmp_path: Path):
    """One process, which is a group too: torch's kernels are called as they want to be."""
    dist.init_process_group("nccl", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        x = torch.randn(6, 4, 5, 5, device="cuda", requires_grad=True)
        found = []
        for synchronised in (False, True):
            mean, variance = torch.zeros(4, device="cuda"), torch.ones(4, device="cuda")
            if synchronised:
                with SynchronisedBatchNorm(dist.group.WORLD):
                    y = F.batch_norm(x, mean, variance, training=True)
            else:
                y = F.batch_norm(x, mean, variance, training=True)
            (gradient,) = torch.autograd.grad(y.pow(3).sum(), x)
            found.append((y, gradient, mean, variance))
        torch.testing.assert_close(*found)
    finally:
        dist.destroy_process_group()
