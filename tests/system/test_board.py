"""What a run tells of itself while it goes on and how it ends, through a real service and broker."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from protocol import codec
from protocol.bus import Bus, BusConfig
from protocol.bus_board import Board
from protocol.errors import TrainingDiverged, UnknownRun
from protocol.messages import Feedback
from protocol.operations import RunStatus
from tests.system.whole import run_training, serving, trainer_config
from trainer import record, summary
from trainer.run import Run


@pytest.fixture
def board(broker: str) -> Iterator[Board]:
    bus = Bus(broker, BusConfig())
    yield bus.board
    bus.close()


def test_a_run_tells_how_it_does_and_shows_what_was_made_for_it(tmp_path, broker, board, checkpoint, data):
    seen: list[RunStatus] = []
    asked_by_then = [None, 1, 2, 3, 3]  # feedback, an iteration ahead

    def look(run: Run) -> None:
        if run.at.done == 1:  # the thread looks twice a second, and may have looked before the question was put
            told = (run.at.iteration, "training", asked_by_then[run.at.iteration])
            deadline = time.monotonic() + 60
            while (status := _status(board)) is None or (
                status.iteration,
                status.state,
                status.newest_feedback,
            ) != told:
                assert time.monotonic() < deadline, status
                time.sleep(0.02)
            seen.append(status)

    with serving(tmp_path, broker, checkpoint, data) as url:
        config = trainer_config(tmp_path / "runs", data, url, mode="async", max_staleness=1)
        run_training(config, broker, look)
    assert [len(status.curve) for status in seen] == [0, 1, 2, 3, 4]
    assert [status.oldest_useful for status in seen[1:]] == [0, 1, 2, 3]
    told, rows = board.run("run"), record.rows(config.folder / "metrics.jsonl")
    assert (told.state, told.problem, told.iteration, told.updates) == ("done", None, 5, rows[-1]["updates"])
    assert [point.train_top1 for point in told.curve] == [row["train_top1"] for row in rows]
    assert [point.candidates for point in told.curve] == [row["candidates"] for row in rows]
    assert sum(point.candidates for point in told.curve) == 30  # ten for each feedback, some as soon as they are there
    assert all(point.kept <= point.candidates for point in told.curve)
    assert all((point.kept > 0) == (point.candidates > 0) for point in told.curve)
    asked = Feedback.model_validate_json((config.folder / "feedback" / "000003.json").read_bytes())
    assert [hard.sample_id for hard in told.hard] == [sample.sample_id for sample in asked.samples]
    _check_idle(told, config.folder)
    _check_shown(board, asked)


def _status(board: Board) -> RunStatus | None:
    try:
        return board.run("run")
    except UnknownRun:
        return None


def _check_idle(told: RunStatus, folder: Path) -> None:
    """The same shares as the summary's, but for the time before the first and after the last interval."""
    whole = summary.summarise(folder)
    assert told.generator_idle == pytest.approx(whole.generator_idle, abs=0.15)
    assert told.trainer_idle == pytest.approx(whole.trainer_idle, abs=0.15)


def _check_shown(board: Board, asked: Feedback) -> None:
    sources = [sample.sample_id for sample in asked.samples]
    shown = board.samples("run", 50, sources)
    assert {entry.sample.source_id for entry in shown} == set(sources)
    newest = [entry for entry in shown if entry.sample.feedback == 3]
    assert sorted(entry.sample.index for entry in newest) == sorted([0, 1] * len(sources))
    picture = codec.image_from_bytes(base64.b64decode(newest[0].thumbnail))
    assert picture.shape == (8, 8, 3)


@pytest.mark.parametrize(
    ("error", "state", "problem"),
    [
        (TrainingDiverged("the loss is NaN: lower it"), "failed", "the loss is NaN: lower it"),
        (ZeroDivisionError(), "failed", "ZeroDivisionError"),
        (KeyboardInterrupt(), "stopped", None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_how_a_run_ended_is_told_and_a_new_one_forgets_it(
    tmp_path, broker, board, checkpoint, data, error, state, problem
):
    def end(run: Run) -> None:
        if run.at.iteration == 1:
            raise error

    with serving(tmp_path, broker, checkpoint, data) as url:
        config = trainer_config(tmp_path / "runs", data, url)
        with pytest.raises(type(error)):
            run_training(config, broker, end)
        told = board.run("run")
        assert (told.state, told.problem, told.iteration, len(told.curve)) == (state, problem, 1, 1)

        def go_on(run: Run) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run_training(config, broker, go_on)
        assert len(board.run("run").curve) == 1, "a resumed run tells what it had"


def test_a_run_on_real_data_tells_nothing(tmp_path, broker, board, data):
    run_training(trainer_config(tmp_path, data, "", mode="real"), broker)
    assert board.runs() == []
