"""Clips to arrays and back: folders of frames, animated pictures and video files. A clip is uint8 RGB [M, H, W, 3].

Files are read on this machine alone: nothing is fetched, and what is too large is refused before it is decoded. This
module does not know what a clip shows.

Shapes: M frames, H W pixels.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from protocol import codec
from protocol.errors import InvalidClip, InvalidImage

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")  # of frames, one file each
ANIMATED = (".gif", ".webp")  # files of a whole clip that are pictures
VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv")
MAX_FRAMES = 100_000  # of a file that is read
FORMATS = ("webp", "gif", "mp4")


def spread(total: int, frames: int) -> list[int]:
    """Indices of `frames` of `total` frames, evenly spread from the first to the last, with repeats where there are
    fewer: the middle of each of `frames` equal parts."""
    assert total >= 1 and frames >= 1, (total, frames)
    return [min(total - 1, (2 * index + 1) * total // (2 * frames)) for index in range(frames)]


def length(path: Path) -> int:
    """How many frames a clip has. Raises InvalidClip."""
    if path.is_dir():
        return len(_frame_files(path))
    if path.suffix.lower() in ANIMATED:
        with _opened(path) as picture:
            return getattr(picture, "n_frames", 1)
    return sum(1 for _ in _video_frames(path))


def read(path: Path, frames: Sequence[int] | int | None = None, *, max_pixels: int = codec.MAX_PIXELS) -> np.ndarray:
    """Decode a clip.

    Args:
        path: a folder of frames, one picture file each, in name order; an animated GIF or WebP; or a video
            file.
        frames: these, by index; or so many, evenly spread (`spread`); None: all.
        max_pixels: bound on the width x height of a frame, checked before it is decoded.

    Returns:
        uint8 [M, H, W, 3].

    Raises:
        InvalidClip: no frames, damaged, too large, or frames of several sizes.
    """
    if isinstance(frames, int):
        frames = spread(length(path), frames)
    if path.is_dir():
        found = _from_folder(path, frames, max_pixels)
    elif path.suffix.lower() in ANIMATED:
        found = _picked(_animation_frames(path, max_pixels), frames)
    else:
        found = _picked(_video_frames(path, max_pixels), frames)
    if not found:
        raise InvalidClip(f"{path} has no frames: remove it, or put frames into it")
    if len({frame.shape for frame in found}) > 1:
        raise InvalidClip(f"{path} has frames of several sizes: bring them to one")
    return np.stack(found)


def to_bytes(clip: np.ndarray, format: str = "webp", fps: float = 8.0) -> bytes:
    """A file of uint8 [M, H, W, 3] that plays.

    Args:
        format: "webp", which is lossless and plays in browsers; "gif", of 256 colours; or "mp4" (H.264).
        fps: frames a second.
    """
    assert clip.dtype == np.uint8 and clip.ndim == 4 and clip.shape[3] == 3, (clip.dtype, clip.shape)
    if format == "mp4":
        return _mp4(clip, fps)
    first, *others = (Image.fromarray(frame) for frame in clip)
    options = {"lossless": True} if format == "webp" else {}
    out = io.BytesIO()
    first.save(
        out,
        format=format.upper(),
        save_all=True,
        append_images=others,
        duration=round(1000 / fps),
        loop=0,
        **options,
    )
    return out.getvalue()


def _frame_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES and path.name[0] != ".")


def _from_folder(folder: Path, frames: Sequence[int] | None, max_pixels: int) -> list[np.ndarray]:
    files = _frame_files(folder)
    try:
        chosen = files if frames is None else [files[index] for index in frames]
        return [codec.image_from_bytes(path.read_bytes(), max_pixels=max_pixels) for path in chosen]
    except IndexError as error:
        raise InvalidClip(f"{folder} has {len(files)} frames only, and no {max(frames or [0])}") from error
    except (OSError, InvalidImage) as error:
        raise InvalidClip(f"{folder}: a frame cannot be read ({error}): restore or remove it") from error


def _picked(frames: Iterator[np.ndarray], wanted: Sequence[int] | None) -> list[np.ndarray]:
    """The frames at these indices, in that order; no more than those are kept in memory."""
    if wanted is None:
        return list(frames)
    needed, kept, last = set(wanted), {}, max(wanted)
    for index, frame in enumerate(frames):
        if index in needed:
            kept[index] = frame
        if index == last:
            break
    if missing := needed - kept.keys():
        raise InvalidClip(f"the clip has no frame {min(missing)}: it ends before")
    return [kept[index] for index in wanted]


def _opened(path: Path) -> Image.Image:
    try:
        return Image.open(path, formats=("GIF", "WEBP"))
    except (OSError, SyntaxError, ValueError) as error:
        raise InvalidClip(f"{path} cannot be read as an animated picture ({error}): restore or remove it") from error


def _animation_frames(path: Path, max_pixels: int) -> Iterator[np.ndarray]:
    with _opened(path) as picture:
        _check_size(path, picture.width, picture.height, max_pixels)
        try:
            for index in range(getattr(picture, "n_frames", 1)):
                picture.seek(index)
                yield np.array(picture.convert("RGB"))
        except (OSError, SyntaxError, ValueError, EOFError) as error:
            raise InvalidClip(f"{path} is damaged ({error}): restore or remove it") from error


def _video_frames(path: Path, max_pixels: int = codec.MAX_PIXELS) -> Iterator[np.ndarray]:
    import av  # late: it is large, and folders of frames need none of it

    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise InvalidClip(f"{path} has no video in it: remove it")
            stream = container.streams.video[0]
            _check_size(path, stream.width, stream.height, max_pixels)
            for index, frame in enumerate(container.decode(stream)):
                if index >= MAX_FRAMES:
                    raise InvalidClip(f"{path} has more than {MAX_FRAMES} frames: cut it")
                yield frame.to_ndarray(format="rgb24")
    except (av.FFmpegError, OSError) as error:
        raise InvalidClip(f"{path} cannot be decoded ({error}): restore or remove it") from error


def _check_size(path: Path, width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise InvalidClip(f"{path} has frames of {width} x {height} pixels; {max_pixels} are allowed: make it smaller")


def _mp4(clip: np.ndarray, fps: float) -> bytes:
    """H.264 wants even sides: an odd one gets its last row or column twice."""
    from fractions import Fraction

    import av  # late, as above

    odd = [(0, 0), (0, clip.shape[1] % 2), (0, clip.shape[2] % 2), (0, 0)]
    clip = np.pad(clip, odd, mode="edge")
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.height, stream.width, stream.pix_fmt = clip.shape[1], clip.shape[2], "yuv420p"
        for frame in clip:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return out.getvalue()
