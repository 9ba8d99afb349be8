"""HEIC and JPEG XL are decoded by their extras, and listed and named without them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import imagecodecs
import numpy as np
import pillow_heif
import pytest
from PIL import Image

from pipelines.errors import MediaError
from pipelines.media.image_formats.extras import read_jpegxl_size
from pipelines.media.images import decode_image
from tests.support.roots import ROOT
from tests.support.rows import list_input
from tests.support.scenes import decode_pixels, draw_scene, encode_image


def encode_heic(image: Image.Image, **options: object) -> bytes:
    pillow_heif.register_heif_opener()
    return encode_image(image, "HEIF", **options)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_a_heic_comes_close(mode: str) -> None:
    picture = decode_pixels(encode_heic(draw_scene(64, 48).convert(mode), quality=95))
    assert np.abs(picture.astype(int) - np.asarray(draw_scene(64, 48).convert(mode).convert("RGB"))).mean() < 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_heic_is_turned_once(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    scene = draw_scene(64, 48)
    turned = decode_image(encode_image(scene, "PNG", exif=exif))
    picture = decode_pixels(encode_heic(scene, quality=95, exif=exif.tobytes()))
    assert picture.shape == np.asarray(turned).shape
    assert np.abs(picture.astype(int) - np.asarray(turned)).mean() < 4


@pytest.mark.parametrize("container", [False, True])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_jpegxl_comes_back_exactly(channels: int, dtype: type, container: bool) -> None:
    scene = np.dstack([np.asarray(draw_scene()), np.full((23, 37), 9, np.uint8)])[..., 4 - channels :][..., ::-1]
    data = imagecodecs.jpegxl_encode(
        (scene.astype(dtype) * (257 if dtype == np.uint16 else 1)).squeeze(), lossless=True, usecontainer=container
    )
    colours = scene[..., :-1] if channels in (2, 4) else scene
    assert (decode_pixels(data) == colours).all()


@pytest.mark.parametrize("size", [(8, 8), (256, 256), (37, 23), (1600, 900), (1200, 1000), (700, 300), (70000, 3)])
@pytest.mark.parametrize("container", [False, True])
def test_the_size_of_a_jpegxl_is_read_from_its_header(size: tuple[int, int], container: bool) -> None:
    data = imagecodecs.jpegxl_encode(np.zeros((size[1], size[0], 3), np.uint8), usecontainer=container)
    assert read_jpegxl_size(data) == size
    with pytest.raises(MediaError, match="are over the limit of 60 pixels"):
        decode_image(data, max_pixels=60)


def test_a_heic_too_large_is_refused_before_decoding() -> None:
    with pytest.raises(MediaError, match="64 x 48 px are over the limit of 60 pixels"):
        decode_image(encode_heic(draw_scene(64, 48)), max_pixels=60)


@pytest.mark.parametrize("encode", [encode_heic, lambda image: imagecodecs.jpegxl_encode(np.asarray(image))])
def test_damaged_files_are_decoded_or_media_errors(encode: object) -> None:
    rng = np.random.default_rng(0)
    whole = encode(draw_scene(64, 48))  # type: ignore[operator]
    errors = 0
    for _ in range(60):
        data = bytearray(whole[: rng.integers(len(whole))] if rng.random() < 0.3 else whole)
        for at in rng.integers(max(1, len(data)), size=3):
            data[at : at + 1] = rng.bytes(1)
        try:
            assert decode_image(bytes(data)).mode == "RGB"
        except MediaError as error:
            errors += 1
            assert "\n" not in str(error)
    assert errors >= 5


WITHOUT = """
import sys
sys.modules[{package!r}] = None  # as if it were not installed
from pipelines.media.images import decode_image
decode_image({start!r} + bytes(100))
"""


@pytest.mark.parametrize(
    ("package", "start", "reason"),
    [
        (
            "pillow_heif",
            b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
            "format HEIC without its extra: pip install 'ovis2-ray[heif]'",
        ),
        ("imagecodecs", b"\xff\x0a\x7f\0\0\0\0", "format JPEG XL without its extra: pip install 'ovis2-ray[jxl]'"),
    ],
)
def test_without_the_extra_the_error_says_what_to_install(package: str, start: bytes, reason: str) -> None:
    command = [sys.executable, "-c", WITHOUT.format(package=package, start=start)]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert f"MediaError: unsupported {reason}" in finished.stderr


def test_importing_the_decoder_loads_neither_package() -> None:
    code = "import sys; import pipelines.media.images; print({'pillow_heif', 'imagecodecs'} & sys.modules.keys())"
    finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "set()"


def test_both_formats_are_listed_in_directories(tmp_path: Path) -> None:
    for name in ("a.heic", "b.HEIF", "c.hif", "d.jxl", "e.psd"):
        (tmp_path / name).touch()
    assert [row["id"].rpartition("/")[2] for row in list_input(tmp_path)] == ["a.heic", "b.HEIF", "c.hif", "d.jxl"]
