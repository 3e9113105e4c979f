"""The drop-in for a loop of one's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import tomli_w
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader

from protocol.broker import URL_VARIABLE
from tests.system.whole import serving, trainer_config
from trainer import OnTheFly, record
from trainer.tasks.small_cnn import SmallCNN


def settings_file(folder: Path, config) -> Path:
    path = folder / "run.toml"
    path.write_text(tomli_w.dumps({"trainer": config.model_dump(mode="json", exclude_none=True)}))
    return path


def plain_loop(otf: OnTheFly, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[tuple[int, int]]:
    """(iteration, synthetic samples) of each iteration."""
    seen = []
    for iteration in otf:
        loader = DataLoader(ConcatDataset([otf.real, otf.synthetic]), batch_size=6, shuffle=True)
        for images, labels, synthetic in loader:
            model.train()
            x = otf.inputs(images)
            keep = otf.select(x, labels, synthetic)
            assert keep[~synthetic].all()
            optimizer.zero_grad()
            F.cross_entropy(model(x[keep]), labels[keep]).backward()
            optimizer.step()
        seen.append((iteration, len(otf.synthetic)))
    return seen


def test_a_plain_loop_gets_samples_and_selection(
    tmp_path: Path, broker: str, checkpoint: Path, data: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(URL_VARIABLE, broker)
    with serving(tmp_path, broker, checkpoint, data) as url:
        path = settings_file(tmp_path, trainer_config(tmp_path / "runs", data, url))
        model = SmallCNN(3, 8)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        with OnTheFly(path, model, optimizer) as otf:
            seen = plain_loop(otf, model, optimizer)
        assert [iteration for iteration, _ in seen] == [0, 1, 2, 3, 4]
        assert [count for _, count in seen[:2]] == [0, 0]
        assert all(0 < count <= 10 for _, count in seen[2:])
        metrics = record.rows(otf.config.folder / "metrics.jsonl")
        assert [row["real_rows"] for row in metrics] == [12] * 5
        assert all(0 < row["synthetic_rows"] < row["lookahead_seen"] for row in metrics[2:])

        again = SmallCNN(3, 8)  # the run is over: entering it again finds the trained weights
        with OnTheFly(path, again, torch.optim.AdamW(again.parameters())) as otf:
            assert list(otf) == []
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
