from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from protocol import codec
from protocol.dataset import Dataset, DatasetConfig
from protocol.messages import Feedback
from tests.trainer.run_folder import RunFolder, write_dataset, write_run
from trainer.metrics import feature_file, features
from trainer.metrics.device_hours import device_hours
from trainer.record import Record
from trainer.report import figures, paper
from trainer.report.__main__ import main
from trainer.report.page import page
from trainer.report.style import CSS
from trainer.report.svg import COLOURS
from trainer.summary import summary_of

VOID = {"meta", "img", "br"}
TSNE = paper._tsne


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


@pytest.fixture(scope="module")
def standard(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, str]:
    """The run of `write_run`, which no test changes, and its report."""
    folder = tmp_path_factory.mktemp("standard")
    run = write_run(folder / "run", write_dataset(folder / "data"), DatasetConfig(root=folder / "data", split="train"))
    return run, page(Record.open(run.folder))


@pytest.fixture(autouse=True)
def _quick_tsne(monkeypatch: pytest.MonkeyPatch) -> None:
    """t-SNE takes seconds; the first two components stand in for it."""
    monkeypatch.setattr(paper, "_tsne", lambda components: components[:, :2])


def write(tmp_path: Path, data: DatasetConfig, name: str = "run", **settings: object) -> RunFolder:
    return write_run(tmp_path / name, Dataset.open(data), data, **settings)


def read(run: RunFolder, *baselines: RunFolder) -> Page:
    return Page(page(Record.open(run.folder), [Record.open(baseline.folder) for baseline in baselines]))


def images_of(run: RunFolder, feedback: int, unit: int) -> np.ndarray:
    return codec.decode((run.folder / "batches" / f"{feedback:06d}-{unit:06d}.safetensors").read_bytes())["images"]


# ---------------------------------------------------------------- pictures


def test_hard_samples_stand_beside_what_was_made_for_them(standard: tuple[RunFolder, str]):
    run, text = standard
    shown = Page(text).shown("Hard samples")
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


def test_each_synthetic_sample_shows_what_became_of_it(standard: tuple[RunFolder, str]):
    _, text = standard
    fates = [fate for fate, _ in Page(text).shown("Hard samples")]
    assert fates.count("near-copy") == 1
    assert fates[5] == "near-copy"  # row 3 of the first batch: the second sample of the second real one
    assert fates[13:15] == ["not-used", "not-used"]  # stale
    assert (fates.count("kept"), fates.count("dropped"), fates.count("")) == (8, 3, 8)


def test_what_vog_dropped_stands_beside_what_it_kept(standard: tuple[RunFolder, str]):
    run, text = standard
    scores = {row["id"]: row["vog"] for row in Record.open(run.folder).selection if row["iteration"] == 3}
    batch = next(batch for batch in run.pool.batches() if (batch.feedback, batch.unit) == (2, 0))
    ascending = sorted(range(4), key=lambda row: scores[batch.samples[row].id])
    shown = Page(text).shown("What variance")
    assert [fate for fate, _ in shown] == ["dropped", "kept", "kept", "kept"]
    for (_, pixels), row in zip(shown, ascending, strict=True):
        assert np.array_equal(pixels, images_of(run, 2, 0)[row])


def test_what_similarity_dropped_is_shown_in_the_place_of_vog(tmp_path: Path, data: DatasetConfig):
    filters = {"vog": {"enabled": False}, "similarity": {"enabled": True}}
    run = RunFolder(tmp_path / "run", Dataset.open(data), data, **filters)
    run.answer(1, 0, (0, 1), [0])
    candidates = run.pool.take(1)
    run.journal.selection(2, candidates, [0.9, 0.4], [True, False], "similarity")
    run.finish(2, {"candidates": 2, "similarity_dropped": 1})
    parsed = read(run)
    assert [fate for fate, _ in parsed.shown("What similarity to real samples chose")] == ["dropped", "kept"]
    assert "near 0.4" in parsed.text and "VoG" not in parsed.text
    assert "1 dropped by similarity to real samples" in parsed.text


def test_a_near_copy_stands_beside_its_real_sample(standard: tuple[RunFolder, str]):
    run, text = standard
    (_, real), (fate, made) = Page(text).shown("Near copies")
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


def test_nothing_is_fetched_from_elsewhere(standard: tuple[RunFolder, str]):
    _, text = standard
    assert "@import" not in text
    assert set(re.findall(r"url\((.)", text)) <= {"#"}
    for tag, named in Page(text).tags:
        assert tag not in ("script", "link", "iframe", "object", "base")
        assert named.pop("src", "data:image/png").startswith("data:image/png")
        assert named.pop("href", "#").startswith("#")
        assert not [value for value in named.values() if "//" in value]


def test_ids_are_unique_and_references_lead_somewhere(standard: tuple[RunFolder, str]):
    tags = Page(standard[1]).tags
    ids = [named["id"] for _, named in tags if "id" in named]
    assert len(ids) == len(set(ids))
    assert {named["href"][1:] for _, named in tags if "href" in named} <= set(ids)


