"""Captioning a dataset: what is written, what is left alone, and going on after an interruption."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from agent import cli
from generator_service.language import __main__ as command
from generator_service.language import caption_dataset
from generator_service.language.caption_dataset import Captioned, caption
from generator_service.language.captioner import Captioner, Config
from protocol.dataset import Dataset, DatasetConfig
from tests.generator_service.language.tiny_language import save_blip2


def greys(images: Sequence[np.ndarray]) -> list[str]:
    """Says how bright each picture is; of black ones nothing."""
    return [f"a grey of {image[0, 0, 0]}" if image.any() else "" for image in images]


@pytest.fixture
def place(tmp_path: Path) -> DatasetConfig:
    """Six pictures of greys 0, 10, ... 50, and a file that is none."""
    for number in range(6):
        path = tmp_path / "train" / ("cat", "dog")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((3, 3, 3), 10 * number, dtype=np.uint8)).save(path)
    (tmp_path / "train" / "cat" / "bad.png").write_text("no picture")
    return DatasetConfig(root=tmp_path, split="train")


def captions(place: DatasetConfig) -> dict[str, str | None]:
    return {entry.path.stem: entry.caption for entry in Dataset.open(place).samples}


def test_every_picture_gets_the_caption_that_is_its_own(place: DatasetConfig):
    steps: list[tuple[int, int]] = []
    report = caption(Dataset.open(place), place, greys, 4, lambda done, total: steps.append((done, total)))
    expected = {str(n): f"a grey of {10 * n}" for n in range(1, 6)} | {"0": None}
    assert captions(place) == expected
    assert report == Captioned(had=0, written=5, silent=1, bad=1)
    assert steps == [(4, 6), (6, 6)]


def test_what_has_a_caption_is_not_even_looked_at(place: DatasetConfig):
    caption(Dataset.open(place), place, greys, 4)
    path = place.root / "train" / "metadata.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row.pop("caption", None)
    rows[-1]["text"] = "mine"  # dog/5.png
    path.write_text("\n".join(map(json.dumps, rows)))
    seen: list[int] = []

    def describe(images: Sequence[np.ndarray]) -> list[str]:
        seen.extend(int(image[0, 0, 0]) for image in images)
        return greys(images)

    assert caption(Dataset.open(place), place, describe, 2).had == 1
    assert sorted(seen) == [0, 10, 20, 30, 40]
    assert captions(place)["5"] == "mine"


def test_an_interrupted_run_goes_on_where_it_was(place: DatasetConfig):
    described: list[int] = []

    def describe(images: Sequence[np.ndarray]) -> list[str]:
        if len(described) == 4:
            raise KeyboardInterrupt
        described.extend(int(image[0, 0, 0]) for image in images)
        return [f"first {image[0, 0, 0]}" for image in images]

    with pytest.raises(KeyboardInterrupt):
        caption(Dataset.open(place), place, describe, 2)
    assert sum(text is not None for text in captions(place).values()) == 4
    report = caption(Dataset.open(place), place, lambda images: ["second"] * len(images), 2)
    assert (report.had, report.written) == (4, 2)
    assert sorted(text.split()[0] for text in captions(place).values() if text) == ["first"] * 4 + ["second"] * 2


def test_captions_are_saved_while_it_goes_on_and_those_of_others_meanwhile_win(
    place: DatasetConfig, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(caption_dataset, "SAVE_S", 0.0)
    path = place.root / "train" / "metadata.jsonl"
    calls: list[int] = []

    def describe(images: Sequence[np.ndarray]) -> list[str]:
        calls.append(len(images))
        if len(calls) == 2:
            lines = path.read_text().splitlines()  # the first batch is there already
            assert sum('"caption"' in line for line in lines) == 2
            path.write_text(
                "\n".join(line if '"caption"' in line else line[:-1] + ', "caption": "mine"}' for line in lines)
            )
        return ["the model's"] * len(images)

    assert caption(Dataset.open(place), place, describe, 2).written == 2
    assert sorted(text or "" for text in captions(place).values()) == ["mine"] * 4 + ["the model's"] * 2


def test_a_picture_that_breaks_meanwhile_is_skipped_and_told(place: DatasetConfig, caplog: pytest.LogCaptureFixture):
    dataset = Dataset.open(place)
    (place.root / "train" / "dog" / "3.png").write_text("broken")
    report = caption(dataset, place, greys, 3)
    assert (report.written, report.silent, report.bad) == (4, 1, 2)
    assert "2 files are bad" in str(report) and any("3.png" in message for message in caplog.messages)


# ---------------------------------------------------------------- the command


@pytest.fixture
def _in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave this process's logs and signals alone."""
    monkeypatch.setattr("protocol.logs.setup", lambda process: None)
    monkeypatch.setattr("protocol.parent.interruptible", lambda: None)


@pytest.mark.usefixtures("_in_process")
def test_the_command_captions_with_a_real_model(
    place: DatasetConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    became: list[list[str]] = []
    monkeypatch.setattr("os.execv", lambda program, arguments: became.append(arguments))
    folder = save_blip2(tmp_path / "model")
    arguments = ["--dataset", str(place.root), "--split", "train", "--model", str(folder), "--prompt", "a photo of"]
    arguments += ["--set", "agent.captioner.max_new_tokens=6", "--set", "agent.captioner.device=cpu"]
    cli.main(["caption", *arguments])
    ((_, flag, module, *settings),) = became
    assert (flag, module) == ("-m", "generator_service.language")
    assert command.main(settings) == 0
    told = capsys.readouterr().out
    assert "0 pictures had one" in told and "1 files are bad" in told
    model = Captioner(Config(model=str(folder), prompt="a photo of", max_new_tokens=6, device="cpu"))
    dataset = Dataset.open(place)
    expected = model.describe([dataset.image(entry.id) for entry in dataset.samples])
    assert [entry.caption for entry in dataset.samples] == [text or None for text in expected]
    assert any(expected)


@pytest.mark.usefixtures("_in_process")
def test_without_a_model_nothing_is_written(place: DatasetConfig, capsys: pytest.CaptureFixture[str]):
    settings = [f"generator.dataset.root={json.dumps(str(place.root))}", "generator.dataset.split=train"]
    assert command.main([part for setting in settings for part in ("--set", setting)]) == 0
    assert "no captioner" in capsys.readouterr().out
    assert not (place.root / "train" / "metadata.jsonl").exists()


@pytest.mark.usefixtures("_in_process")
@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ([], "generator.dataset"),
        (["generator.dataset.root=nowhere", "agent.captioner.model=x"], "does not exist"),
        (["generator.dataset.root=here", "agent.captioner.modell=x"], "did you mean 'model'"),
        (["generator.dataset.root=here", "agent.captioner.model=./nowhere"], "no folder './nowhere'"),
    ],
)
def test_wrong_settings_say_what_to_do(
    settings: list[str], told: str, place: DatasetConfig, capsys: pytest.CaptureFixture[str]
):
    here = json.dumps(str(place.root / "train"))
    overrides = [setting.replace("=here", f"={here}") for setting in settings]
    assert command.main([part for override in overrides for part in ("--set", override)]) == 2
    assert told in capsys.readouterr().err
