"""A landmark model learns drawn faces, is saved and read back, and action units come out of pixels."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from generator_service.faces.interface import FacesConfig, open_reader
from generator_service.faces.landmark_model import LandmarkModel
from generator_service.faces.landmark_training import MIRRORED, error, moved, train_landmarks
from generator_service.faces.landmarks import Config, LandmarkReader
from protocol.errors import ConfigError, InvalidRequest
from tests.expressions.portrait import UNITS, Identity, Pose, render
from tests.generator_service.faces.drawn import SIZE, WHO, drawn, face


def test_it_finds_landmarks_of_faces_it_has_not_seen(trained: Path):
    images, points, _ = drawn(24, 1)
    model = LandmarkModel.load(trained)
    average = np.abs(points - points.mean(axis=0)).mean()
    _, found = model(images)
    assert error(model, images, points) < 0.08
    assert np.abs(found - points).mean() < 0.6 * average  # and not the mean face, whatever is shown


def test_it_tells_faces_from_what_is_none(trained: Path):
    model = LandmarkModel.load(trained)
    images, *_ = drawn(16, 2)
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, images.shape, dtype=np.uint8)
    assert model(images)[0].min() > 0.5 > model(noise)[0].max()


def test_landmarks_are_in_pixels_of_the_frame(trained: Path):
    model = LandmarkModel.load(trained)
    images, *_ = drawn(3, 3)
    wide = images.repeat(3, axis=2).repeat(2, axis=1)  # 64 x 96
    (_, found), (_, stretched) = model(images), model(wide)
    np.testing.assert_allclose(stretched, found * [3, 2], atol=0.5)


def test_a_batch_reads_as_its_frames_do(trained: Path):
    model = LandmarkModel.load(trained)
    images, *_ = drawn(70, 4)  # more than one forward pass
    presence, found = model(images)
    np.testing.assert_allclose(found[65], model(images[65:66])[1][0], atol=1e-4)
    assert presence.shape == (70,) and found.dtype == np.float64


def test_the_reader_reads_units_from_pixels_against_the_clips_own_neutral_frame(trained: Path):
    reader = open_reader(FacesConfig.model_validate({"landmarks": {"checkpoint": str(trained), "device": "cpu"}}))
    images, _, units = drawn(40, 5)
    neutral, _ = render(WHO, np.zeros(len(UNITS)), Pose(), SIZE)
    reading = reader.read(images, neutral[None])
    truth = units[:, UNITS.index("AU26")]
    assert np.corrcoef(reading.intensity[:, reader.units.index("AU26")], truth)[0, 1] > 0.7
    assert reading.intensity[:, reader.units.index("AU20")].mean() < 0.1


def test_each_clip_is_counted_from_its_own_neutral_frame(trained: Path):
    reader = LandmarkReader(Config(checkpoint=trained, device="cpu"))
    images, *_ = drawn(8, 6)
    whole = reader.read(images, images[[0, 4]])
    np.testing.assert_allclose(whole.intensity[:4], reader.read(images[:4], images[:1]).intensity, atol=1e-3)
    np.testing.assert_allclose(whole.intensity[4:], reader.read(images[4:], images[4:5]).intensity, atol=1e-3)
    np.testing.assert_allclose(whole.intensity[[0, 4]], 0.0, atol=1e-3)
    assert whole.intensity.max() > 0.1


def test_where_there_is_no_face_there_is_no_intensity(trained: Path):
    reader = LandmarkReader(Config(checkpoint=trained, device="cpu"))
    images, *_ = drawn(2, 7)
    noise = np.random.default_rng(1).integers(0, 256, images.shape, dtype=np.uint8)
    reading = reader.read(np.concatenate([noise, images]), noise[:1])
    assert not reading.intensity[:2].any() and np.isnan(reading.landmarks[:2]).all()
    # a neutral frame without a face leaves its clip with the population's neutral face
    np.testing.assert_allclose(reading.intensity[2:], reader.read(images).intensity, atol=1e-3)


def test_readings_are_told_apart_by_the_weights(trained: Path, tmp_path: Path):
    one = LandmarkModel.load(trained)
    shutil.copytree(trained, tmp_path / "copy")
    assert LandmarkModel.load(tmp_path / "copy").digest == one.digest
    card = json.loads((tmp_path / "copy/config.json").read_text())
    card["neutral"][0][0] += 1
    (tmp_path / "copy/config.json").write_text(json.dumps(card))
    assert LandmarkModel.load(tmp_path / "copy").digest != one.digest


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model": "resnet_none"}, "does not fit"),
        ({"model": "resnet18"}, "does not fit"),
        ({"neutral": [[0, 0]]}, "neutral: List should have at least 68"),
        (None, "cannot be read"),
    ],
)
def test_what_is_no_checkpoint_is_told(trained: Path, tmp_path: Path, change: dict | None, told: str):
    shutil.copytree(trained, tmp_path / "copy")
    path = tmp_path / "copy/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change)) if change else path.unlink()
    with pytest.raises(ConfigError, match=told):
        LandmarkModel.load(tmp_path / "copy")


def test_training_needs_faces_and_arrays_that_fit(tmp_path: Path):
    images, points, _ = drawn(4, 8)
    for arrays in (
        (images, points, np.zeros(4, dtype=bool)),
        (images, points[:3], np.ones(4, dtype=bool)),
        (images.astype(float), points, np.ones(4, dtype=bool)),
        (images, points, np.ones(4)),
        (images, points * np.nan, np.ones(4, dtype=bool)),
    ):
        with pytest.raises(InvalidRequest):
            train_landmarks(*arrays, tmp_path, steps=1)


def test_a_mirrored_face_has_its_landmarks_where_they_are_named():
    symmetric = face()
    symmetric[:, 0] = (symmetric[:, 0] - symmetric[MIRRORED, 0]) / 2
    symmetric[:, 1] = (symmetric[:, 1] + symmetric[MIRRORED, 1]) / 2
    np.testing.assert_allclose(symmetric[MIRRORED] * [-1, 1], symmetric)
    np.testing.assert_allclose(symmetric, face(), atol=1e-9)  # the drawn face is symmetric: left stays left
    assert sorted(MIRRORED) == list(range(68))


def test_landmarks_move_with_their_pictures():
    """A white dot on black is where its landmark says, after every shift, turn, scaling and mirroring."""
    picture = torch.zeros(32, 3, 64, 64)
    picture[:, :, 25:28, 39:42] = 1.0
    points = torch.full((32, 68, 2), 0.5)
    points[:, :] = torch.tensor([40.5 / 64, 26.5 / 64])
    x, new = moved(picture, points, torch.Generator().manual_seed(0))
    mass = x[:, 0] / x[:, 0].sum(dim=(1, 2), keepdim=True)
    centres = (torch.arange(64) + 0.5) / 64
    found = torch.stack([(mass.sum(1) * centres).sum(1), (mass.sum(2) * centres).sum(1)], 1)
    np.testing.assert_allclose(new[:, 30], found, atol=0.004)
    assert (new[:, 30, 0] < 0.5).float().mean() > 0.25  # some were mirrored
    assert new[:, 30].std(0).min() > 0.02


def test_training_repeats_itself(tmp_path: Path):
    images, points, _ = drawn(8, 9)
    options = {"model": "test_convnext", "stage": 0, "size": SIZE, "steps": 2, "batch_size": 4, "device": "cpu"}
    state = torch.get_rng_state()
    one = train_landmarks(images, points, np.ones(8, dtype=bool), tmp_path / "1", seed=3, **options)
    two = train_landmarks(images, points, np.ones(8, dtype=bool), tmp_path / "2", seed=3, **options)
    other = train_landmarks(images, points, np.ones(8, dtype=bool), tmp_path / "3", seed=4, **options)
    assert one.digest == two.digest != other.digest
    assert torch.equal(state, torch.get_rng_state())


def test_somebody_else_is_read_against_the_population(trained: Path):
    """Pixels of a person it has never seen still give a reading without NaNs."""
    reader = LandmarkReader(Config(checkpoint=trained, device="cpu"))
    picture, _ = render(Identity.drawn("else", 5), np.zeros(len(UNITS)), Pose(), SIZE)
    assert np.isfinite(reader.read(picture[None]).intensity).all()