def test_charts_take_their_colours_from_the_page(standard: tuple[RunFolder, str]):
    chart = figures.timeline(Record.open(standard[0].folder))
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


def test_the_timeline_is_to_scale(standard: tuple[RunFolder, str]):
    chart = figures.timeline(Record.open(standard[0].folder))
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


def test_every_activity_of_a_trainer_is_on_the_timeline(tmp_path: Path, data: DatasetConfig):
    """And what it cost is counted."""
    run = RunFolder(tmp_path / "run", Dataset.open(data), data)
    for number, what in enumerate(figures.ACTIVITIES):
        run.trainer(what, number, number + 0.5, 0)
    record = Record.open(run.folder)
    chart = figures.timeline(record)
    assert [what for what, name in figures.ACTIVITIES.items() if f">{name}<" not in chart] == []
    assert device_hours(record) == dict.fromkeys(figures.ACTIVITIES, pytest.approx(0.5 / 3600))
    style = COLOURS.keys() | figures.ACTIVITIES.keys()
    assert all(CSS.count(f"--{name}:") >= 2 for name in style)  # light and dark


# ---------------------------------------------------------------- what the paper measures


def measured(tmp_path: Path, data: DatasetConfig, **fields: object) -> RunFolder:
    """The run of `write_run` with one more iteration, which also measured robustness and features."""
    run = write_run(tmp_path / "run", Dataset.open(data), data, iterations=5)
    corrupted = {"gaussian_blur": {"1": 0.7, "5": 0.5}, "speckle_noise": {"1": 0.8, "5": 0.2}}
    told = {"corrupted": corrupted, "corruption_scale": "cifar-c", "device": "cpu", "synthetic_top1": 0.85}
    run.finish(4, **told | fields)
    draw = torch.Generator().manual_seed(0)
    far = {"real": 1.0, "kept": 2.0, "dropped": 4.0, "erased": 1.0}  # from the origin
    places = {kind: torch.nn.functional.normalize(torch.randn(12, 6, generator=draw)) * far[kind] for kind in far}
    places["real"][6:] = -places["real"][:6]  # so that their centre is the origin
    features.write(run.folder, places, {kind: torch.zeros(12, dtype=torch.long) for kind in far})
    return run


def test_each_figure_has_its_number_and_says_what_it_shows(tmp_path: Path, data: DatasetConfig):
    text = read(measured(tmp_path, data)).text
    assert "Not measured" not in text
    assert "Figure 6a, Table 14. At the end the model is right on 100.0 % of the training samples and on 90.0 %" in text
    assert "Table 13. Clean 90.0 %; mean over the severities: Gaussian blur 60.0 % (-30.0 points), speckle" in text
    assert "Figure 6c. Accuracy at the end: real 100.0 %, synthetic 85.0 %, held out 90.0 %. Synthetic data" in text
    assert "fits like held-out data" in text
    assert "Figure 6b. Synthetic gradients were the larger ones in 2 of 2 iterations" in text
    assert "in the last one they were 1.3 times the real ones" in text  # 2 over 1.5
    assert "Figure 5, left. Correlation r = -1.00 over 2 classes: the weaker a class, the more" in text
    assert "Figure 3. From the centre of their class's real samples, kept synthetic samples are 2.00 times" in text
    assert "dropped ones 4.00 times: dropped ones lie further out" in text
    assert "RL-identity, Figure 4. A colour is a class, 1 at random" in text
    assert "synthetic 2 away, 100 % nearest to their own" in text
    assert "Figure 4. 52.5 CPU seconds in all, most of it training (45.7 %). What adapting took was not" in text


def test_the_papers_tables_by_hand(tmp_path: Path, data: DatasetConfig):
    run = measured(tmp_path, data, synthetic_top1=0.75)
    baseline = RunFolder(tmp_path / "real-only", Dataset.open(data), data, mode="real")
    baseline.trainer("train", 0, 6, 0)
    baseline.finish(0, test_top1=0.72)
    rows = {cells[0]: cells[1:] for cells in read(run, baseline).cells}
    assert rows["Clean"] == ["72.0 %", "90.0 %"]
    assert rows["Gaussian blur"] == ["\N{EN DASH}", "60.0 %"]
    assert rows["Speckle noise"] == ["\N{EN DASH}", "50.0 %"]
    assert rows["Training set"] == ["60.0 %", "100.0 %"]
    assert rows["Synthetic samples"] == ["\N{EN DASH}", "75.0 %"]
    assert rows["Training"] == ["6.00", "24.00"]
    assert rows["Generating"] == ["\N{EN DASH}", "16.50"]
    assert rows["In all, seconds"] == ["6.00", "52.50"]


