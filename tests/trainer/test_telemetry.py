"""The trainer's page of metrics: what its journal says shows there, and only while the run lasts."""

from __future__ import annotations

import socket
from pathlib import Path

import httpx
import pytest

from protocol.bus import QueueConfig
from protocol.errors import ConfigError
from tests.generator_service.tiny_service import write_dataset
from tests.ports import free_port
from tests.system.whole import trainer_config
from trainer.settings import TrainerConfig
from trainer.start import open_run

NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
def config(tmp_path: Path) -> TrainerConfig:
    port = free_port()
    data = write_dataset(tmp_path / "data", per_class=2)
    return trainer_config(tmp_path / "runs", data, NOWHERE, mode="real", metrics_port=port)


def test_what_the_journal_says_is_on_the_page_while_the_run_lasts(config: TrainerConfig):
    url = f"http://127.0.0.1:{config.metrics_port}/metrics"
    with open_run(config, QueueConfig()) as (run, _):
        page = httpx.get(url).text
        assert 'onthefly_trainer_peer_up{peer="broker",run="run"} 1.0' in page
        assert 'onthefly_trainer_answer_lag_iterations{run="run"} NaN' in page
        run.journal.event("outage", "the broker is gone", peer="the broker")
        run.journal.event("late", "the answers are late")
        run.journal.interval("generator", "generate", 1.0, 2.0, feedback=3)
        run.journal.interval("trainer", "wait", 1.0, 3.5)
        run.journal.interval("trainer", "wait", 4.0, 4.5)
        run.at.iteration = 5
        page = httpx.get(url).text
        assert 'onthefly_trainer_peer_up{peer="broker",run="run"} 0.0' in page
        assert 'onthefly_trainer_events_total{event="late",run="run"} 1.0' in page
        assert 'onthefly_trainer_answer_lag_iterations{run="run"} 2.0' in page
        assert 'onthefly_trainer_phase_seconds_total{phase="wait",run="run"} 3.0' in page
        run.journal.event("recovery", "the broker is back", peer="the broker")
        assert 'onthefly_trainer_peer_up{peer="broker",run="run"} 1.0' in httpx.get(url).text
    with pytest.raises(httpx.ConnectError):
        httpx.get(url)


def test_a_taken_port_is_told_before_the_training(config: TrainerConfig):
    with (
        socket.create_server(("127.0.0.1", config.metrics_port)),
        pytest.raises(ConfigError, match=r"trainer\.metrics_port"),
        open_run(config, QueueConfig()),
    ):
        pass
