"""Formats are named by content, more of them are decoded, and "corrupt" is said only of what is."""

from __future__ import annotations

import ctypes
import io
import struct

import numpy as np
import pytest
from PIL import Image

from pipelines.errors import MediaError
from pipelines.media.image_formats.fresh_memory import fill_new_memory
from pipelines.media.image_formats.names import name_format
from pipelines.media.images import decode_image
from pipelines.monitoring.error_reasons import normalize_reason
from tests.support.scenes import decode_pixels, draw_scene, encode_image

MASKS = {
    "rgb32bf": (32, (0xFF000000, 0xFF0, 0xFF0000)),
    "11-11-10": (32, (0xFFE00000, 0x1FFC00, 0x3FF)),
    "2-3-1": (16, (0x6, 0x38, 0x1)),
    "4-4-4-4": (16, (0xF00, 0xF0, 0xF, 0xF000)),
    "alpha": (32, (0xFF00, 0xFF0000, 0xFF000000, 0xFF)),
}


def make_bitmap(bits: int, masks: tuple[int, ...], pixels: np.ndarray, *, top_down: bool = False) -> bytes:
    """Write uint8[H, W, 3] as a BMP of bit fields. A fourth mask is that of alpha, here opaque."""
    height, width, _ = pixels.shape
    packed = np.zeros((height, (width * bits + 31) // 32 * 32 // bits), np.uint32)
    channels = [*np.moveaxis(pixels, -1, 0), np.full((height, width), 255)]
    for mask, channel in zip(masks, channels, strict=False):
        shift = (mask & -mask).bit_length() - 1
        packed[:, :width] |= np.rint(channel / 255 * (mask >> shift)).astype(np.uint32) << shift
    body = (packed if top_down else packed[::-1]).astype(f"<u{bits // 8}").tobytes()
    size = 56 if len(masks) == 4 else 40
    fields = (size, width, -height if top_down else height, 1, bits, 3, len(body), 0, 0, 0, 0, *masks)
    return (
        struct.pack("<2sIII", b"BM", 0, 0, 14 + 40 + 4 * len(masks))
        + struct.pack(f"<IiiHH{6 + len(masks)}I", *fields)
        + body
    )


@pytest.mark.parametrize("top_down", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_bitmaps_of_any_bit_fields_are_decoded(name: str, top_down: bool) -> None:
    bits, masks = MASKS[name]
    scene = np.asarray(draw_scene())
    levels = [mask // (mask & -mask) for mask in masks[:3]]
    wanted = np.stack([np.rint(np.rint(scene[..., i] / 255 * top) / top * 255) for i, top in enumerate(levels)], -1)
    assert (decode_pixels(make_bitmap(bits, masks, scene, top_down=top_down)) == wanted).all()


def test_bitmaps_of_bit_fields_are_bounded_and_complete() -> None:
    whole = make_bitmap(*MASKS["rgb32bf"], np.asarray(draw_scene()))
    with pytest.raises(MediaError, match=r"truncated BMP of .* bytes: 10 bytes of its pixels are missing"):
        decode_image(whole[:-10])
    with pytest.raises(MediaError, match="37 x 23 px are over the limit of 850 pixels"):
        decode_image(whole, max_pixels=850)


def split_associations(data: bytes) -> bytes:
    """Give each item of an AVIF a box `ipma` of its own, as older encoders did."""
    at = data.index(b"ipma") - 4
    length, count = int.from_bytes(data[at : at + 4], "big"), int.from_bytes(data[at + 12 : at + 16], "big")
    entry, boxes = at + 16, b""
    for _ in range(count):
        stop = entry + 3 + data[entry + 2]
        boxes += struct.pack(">I4sII", 16 + stop - entry, b"ipma", 0, 1) + data[entry:stop]
        entry = stop
    added = len(boxes) - length
    out = bytearray(data[:at] + boxes + data[at + length :])
    for kind in (b"meta", b"iprp"):
        place = data.index(kind) - 4
        out[place : place + 4] = (int.from_bytes(data[place : place + 4], "big") + added).to_bytes(4, "big")
    items = data.index(b"iloc") + 4 + 4 + 2  # version and flags, sizes of the fields
    for number in range(int.from_bytes(data[items : items + 2], "big")):
        place = items + 2 + 14 * number + 6
        out[place : place + 4] = (int.from_bytes(out[place : place + 4], "big") + added).to_bytes(4, "big")
    return bytes(out)


def test_an_avif_with_alpha_of_an_older_encoder_is_decoded() -> None:
    scene = draw_scene(64, 48).convert("RGBA")
    scene.putalpha(128)
    whole = encode_image(scene, "AVIF", quality=90)
    old = split_associations(whole)
    assert old.count(b"ipma") == 2
    with pytest.raises(OSError, match="cannot identify"):
        Image.open(io.BytesIO(old))  # the cause: as soon as Pillow takes it, this repair can go
    assert (decode_pixels(old) == decode_pixels(whole)).all()


@pytest.mark.parametrize("at", range(0, 400, 7))
def test_a_damaged_box_never_raises_anything_else(at: int) -> None:
    data = bytearray(split_associations(encode_image(draw_scene(64, 48).convert("RGBA"), "AVIF")))
    data[at] ^= 0xA5
    try:
        assert decode_image(bytes(data)).mode == "RGB"
    except MediaError as error:
        assert str(error)


def shorten_strip(data: bytes) -> bytes:
    """Let the first JPEG strip of a TIFF say that it has half of its lines."""
    out = bytearray(data)
    at = data.index(b"\xff\xc0") + 5
    out[at : at + 2] = (int.from_bytes(data[at : at + 2], "big") // 2).to_bytes(2, "big")
    return bytes(out)


@pytest.mark.parametrize("size", [(64, 48), (8, 8)])
def test_a_tiff_whose_decoder_leaves_pixels_undefined_is_an_error(size: tuple[int, int]) -> None:
    whole = encode_image(draw_scene(*size), "TIFF", compression="jpeg")
    assert decode_image(whole).size == size
    for _ in range(3):
        with pytest.raises(MediaError, match=r"corrupt TIFF of .* bytes: some of its pixels are not in the file"):
            decode_image(shorten_strip(whole))


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "group4"])
def test_complete_tiffs_are_decoded_as_before(compression: str) -> None:
    image = draw_scene(300, 700).convert("1" if compression == "group4" else "RGB")
    data = encode_image(image, "TIFF", compression=compression)
    assert (decode_pixels(data) == np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))).all()


@pytest.mark.parametrize("size", [100, 5_000, 5_000_000])
def test_new_memory_begins_with_the_wanted_bytes(size: int) -> None:
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = (
        ctypes.c_void_p,
        [ctypes.c_size_t],
        [ctypes.c_void_p],
    )
    for value in (0x55, 0xAA):
        with fill_new_memory(value):
            address = libc.malloc(size)
        # The allocator keeps its own list in the first bytes of a free block.
        assert set(ctypes.string_at(address + 16, size - 16)) == {value}
        libc.free(address)


@pytest.mark.parametrize(
    ("start", "name"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf", "AVIF"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "HEIC"),
        (b"\xff\x0a\xfa\x1f", "JPEG XL"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
        (b'<?xml version="1.0"?>\n<!-- a > b -->\n<svg xmlns="http://www.w3.org/2000/svg">', "SVG"),
        (b"8BPS\0\1", "Photoshop (PSD)"),
        (b"%PDF-1.7", "PDF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", "EPS or PostScript"),
        (b"DDS |\0\0\0", "DDS"),
        (b"\0\0\1\0\1\0", "ICO"),
        (b"<!doctype HTML>", "HTML page"),
        (b'{"error": "rate limit"}', "JSON"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"PK\3\4\x14\0", "ZIP archive"),
        (b"just words", None),
    ],
)
def test_formats_are_named_by_content(start: bytes, name: str | None) -> None:
    assert name_format(start + bytes(100)) == name


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"8BPS\0\1" + bytes(50), "unsupported format Photoshop (PSD): convert the file to JPEG or PNG"),
        (b"<svg>" + bytes(50), "unsupported format SVG: convert the file to JPEG or PNG"),
        (b'{"message": "no"}', "not an image: the data is a JSON"),
        (
            encode_image(Image.new("RGB", (9, 9)), "BMP").replace(b"\x18\0\0\0\0\0", b"\x18\0\4\0\0\0"),
            "unsupported BMP:",
        ),
        (encode_image(draw_scene(), "JPEG")[:20], "truncated or corrupt JPEG of 20 bytes"),
    ],
)
def test_a_format_that_is_not_supported_is_not_called_corrupt(data: bytes, reason: str) -> None:
    with pytest.raises(MediaError) as caught:
        decode_image(data)
    assert str(caught.value).startswith(reason)


@pytest.mark.parametrize(
    "reasons",
    [
        ["truncated PNG of 1,234 bytes", "truncated PNG of 5 bytes"],
        ["the data starts with b'\\xff\\'\\n'", 'the data starts with b"it\'s"'],
        ["broken PNG file (chunk b'\\xf4')", "broken PNG file (chunk b'IDAT')"],
    ],
)
def test_reasons_that_differ_in_numbers_or_quoted_text_share_a_group(reasons: list[str]) -> None:
    assert len({normalize_reason("decode", reason) for reason in reasons}) == 1


def test_an_apostrophe_is_not_a_quotation_mark() -> None:
    text = "the model's limit and the video's codec"
    assert normalize_reason("tile", text) == f"tile: {text}"
