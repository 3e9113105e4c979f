"""Clips to files and back: exactly, in the right order, and every damaged or impossible one by name."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from protocol import clips, codec
from protocol.errors import InvalidClip


def noise(frames: int = 5, height: int = 12, width: int = 10, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), np.uint8)


def smooth(frames: int = 9, side: int = 32) -> np.ndarray:
    """A square that moves: what a video codec is made for."""
    clip = np.zeros((frames, side, side, 3), np.uint8)
    for index in range(frames):
        clip[index, 8:24, 2 * index : 2 * index + 12] = (200, 40 + 10 * index, 90)
    return clip


def folder(path: Path, clip: np.ndarray, name: str = "{:03d}.png") -> Path:
    path.mkdir(parents=True)
    for index, frame in enumerate(clip):
        (path / name.format(index)).write_bytes(codec.image_to_bytes(frame))
    return path


def file(path: Path, clip: np.ndarray, **options) -> Path:
    path.write_bytes(clips.to_bytes(clip, path.suffix[1:], **options))
    return path


# ---------------------------------------------------------------- spread


@settings(deadline=None)
@given(total=st.integers(1, 500), frames=st.integers(1, 100))
def test_spread_is_even(total: int, frames: int):
    found = clips.spread(total, frames)
    assert len(found) == frames and found == sorted(found)
    assert found[0] >= 0 and found[-1] < total
    assert found == [total - 1 - index for index in reversed(found)] or (total * frames) % 2 == 0
    steps = {b - a for a, b in itertools.pairwise(found)}
    assert max(steps, default=0) - min(steps, default=0) <= 1
    if frames >= total:
        assert set(found) == set(range(total))


def test_spread_by_hand():
    assert clips.spread(16, 16) == list(range(16))
    assert clips.spread(4, 2) == [1, 3] and clips.spread(10, 3) == [1, 5, 8]
    assert clips.spread(2, 5) == [0, 0, 1, 1, 1] and clips.spread(1, 3) == [0, 0, 0]


# ---------------------------------------------------------------- round trips


@settings(deadline=None, max_examples=30)
@given(
    frames=st.integers(1, 6),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    seed=st.integers(0, 99),
    still=st.lists(st.booleans(), min_size=6, max_size=6),
)
def test_webp_and_gif_keep_every_frame(tmp_path_factory, frames: int, height: int, width: int, seed: int, still):
    """Frames that are equal to the one before as well, which encoders of animations join."""
    clip, place = noise(frames, height, width, seed), tmp_path_factory.mktemp("clips")
    for index in range(1, frames):
        if still[index]:
            clip[index] = clip[index - 1]
    webp = file(place / "clip.webp", clip)
    assert (clips.read(webp) == clip).all() and clips.length(webp) == clips.check(webp) == frames
    gif = file(place / "clip.gif", clip)
    assert (clips.read(gif) == clip).all() and clips.length(gif) == frames  # less than 256 colours each


def test_a_gif_of_more_colours_is_near(tmp_path: Path):
    clip = np.repeat(np.linspace(0, 255, 64 * 64).astype(np.uint8).reshape(1, 64, 64, 1), 3, axis=3)
    clip = np.concatenate([clip, 255 - clip])
    found = clips.read(file(tmp_path / "clip.gif", clip))
    assert found.shape == clip.shape and np.abs(found.astype(int) - clip).mean() < 4


def test_lossy_webp_is_near_and_smaller(tmp_path: Path):
    clip = noise(4, 64, 64)
    small, exact = clips.to_bytes(clip, quality=50), clips.to_bytes(clip)
    assert len(small) < len(exact) / 2
    path = tmp_path / "clip.webp"
    path.write_bytes(clips.to_bytes(np.repeat(smooth(), 2, axis=0), quality=80))
    assert np.abs(clips.read(path).astype(int) - np.repeat(smooth(), 2, axis=0)).mean() < 4


@pytest.mark.parametrize("frames", [1, 2, 9, 40])
def test_mp4_keeps_every_frame_nearly(tmp_path: Path, frames: int):
    clip = np.repeat(smooth(), 5, axis=0)[:frames]
    found = clips.read(file(tmp_path / "clip.mp4", clip, fps=8.0))
    assert found.shape == clip.shape and np.abs(found.astype(int) - clip).mean() < 6
    assert clips.length(tmp_path / "clip.mp4") == frames


def test_odd_sides_of_an_mp4_get_a_last_row_and_column(tmp_path: Path):
    found = clips.read(file(tmp_path / "clip.mp4", smooth()[:, :31, :29]))
    assert found.shape == (9, 32, 30, 3)


def test_files_play_at_their_rate(tmp_path: Path):
    with Image.open(file(tmp_path / "clip.webp", noise(), fps=8.0)) as picture:
        picture.seek(1)
        picture.load()
        assert picture.info["duration"] == 125 and picture.info["loop"] == 0


# ---------------------------------------------------------------- what is read


def test_a_folder_of_frames_in_the_order_people_count(tmp_path: Path):
    """As DFEW names them: 1.jpg to 16.jpg, of which 10 comes after 9."""
    clip = noise(12)
    place = folder(tmp_path / "clip", clip, name="{}.png")
    (place / "notes.txt").write_text("not a frame")
    (place / ".hidden.png").write_bytes(b"nor this")
    assert (clips.read(place) == clip).all() and clips.length(place) == clips.check(place) == 12
    assert (clips.read(place, 4) == clip[[1, 4, 7, 10]]).all()
    assert (clips.read(place, [11, 0, 0]) == clip[[11, 0, 0]]).all()


@pytest.mark.parametrize("kind", ["webp", "gif"])
def test_some_frames_of_a_file(tmp_path: Path, kind: str):
    clip = noise(7)
    path = file(tmp_path / f"clip.{kind}", clip)
    assert (clips.read(path, 3) == clip[[1, 3, 5]]).all()
    assert (clips.read(path, 9) == clip[[0, 1, 1, 2, 3, 4, 5, 5, 6]]).all()
    assert (clips.read(path, [6, 2, 2]) == clip[[6, 2, 2]]).all()


def test_no_more_frames_are_decoded_than_are_asked_for(tmp_path: Path):
    place = folder(tmp_path / "clip", noise(4))
    (place / "002.png").write_bytes(b"damaged")
    assert len(clips.read(place, [0, 1, 3])) == 3
    with pytest.raises(InvalidClip, match=r"002\.png that cannot be read"):
        clips.read(place)


# ---------------------------------------------------------------- what cannot be


def test_clips_that_are_none(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("text")
    (tmp_path / "still.png").write_bytes(codec.image_to_bytes(noise()[0]))
    for name, said in (
        ("empty", "has no frames"),
        ("missing.mp4", "is not there"),
        ("notes.txt", "is no clip"),
        ("still.png", "is no clip"),
    ):
        for ask in (clips.check, clips.read, lambda path: clips.read(path, 3)):
            with pytest.raises(InvalidClip, match=rf"{name} {said}"):
                ask(tmp_path / name)


@pytest.mark.parametrize("kind", ["webp", "gif", "mp4", "avi", "mkv"])
@pytest.mark.parametrize("content", [b"", b"GIF89a", b"RIFF\x10\0\0\0WEBPVP8X", b"\0\0\0\x18ftypisom", b"x" * 5000])
def test_files_of_something_else(tmp_path: Path, kind: str, content: bytes):
    path = tmp_path / f"clip.{kind}"
    path.write_bytes(content)
    for ask in (clips.check, clips.read, clips.length):
        with pytest.raises(InvalidClip, match="clip"):
            ask(path)


@pytest.mark.parametrize("kind", ["webp", "gif", "mp4"])
@settings(deadline=None, max_examples=15)
@given(part=st.floats(0.02, 0.97))
def test_a_truncated_file_is_told(tmp_path_factory, kind: str, part: float):
    path = file(tmp_path_factory.mktemp("cut") / f"clip.{kind}", noise(5, 24, 24))
    data = path.read_bytes()
    path.write_bytes(data[: int(part * len(data))])
    with pytest.raises(InvalidClip, match="clip"):
        clips.check(path)


def test_a_playlist_is_no_clip(tmp_path: Path):
    """It would have other files opened, or fetched."""
    other = file(tmp_path / "other.mp4", smooth())
    for name, text in (
        ("list.mp4", f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{other}\n#EXT-X-ENDLIST\n"),
        ("concat.mkv", f"ffconcat version 1.0\nfile {other.name}\n"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(InvalidClip, match=f"{name} cannot be decoded"):
            clips.check(tmp_path / name)


def test_frames_that_are_not_there(tmp_path: Path):
    place, path = folder(tmp_path / "clip", noise(3)), file(tmp_path / "clip.webp", noise(3))
    for clip in (place, path):
        with pytest.raises(InvalidClip, match=r"has no frame 3: .* counted from 0"):
            clips.read(clip, [0, 3])


def test_frames_of_several_sizes(tmp_path: Path):
    place = folder(tmp_path / "clip", noise(2))
    (place / "002.png").write_bytes(codec.image_to_bytes(noise(1, 5, 5)[0]))
    for ask in (clips.check, clips.read):
        with pytest.raises(InvalidClip, match="several sizes"):
            ask(place)


@pytest.mark.parametrize("kind", ["webp", "gif", "mp4"])
def test_what_is_too_large_is_not_decoded(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch):
    path = file(tmp_path / f"clip.{kind}", noise(6, 20, 20))
    with pytest.raises(InvalidClip, match="20 x 20 pixels; 399 are allowed"):
        clips.check(path, max_pixels=399)
    monkeypatch.setattr(clips, "MAX_FRAMES", 5)
    with pytest.raises(InvalidClip, match="more than 5 frames"):
        clips.check(path)


def test_a_folder_of_too_many_or_too_large_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    place = folder(tmp_path / "clip", noise(6, 20, 20))
    with pytest.raises(InvalidClip, match="20 x 20 pixels; 399 are allowed"):
        clips.check(place, max_pixels=399)
    monkeypatch.setattr(clips, "MAX_FRAMES", 5)
    with pytest.raises(InvalidClip, match="more than 5 frames"):
        clips.check(place)
