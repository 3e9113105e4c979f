from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import nn

from protocol.bus import QueueConfig
from protocol.dataset import Dataset, DatasetConfig
from protocol.errors import ServiceUnreachable
from protocol.messages import WeightsInfo, WeightsList, WeightsRef
from tests.trainer.run_folder import RunFolder, write_dataset
from trainer import adaptation, measure
from trainer.data.batches import derive
from trainer.data.images import SyntheticImages
from trainer.loop import train
from trainer.metrics import feature_file, features
from trainer.metrics.corruptions import Corrupted
from trainer.metrics.device_hours import device_hours
from trainer.record import Record, rows
from trainer.run import Run
from trainer.settings import TrainerConfig
from trainer.start import open_run


@pytest.fixture
def data(tmp_path: Path) -> DatasetConfig:
    write_dataset(tmp_path / "data", ("cat", "dog", "elk"), each=6)
    shutil.copytree(tmp_path / "data" / "train", tmp_path / "data" / "test")
    return DatasetConfig(root=tmp_path / "data", split="train")


def settings(tmp_path: Path, data: DatasetConfig, **more: object) -> TrainerConfig:
    plain = {"run": "run", "runs_dir": tmp_path, "dataset": data, "mode": "real", "device": "cpu", "threads": 1}
    plain |= {"model": {"image_size": 8}, "iterations": 2, "epochs": 1, "batch_size": 6, "gradient_rows": 4}
    return TrainerConfig.model_validate(plain | {"optimizer": {"learning_rate": 0.02}} | more)


@pytest.fixture
def run(tmp_path: Path, data: DatasetConfig) -> Iterator[Run]:
    with open_run(settings(tmp_path, data), QueueConfig()) as (run, _):
        yield run


def trained(config: TrainerConfig) -> Run:
    with open_run(config, QueueConfig()) as (run, source):
        train(run, source)
    return run


