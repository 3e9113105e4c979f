from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from protocol import codec
from protocol.dataset import Dataset, DatasetConfig
from tests.trainer.run_folder import RunFolder, write_dataset, write_run
from trainer.record import Record
from trainer.report import figures
from trainer.report.__main__ import main
from trainer.report.page import page

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Reads a page, insisting that every element is closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[tuple[str, dict[str, str]]] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.cells: list[list[str]] = []  # of every table row
        self.images: list[tuple[str, str, np.ndarray]] = []  # section, fate, pixels
        self.words: list[str] = []
        self.section = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        named = {name: value or "" for name, value in attributes}
        self.tags.append((tag, named))
        if tag == "img":
            fate = self.open[-1][1]["class"].removeprefix("picture").strip()
            assert named["alt"]
            self.images.append((self.section, fate, codec.image_from_base64(named["src"])))
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")
        if tag not in VOID:
            self.open.append((tag, named))

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attributes}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1][0] == "h2":
            self.section = data
        if self.open and self.open[-1][0] in ("td", "th"):
            self.cells[-1][-1] += data
        if not self.open or self.open[-1][0] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def shown(self, section: str) -> list[tuple[str, np.ndarray]]:
        return [(fate, pixels) for where, fate, pixels in self.images if where.startswith(section)]


@pytest.fixture
def data(tmp_path: Path) -> DatasetConfig:
    write_dataset(tmp_path / "data")
    return DatasetConfig(root=tmp_path / "data", split="train")


def write(tmp_path: Path, data: DatasetConfig, name: str = "run", **settings: object) -> RunFolder:
    return write_run(tmp_path / name, Dataset.open(data), data, **settings)


def read(run: RunFolder, *baselines: RunFolder) -> Page:
    return Page(page(Record.open(run.folder), [Record.open(baseline.folder) for baseline in baselines]))


def images_of(run: RunFolder, feedback: int, unit: int) -> np.ndarray:
    return codec.decode((run.folder / "batches" / f"{feedback:06d}-{unit:06d}.safetensors").read_bytes())["images"]


# ---------------------------------------------------------------- pictures


def test_hard_samples_stand_beside_what_was_made_for_them(tmp_path: Path, data: DatasetConfig):
    run = write(tmp_path, data)
    shown = read(run).shown("Hard samples")
    first, late, last = images_of(run, 1, 0), images_of(run, 1, 1), images_of(run, 2, 0)
    unused = images_of(run, 2, 2)
    expected: list[np.ndarray] = []
    for index in range(4):  # feedback 1, hardest first; then the one whose samples came late
        expected += [run.dataset.image(index), first[2 * index], first[2 * index + 1]]
    expected += [run.dataset.image(4), late[0], late[1]]
    for index in range(2):  # feedback 2: units of samples 2 and 3 failed
        expected += [run.dataset.image(index), last[2 * index], last[2 * index + 1]]
    expected += [run.dataset.image(4), unused[0], unused[1]]
    assert len(shown) == len(expected) == 24
    for (_, pixels), wanted in zip(shown, expected, strict=True):
        assert np.array_equal(pixels, wanted)


def test_each_synthetic_sample_shows_what_became_of_it(tmp_path: Path, data: DatasetConfig):
    run = write(tmp_path, data)
    fates = [fate for fate, _ in read(run).shown("Hard samples")]
    assert fates.count("near-copy") == 1
    assert fates[5] == "near-copy"  # row 3 of the first batch: the second sample of the second real one
    assert fates[13:15] == ["not-used", "not-used"]  # stale
    assert (fates.count("kept"), fates.count("dropped"), fates.count("")) == (8, 3, 8)


