"""Any bytes become an RGB picture or a MediaError with the reason."""

from __future__ import annotations

import io
import struct
import time
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipelines.errors import MediaError
from pipelines.media.images import MAX_PIXELS, decode_image
from tests.support.scenes import decode_pixels, draw_scene, encode_image

ORIENTATION = 0x0112
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP")


def make_png(width: int, height: int, *chunks: bytes) -> bytes:
    """Return an 8-bit RGB PNG whose pixel data is one byte."""
    header = make_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + make_chunk(b"IDAT", zlib.compress(b"\0"))


def make_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def claim_size(format: str, width: int, height: int) -> bytes:
    """Return a small file whose header claims the given size."""
    data = bytearray(encode_image(draw_scene(), format))
    if format == "JPEG":
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = struct.pack(">HH", height, width)
    elif format == "GIF":
        data[6:10] = struct.pack("<HH", width, height)
    elif format == "BMP":
        data[18:26] = struct.pack("<ii", width, height)
    elif format == "PNG":
        return make_png(width, height)
    return bytes(data)


@pytest.mark.parametrize("format", ["PNG", "TIFF", "BMP", "PPM", "TGA", "DIB"])
def test_lossless_formats_come_back_exactly(format: str) -> None:
    assert (decode_pixels(encode_image(draw_scene(), format)) == np.asarray(draw_scene())).all()


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "AVIF", "JPEG2000", "MPO"])
def test_lossy_formats_come_close(format: str) -> None:
    difference = decode_pixels(encode_image(draw_scene(), format, quality=95)).astype(int) - np.asarray(draw_scene())
    assert np.abs(difference).mean() < 4


UPRIGHT: dict[int, Callable[[NDArray[np.uint8]], NDArray[np.uint8]]] = {  # stored -> seen, from the EXIF standard
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF", "JPEG"])
def test_exif_orientation_is_applied_once(format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"lossless": True} if format == "WEBP" else {"quality": 95} if format == "JPEG" else {}
    picture = decode_pixels(encode_image(draw_scene(), format, exif=exif, **options))
    seen = UPRIGHT[orientation](np.asarray(draw_scene()))
    assert picture.shape == seen.shape
    assert np.abs(picture.astype(int) - seen).mean() < (4 if format == "JPEG" else 1e-9)


def test_exif_after_the_pixels_is_applied() -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    data = encode_image(draw_scene())
    end = data.index(b"IEND") - 4
    late = data[:end] + make_chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")) + data[end:]
    assert (decode_pixels(late) == np.rot90(np.asarray(draw_scene()), -1)).all()


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_unknown_orientation_is_ignored(orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    assert (decode_pixels(encode_image(draw_scene(), exif=exif)) == np.asarray(draw_scene())).all()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_unreadable_exif_is_ignored(format: str) -> None:
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[ORIENTATION], exif[0x010F], exif[0x8769] = 6, "maker", {0x9000: b"0230"}
    for _ in range(50):
        block = bytearray(exif.tobytes())
        for _ in range(4):
            block[rng.integers(6, len(block))] = rng.integers(256)
        block = block[: rng.integers(6, len(block) + 1)]
        assert sorted(decode_image(encode_image(draw_scene(), format, exif=bytes(block))).size) == [23, 37]


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "PA", "CMYK"])
def test_every_8_bit_mode_becomes_rgb(mode: str) -> None:
    image = draw_scene().convert("P").convert("PA") if mode == "PA" else draw_scene().convert(mode)
    assert (decode_pixels(encode_image(image, "TIFF")) == np.asarray(image.convert("RGB"))).all()


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
def test_colour_under_transparency_is_kept(format: str) -> None:
    image = Image.new("RGBA", (8, 8), (200, 100, 50, 0))
    options = {"lossless": True, "exact": True} if format == "WEBP" else {}
    assert (decode_pixels(encode_image(image, format, **options)) == (200, 100, 50)).all()