def logits(run: Run, images: np.ndarray) -> torch.Tensor:
    """Of uint8 [B, S, S, 3], past the run's own code."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        return run.model.eval()((x - 0.5) / 0.5)


def test_accuracy_on_blurred_images_is_that_of_blurred_images(tmp_path: Path, data: DatasetConfig):
    run = trained(settings(tmp_path, data))
    first, last = rows(tmp_path / "run" / "metrics.jsonl")
    assert "corrupted" not in first
    assert last["corruption_scale"] == "cifar-c"
    found = last["corrupted"]["gaussian_blur"]
    assert list(found) == ["1", "2", "3", "4", "5"]
    sharp = logits(run, run.test.images.numpy())
    for severity, sigma in ((1, 0.4), (5, 1.0)):
        blurred = gaussian_filter(run.test.images.numpy().astype(float), (0, sigma, sigma, 0), mode="nearest")
        wanted = logits(run, np.rint(blurred).astype(np.uint8))
        data = Corrupted(run.test, "gaussian_blur", severity, "cifar-c", 0, run.device)
        off = (run.predict(data) - wanted).abs().max()
        assert off < 0.1 * (sharp - wanted).abs().max()  # pixels on the edge of two levels may round either way
        right = (run.predict(data).argmax(1) == run.test.labels).double().mean()
        assert found[str(severity)] == pytest.approx(right.item())
    assert set(last["corrupted"]["speckle_noise"]) == set(found)
    assert (last["devices"], last["device"]) == (1, "cpu")


def test_all_of_it_can_be_switched_off_and_leaves_the_model_as_it_is(tmp_path: Path, data: DatasetConfig):
    with_all = trained(settings(tmp_path, data))
    off = {"corruptions": [], "features_per_class": 0}
    without = trained(settings(tmp_path, data, run="off", gradient_rows=0, measure=off))
    last = rows(tmp_path / "off" / "metrics.jsonl")[-1]
    assert "corrupted" not in last and last["gradient_real"] is None
    assert feature_file.read(tmp_path / "off") is None
    for one, other in zip(with_all.model.parameters(), without.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_class_accuracies_of_the_training_set_average_to_its_own(tmp_path: Path, data: DatasetConfig):
    trained(settings(tmp_path, data))
    for row in rows(tmp_path / "run" / "metrics.jsonl"):
        assert sum(row["train_per_class"]) / 3 == pytest.approx(row["train_top1"])  # six of each class


def test_gradient_rows_are_spread_over_the_set(run: Run, monkeypatch: pytest.MonkeyPatch):
    seen: list[int] = []
    monkeypatch.setattr(measure, "gradient_magnitude", lambda task, model, x, y, **_: seen.extend(y.tolist()) or 1.0)
    measure.gradient(run, run.real)
    assert seen == [0, 0, 1, 2]  # rows 0, 5, 10 and 15 of 18, six of each class


# ---------------------------------------------------------------- feature space


@pytest.fixture
def fed(tmp_path: Path, data: DatasetConfig) -> Iterator[Run]:
    """A run whose last iteration was given 12 synthetic samples, of which the filter dropped every third."""
    RunFolder(tmp_path / "run", Dataset.open(data), data).answer(1, 0, (0, 1), range(0, 18, 3))
    with open_run(settings(tmp_path, data), QueueConfig()) as (run, _):
        run.at.iteration, candidates = 1, run.pool.everything()
        kept = [index % 3 != 0 for index in range(12)]
        run.journal.selection(1, candidates, [0.5] * 12, kept, "vog")
        run.synthetic = run.with_pixels(candidates).subset(torch.tensor(kept))
        yield run


def test_real_kept_and_dropped_samples_are_placed_by_the_models_features(fed: Run):
    measure.write_features(fed)
    found = feature_file.read(fed.config.folder)
    assert found is not None
    generator = torch.Generator().manual_seed(derive(fed.config.seed, "features"))
    images = [fed.real.images, fed.synthetic.images, fed.with_pixels(fed.pool.everything()).images[::3]]
    for labels in (fed.real.labels, fed.synthetic.labels, fed.real.labels[:4]):  # what is drawn before the erasing
        torch.randperm(len(labels), generator=generator)
    features.some(fed.synthetic.labels, 10, generator)
    images.append(features.erased(fed.real.images, generator))
    with torch.no_grad():
        wanted = fed.model.eval().features((torch.cat(images).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5)
    places = torch.from_numpy(found.components)
    assert torch.allclose(torch.cdist(places, places), torch.cdist(wanted, wanted), atol=1e-3)
    assert found.kinds.tolist() == [0] * 18 + [1] * 8 + [2] * 4 + [3] * 18
    dropped = [candidate.sample.label for candidate in fed.pool.everything()[::3]]
    real = fed.real.labels.tolist()
    assert found.labels.tolist() == [*real, *fed.synthetic.labels.tolist(), *dropped, *real]


def test_parts_are_erased_of_ten_classes_at_most_that_have_synthetic_samples(fed: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measure, "ERASED_CLASSES", 1)
    fed.synthetic = fed.synthetic.subset(fed.synthetic.labels == 1)
    measure.write_features(fed)
    found = feature_file.read(fed.config.folder)
    assert found is not None
    assert found.labels[found.kinds == 3].tolist() == [1] * 6
    fed.synthetic = SyntheticImages.none(fed.frame)
    monkeypatch.setattr(measure, "ERASED_CLASSES", 2)
    measure.write_features(fed)
    found = feature_file.read(fed.config.folder)
    assert found is not None
    assert sorted(np.bincount(found.labels[found.kinds == 3], minlength=3).tolist()) == [0, 6, 6]


def test_few_classes_and_few_of_each_are_kept(fed: Run):
    fed.config.measure.features_per_class, fed.config.measure.features_classes = 2, 2
    measure.write_features(fed)
    found = feature_file.read(fed.config.folder)
    assert found is not None
    assert set(found.labels.tolist()) == {0, 2}
    assert np.bincount(found.labels[found.kinds == 0]).tolist() == [2, 0, 2]


def test_a_model_that_does_not_tell_its_features_is_trained_all_the_same(run: Run):
    run.model = nn.Sequential(nn.Flatten(), nn.Linear(8 * 8 * 3, 3))
    measure.write_features(run)
    assert feature_file.read(run.config.folder) is None


# ---------------------------------------------------------------- what adapting took


class Service:
    def __init__(self, *listed: WeightsInfo):
        self.listed = listed

    def weights(self) -> WeightsList:
        if not self.listed:
            raise ServiceUnreachable("nobody answers")
        return WeightsList(active=ref("a", 1), data=list(self.listed))


def ref(name: str, version: int) -> WeightsRef:
    return WeightsRef(name=name, version=version, digest="d")


def info(name: str, version: int, **metadata: object) -> WeightsInfo:
    plain = {"backend": "dit", "kind": "lora", "base": None, "classes": [], "created": 0.0, "active": False}
    return WeightsInfo(**ref(name, version).model_dump(), **plain, metadata=metadata)


def test_only_the_weights_that_made_samples_count(tmp_path: Path, data: DatasetConfig):
    run = RunFolder(tmp_path / "run", Dataset.open(data), data)
    service = Service(
        info("a", 1, seconds=36.0), info("a", 2, seconds=72.0), info("b", 1, seconds=9.0), info("base", 1)
    )
    adaptation.note(service, [ref("a", 2), ref("b", 1), ref("base", 1), ref("b", 1)], run.folder)
    assert device_hours(Record.open(run.folder))["adapt"] == pytest.approx((72 + 9) / 3600)


def test_what_weights_were_made_from_counts_once(tmp_path: Path, data: DatasetConfig):
    """A job tunes what was cold-started, publishes on its way, and is done; then another one like it."""
    cold = info("cold", 1, seconds=60.0, recipe="c")

    def tuned(version: int, seconds: float, recipe: str, part: bool) -> WeightsInfo:
        told = {"part_of": {"recipe": recipe, "step": version}} if part else {"recipe": recipe}
        return info("t", version, seconds=seconds, **told).model_copy(update={"base": "cold@1"})

    first = [tuned(1, 10.0, "x", True), tuned(3, 25.0, "x", True), tuned(4, 27.0, "x", False)]
    again = [tuned(2, 5.0, "y", True), tuned(5, 8.0, "x", True)]  # another job between, and the first once more
    service = Service(cold, *first, *again)

    def seconds(*versions: int) -> float:
        run = RunFolder(tmp_path / "-".join(map(str, versions)), Dataset.open(data), data)
        for number in range(len(versions)):  # told at every start
            adaptation.note(service, [ref("t", version) for version in versions[: number + 1]], run.folder)
        return 3600 * device_hours(Record.open(run.folder))["adapt"]

    assert [seconds(1), seconds(1, 3), seconds(3), seconds(4)] == pytest.approx([70.0, 85.0, 85.0, 87.0])
    assert [seconds(2, 4), seconds(5), seconds(4, 5)] == pytest.approx([92.0, 68.0, 95.0])


@pytest.mark.parametrize("used", [[], [ref("a", 1)]], ids=["nothing made", "service away"])
def test_without_an_answer_adapting_is_not_known(tmp_path: Path, data: DatasetConfig, used: list[WeightsRef]):
    run = RunFolder(tmp_path / "run", Dataset.open(data), data)
    adaptation.note(Service(), used, run.folder)
    assert "adapt" not in device_hours(Record.open(run.folder))
