"""The drop-in for a loop of one's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms.v2.functional import pil_to_tensor

from protocol.broker import URL_VARIABLE
from protocol.errors import ConfigError
from tests.system.whole import serving, trainer_config
from trainer import OnTheFly, record
from trainer.tasks.small_cnn import SmallCNN


def transform(image: Image.Image) -> torch.Tensor:
    """Not what the settings' task would do: images are recognised by it."""
    return pil_to_tensor(image).float() / 100 - 1


@pytest.fixture
def url(tmp_path: Path, broker: str, checkpoint: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv(URL_VARIABLE, broker)
    with serving(tmp_path, broker, checkpoint, data) as url:
        yield url


def settings_file(folder: Path, config: Any) -> Path:
    path = folder / "run.toml"
    path.write_text(tomli_w.dumps({"trainer": config.model_dump(mode="json", exclude_none=True)}))
    return path


def loader_of(data: Path, **options: Any) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    return DataLoader(ImageFolder(data, transform), batch_size=5, shuffle=True, generator=generator, **options)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor, labels: torch.Tensor) -> None:
    assert model.training
    optimizer.zero_grad()
    F.cross_entropy(model(images), labels).backward()
    optimizer.step()


def counted(images: torch.Tensor, real: torch.Tensor) -> tuple[int, int]:
    """(real rows, other rows) of a batch."""
    known = torch.stack([(image == real).flatten(1).all(1).any() for image in images])
    return int(known.sum()), int((~known).sum())


def test_a_plain_loop_gets_samples_and_selection(tmp_path: Path, data: Path, url: str):
    path = settings_file(tmp_path, trainer_config(tmp_path / "runs", data, url))
    model, loader = SmallCNN(3, 8), loader_of(data)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    real = torch.stack([image for image, _ in loader.dataset])
    seen = []  # (synthetic samples of the iteration, real rows, other rows) of each epoch
    with OnTheFly(path, model, optimizer) as augment:
        assert augment.epochs == range(10)
        for _ in augment.epochs:
            rows = [0, 0]
            for images, labels in augment(loader):
                rows = [a + b for a, b in zip(rows, counted(images, real), strict=True)]
                step(model, optimizer, images, labels)
            seen.append((len(augment.synthetic), *rows))
        with pytest.raises(ConfigError, match="this run has had its 5 iterations of 2 epochs"):
            next(augment(loader))
    assert seen[:3] == [(0, 12, 0)] * 3  # warm-up
    for _, own, others in seen:
        assert own == 12 and (others == 0 or 0 < others < 10)
    metrics = record.rows(tmp_path / "runs" / "run" / "metrics.jsonl")
    assert [row["real_rows"] for row in metrics] == [24] * 5
    assert all(row["synthetic_rows"] == 0 for row in metrics[:2])
    assert all(0 < row["synthetic_rows"] < row["lookahead_seen"] for row in metrics[2:])
    assert sum(others for *_, others in seen) == sum(row["synthetic_rows"] for row in metrics)

    again = SmallCNN(3, 8)  # the run is over: entering it again finds the trained weights
    with OnTheFly(path, again, torch.optim.AdamW(again.parameters())) as augment:
        assert not augment.epochs
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_every_synthetic_sample_comes_once_an_epoch_in_the_loaders_own_layout(tmp_path: Path, data: Path, url: str):
    """Without lookahead; batches are dicts; an epoch is left early and counts; the run is interrupted and goes on."""

    def collate(rows: list[tuple[torch.Tensor, int]]) -> dict[str, torch.Tensor]:
        images, labels = zip(*rows, strict=True)
        return {"pixel_values": torch.stack(images), "labels": torch.tensor(labels)}

    config = trainer_config(tmp_path / "runs", data, url, lookahead={"enabled": False}, iterations=3)
    path, loader = settings_file(tmp_path, config), loader_of(data, collate_fn=collate)
    real = torch.stack([image for image, _ in loader.dataset])
    torch.manual_seed(0)
    model = SmallCNN(3, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with pytest.raises(KeyboardInterrupt), OnTheFly(path, model, optimizer) as augment:
        for epoch in augment.epochs:
            for batch in augment(loader):
                if epoch == 2:
                    raise KeyboardInterrupt
                step(model, optimizer, batch["pixel_values"], batch["labels"])
                break
    with OnTheFly(path, model, optimizer) as augment:
        assert augment.epochs == range(2, 6)  # the first epoch of iteration 1 once more
        for epoch in augment.epochs:
            others = []
            for batch in augment(loader):
                step(model, optimizer, batch["pixel_values"], batch["labels"])
                made = [(transform(Image.fromarray(image.numpy())), label) for image, label, _ in augment.synthetic]
                known = [(image == real).flatten(1).all(1).any() for image in batch["pixel_values"]]
                rows = zip(batch["pixel_values"], batch["labels"].tolist(), known, strict=True)
                others += [(image, label) for image, label, own in rows if not own]
            assert len(others) == len(made) and bool(made) == (epoch >= 4)
            plain = [[(label, image.flatten().tolist()) for image, label in rows] for rows in (others, made)]
            assert sorted(plain[0]) == sorted(plain[1])


def test_what_it_cannot_work_with(tmp_path: Path, data: Path, url: str):
    path = settings_file(tmp_path, trainer_config(tmp_path / "runs", data, url))
    model = SmallCNN(3, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with OnTheFly(path, model, optimizer) as augment, pytest.raises(ConfigError, match="give OnTheFly `transform`"):
        next(augment(DataLoader([(torch.zeros(3, 8, 8), 0)])))
    triples = DataLoader(ImageFolder(data, transform), collate_fn=lambda rows: (1, 2, 3))
    other = OnTheFly(path, model, optimizer, overrides=["trainer.run=other"])
    with other as augment, pytest.raises(ConfigError, match="batches are tuple: let them be"):
        next(augment(triples))
    with pytest.raises(ConfigError, match="your loader loads all real samples"):
        OnTheFly(path, model, optimizer, overrides=["trainer.thresholds.auto=true"])
    with pytest.raises(ConfigError, match="your loader loads all real samples"):
        OnTheFly(path, model, optimizer, overrides=["trainer.mode=synthetic"])