def test_the_robustness_chart_is_to_scale(tmp_path: Path, data: DatasetConfig):
    chart = paper.robustness(Record.open(measured(tmp_path, data).folder), [])
    assert chart is not None
    (line,) = re.findall(r'<path d="([^"]*)"[^>]*stroke: var\(--real\)[^>]*stroke-linecap: square', chart)[:1]
    (_, clean), (_, mild), (_, strong) = [tuple(map(float, at)) for at in re.findall(r"([-\d.]+) ([-\d.]+)", line)]
    assert (mild - clean) / (strong - clean) == pytest.approx((0.9 - 0.7) / (0.9 - 0.5), abs=1e-3)


def test_the_same_features_give_the_same_picture(tmp_path: Path, data: DatasetConfig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(paper, "_tsne", TSNE)
    found = feature_file.read(measured(tmp_path, data).folder)
    chart = paper.feature_map(found, ["cat", "dog"])
    assert chart is not None and chart == paper.feature_map(found, ["cat", "dog"])
    assert ">cat<" in chart and ">dog<" not in chart


def test_what_was_not_measured_is_said(tmp_path: Path, data: DatasetConfig):
    held_out = ("test_top1", "per_class", "worst_case_disparity", "train_val_gap")
    run = RunFolder(tmp_path / "run", Dataset.open(data), data, mode="real")
    run.finish(0, gradient_real=None, **dict.fromkeys(held_out, "absent"))
    text = read(run).text
    for number in ("Table 13", "6a, Table 14", "Figure 6b", "Figure 6c", "Figure 5, left", "Figure 3", "Figure 4"):
        assert f"{number}. Not measured in this run." in text


def test_prompts_stand_beside_what_was_made_from_them(tmp_path: Path, data: DatasetConfig):
    run = write(tmp_path, data)
    assert "Captions were perturbed" not in read(run).text
    path = run.folder / "batches" / "000001-000000.json"
    batch = Record.open(run.folder).batches[0]
    by = ["llama", "llama", "llama", "template"] * 2
    samples = [
        sample.model_copy(update={"prompt": f"a <b>cat</b>, version {row}", "prompt_by": by[row]})
        for row, sample in enumerate(batch.samples)
    ]
    path.write_text(batch.model_copy(update={"samples": samples}).model_dump_json())
    parsed = read(run)
    assert "Captions were perturbed (Figure 2) by llama (6 samples), template (2 samples)." in parsed.text
    assert "The template stood in for the language model in 25.0 % of them." in parsed.text
    assert "2 prompts a <b>cat</b>, version 2 (llama) a <b>cat</b>, version 3 (template)" in parsed.text
    assert summary_of(Record.open(run.folder)).caption_fallback == 0.25


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


def test_a_synthetic_run_shows_its_pool_and_what_was_made_from_its_members(tmp_path: Path, data: DatasetConfig):
    run = RunFolder(tmp_path / "run", Dataset.open(data), data, mode="synthetic", feedback={"criterion": "similarity"})
    run.ask(0, range(3), each=1)
    run.answer(0, 0, (0, 5), range(3), each=1)
    run.journal.dropped(0, run.pool.take(0), "pool")
    members = [sample for batch in run.pool.batches() for sample in batch.samples]
    for feedback in (2, 3):  # about members of the pool, which are samples of the run
        run.ask(feedback, range(2))
        path = run.folder / "feedback" / f"{feedback:06d}.json"
        asked = Feedback.model_validate_json(path.read_bytes())
        pixels = [codec.image_to_base64(image) for image in images_of(run, 0, 0)]
        samples = [
            sample.model_copy(update={"sample_id": members[row].id, "pixels": pixels[row]})
            for row, sample in enumerate(asked.samples)
        ]
        path.write_text(asked.model_copy(update={"samples": samples}).model_dump_json())
    entries = [SimpleNamespace(id=member.id, label=member.label, class_name=member.class_name) for member in members]
    run.dataset = SimpleNamespace(samples=entries)
    run.answer(2, 0, (5, 9), range(2))
    run.answer(3, 0, (9, 12), range(2))
    run.finish(2, {"candidates": 4})
    parsed = read(run)
    hard = parsed.text.partition("Hard samples and")[2].partition("What variance")[0]
    pool, *later = re.split(r"Asked for in iteration (\d+)", hard)
    assert later[::2] == ["3", "4"]
    assert "The pool was made beforehand" in pool and "Asked for beforehand" in pool and "score 0" not in pool
    assert "Lowest score first. The score is the negated similarity" in pool
    assert "score 0 " in later[1] and "score 0.1" in later[1]
    alts = [named["alt"].split(" of ")[0] for tag, named in parsed.tags if tag == "img"]
    assert alts[:6] == ["real sample", "synthetic sample"] * 3
    assert alts[6:18] == ["pool member", "synthetic sample", "synthetic sample"] * 4
    assert np.array_equal(parsed.shown("Hard")[6][1], images_of(run, 0, 0)[0])
    assert "A pool of synthetic samples stood in for the real ones" in parsed.text


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
