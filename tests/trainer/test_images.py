from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from protocol import codec
from protocol.dataset import Dataset, DatasetConfig
from protocol.errors import ConfigError
from tests.trainer.clip_folders import write_clips
from tests.trainer.test_pool import make_batch
from trainer.data.images import Frame, RealImages, SyntheticImages, read, resized
from trainer.pool import Pool


def write_pictures(root: Path) -> Dataset:
    rng = np.random.default_rng(0)
    for name, shape in (("a", (8, 8)), ("b", (12, 20))):
        (root / name).mkdir()
        for number in range(3):
            picture = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
            Image.fromarray(picture).save(root / name / f"{number}.png")
    return Dataset.open(DatasetConfig(root=root))


def test_the_right_size_is_left_alone_and_copied():
    image = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    image.flags.writeable = False
    out = resized(image, 8)
    assert (out.numpy() == image).all()
    out[0, 0, 0] = 9  # writable


def test_the_middle_of_a_wide_picture_is_kept():
    image = np.zeros((8, 24, 3), np.uint8)
    image[:, 8:16] = 200
    assert (resized(image, 8) == 200).all()


def test_a_flat_picture_stays_flat_at_any_size():
    for shape in ((5, 9, 3), (40, 31, 3), (8, 100, 3)):
        out = resized(np.full(shape, 77, np.uint8), 8)
        assert out.shape == (8, 8, 3)
        assert (out == 77).all()


def test_a_frame_that_is_no_square():
    """Cropped, the middle is kept and nothing is stretched; stretched, every part is kept."""
    image = np.zeros((8, 24, 3), np.uint8)
    image[:, 8:16], image[:, 16:] = 100, 200
    cropped = resized(image, Frame(8, 4))
    assert cropped.shape == (8, 4, 3) and (cropped == 100).all()
    stretched = resized(image, Frame(8, 12, crop=False))
    assert stretched.shape == (8, 12, 3)
    for column, colour in ((1, 0), (6, 100), (10, 200)):
        assert (stretched[:, column].int() - colour).abs().max() <= 3
    tall = resized(image, Frame(16, 6))  # scaled by 2, to 48 wide, of which the middle 6 remain
    assert tall.shape == (16, 6, 3) and (tall == 100).all()
    assert read([], Frame(16, 6)).shape == (0, 16, 6, 3) and resized(image, Frame(8, 8)).equal(resized(image, 8))


def test_shrinking_averages():
    """Antialiased: a checkerboard of single pixels becomes grey, not one of its colours."""
    board = (np.indices((32, 32)).sum(0) % 2 * 255).astype(np.uint8)
    out = resized(np.repeat(board[..., None], 3, axis=2), 8)
    assert (out.int() - 127).abs().max() <= 6


def test_cached_and_decoded_images_are_the_same(tmp_path: Path):
    dataset = write_pictures(tmp_path)
    cached, decoded = RealImages(dataset, 8, cache_gib=1.0), RealImages(dataset, 8, cache_gib=0.0)
    assert isinstance(cached.images, torch.Tensor)
    assert not isinstance(decoded.images, torch.Tensor)
    assert torch.equal(cached.images[1:5], decoded.images[1:5])
    for index in range(6):
        one, other = cached[index], decoded[index]
        assert torch.equal(one[0], other[0])
        assert one[1:] == other[1:] == ([0, 0, 0, 1, 1, 1][index], False)


def test_a_subset_keeps_rows_together(tmp_path: Path):
    pool = Pool(tmp_path)
    pool.admit(*make_batch(0, 0, 1, ["a", "b", "c"]))
    candidates = pool.take(0)
    data = SyntheticImages(candidates, read(candidates, 2))
    chosen = data.subset(torch.tensor([True, False, True]))
    assert [candidate.sample.source_id for candidate in chosen.candidates] == ["a", "c"]
    assert torch.equal(chosen.images, data.images[[0, 2]])
    assert chosen[1][1:] == (0, True)
    assert len(SyntheticImages.none(2)) == 0
    assert data.subset(torch.ones(3, dtype=torch.bool)) is data  # no second copy of all the pixels


# ---------------------------------------------------------------- clips


def write_clips_of(root: Path) -> Dataset:
    write_clips(root, {"left": 2, "right": 1})
    return Dataset.open(DatasetConfig(root=root, split="train", layout="clips"))


def test_every_frame_of_a_clip_is_brought_to_size():
    clip = np.stack([np.full((8, 24, 3), 10 * number, np.uint8) for number in range(4)])
    clip[:, :, 8:16] += 100
    found = resized(clip, Frame(8, 8, frames=2))
    assert found.shape == (2, 8, 8, 3) and found.dtype == torch.uint8
    assert (found[0] == 110).all() and (found[1] == 130).all()  # frames 1 and 3, cropped to the middle
    assert torch.equal(resized(clip[:1], Frame(8, 8, frames=3)), torch.full((3, 8, 8, 3), 100, dtype=torch.uint8))


@pytest.mark.parametrize("clip", [True, False])
def test_what_is_no_clip_or_no_image_is_told(clip: bool):
    pixels, size = np.zeros((2, 8, 8, 3), np.uint8), Frame(8, 8, frames=None if clip else 2)
    with pytest.raises(ConfigError, match="is a clip" if clip else "is an image"):
        resized(pixels if clip else pixels[0], size)


def test_clips_are_cached_when_they_fit_and_decoded_when_not(tmp_path: Path):
    dataset, size = write_clips_of(tmp_path), Frame(8, 8, frames=3)
    bytes_in_all = 3 * 3 * 8 * 8 * 3
    cached = RealImages(dataset, size, cache_gib=bytes_in_all / 2**30)
    decoded = RealImages(dataset, size, cache_gib=(bytes_in_all - 1) / 2**30)
    assert isinstance(cached.images, torch.Tensor) and not isinstance(decoded.images, torch.Tensor)
    assert cached.images.shape == (3, 3, 8, 8, 3) and torch.equal(cached.images[:2], decoded.images[:2])
    assert torch.equal(cached[2][0], resized(dataset.clip(2), size)) and decoded[2][1:] == (1, False)


def test_candidates_that_are_clips(tmp_path: Path):
    """Of several files, in an order that jumps between them."""
    pool = Pool(tmp_path)
    pixels = {name: np.full((4, 2, 2, 3), 50 * number, np.uint8) for number, name in enumerate("abcd")}
    for unit, names in enumerate(("ac", "bd")):
        batch, _ = make_batch(0, unit, 2, list(names))
        data = codec.encode({"images": np.stack([pixels[name] for name in names])})
        blob = batch.blob and batch.blob.model_copy(update={"sha256": codec.digest(data), "size": len(data)})
        pool.admit(batch.model_copy(update={"blob": blob}), data)
    candidates = pool.take(0)
    assert [candidate.sample.source_id for candidate in candidates] == list("abcd")
    found = read(candidates, Frame(2, 2, frames=3))
    assert found.shape == (4, 3, 2, 2, 3) and [int(clip[0, 0, 0, 0]) for clip in found] == [0, 50, 100, 150]
    data = SyntheticImages(candidates, found).subset(torch.tensor([False, True, False, True]))
    assert torch.equal(data.images, found[[1, 3]]) and data[1][0].shape == (3, 2, 2, 3)
    assert SyntheticImages.none(Frame(2, 2, frames=3)).images.shape == (0, 3, 2, 2, 3)
    with pytest.raises(ConfigError, match="a sample is a clip"):
        read(candidates, 2)