def test_what_vog_dropped_stands_beside_what_it_kept(tmp_path: Path, data: DatasetConfig):
    run = write(tmp_path, data)
    scores = {row["id"]: row["vog"] for row in Record.open(run.folder).selection if row["iteration"] == 3}
    batch = next(batch for batch in run.pool.batches() if (batch.feedback, batch.unit) == (2, 0))
    ascending = sorted(range(4), key=lambda row: scores[batch.samples[row].id])
    shown = read(run).shown("What variance")
    assert [fate for fate, _ in shown] == ["dropped", "kept", "kept", "kept"]
    for (_, pixels), row in zip(shown, ascending, strict=True):
        assert np.array_equal(pixels, images_of(run, 2, 0)[row])


def test_a_near_copy_stands_beside_its_real_sample(tmp_path: Path, data: DatasetConfig):
    run = write(tmp_path, data)
    (_, real), (fate, made) = read(run).shown("Near copies")
    assert fate == "near-copy"
    assert np.array_equal(real, run.dataset.image(1))
    assert np.array_equal(made, images_of(run, 1, 0)[3])


def test_tiny_pictures_are_enlarged_without_smoothing_and_large_ones_made_smaller(tmp_path: Path, data: DatasetConfig):
    run = RunFolder(tmp_path / "run", Dataset.open(data), data)
    run.ask(1, [0])
    large = np.random.default_rng(0).integers(0, 256, (2, 200, 320, 3), dtype=np.uint8)
    run.answer(1, 0, (0, 1), [0], images=large)
    parsed = read(run)
    assert [pixels.shape for _, pixels in parsed.shown("Hard")] == [(8, 8, 3), (100, 160, 3), (100, 160, 3)]
    assert [named.get("class") for tag, named in parsed.tags if tag == "img"] == ["tiny", None, None]


# ---------------------------------------------------------------- the document


def test_nothing_is_fetched_from_elsewhere(tmp_path: Path, data: DatasetConfig):
    run = write(tmp_path, data)
    text = page(Record.open(run.folder))
    assert "@import" not in text
    assert set(re.findall(r"url\((.)", text)) <= {"#"}
    for tag, named in Page(text).tags:
        assert tag not in ("script", "link", "iframe", "object", "base")
        assert named.pop("src", "data:image/png").startswith("data:image/png")
        assert named.pop("href", "#").startswith("#")
        assert not [value for value in named.values() if "//" in value]


def test_ids_are_unique_and_references_lead_somewhere(tmp_path: Path, data: DatasetConfig):
    tags = read(write(tmp_path, data)).tags
    ids = [named["id"] for _, named in tags if "id" in named]
    assert len(ids) == len(set(ids))
    assert {named["href"][1:] for _, named in tags if "href" in named} <= set(ids)


def test_charts_take_their_colours_from_the_page(tmp_path: Path, data: DatasetConfig):
    chart = figures.timeline(Record.open(write(tmp_path, data).folder))
    assert "var(--train)" in chart
    assert not re.search(r"#[0-9a-f]{2}0b0d", chart)


def test_hostile_names_are_text(tmp_path: Path):
    names = ("<img src=x onerror=alert(1)>", 'a $x_{"&')
    dataset = write_dataset(tmp_path / "data", names)
    run = write_run(tmp_path / "run", dataset, DatasetConfig(root=tmp_path / "data", split="train"))
    run.journal.event("outage", "<script>alert(2)</script>", peer="x")
    parsed = read(run)
    assert "script" not in {tag for tag, _ in parsed.tags}
    assert not [named for _, named in parsed.tags if "onerror" in named]
    assert parsed.text.count("<img src=x onerror=alert(1)>") >= 3  # chart, hard samples, VoG
    assert 'a $x_{"&' in parsed.text
    assert "<script>alert(2)</script>" in parsed.text


# ---------------------------------------------------------------- numbers


