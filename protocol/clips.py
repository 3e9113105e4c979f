"""Clips to arrays and back: folders of frames, animated pictures and video files. A clip is uint8 RGB [M, H, W, 3].

Files are read on this machine alone: nothing is fetched, and what is too large is refused before it is decoded. This
module does not know what a clip shows.

Shapes: M frames, H W pixels.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import GifImagePlugin, Image

from protocol import codec
from protocol.errors import InvalidClip, InvalidImage

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")  # of frames, one file each
ANIMATED = (".gif", ".webp")  # files of a whole clip that are pictures
VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv")
MAX_FRAMES = 100_000  # of a clip that is read
ALONE = {  # playlists, which would have other files opened, are no clips
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,asf,flv",
    "protocol_whitelist": "file",
}
FORMATS = ("webp", "gif", "mp4")


def spread(total: int, frames: int) -> list[int]:
    """Indices of `frames` of `total` frames, evenly spread from the first to the last, with repeats where there are
    fewer: the middle of each of `frames` equal parts."""
    assert total >= 1 and frames >= 1, (total, frames)
    return [min(total - 1, (2 * index + 1) * total // (2 * frames)) for index in range(frames)]


def is_clip_file(path: Path) -> bool:
    """Whether a file's name ends as those of clips do."""
    return path.suffix.lower() in (*ANIMATED, *VIDEOS)


def is_moving(path: Path) -> bool:
    """Whether it can be a clip alone, and no picture: a folder, or a video file by its name."""
    return path.suffix.lower() in VIDEOS or path.is_dir()


def length(path: Path) -> int:
    """How many frames a clip has. Raises InvalidClip."""
    _check_there(path)
    if path.is_dir():
        return len(frame_files(path))
    if path.suffix.lower() in ANIMATED:
        with _decoding(path), Image.open(path, formats=("GIF", "WEBP")) as picture:
            return _counted(path, picture)
    return sum(1 for _ in _video_frames(path, codec.MAX_PIXELS))


def check(path: Path, *, max_pixels: int = codec.MAX_PIXELS) -> int:
    """Decode every frame of a clip, and keep none. Returns how many it has. Raises InvalidClip, as `read`."""
    shapes = [frame.shape for frame in _decoded(path, max_pixels)]
    _check_shapes(path, shapes)
    return len(shapes)


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
        total = length(path)
        _check_shapes(path, [()] * total)
        frames = spread(total, frames)
    if path.is_dir():
        found = [_still(file, max_pixels) for file in _picked(path, iter(frame_files(path)), frames)]
    else:
        found = _picked(path, _decoded(path, max_pixels), frames)
    _check_shapes(path, [frame.shape for frame in found])
    return np.stack(found)


def to_bytes(clip: np.ndarray, format: str = "webp", fps: float = 8.0, quality: int | None = None) -> bytes:
    """A file of uint8 [M, H, W, 3] that plays, and has every frame, be it equal to the one before.

    Args:
        format: "webp", which plays in browsers; "gif", of 256 colours a frame; or "mp4" (H.264).
        fps: frames a second.
        quality: 0 to 100, of webp; None: lossless.
    """
    assert clip.dtype == np.uint8 and clip.ndim == 4 and clip.shape[3] == 3, (clip.dtype, clip.shape)
    if format == "mp4":
        return _mp4(clip, fps)
    return _webp(clip, round(1000 / fps), quality) if format == "webp" else _gif(clip, round(1000 / fps))


def frame_files(folder: Path) -> list[Path]:
    """The pictures of a folder of frames in the order of their names, in which 10 comes after 9, be it padded or not.

    Raises:
        InvalidClip: it cannot be read.
    """
    try:
        found = [path for path in folder.iterdir() if path.suffix.lower() in PICTURES and path.name[0] != "."]
    except OSError as error:
        raise InvalidClip(f"{folder} cannot be read ({error.strerror}): restore or remove it") from error
    if len(found) > MAX_FRAMES:
        raise InvalidClip(f"{folder} has more than {MAX_FRAMES} frames: cut it")
    return sorted(found, key=_counting)


def _counting(path: Path) -> tuple[list[tuple[str, int]], str]:
    """What sorts names as people count."""
    return [(text, int(digits or 0)) for text, digits in re.findall("([^0-9]*)([0-9]*)", path.stem)], path.name


def _decoded(path: Path, max_pixels: int) -> Iterator[np.ndarray]:
    """The frames of a clip, one after the other."""
    _check_there(path)
    if path.is_dir():
        return (_still(file, max_pixels) for file in frame_files(path))
    return (_animation_frames if path.suffix.lower() in ANIMATED else _video_frames)(path, max_pixels)


def _check_there(path: Path) -> None:
    if not path.exists():
        raise InvalidClip(f"{path} is not there: restore it, or take it from the list")
    if not path.is_dir() and not is_clip_file(path):
        raise InvalidClip(
            f"{path} is no clip: expected a folder of frames, or a file of {', '.join(ANIMATED + VIDEOS)}"
        )


