"""Synchronous mode, through broker and HTTP, is the paper's algorithm; and a resumed run is the uninterrupted one.

Both to the bit, on the CPU.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from agent.planner import plan
from generator_service.backends.dit import Config, DiTBackend
from generator_service.backends.interface import Row, Sampling
from generator_service.weights import WeightStore
from protocol.dataset import Dataset
from protocol.messages import Feedback, MarginalSample
from tests.system.whole import run_training, serving, serving_both, trainer_config
from trainer.data.batches import batches_an_epoch, derive, schedule
from trainer.run import Run
from trainer.selection.lookahead import lookahead
from trainer.selection.ranking import keep
from trainer.selection.vog import vog
from trainer.settings import TrainerConfig
from trainer.tasks.classification import Classification, ClassificationConfig


class Interrupted(Exception):
    pass


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def algorithm_1(config: TrainerConfig, agent, checkpoint: Path, weights_dir: Path) -> dict[str, torch.Tensor]:
    """GenDataAgent's Algorithm 1 with lookahead, as plain as it goes: no queue, no HTTP, no threads, no checkpoints."""
    dataset = Dataset.open(config.dataset)
    real = torch.stack([torch.from_numpy(dataset.image(i).copy()) for i in range(len(dataset))])
    labels = torch.tensor([entry.label for entry in dataset.samples])
    backend = DiTBackend(Config(checkpoint=str(checkpoint), device="cpu"))
    weights = WeightStore(weights_dir, backend.folder, backend.name, backend.classes).active()
    task = Classification(ClassificationConfig(**config.model), dataset.classes)
    torch.manual_seed(config.seed)
    model = task.build_model()
    rate = config.optimizer.learning_rate
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4)
    snapshots: list[dict[str, torch.Tensor]] = []

    for iteration in range(config.iterations):
        images, targets = real, labels
        if iteration >= config.warmup_iterations:
            model.eval()
            with torch.no_grad():
                p = model(task.preprocess(real)).double().softmax(1)[torch.arange(len(real)), labels]
            hardest = torch.argsort(p, stable=True)[: int(np.ceil(config.feedback.fraction * len(real)))]
            made, made_labels = generate(config, agent, backend, weights, dataset, iteration, hardest.tolist())
            x = task.preprocess(made)
            kept = keep(vog(model, snapshots, x, made_labels), made_labels, config.vog.fraction)
            images, targets = torch.cat([real, made[kept]]), torch.cat([labels, made_labels[kept]])
        steps = config.epochs * batches_an_epoch(len(images), config.batch_size)
        order = schedule(len(images), config.batch_size, steps, config.seed, iteration)
        for number, rows in enumerate(order):
            seed = derive(config.seed, "augment", iteration, number)
            x = task.augment(task.preprocess(images[rows]), torch.Generator().manual_seed(seed))
            y, synthetic = targets[rows], torch.tensor(rows) >= len(real)
            model.train()
            mask = lookahead(model, task.losses, x, y, synthetic, virtual_lr=rate, keep=config.lookahead.keep)
            optimizer.zero_grad()
            F.cross_entropy(model(x[mask]), y[mask]).backward()
            optimizer.step()
        if iteration < config.warmup_iterations:
            snapshots.append({name: value.clone() for name, value in model.state_dict().items()})
    return model.state_dict()


def generate(config, agent, backend, weights, dataset, iteration, hardest):
    """The synthetic samples of one iteration, in the order (source, index): uint8 [n, 8, 8, 3] and labels [n]."""
    samples = [
        MarginalSample(sample_id=e.id, label=e.label, class_name=e.class_name, score=0.0)
        for e in (dataset.samples[row] for row in hardest)
    ]
    feedback = Feedback(run=config.run, feedback=iteration, model_version=0, samples=samples)
    made = []
    for unit in plan(feedback, agent, weights.ref, weights.classes, lambda name: True):
        rows = [
            Row(
                seed=row.seed,
                label=weights.classes.index(row.class_name),
                guidance_scale=row.guidance_scale,
                image=dataset.image(row.init_id),
            )
            for row in unit.rows
        ]
        pixels = backend.generate(weights, rows, Sampling(unit.steps, unit.scheduler, unit.strength, guided=True))
        made += [(row.source_id, row.index, row.label, image) for row, image in zip(unit.rows, pixels, strict=True)]
    made.sort(key=lambda entry: entry[:2])
    return torch.from_numpy(np.stack([entry[3] for entry in made])), torch.tensor([entry[2] for entry in made])


def test_sync_mode_is_algorithm_1_to_the_bit(tmp_path: Path, broker: str, checkpoint: Path, data: Path):
    with serving_both(tmp_path, broker, checkpoint, data) as (service, url):
        config = trainer_config(tmp_path / "runs", data, url)
        run = run_training(config, broker)
        agent = service._agent
    assert run.at.iteration == config.iterations
    expected = algorithm_1(config, agent, checkpoint, tmp_path / "plain")
    assert same(run.model.state_dict(), expected)


def test_synthetic_data_made_a_difference(tmp_path: Path, broker: str, checkpoint: Path, data: Path):
    """Otherwise the equality above would say nothing."""
    with serving(tmp_path, broker, checkpoint, data) as url:
        on_the_fly = run_training(trainer_config(tmp_path / "a", data, url), broker)
        real_only = run_training(trainer_config(tmp_path / "b", data, url, mode="real"), broker)
    assert on_the_fly.at.updates > real_only.at.updates
    assert not same(on_the_fly.model.state_dict(), real_only.model.state_dict())


@pytest.mark.timeout(400)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path: Path, broker: str, checkpoint: Path, data: Path):
    """Stopped in the warm-up, at an iteration's start, and within stage 2; with and without checkpoints in between."""
    with serving(tmp_path, broker, checkpoint, data) as url:
        whole = run_training(trainer_config(tmp_path / "whole", data, url), broker)
        for stop_at, every in itertools.product((5, 14, 19), (None, 4)):
            place = tmp_path / f"{stop_at}-{every}"
            equal(whole, halves(trainer_config(place, data, url, checkpoint_every=every), broker, stop_at))


def halves(config: TrainerConfig, broker: str, stop_at: int) -> Run:
    """A run that is interrupted after so many updates, and resumed."""

    def stop(run: Run) -> None:
        if run.at.updates == stop_at:
            raise Interrupted

    with pytest.raises(Interrupted):
        run_training(config, broker, stop)
    return run_training(config, broker)


def equal(whole: Run, resumed: Run) -> None:
    assert same(whole.model.state_dict(), resumed.model.state_dict())
    for one, other in zip(
        whole.optimizer.state_dict()["state"].values(), resumed.optimizer.state_dict()["state"].values(), strict=True
    ):
        assert torch.equal(one["momentum_buffer"], other["momentum_buffer"])
    lines = [(run.config.folder / "metrics.jsonl").read_text() for run in (whole, resumed)]
    assert lines[0] == lines[1]