def test_comparison_by_hand(tmp_path: Path, data: DatasetConfig):
    run = write(tmp_path, data)
    baseline = RunFolder(tmp_path / "real-only", Dataset.open(data), data, mode="real")
    for iteration in range(4):
        baseline.trainer("train", 6 * iteration, 6 * iteration + 6, iteration)
        baseline.finish(iteration, test_top1=0.72)
    parsed = read(run, baseline)
    rows = {cells[0]: cells[1:] for cells in parsed.cells}
    assert rows[""] == ["real-only", "run"]
    assert rows["Top-1 accuracy, held out"] == ["72.0 %", "80.0 %"]
    assert rows["Worst class over best class"] == ["0.800", "0.800"]
    assert rows["Training minus held-out accuracy"] == ["10.0 %", "10.0 %"]
    assert rows["Wall time"] == ["24.0 s", "40.0 s"]
    assert rows["Trainer idle (waiting for samples)"] == ["0.0 %", "5.0 %"]
    assert rows["Generator idle, once asked"] == ["\N{EN DASH}", "41.1 %"]  # 1 - 16.5 / 28
    assert rows["Synthetic samples generated"] == ["0", "16"]
    assert rows["Dropped by variance of gradients"] == ["0", "3"]
    assert rows["Dropped as stale"] == ["0", "2"]
    assert rows["Kept by lookahead"] == ["0", "200"]
    assert "+8.0 points against real-only" in parsed.text
    assert "same number of updates" not in parsed.text
    assert "16 samples of 20 asked for arrived. 1 work units failed, and 4 samples with them. Every" in parsed.text


def test_unequal_updates_are_pointed_out(tmp_path: Path, data: DatasetConfig):
    baseline = RunFolder(tmp_path / "short", Dataset.open(data), data, mode="real")
    baseline.finish(0)
    assert "did not make the same number of updates" in read(write(tmp_path, data), baseline).text


def bars(chart: str, colour: str) -> list[tuple[float, float]]:
    """Left and right edge of every bar of a colour, in the chart's units, from left to right."""
    found = []
    for outline in re.findall(rf'<path [^>]*d="([^"]*)"[^>]*fill: var\(--{colour}\)', chart):
        xs = [float(x) for x in re.findall(r"[ML] ([-\d.]+) [-\d.]+", outline)]
        found.append((min(xs), max(xs)))
    return sorted(found)


def test_the_timeline_is_to_scale(tmp_path: Path, data: DatasetConfig):
    chart = figures.timeline(Record.open(write(tmp_path, data).folder))
    trained, generated = bars(chart, "train"), bars(chart, "generate")
    ticks = [float(x) for x in re.findall(r'id="timeline-xtick_\d+".*?<use [^>]*x="([\d.]+)"', chart, re.DOTALL)]
    labels = [float(text) for text in re.findall(r">(\d+)</text>", chart)]
    second = (ticks[-1] - ticks[0]) / (labels[-1] - labels[0])

    def seconds(found: list[tuple[float, float]]) -> list[float]:
        return [labels[0] + (x - ticks[0]) / second for bar in found for x in bar]

    lanes = [bar for bar in trained if bar[1] - bar[0] > 5 * second]  # without the legend's swatch
    assert seconds(lanes) == pytest.approx([3, 9, 13, 19, 23, 29, 33, 39], abs=0.05)
    batches = [bar for bar in generated if bar[1] - bar[0] > 1.5 * second]
    assert seconds(batches) == pytest.approx([12, 18, 21.5, 28, 26, 30, 32, 34], abs=0.05)


# ---------------------------------------------------------------- what may be missing


def test_a_run_on_real_data_only(tmp_path: Path, data: DatasetConfig):
    run = RunFolder(tmp_path / "run", Dataset.open(data), data, mode="real")
    run.trainer("train", 0, 1, 0)
    run.finish(0)
    text = read(run).text
    assert "real data only; nothing was generated" in text
    assert "No synthetic samples arrived" in text
    assert "No generator worked" in text
    assert "No synthetic samples were made for real ones" in text
    assert "Variance of gradients dropped nothing" in text
    assert "Only one iteration is finished" in text
    assert "1 of 4 iterations are done" in text


def test_a_run_that_has_only_begun(tmp_path: Path, data: DatasetConfig):
    text = read(RunFolder(tmp_path / "run", Dataset.open(data), data)).text
    assert "No iteration is finished yet" in text
    assert "No interval is recorded yet" in text


