"""Real runs publish their models to a real service, whose features are then the trainer's own."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from generator_service.published_models import PublishedModels
from generator_service.rl.features import open_extractor
from generator_service.service import Service
from protocol.bus import QueueConfig
from protocol.errors import BodyTooLarge, Unauthorized
from tests.system.whole import run_training, serving_both, trainer_config
from trainer import record
from trainer.loop import train
from trainer.run import Run
from trainer.settings import TrainerConfig
from trainer.start import open_run

MODEL = {"model": "test_resnet", "image_size": 32, "drop_rate": 0.2}


def settings(folder: Path, data: Path, url: str, **more: Any) -> TrainerConfig:
    plain = {"mode": "real", "model": MODEL, "publish": {"name": "face"}, "iterations": 3, "epochs": 1}
    return trainer_config(folder / "runs", data, url, **plain | more)


def events(run: Run) -> list[str]:
    return [row["event"] for row in record.rows(run.config.folder / "events.jsonl")]


def compared(run: Run, store: PublishedModels) -> str:
    """The newest published version, whose features are those of the model as it is now."""
    extractor = open_extractor("published:face", pretrained=True, size=None, published=store, device="cpu")
    images = run.real.images[:]
    own = F.normalize(run.task.features(run.model, run.inputs(images)).double(), dim=1).float()
    torch.testing.assert_close(extractor(images.numpy()), own, atol=2e-6, rtol=0)
    card = extractor.published.card
    assert (card.run, card.iteration, card.updates) == ("run", run.at.iteration - 1, run.at.updates)
    assert card.size == tuple(images.shape[1:3])
    return extractor.exactly


def trained(config: TrainerConfig, service: Service, queue: QueueConfig) -> list[str]:
    """What was published after each iteration."""
    seen: list[str] = []
    with open_run(config, queue) as (run, source):
        run.after_iteration.append(lambda run: seen.append(compared(run, service.published)))
        train(run, source)
    return seen


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_the_published_features_are_the_trainers_own_after_every_iteration(
    tmp_path: Path, broker: str, checkpoint: Path, data: Path, mode: str
):
    with serving_both(tmp_path, broker, checkpoint, data) as (service, url):
        config = settings(tmp_path, data, url, mode=mode, iterations=5)
        seen = trained(config, service, QueueConfig(url=broker))
        assert seen == [f"published:face@{version}" for version in range(1, 6)]
        assert [model.version for model in service.published.list()] == [2, 3, 4, 5]


TASKS = {
    "vit": {"model": MODEL | {"model": "test_vit"}},
    "rectangular": {
        "task": "reid",
        "model": {"model": "test_resnet", "image_size": (64, 32), "neck": "none"},
    },
    "rectangular vit": {
        "task": "reid",
        "model": {"model": "test_vit", "image_size": (64, 32), "neck": "none"},
    },
}


@pytest.mark.parametrize("kind", TASKS)
def test_models_of_other_kinds_and_sizes_without_a_broker(tmp_path: Path, checkpoint: Path, data: Path, kind: str):
    with serving_both(tmp_path, "embedded", checkpoint, data) as (service, url):
        config = settings(tmp_path, data, url, **TASKS[kind])
        assert trained(config, service, QueueConfig()) == [f"published:face@{version}" for version in (1, 2, 3)]


def test_a_run_that_is_stopped_and_resumed_publishes_on(tmp_path: Path, checkpoint: Path, data: Path):
    class Stopped(Exception):
        pass

    def stop(run: Run) -> None:
        if run.at.iteration == 1:
            raise Stopped

    with serving_both(tmp_path, "embedded", checkpoint, data) as (service, url):
        config = settings(tmp_path, data, url)
        with pytest.raises(Stopped), open_run(config, QueueConfig()) as (run, source):
            train(run, source, stop)
        assert trained(config, service, QueueConfig()) == ["published:face@2", "published:face@3"]


def test_the_service_goes_and_comes_back(tmp_path: Path, broker: str, checkpoint: Path, data: Path):
    with ExitStack() as stack:
        gone = stack.enter_context(ExitStack())
        service, url = gone.enter_context(serving_both(tmp_path, "embedded", checkpoint, data))
        port = int(url.rsplit(":", 1)[1])

        def stop_and_start(run: Run) -> None:
            if run.at.done == 1 and run.at.iteration == 1:
                gone.close()
            if run.at.done == 1 and run.at.iteration == 4:
                stack.enter_context(serving_both(tmp_path, "embedded", checkpoint, data, at_port=port))

        run = run_training(settings(tmp_path, data, url, iterations=6), broker, stop_and_start)
        cards = [model.card for model in service.published.list()]
    assert run.at.iteration == 6 and events(run) == ["unpublished", "published"]
    assert [card.iteration for card in cards] == [0, 4, 5]


@pytest.mark.parametrize(
    ("service", "error", "said"),
    [
        ({"api_key": "hush"}, Unauthorized, "key"),
        ({"max_model_bytes": 2000}, BodyTooLarge, "max_model_bytes"),
    ],
    ids=["key", "size"],
)
def test_what_the_service_refuses_for_good_stops_the_run_which_can_go_on(
    tmp_path: Path, checkpoint: Path, data: Path, service: dict, error: type, said: str
):
    with serving_both(tmp_path, "embedded", checkpoint, data, **service) as (_, url):
        config = settings(tmp_path, data, url)
        with pytest.raises(error, match=said):
            run_training(config, "embedded")
    with serving_both(tmp_path, "embedded", checkpoint, data) as (opened, url):
        config = settings(tmp_path, data, url)
        run = run_training(config, "embedded")
        assert "resumed" in events(run) and [model.card.iteration for model in opened.published.list()] == [1, 2]
