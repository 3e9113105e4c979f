"""Bytes in, arrays out: nothing altered, nothing damaged accepted."""

from __future__ import annotations

import base64
import contextlib
import io
import struct
import subprocess
import sys
import zlib

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp
from PIL import Image

from protocol import codec
from protocol.errors import BlobCorrupt, InvalidImage

DTYPES = st.sampled_from([np.uint8, np.int64, np.float32, np.float16, np.bool_])
ARRAYS = DTYPES.flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=4))
)
NAMES = st.text(st.characters(codec="utf-8"), max_size=8).filter(lambda name: name != "__metadata__")
PICTURE = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


@given(st.dictionaries(NAMES, ARRAYS, max_size=4))
def test_arrays_come_back_as_they_were(arrays: dict[str, np.ndarray]) -> None:
    back = codec.decode(codec.encode(arrays))
    assert back.keys() == arrays.keys()
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype and back[name].shape == array.shape
        assert back[name].tobytes() == array.tobytes()
        assert back[name].flags.writeable


def test_arrays_in_any_memory_order_and_insertion_order_give_the_same_bytes() -> None:
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    turned = np.asfortranarray(array)
    assert codec.encode({"a": array, "b": array[:, ::2]}) == codec.encode({"b": turned[:, ::2], "a": turned})
    assert codec.decode(codec.encode({"t": array.T}, {"note": "kept"}))["t"].tolist() == array.T.tolist()


@given(ARRAYS, st.data())
def test_any_flipped_bit_changes_the_digest(array: np.ndarray, data: st.DataObject) -> None:
    sent = codec.encode({"x": array})
    place = data.draw(st.integers(0, len(sent) - 1))
    damaged = bytearray(sent)
    damaged[place] ^= data.draw(st.integers(1, 255))
    assert codec.digest(bytes(damaged)) != codec.digest(sent)


@given(st.one_of(st.binary(max_size=64), st.binary(max_size=40).map(lambda b: struct.pack("<Q", len(b)) + b)))
def test_bytes_that_are_no_safetensors_are_corrupt(data: bytes) -> None:
    if data[8:].strip() == b"{}":
        return
    with pytest.raises(BlobCorrupt, match="do not decode"):
        codec.decode(data)


@given(st.data())
def test_a_damaged_header_is_corrupt_or_changes_names_never_crashes(data: st.DataObject) -> None:
    sent = bytearray(codec.encode({"images": PICTURE}))
    for _ in range(data.draw(st.integers(1, 3))):
        sent[data.draw(st.integers(0, len(sent) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(BlobCorrupt):
        codec.decode(bytes(sent[: data.draw(st.integers(0, len(sent)))]))


def test_a_dtype_numpy_lacks_is_corrupt() -> None:
    header = b'{"x":{"dtype":"BF16","shape":[1],"data_offsets":[0,2]}}'
    with pytest.raises(BlobCorrupt):
        codec.decode(struct.pack("<Q", len(header)) + header + b"\0\0")


def test_digest_is_sha256() -> None:
    assert codec.digest(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# ---------------------------------------------------------------- pictures


def saved(image: Image.Image, format: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, format=format, **options)
    return out.getvalue()


@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 6), st.integers(1, 6), st.just(3))))
def test_png_keeps_every_pixel(image: np.ndarray) -> None:
    assert (codec.image_from_bytes(codec.image_to_bytes(image)) == image).all()
    text = codec.image_to_base64(image)
    assert (codec.image_from_base64(text) == image).all()
    assert (codec.image_from_base64(f"data:image/png;base64,{text[:4]}\n{text[4:]}") == image).all()


@pytest.mark.parametrize(("format", "magic"), [("png", b"\x89PNG"), ("jpeg", b"\xff\xd8\xff"), ("webp", b"RIFF")])
def test_formats_and_quality(format: str, magic: bytes) -> None:
    ramp = np.repeat(np.linspace(0, 255, 64).astype(np.uint8)[None, :, None], 64, axis=0).repeat(3, axis=2)
    best = codec.image_to_bytes(ramp, format, 100)
    assert best.startswith(magic)
    assert np.abs(codec.image_from_bytes(best).astype(int) - ramp).max() <= 3
    small = codec.image_to_bytes(PICTURE.repeat(8, 0).repeat(8, 1), format, 5)
    large = codec.image_to_bytes(PICTURE.repeat(8, 0).repeat(8, 1), format, 100)
    assert small == large if format == "png" else len(small) < len(large)


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to see it upright
    data = saved(Image.fromarray(PICTURE), "PNG", exif=exif)
    assert (codec.image_from_bytes(data) == np.rot90(PICTURE, -1)).all()