def test_without_a_test_split(tmp_path: Path, data: DatasetConfig):
    run = RunFolder(tmp_path / "run", Dataset.open(data), data)
    held_out = ("test_top1", "per_class", "worst_case_disparity", "train_val_gap")
    for iteration in range(2):
        run.finish(iteration, **dict.fromkeys(held_out, "absent"))
    assert "No test split was evaluated" in read(run).text


def test_classes_without_test_samples_are_left_out(tmp_path: Path, data: DatasetConfig):
    run = RunFolder(tmp_path / "run", Dataset.open(data), data)
    for iteration in range(3):
        run.finish(iteration, per_class=[0.5, None])
    chart = figures.classes(Record.open(run.folder), ["cat", "dog"])
    assert ">cat<" in chart
    assert ">dog<" not in chart


def test_the_dataset_is_gone_but_pixels_were_sent(tmp_path: Path, data: DatasetConfig):
    run = write(tmp_path, data)
    feedback = Record.open(run.folder).feedback[0]
    wanted = run.dataset.image(0)
    first = feedback.samples[0].model_copy(update={"pixels": codec.image_to_base64(wanted)})
    sent = feedback.model_copy(update={"samples": [first, *feedback.samples[1:]]})
    (run.folder / "feedback" / "000001.json").write_text(sent.model_dump_json())
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    parsed = read(run)
    assert "The real samples cannot be read any more" in parsed.text
    assert str(tmp_path / "data") in parsed.text
    assert np.array_equal(parsed.shown("Hard")[0][1], wanted)
    assert parsed.text.count("gone") >= 4  # the other real samples


def test_deleted_batches_leave_gaps(tmp_path: Path, data: DatasetConfig):
    run = write(tmp_path, data)
    for path in (run.folder / "batches").glob("*.safetensors"):
        path.unlink()
    assert {fate for fate, _ in read(run).shown("Hard")} == {""}  # the real samples only


def test_an_offline_run(tmp_path: Path, data: DatasetConfig):
    run = RunFolder(tmp_path / "run", Dataset.open(data), data, mode="offline")
    run.ask(0, range(3))
    run.answer(0, 0, (0, 5), range(3))
    run.finish(2, run.select(2, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], dropped=(0,)))
    parsed = read(run)
    assert "drawn again" in parsed.text
    assert "Asked for beforehand" in parsed.text
    assert "score" not in parsed.text.partition("Asked for beforehand")[2].partition("What variance")[0]


def test_many_classes_show_the_weakest(tmp_path: Path, data: DatasetConfig):
    run = RunFolder(tmp_path / "run", Dataset.open(data), data, mode="real")
    run.finish(0, per_class=[label / 100 for label in range(40)])
    parsed = read(run)
    assert f"The {figures.MOST_CLASSES} weakest of 40 classes" in parsed.text
    assert "class 23" in parsed.text
    assert "class 24" not in parsed.text


# ---------------------------------------------------------------- the command


def test_the_command_writes_the_page_and_loads_no_torch(tmp_path: Path, data: DatasetConfig):
    run, out = write(tmp_path, data), tmp_path / "report.html"
    code = "import sys; from trainer.report.__main__ import main; assert main() == 0; assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", code, str(run.folder), "--baseline", str(run.folder), "--out", str(out)]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == f"wrote {out}\n"
    assert out.read_text() == page(Record.open(run.folder), [Record.open(run.folder)])


def test_a_folder_that_is_no_run_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main([str(tmp_path), "--out", str(tmp_path / "report.html")]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_an_out_folder_that_is_not_there_says_what_to_do(
    tmp_path: Path, data: DatasetConfig, capsys: pytest.CaptureFixture[str]
):
    run = write(tmp_path, data)
    assert main([str(run.folder), "--out", str(tmp_path / "none" / "report.html")]) == 2
    assert "make it first" in capsys.readouterr().err
