"""Arrays to safetensors bytes and back, pictures to arrays and back, and the digest that guards both.

Bytes from outside are never trusted: nothing is unpickled, fetched or decoded past a stated size. This module does not
know where bytes are kept (`bus_blobs`) nor what a picture is for.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import safetensors.numpy
from PIL import Image, ImageOps

from protocol.errors import BlobCorrupt, InvalidImage

MAX_PIXELS = 64_000_000  # default bound on width x height of any picture read
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # decoders that start no other program and open no other file
SENT = ("PNG", "JPEG", "WEBP")  # formats of pictures in messages, whose decoders are the best tested


def encode(arrays: Mapping[str, np.ndarray], metadata: dict[str, str] | None = None) -> bytes:
    """Safetensors bytes of named arrays of any shape; the same arrays give the same bytes."""
    ordered = {name: np.asarray(arrays[name], order="C") for name in sorted(arrays)}
    return safetensors.numpy.save(ordered, metadata)


def decode(data: bytes) -> dict[str, np.ndarray]:
    """The arrays that `encode` was given; writable copies.

    Raises:
        BlobCorrupt: the bytes are not safetensors, or hold a dtype that numpy lacks.
    """
    try:
        arrays = safetensors.numpy.load(data)
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError) as error:
        raise BlobCorrupt(f"{len(data)} bytes do not decode as safetensors ({error}): the blob is damaged") from error
    return {name: np.array(array) for name, array in arrays.items()}


def decode_row(path: Path, name: str, row: int) -> np.ndarray:
    """One row of an array in a file that `encode` made; nothing else of it is read. Raises FileNotFoundError."""
    with safetensors.safe_open(path, framework="numpy") as file:
        return file.get_slice(name)[row]


def digest(data: bytes) -> str:
    """SHA-256 of the bytes, 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def image_from_bytes(data: bytes, *, max_pixels: int = MAX_PIXELS, formats: Sequence[str] = _FORMATS) -> np.ndarray:
    """Decode a picture file; the first frame of an animated one, upright as EXIF says, transparency over white.

    Args:
        data: a file in one of the `formats`.
        max_pixels: bound on width x height, checked before any pixel is decoded.

    Returns:
        uint8 RGB [H, W, 3].

    Raises:
        InvalidImage: not a picture, truncated, too large, or of a pixel type without a range.
    """
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            if image.width * image.height > max_pixels:
                raise InvalidImage(
                    f"the image has {image.width} x {image.height} pixels; {max_pixels} are allowed: send it smaller"
                )
            image.load()
            return rgb(ImageOps.exif_transpose(image))
    except InvalidImage:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InvalidImage(
            f"the image is too large (at most {max_pixels} pixels are allowed): send it smaller"
        ) from error
    except Image.UnidentifiedImageError as error:
        raise InvalidImage(
            f"{len(data)} bytes are not an image of a known format: send the file as it is ({', '.join(formats)})"
        ) from error
    except (
        Exception
    ) as error:  # decoders raise whatever their parser stumbles on: OSError, SyntaxError, struct.error, ...
        raise InvalidImage(f"the image is truncated or damaged ({error}): send the whole file") from error


def rgb(image: Image.Image) -> np.ndarray:
    """uint8 [H, W, 3] of any mode, transparency over white. Raises InvalidImage."""
    if image.mode == "F":
        raise InvalidImage("the image has floating-point pixels, whose range is unknown: save it as 8-bit RGB")
    if image.mode.startswith("I"):  # 16-bit grey, which `convert` would clip
        grey = (np.asarray(image).clip(0, 0xFFFF).astype(np.uint16) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def image_from_base64(text: str, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode base64, or a `data:` URL, of a PNG, JPEG or WebP file to uint8 RGB [H, W, 3]. Other URLs are refused, not
    fetched.

    Raises:
        InvalidImage: as `image_from_bytes`, or not base64.
    """
    if text.startswith("data:"):
        header, comma, text = text.partition(",")
        if not comma or not header.endswith(";base64"):
            raise InvalidImage("a data URL must read data:image/...;base64,<data>")
    elif "://" in text[:32]:
        raise InvalidImage("URLs are not fetched: send the image itself, as base64 or as a data: URL")
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidImage(f"the image is not valid base64 ({error}): send base64 or a data: URL") from error
    return image_from_bytes(data, max_pixels=max_pixels, formats=SENT)


def image_to_bytes(image: np.ndarray, format: str = "png", quality: int = 100) -> bytes:
    """A picture file of uint8 RGB [H, W, 3].

    Args:
        format: "png", "jpeg" or "webp".
        quality: 0 to 100, for jpeg and webp; png is always lossless.
    """
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3, (image.dtype, image.shape)
    out = io.BytesIO()
    options = {} if format == "png" else {"quality": quality}
    Image.fromarray(image).save(out, format=format.upper(), **options)
    return out.getvalue()


def image_to_base64(image: np.ndarray, format: str = "png", quality: int = 100) -> str:
    """Base64 text of `image_to_bytes`."""
    return base64.b64encode(image_to_bytes(image, format, quality)).decode("ascii")