def test_transparency_lies_over_white() -> None:
    red_half = np.zeros((1, 2, 4), np.uint8)
    red_half[..., 0], red_half[0, 0, 3] = 255, 255
    assert codec.image_from_bytes(saved(Image.fromarray(red_half))).tolist() == [[[255, 0, 0], [255, 255, 255]]]
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([9, 9, 9])
    assert codec.image_from_bytes(saved(palette, transparency=b"\0")).tolist() == [[[255, 255, 255]]]


def test_grey_of_8_and_16_bits_and_one_bit() -> None:
    assert codec.image_from_bytes(saved(Image.fromarray(np.array([[0, 77]], np.uint8)))).tolist() == [
        [[0] * 3, [77] * 3]
    ]
    deep = Image.fromarray(np.array([[0, 0x1234, 0xFFFF]], np.uint16))
    assert codec.image_from_bytes(saved(deep)).tolist() == [[[0] * 3, [0x12] * 3, [255] * 3]]
    assert codec.image_from_bytes(saved(Image.new("1", (1, 1), 1))).tolist() == [[[255] * 3]]


def test_floating_point_pixels_are_refused() -> None:
    with pytest.raises(InvalidImage, match="floating-point"):
        codec.image_from_bytes(saved(Image.new("F", (2, 2)), "TIFF"))


def test_size_is_checked_before_decoding() -> None:
    data = saved(Image.new("L", (100, 100)))
    codec.image_from_bytes(data, max_pixels=10_000)
    with pytest.raises(InvalidImage, match="100 x 100 pixels; 9999 are allowed"):
        codec.image_from_bytes(data, max_pixels=9_999)


@pytest.mark.parametrize("side", [12_000, 60_000])
def test_decompression_bombs_are_refused(side: int) -> None:
    bomb = bytearray(saved(Image.new("1", (8, 8))))
    bomb[16:24] = struct.pack(">II", side, side)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bytes(bomb[12:29])))
    with pytest.raises(InvalidImage, match="send it smaller"):
        codec.image_from_bytes(bytes(bomb))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_every_truncation_is_an_invalid_image(format: str) -> None:
    data = saved(Image.fromarray(PICTURE), format)
    for length in range(0, len(data) - 60, max(1, len(data) // 40)):
        with pytest.raises(InvalidImage):
            codec.image_from_bytes(data[:length])


@settings(max_examples=200)
@given(st.sampled_from(["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"]), st.data())
def test_damaged_files_never_raise_anything_else(format: str, data: st.DataObject) -> None:
    sent = bytearray(saved(Image.fromarray(PICTURE), format))
    for _ in range(data.draw(st.integers(1, 4))):
        sent[data.draw(st.integers(0, len(sent) - 1))] = data.draw(st.integers(0, 255))
    try:
        image = codec.image_from_bytes(bytes(sent), max_pixels=10_000)
    except InvalidImage:
        return
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3


@pytest.mark.parametrize("data", [b"", b"not an image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
def test_what_is_no_image_says_so(data: bytes) -> None:
    with pytest.raises(InvalidImage, match="not an image of a known format"):
        codec.image_from_bytes(data)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("https://example.org/cat.png", "not fetched"),
        ("file:///etc/passwd", "not fetched"),
        ("!!!!", "base64"),
        ("é", "base64"),
        ("data:image/png,raw", "data URL"),
        ("data:image/png;base64", "data URL"),
        (base64.b64encode(b"text").decode(), "not an image"),
    ],
)
def test_base64_that_is_no_image_says_so(text: str, said: str) -> None:
    with pytest.raises(InvalidImage, match=said):
        codec.image_from_base64(text)


def test_the_codec_needs_no_torch() -> None:
    code = (
        "import sys, protocol.codec, protocol.bus, protocol.client, protocol.dataset; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