def _check_shapes(path: Path, shapes: Sequence[tuple[int, ...]]) -> None:
    if not shapes:
        raise InvalidClip(f"{path} has no frames: remove it, or put frames into it")
    if len(set(shapes)) > 1:
        raise InvalidClip(f"{path} has frames of several sizes: bring them to one")


def _still(file: Path, max_pixels: int) -> np.ndarray:
    try:
        return codec.image_from_bytes(file.read_bytes(), max_pixels=max_pixels)
    except (OSError, InvalidImage) as error:
        raise InvalidClip(f"{file.parent} has a frame {file.name} that cannot be read ({error}): restore it") from error


def _picked(path: Path, frames: Iterator[Any], wanted: Sequence[int] | None) -> list[Any]:
    """The frames at these indices, in that order; no more than those are kept in memory."""
    if wanted is None:
        return list(frames)
    needed, kept, last = set(wanted), {}, max(wanted, default=-1)
    for index, frame in zip(range(last + 1), frames, strict=False):
        if index in needed:
            kept[index] = frame
    if missing := needed - kept.keys():
        raise InvalidClip(f"{path} has no frame {min(missing)}: ask for frames that it has, counted from 0")
    return [kept[index] for index in wanted]


@contextmanager
def _decoding(path: Path) -> Iterator[None]:
    """Decoders raise whatever their parser stumbles on: OSError, SyntaxError, IndexError, struct.error, ..."""
    try:
        yield
    except InvalidClip:
        raise
    except Exception as error:
        raise InvalidClip(f"{path} cannot be decoded ({error}): restore or remove it") from error


def _counted(path: Path, picture: Image.Image) -> int:
    total = getattr(picture, "n_frames", 1)
    if total > MAX_FRAMES:
        raise InvalidClip(f"{path} has more than {MAX_FRAMES} frames: cut it")
    return total


def _animation_frames(path: Path, max_pixels: int) -> Iterator[np.ndarray]:
    with _decoding(path), Image.open(path, formats=("GIF", "WEBP")) as picture:
        _check_size(path, picture.width, picture.height, max_pixels)
        for index in range(_counted(path, picture)):
            picture.seek(index)
            yield codec.rgb(picture)


def _video_frames(path: Path, max_pixels: int) -> Iterator[np.ndarray]:
    import av  # late: it is large, and folders of frames need none of it

    with _decoding(path), av.open(str(path), options=ALONE) as container:
        if not container.streams.video:
            raise InvalidClip(f"{path} has no video in it: remove it")
        stream = container.streams.video[0]
        _check_size(path, stream.width, stream.height, max_pixels)
        for index, frame in enumerate(container.decode(stream)):
            if index >= MAX_FRAMES:
                raise InvalidClip(f"{path} has more than {MAX_FRAMES} frames: cut it")
            if frame.is_corrupt:
                raise InvalidClip(f"{path} is damaged at frame {index}: restore or remove it")
            yield frame.to_ndarray(format="rgb24")


def _check_size(path: Path, width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise InvalidClip(f"{path} has frames of {width} x {height} pixels; {max_pixels} are allowed: make it smaller")


def _webp(clip: np.ndarray, duration: int, quality: int | None) -> bytes:
    """A WebP container of frames. Encoders of animations would join equal frames to one."""
    options = {"lossless": True} if quality is None else {"quality": quality}
    height, width = clip.shape[1:3]
    extent = _little(width - 1, 3) + _little(height - 1, 3)
    place = bytes(6) + extent + _little(duration, 3) + bytes([2])  # at (0, 0), and not blended with the one before
    chunks = [_chunk(b"VP8X", bytes([2, 0, 0, 0]) + extent), _chunk(b"ANIM", bytes(6))]
    for frame in clip:
        still = io.BytesIO()
        Image.fromarray(frame).save(still, format="WEBP", **options)
        chunks.append(_chunk(b"ANMF", place + still.getvalue()[12:]))  # without its own header, RIFF....WEBP
    return _chunk(b"RIFF", b"WEBP" + b"".join(chunks))


def _chunk(name: bytes, body: bytes) -> bytes:
    return name + _little(len(body), 4) + body + bytes(len(body) % 2)


def _little(number: int, size: int) -> bytes:
    return number.to_bytes(size, "little")


def _gif(clip: np.ndarray, duration: int) -> bytes:
    """A GIF of frames with colours of their own, equal ones included."""
    pictures = [Image.fromarray(frame).quantize(256) for frame in clip]
    header, _ = GifImagePlugin.getheader(pictures[0], None, {"loop": 0})
    parts = [GifImagePlugin.getdata(one, duration=duration, include_color_table=True) for one in pictures]
    return b"".join(header) + b"".join(b"".join(part) for part in parts) + b";"


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