@pytest.mark.parametrize("transparency", [0, b"\x00\x80"])
def test_palette_keeps_its_colours(transparency: int | bytes) -> None:
    image = Image.new("P", (8, 8), 0)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    picture = decode_pixels(encode_image(image, transparency=transparency))
    assert picture[0, 0].tolist() == [10, 20, 30]
    assert picture[0, 1].tolist() == [40, 50, 60]


def test_inverted_cmyk_of_adobe_is_corrected() -> None:
    data = encode_image(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG")
    assert b"Adobe" in data
    assert np.abs(decode_pixels(data).astype(int) - (255, 0, 0)).max() < 4


GREY_16 = np.arange(65536, dtype=np.uint16).reshape(256, 256)


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_keeps_its_upper_byte(format: str) -> None:
    assert (decode_pixels(encode_image(Image.fromarray(GREY_16), format)) == (GREY_16 >> 8)[..., None]).all()


def test_big_endian_16_bit_grey_keeps_its_upper_byte() -> None:
    data = encode_image(Image.frombytes("I;16B", (256, 256), GREY_16.astype(">u2").tobytes()), "TIFF")
    assert Image.open(io.BytesIO(data)).mode == "I;16B"
    assert (decode_pixels(data) == (GREY_16 >> 8)[..., None]).all()


def test_32_bit_grey_in_the_16_bit_range_keeps_its_upper_byte() -> None:
    assert (
        decode_pixels(encode_image(Image.fromarray(GREY_16.astype(np.int32)), "TIFF")) == (GREY_16 >> 8)[..., None]
    ).all()


@pytest.mark.parametrize("lowest", [-1, 1])
def test_integers_beyond_16_bits_are_refused(lowest: int) -> None:
    with pytest.raises(MediaError, match=f"from {lowest} to {lowest + 65535} are not within 0 to 65535"):
        decode_image(encode_image(Image.fromarray(GREY_16.astype(np.int32) + lowest), "TIFF"))


def test_floats_from_0_to_1_are_black_to_white() -> None:
    pixels = np.array([[0, 0.5, 1]], np.float32)
    assert decode_pixels(encode_image(Image.fromarray(pixels), "TIFF"))[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("pixel", [-0.1, 1.5, 255, np.inf, np.nan])
def test_floats_outside_0_to_1_are_refused(pixel: float) -> None:
    with pytest.raises(MediaError, match="unknown brightness scale"):
        decode_image(encode_image(Image.fromarray(np.array([[0, pixel]], np.float32)), "TIFF"))


def test_an_unsupported_mode_is_refused() -> None:
    with pytest.raises(MediaError, match="TIFF in mode LAB"):
        decode_image(encode_image(Image.new("LAB", (5, 5)), "TIFF"))


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_an_animation_gives_its_first_frame(format: str) -> None:
    red, blue = (Image.new("RGB", (16, 16), color) for color in ("red", "blue"))
    picture = decode_pixels(encode_image(red, format, save_all=True, append_images=[blue], duration=50))
    assert np.abs(picture.astype(int) - (255, 0, 0)).max() < 4


@pytest.mark.parametrize("format", ["PNG", "JPEG", "BMP", "GIF"])
def test_a_picture_too_large_is_refused_before_decoding(format: str) -> None:
    data = claim_size(format, 20_000, 20_000)
    start_s = time.process_time()
    with pytest.raises(MediaError, match=r"too large: .*400000000 pixels.*178956970"):
        decode_image(data)
    assert time.process_time() - start_s < 0.5


def test_the_pixel_limit_does_not_depend_on_pillows_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(MediaError, match="20,000 x 20,000 px are over the limit of 178,956,970 pixels"):
        decode_image(make_png(20_000, 20_000))


@pytest.mark.parametrize("spare", [0, -1])
def test_the_limit_itself_is_allowed(spare: int) -> None:
    assert MAX_PIXELS == 178_956_970
    max_pixels = 37 * 23 + spare
    if spare < 0:
        with pytest.raises(MediaError, match="37 x 23 px are over the limit of 850 pixels"):
            decode_image(encode_image(draw_scene()), max_pixels=max_pixels)
    else:
        assert decode_image(encode_image(draw_scene()), max_pixels=max_pixels).size == (37, 23)


def test_a_text_chunk_that_explodes_is_refused() -> None:
    bomb = make_chunk(b"zTXt", b"comment\0\0" + zlib.compress(bytes(100_000_000)))
    with pytest.raises(MediaError, match=r"PNG.*too large"):
        decode_image(make_png(5, 5, bomb))


def test_running_out_of_memory_is_a_media_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: object, **_options: object) -> Image.Image:
        raise MemoryError

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(MediaError, match=r"PNG of .* bytes does not fit into memory"):
        decode_image(encode_image(draw_scene()))


def test_pillows_warnings_are_suppressed() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(MediaError, match="truncated PNG"):
            decode_image(make_png(10_000, 10_000))  # large enough for Pillow to warn
    assert not caught


def test_threads_leave_the_warning_filters_unchanged() -> None:
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        sizes = {image.size for image in pool.map(decode_image, [encode_image(draw_scene(), "JPEG")] * 64)}
    assert sizes == {(37, 23)}
    assert warnings.filters == before


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not an image: the data is empty"),
        (b"<!DOCTYPE html><html></html>", "not an image: the data is an HTML page"),
        (b"\n <HTML>", "not an image: the data is an HTML page"),
        (b"%PDF-1.7 and so on", "unsupported format PDF"),
        (bytes(1000), "not an image in a known format: the data starts with b'"),
        (encode_image(draw_scene(), "JPEG")[:-200], "truncated JPEG of"),
        (encode_image(draw_scene(), "JPEG")[:20], "truncated or corrupt JPEG of 20 bytes"),
        (encode_image(draw_scene(), "WEBP")[:-20], "truncated WebP of"),
        (encode_image(draw_scene(), "PNG")[:-200], "truncated PNG of"),
        (claim_size("BMP", 0, 5), "BMP"),
        (claim_size("PNG", 0, 5), "PNG"),
        (b"P6 0 0 255 ", "netpbm"),
    ],
)
def test_an_error_names_the_reason_in_one_line(data: bytes, reason: str) -> None:
    with pytest.raises(MediaError) as caught:
        decode_image(data)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """Truncate the data, flip bits or overwrite 16 bytes; half of the time within the first 64 bytes."""
    reach = 64 if rng.random() < 0.5 else len(data)
    out = bytearray(data)
    kind = rng.integers(3)
    if kind == 0:
        return bytes(out[: rng.integers(reach)])
    for at in rng.integers(min(reach, len(out)), size=rng.integers(1, 6)):
        out[at] ^= 1 << rng.integers(8)
    if kind == 2:
        at = int(rng.integers(len(out)))
        out[at : at + 16] = rng.integers(0, 256, min(16, len(out) - at), dtype=np.uint8).tobytes()
    return bytes(out)


@pytest.mark.parametrize("format", FORMATS)
def test_damaged_files_decode_or_raise_media_error(format: str) -> None:
    rng = np.random.default_rng(FORMATS.index(format))
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    options = {"exif": exif} if format in ("PNG", "JPEG", "WEBP", "TIFF") else {}
    whole = encode_image(draw_scene(), format, **options)
    outcomes = {"picture": 0, "error": 0}
    for _ in range(60):
        try:
            image = decode_image(mutate(whole, rng))
        except MediaError as error:
            assert str(error)
            assert "\n" not in str(error)
            outcomes["error"] += 1
        else:
            assert image.mode == "RGB"
            assert np.asarray(image).size > 0
            outcomes["picture"] += 1
    assert outcomes["error"] >= 5, outcomes
